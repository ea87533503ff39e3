"""One rank of simulated rings, with CUDA graphs and without: ms of a pass, and until the host has issued it.

    python -m tests.tools.simulated_rings --json FILE [--length 65536] [--degrees 1 8 16 32 64]

needs a GPU to say anything. Llama 3.1 8B's heads, bf16, causal, zigzag. A simulated rank has the tiles and merges of
its ring but no messages. Rounds with and without graphs alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.benchmark.rank_alone import rank_alone
from ring_attention import CAUSAL
from ring_attention.direct import attend_over_ring
from ring_attention.kernels import KernelSpec, Scores, choose_kernel
from ring_attention.layout import Layout
from ring_attention.trace import visible_ring_steps
from tests.tools.packed_speed import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, passes, shards

ROUNDS, CALLS = 3, 6
KINDS = {"eager": visible_ring_steps, "graph": contextlib.nullcontext}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Of one call, and until the host has issued it."""
    for _ in range(3):  # the second of a kind is captured
        call()
    _synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    issued = time.perf_counter()
    _synchronize()
    return 1e3 * (time.perf_counter() - start) / CALLS, 1e3 * (issued - start) / CALLS


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(ring_degree: int, length: int) -> dict[str, Any]:
    layout, rank = Layout("zigzag", ring_degree, length), ring_degree // 2
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    inputs = [torch.randn(1, length, n, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for n in heads]
    q, k, v, _ = inputs
    kernel, _ = choose_kernel(KernelSpec.of(q, k, v))
    ring = rank_alone(layout, CAUSAL, rank, kernel, Scores(HEAD_DIM**-0.5))
    forward, both = passes(lambda q, k, v: attend_over_ring(q, k, v, None, ring), shards(layout, rank, inputs)).values()
    found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind, within in KINDS.items():
            with within():
                found[kind].append((*milliseconds(forward), *milliseconds(both)))
    names = ("forward_ms", "forward_host_ms", "both_ms", "both_host_ms")
    medians = {kind: map(statistics.median, zip(*rounds, strict=True)) for kind, rounds in found.items()}
    return {"ring_degree": ring_degree, **{kind: dict(zip(names, own, strict=True)) for kind, own in medians.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="One rank of simulated rings, with CUDA graphs and without.")
    parser.add_argument("--json", type=Path, required=True, help="write the rows to this file")
    parser.add_argument("--length", type=int, default=65536, help="tokens of the sequence")
    parser.add_argument("--degrees", type=int, nargs="*", default=[1, 8, 16, 32, 64])
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for degree in options.degrees:
        rows.append(measure(degree, options.length))
        print(rows[-1], flush=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
