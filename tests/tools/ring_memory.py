"""What attention alone holds at its fullest, by counting storages, on 1 to 8 ranks.

`python -m tests.tools.ring_memory` prints it, and with `--json FILE` keeps it, for the table in docs/performance.md.

torch's MemTracker sees every tensor that operators make, not what a CPU kernel allocates inside nor gloo's own buffers.
Layers of nothing but attention make the difference between what autograd keeps of each, which grows with layers, and
what one layer works with, which must not, nor with the number of ranks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.multiprocessing.reductions import StorageWeakRef

from ring_attention import RingAttention
from ring_attention.transport import P2PTransport
from tests.pool import WorkerPool, parallel_groups

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16
BATCH = 2  # of several rows half are left for last in the backward pass


@dataclass(frozen=True)
class RingMemory:
    """Bytes of one rank.

    Args:
        kept: alive after the forward pass.
        forward_peak: in the forward pass.
        peak: in both passes.
        block: K,V of the rank's own tokens.
        keys_received: the most that was alive at once of K,V that came from others.
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
        """What the forward and the backward pass need beyond what is kept, in blocks of K,V."""
        return (self.forward_peak - self.kept) / self.block, (self.peak - self.kept) / self.block


class KeysReceived:
    """Counts what `P2PTransport.receive_buffer` gave out to receive K,V in, and is alive still."""

    def __init__(self) -> None:
        self.most = 0
        self._rooms: list[tuple[StorageWeakRef, int]] = []
        self._room = P2PTransport.receive_buffer

    def receive_buffer(self, exchange: P2PTransport, name: str, *arguments: Any) -> torch.Tensor:
        tensor = self._room(exchange, name, *arguments)
        if name.startswith("keys"):
            self._rooms.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
            self.most = max(self.most, sum(num_bytes for storage, num_bytes in self._rooms if not storage.expired()))
        return tensor


def total(tracker: MemTracker, kind: str) -> int:
    """Bytes on the CPU: kind is "current" or "peak"."""
    return tracker.get_tracker_snapshot(kind).get(torch.device("cpu"), {}).get("Total", 0)


def measure_ring(num_layers: int, local_length: int, dtype: torch.dtype, num_ranks: int) -> RingMemory:
    """On each rank: layers of attention, each on the output of the one before. Every rank must call it."""
    group = parallel_groups(1, num_ranks).get_sequence_parallel_group()
    attention = RingAttention("auto", group, layout="zigzag")
    x = torch.randn(BATCH, local_length, NUM_HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    keys = KeysReceived()
    received = partialmethod(lambda exchange, *arguments: keys.receive_buffer(exchange, *arguments))
    with patch.object(P2PTransport, "receive_buffer", received), MemTracker() as tracker:
        out = x
        for _ in range(num_layers):
            k, v = torch.stack((out[:, :, :NUM_KV_HEADS], out[:, :, NUM_KV_HEADS:])).unbind(0)
            out = attention.forward(out, k, v, 0)  # MemTracker takes no second call of a module
            del k, v
        kept, forward_peak = total(tracker, "current"), total(tracker, "peak")
        out.backward(torch.ones_like(out))
        peak = total(tracker, "peak")
    block = 2 * BATCH * local_length * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    return RingMemory(num_ranks, num_layers, str(dtype), local_length, kept, forward_peak, peak, block, keys.most)


def fullest_of(ranks: list[RingMemory]) -> RingMemory:
    """The largest of each number."""
    largest = {
        name: max(getattr(rank, name) for rank in ranks) for name in ("kept", "forward_peak", "peak", "keys_received")
    }
    return replace(ranks[0], **largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="keep the rows there")
    arguments = parser.parse_args()
    rows = []
    pool = WorkerPool("cpu")
    for num_ranks in (1, 2, 4, 8):
        for dtype in (torch.float32, torch.bfloat16):
            for num_layers in (1, 2, 4):
                ranks = pool.run(measure_ring, num_layers, 512, dtype, num_ranks, num_ranks=num_ranks)
                peak = fullest_of(ranks)
                rows.append({**asdict(peak), "in_blocks": peak.in_blocks})
                print(rows[-1], flush=True)
    pool.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
