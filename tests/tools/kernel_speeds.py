"""The speed of each attention kernel on this device, by head size and length.

`python -m tests.tools.kernel_speeds --json FILE` measures causal squares, in several rounds that alternate between the
kernels. The registry's order, fastest first, comes from these numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.monitor.device_metrics import StepClock
from recipes.planning.plan import DTYPES
from ring_attention.kernels import KERNELS, AttentionKernel, KernelParams, KernelSpec, SavedTensors
from ring_attention.masked_block import MaskedBlock
from tests.tools.measure import relative_error

HEAD_DIMS = (64, 96, 128, 192, 256, 320, 512)
LENGTHS = (2048, 8192, 32768)
HIDDEN_SIZE = 4096  # heads x head size; four query heads share one key-value head
TIMED_S, ROUNDS = 0.05, 3
SLOW = ("reference",)  # measured only where no other kernel runs: its memory is O(L^2)


def num_heads(head_dim: int) -> int:
    """The multiple of 4 that makes about HIDDEN_SIZE."""
    return 4 * max(1, HIDDEN_SIZE // head_dim // 4)


def kernels(head_dim: int, length: int, dtype: str, device: str) -> dict[str, tuple[Callable[[], Any], ...]]:
    """By kernel that can do it: its forward and its backward pass over one sequence, after a check of the output."""
    heads = num_heads(head_dim)
    counts = (heads, heads // 4, heads // 4, heads)
    q, k, v, dout = (torch.randn(1, length, n, head_dim, device=device).to(DTYPES[dtype]) for n in counts)
    spec, scale = KernelSpec.of(q, k, v), head_dim**-0.5
    found: dict[str, tuple[Callable[[], Any], ...]] = {}
    expected = None
    for name, kernel in KERNELS.items():
        if kernel.refusal(spec) or (found and name in SLOW):
            continue
        passes = _passes(kernel, q, k, v, dout, scale)
        got = passes[0]()
        expected = got if expected is None else expected
        error = relative_error(got, expected)
        assert error < 2e-2, f"{name} differs from the other kernels: {error}"
        found[name] = passes
    return found


def _passes(kernel: AttentionKernel, q: Any, k: Any, v: Any, dout: Any, scale: float) -> tuple[Callable[[], Any], ...]:
    assert len(kernel.split(MaskedBlock(0, q.shape[1], 0, k.shape[1], None, 0))) == 1, "a causal square is one call"
    params = KernelParams(None, 0, scale)
    saved = SavedTensors(q, k, v, *kernel.forward(q, k, v, params))
    return lambda: kernel.forward(q, k, v, params)[0], lambda: kernel.backward(dout, saved, params)


def seconds(call: Callable[[], Any], number: int) -> float:
    clock = StepClock()
    clock.restart()
    for _ in range(number):
        call()
    clock.tick()
    return clock.take()[0] / number


def measure(head_dim: int, length: int, dtype: str, device: str) -> list[dict[str, Any]]:
    found = kernels(head_dim, length, dtype, device)
    numbers = {
        (name, index): max(1, round(TIMED_S / seconds(call, 1)))
        for name, passes in found.items()
        for index, call in enumerate(passes)
    }
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for (name, index), number in numbers.items():
            times.setdefault((name, index), []).append(seconds(found[name][index], number))
    operations = 4 * num_heads(head_dim) * head_dim * length * (length + 1) / 2
    rows = []
    for name in found:
        row: dict[str, Any] = {"kernel": name, "head_dim": head_dim, "length": length, "dtype": dtype}
        for index, (kind, factor) in enumerate((("forward", 1.0), ("backward", 2.5))):
            own = times[name, index]
            row[kind] = {"tflops": factor * operations / statistics.median(own) / 1e12, "ms": [1e3 * t for t in own]}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The speed of each attention kernel on this device.")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    started, rows = time.perf_counter(), []
    print(f"{name}, {options.dtype}, TFLOP/s forward / backward (2.5 times the operations)", flush=True)
    for head_dim in options.head_dims:
        for length in options.lengths:
            own = measure(head_dim, length, options.dtype, device)
            rows += own
            cells = [f"{r['kernel']} {r['forward']['tflops']:.3g} / {r['backward']['tflops']:.3g}" for r in own]
            print(f"head_dim {head_dim:3}, {length:6,} tokens: " + ", ".join(cells), flush=True)
            if options.json:  # a crash loses nothing
                about = {"device": name, "torch": torch.__version__, "seconds": round(time.perf_counter() - started)}
                options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
