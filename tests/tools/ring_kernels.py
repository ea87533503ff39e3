"""The kernel calls of a ring, each alone on this device: the cost of splitting attention into tiles, without merges.

`python -m tests.tools.ring_kernels --length 65536 --ranks 2` times each distinct call of any rank, forward and backward,
over several rounds. It compares the busiest rank's sum with the time of the whole sequence over the ring degree.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recipes.planning.plan import DTYPES
from ring_attention import CAUSAL
from ring_attention.backward_schedule import TileRows, backward_schedule
from ring_attention.kernels import AttentionKernel, KernelParams, KernelSpec, SavedTensors, choose_kernel
from ring_attention.layout import Layout
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import ring_schedule
from tests.tools.kernel_speeds import seconds

TIMED_S, ROUNDS = 0.1, 3
KINDS = ("forward", "backward")


class Call(NamedTuple):
    kind: str
    rows: int
    queries: int
    keys: int
    upper: int | None

    @property
    def pairs(self) -> int:
        """Query-key pairs that attend, in one row."""
        return MaskedBlock(0, self.queries, 0, self.keys, None, self.upper).work

    def __str__(self) -> str:
        band = "full" if self.upper is None else f"causal from key {self.upper} on"
        return f"{self.kind:8} {self.rows} x {self.queries:,} x {self.keys:,} {band}"


def calls(layout: Layout, rank: int, kernel: AttentionKernel, batch: int) -> Counter[Call]:
    """A rank's kernel calls in one causal forward and backward pass."""
    steps = {
        "forward": [TileRows(step.tiles, (0, batch)) for step in ring_schedule(layout, CAUSAL, rank)],
        "backward": [step.compute for step in backward_schedule(layout, CAUSAL, rank, batch, kernel.split).steps],
    }
    return Counter(
        Call(kind, stop - start, block.num_queries, block.num_keys, block.upper)
        for kind in KINDS
        for tiles, (start, stop) in steps[kind]
        for tile in tiles
        for block in kernel.split(tile.block)
    )


def runner(
    call: Call, kernel: AttentionKernel, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> Callable[[], Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ((call.queries, heads[0]), (call.keys, heads[1]), (call.keys, heads[1]), (call.queries, heads[0]))
    q, k, v, dout = (torch.randn(call.rows, *size, head_dim, device=device).to(dtype) for size in sizes)
    params = KernelParams(None, call.upper, head_dim**-0.5)
    if call.kind == "forward":
        return lambda: kernel.forward(q, k, v, params)
    out, lse = kernel.forward(q, k, v, params)
    return lambda: kernel.backward(dout, SavedTensors(q, k, v, out, lse), params)


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernel calls of a ring, each alone on this device.")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 32), help="of queries, of keys and values")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[options.dtype]
    q, k = (torch.empty(1, 1, n, options.head_dim, device=device, dtype=dtype) for n in options.heads)
    kernel = choose_kernel(KernelSpec.of(q, k, k), "auto")[0]
    layout = Layout("zigzag", options.ranks, options.length)
    rank_calls = [calls(layout, rank, kernel, options.batch) for rank in range(options.ranks)]
    whole = [Call(kind, options.batch, options.length, options.length, 0) for kind in KINDS]
    others = sorted({call for own in rank_calls for call in own}, key=str)
    times_ms: dict[Call, list[float]] = {call: [] for call in (*whole, *others)}
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS} ...", flush=True)
        for call, own in times_ms.items():
            run = runner(call, kernel, options.heads, options.head_dim, dtype)
            run()
            own.append(1e3 * seconds(run, max(1, round(TIMED_S / seconds(run, 1)))))
    median = {call: statistics.median(own) for call, own in times_ms.items()}
    rows = []
    for call, own in times_ms.items():
        operations = 4 * options.heads[0] * options.head_dim * call.rows * call.pairs
        tflops = (2.5 if call.kind == "backward" else 1) * operations / median[call] / 1e9
        rows.append({**call._asdict(), "ms": own, "tflops": tflops})
        print(f"{call}: {median[call]:.3f} ms ({min(own):.3f} - {max(own):.3f}), {tflops:.3g} TFLOP/s")
    for kind, at_once in zip(KINDS, whole, strict=True):
        busiest = max(sum(n * median[call] for call, n in own.items() if call.kind == kind) for own in rank_calls)
        ideal = median[at_once] / options.ranks
        print(
            f"{kind}: the busiest rank's calls {busiest:.3f} ms, one call / {options.ranks} {ideal:.3f} ms, which is "
            f"{100 * ideal / busiest:.1f} %"
        )
    if options.json:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        about = {"device": name, "torch": torch.__version__, "kernel": kernel.name, "ranks": options.ranks}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
