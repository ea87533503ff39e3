"""The peak memory of attention alone, by counting storages, on 1 to 8 ranks.

`python -m tests.tools.ring_memory` prints it; `--json FILE` writes it for the table in docs/performance.md.

torch's MemTracker sees every tensor that an operator returns, but not what a CPU kernel allocates inside, nor gloo's
buffers. Layers of attention alone separate what autograd saves, which grows with layers, from what one layer works
with, which must grow neither with layers nor with ranks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ring_attention import RingAttention
from ring_attention.transport import P2PTransport
from tests.pool import WorkerPool, parallel_groups

if TYPE_CHECKING:
    from torch.distributed._tools.mem_tracker import MemTracker  # takes 2 s to import

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16
BATCH = 2  # of several rows, the backward pass holds half back


@dataclass(frozen=True)
class RingMemory:
    """Bytes of one rank.

    Args:
        kept: alive after the forward pass, saved by autograd.
        forward_peak: in the forward pass.
        peak: in both passes.
        block: K,V of the rank's own tokens.
        keys_received: the most K,V from other ranks that were alive at once.
    """

    num_ranks: int
    num_layers: int
    dtype: str
    local_length: int
    kept: int
    forward_peak: int
    peak: int
    block: int
    keys_received: int

    @property
    def in_blocks(self) -> tuple[float, float]:
        """The peaks of the forward and of both passes beyond what autograd saves, over a rank's K,V."""
        return (self.forward_peak - self.kept) / self.block, (self.peak - self.kept) / self.block


class KeysReceived:
    """Counts the receive buffers of K,V that are alive."""

    def __init__(self) -> None:
        self.most = 0
        self._buffers: list[tuple[StorageWeakRef, int]] = []
        self._receive_buffer = P2PTransport.receive_buffer

    def receive_buffer(self, transport: P2PTransport, name: str, *arguments: Any) -> torch.Tensor:
        tensor = self._receive_buffer(transport, name, *arguments)
        if name.startswith("keys"):
            self._buffers.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
            self.most = max(self.most, sum(num_bytes for storage, num_bytes in self._buffers if not storage.expired()))
        return tensor


def total(tracker: MemTracker, kind: str) -> int:
    """Bytes on the CPU: kind is "current" or "peak"."""
    return tracker.get_tracker_snapshot(kind).get(torch.device("cpu"), {}).get("Total", 0)


def measure_ring(num_layers: int, local_length: int, dtype: torch.dtype, num_ranks: int) -> RingMemory:
    """On each rank: layers of attention, each on the output of the previous one. Every rank must call it."""
    from torch.distributed._tools.mem_tracker import MemTracker

    group = parallel_groups(1, num_ranks).get_sequence_parallel_group()
    attention = RingAttention("auto", group, layout="zigzag")
    x = torch.randn(BATCH, local_length, NUM_HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    keys = KeysReceived()
    received = partialmethod(lambda transport, *arguments: keys.receive_buffer(transport, *arguments))
    with patch.object(P2PTransport, "receive_buffer", received), MemTracker() as tracker:
        out = x
        for _ in range(num_layers):
            k, v = torch.stack((out[:, :, :NUM_KV_HEADS], out[:, :, NUM_KV_HEADS:])).unbind(0)
            out = attention.forward(out, k, v, 0)  # MemTracker refuses a second call of a module
            del k, v
        kept, forward_peak = total(tracker, "current"), total(tracker, "peak")
        out.backward(torch.ones_like(out))
        peak = total(tracker, "peak")
    block = 2 * BATCH * local_length * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    return RingMemory(num_ranks, num_layers, str(dtype), local_length, kept, forward_peak, peak, block, keys.most)


def peak_of_ranks(ranks: list[RingMemory]) -> RingMemory:
    """The maximum over ranks of each number."""
    largest = {
        name: max(getattr(rank, name) for rank in ranks) for name in ("kept", "forward_peak", "peak", "keys_received")
    }
    return replace(ranks[0], **largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    pool = WorkerPool("cpu")
    for num_ranks in (1, 2, 4, 8):
        for dtype in (torch.float32, torch.bfloat16):
            for num_layers in (1, 2, 4):
                ranks = pool.run(measure_ring, num_layers, 512, dtype, num_ranks, num_ranks=num_ranks)
                peak = peak_of_ranks(ranks)
                rows.append({**asdict(peak), "in_blocks": peak.in_blocks})
                print(rows[-1], flush=True)
    pool.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
