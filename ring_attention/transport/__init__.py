"""Moves tensors between the ranks that share a sequence. `ring` and `gather` decide what to send.

Only this folder calls torch.distributed directly. DeepSpeed's wrapper lacks batched isend/irecv and symmetric memory,
and its groups have no timeout. One file per transport, one registry:

    p2p          batched isend/irecv, on NCCL or gloo
    copy_engine  copies into the neighbours' memory, without NCCL kernels, among GPUs of one host; p2p between hosts

All ranks post a ring's transfers in the same order, receives before sends. So the first transfer that is not done can
always complete, and no ranks wait for each other in a circle.
"""

# ruff: noqa: F401
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as torch_dist

from ring_attention.transport.collectives import device_backend, rank_and_size
from ring_attention.transport.copy_engine import CopyEngineTransport, release_symmetric_buffers, symmetric_buffer_bytes
from ring_attention.transport.local import messages_are_local, messages_stay_local
from ring_attention.transport.p2p import P2PMessage, P2PTransport, Transfer, TransferError

TRANSPORTS: dict[str, type[P2PTransport]] = {"p2p": P2PTransport, "copy_engine": CopyEngineTransport}


def choose_transport(device_type: str) -> str:
    """The faster transport: copies on NVIDIA GPUs (docs/performance.md), p2p elsewhere."""
    return "copy_engine" if device_type == "cuda" and torch.version.cuda else "p2p"


def make_transport(transport: str, group: torch_dist.ProcessGroup, order: Sequence[int] | None = None) -> P2PTransport:
    """The transport on `group` of this name in TRANSPORTS, or the faster one for "auto".

    Args:
        order: the group's ranks in ring order (`topology.ring_order`); None keeps the group's order.

    Raises:
        ValueError: for an unknown name, or no group.
    """
    is_auto = transport == "auto"
    rank_and_size(group)  # refuses None
    if is_auto:
        backend = device_backend(group, "cuda")
        transport = choose_transport("cuda" if backend is not None and backend.name() == "nccl" else "cpu")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport={transport!r} is unknown: use one of auto, {', '.join(TRANSPORTS)}")
    made = TRANSPORTS[transport](group, order)
    if isinstance(made, CopyEngineTransport):
        made.falls_back = is_auto  # such a group may carry the CPU's tensors too, by gloo
    return made
