"""Moves tensors one hop around the ring. Knows nothing of attention; `ring` decides what to send and when.

The only module of the project that calls torch.distributed directly: DeepSpeed's wrapper has no batched isend/irecv.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor


class HopError(RuntimeError):
    """A hop did not complete; names the stage, the ring rank and the neighbour."""


class Hop:
    """A hop in flight. `wait` returns the received tensors, shaped as the sent ones; on CUDA it lets the host go on."""

    def __init__(
        self, works: list[torch_dist.Work], sent: Tensor, received: Tensor, like: Sequence[Tensor], where: str
    ):
        self._works, self._received, self._like, self._where = works, received, like, where
        self._sent = sent  # the buffer must outlive the transfer

    def wait(self) -> list[Tensor]:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise HopError(f"{self._where}: {error}") from error
        parts = self._received.split([tensor.numel() for tensor in self._like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, self._like, strict=True)]


class P2PExchange:
    """Batched isend/irecv to the next ring rank and from the previous one, on NCCL or gloo.

    Every rank of `group` must post the same hops in the same order. All tensors of one hop share a dtype and travel
    as one message; all ranks send equal shapes, which the equal local lengths of `Layout` guarantee.
    """

    def __init__(self, group: torch_dist.ProcessGroup) -> None:
        self._group = group
        self.ring_rank = torch_dist.get_rank(group)
        self.ring_degree = torch_dist.get_world_size(group)
        self._next = torch_dist.get_global_rank(group, (self.ring_rank + 1) % self.ring_degree)
        self._previous = torch_dist.get_global_rank(group, (self.ring_rank - 1) % self.ring_degree)

    def post(self, tensors: Sequence[Tensor], stage: int) -> Hop:
        """Start sending `tensors` to the next rank and receiving the previous rank's. Returns at once."""
        send_buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
        receive_buffer = torch.empty_like(send_buffer)
        where = (
            f"ring hop after stage {stage}: ring rank {self.ring_rank} of {self.ring_degree}, sending to global rank "
        )
        where += f"{self._next}, receiving from global rank {self._previous}"
        operations = [  # the receive first: no rank may fill its peer's queue before it offers a buffer itself
            torch_dist.P2POp(torch_dist.irecv, receive_buffer, self._previous, self._group),
            torch_dist.P2POp(torch_dist.isend, send_buffer, self._next, self._group),
        ]
        try:
            works = torch_dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise HopError(f"{where}: {error}") from error
        return Hop(works, send_buffer, receive_buffer, tensors, where)


TRANSPORTS = {"p2p": P2PExchange}
