"""Random cases of sequence attention against the fp64 oracle.

`python -m tests.tools.fuzz` runs 1000. `--cases N` and `--seed N` change their number and the random stream, and
`--json FILE` writes a summary. Hypothesis shrinks a failing case and prints it. `tests/distributed/test_fuzz.py` runs
a few.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ring_attention import Mask
from ring_attention.layout import LAYOUTS
from tests.cases import METHODS, Case, check, on_rank
from tests.distributed.test_copy_engine import many_on_rank
from tests.pool import WorkerPool

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
PRIMES = (2, 3, 5, 7, 11, 13, 31, 61)
# fields of which the summary counts the values
COUNTED = (
    "method",
    "num_ranks",
    "layout",
    "dtype",
    "kernel",
    "batch_dim_idx",
    "contiguous",
    "transport",
    "softcap",
    "sinks",
)


@st.composite
def cases(draw: Callable, most_ranks: int) -> Case:
    """Any case that the library supports."""
    method = draw(st.sampled_from(METHODS))
    num_ranks = 1 if method == "local" else draw(st.integers(1, most_ranks))
    ulysses_degree = 1
    if method == "ulysses":
        ulysses_degree = num_ranks
    elif method == "hybrid":
        ulysses_degree = draw(st.sampled_from([u for u in range(1, num_ranks + 1) if num_ranks % u == 0]))
    num_kv_heads = ulysses_degree * draw(st.integers(1, max(1, 4 // ulysses_degree)))
    lengths = st.one_of(
        st.sampled_from([1, max(1, num_ranks - 1), num_ranks, 2 * num_ranks, *PRIMES]), st.integers(1, 150)
    )
    length, batch = draw(lengths), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    kernel = draw(st.sampled_from(["auto", "reference"]))
    sizes = st.sampled_from([8, 16, 24, 40, 64, 128, 512] if length < 40 else [8, 16, 40])
    mask = draw(masks(length, batch))
    return Case(
        method,
        num_ranks,
        ulysses_degree,
        draw(st.sampled_from(LAYOUTS if len(mask.documents or ((),)) == 1 else ("zigzag", "contiguous"))),
        mask,
        length,
        batch,
        num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads,
        draw(sizes),
        draw(st.none() | sizes),
        dtype,
        kernel,
        draw(st.integers(0, 1)),
        draw(st.booleans()),
        draw(st.sampled_from(["p2p", "copy_engine"])) if method in ("ring", "hybrid") else "p2p",
        draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
        draw(st.booleans()),
    )


@st.composite
def masks(draw: Callable, length: int, batch: int) -> Mask:
    reach = st.none() | st.sampled_from([0, 1, length]) | st.integers(0, length)
    mask = Mask(draw(reach), draw(st.just(0) | reach))
    if draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        ends = st.lists(st.integers(0, length), max_size=6)  # equal ones make empty documents
        return mask.packed([[0, *sorted(draw(ends)), length] for _ in range(rows)])
    # a mask that is not causal must name the real tokens, or queries would see the padding
    return mask if mask.right == 0 else mask.packed([0, length])


def fuzz(
    pool: WorkerPool, num_cases: int, most_ranks: int, seed: int, done: Callable[[Case], None] = lambda case: None
) -> None:
    """Raises an AssertionError that names the smallest failing case.

    Args:
        done: called after each case that passed.
    """

    @hypothesis.seed(seed)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        print_blob=False,
    )
    @given(cases(most_ranks))
    def one(case: Case) -> None:
        check(case, pool.run(results, case, num_ranks=case.num_ranks))
        done(case)

    one()


def results(case: Case) -> list[torch.Tensor]:
    """On each rank. Copies are made by threads, into buffers that are overwritten as soon as the protocol allows."""
    return many_on_rank([case], None)[0][0] if case.transport == "copy_engine" else on_rank(case)


def main() -> None:
    parser = argparse.ArgumentParser(description="Random cases of sequence attention against the fp64 oracle.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=6, help="the most ranks per case")
    parser.add_argument("--json", type=Path, help="write a summary to this file")
    options = parser.parse_args()
    seen: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    started, passed = time.monotonic(), 0

    def done(case: Case) -> None:
        nonlocal passed
        passed += 1
        for name in COUNTED:
            seen[name][str(getattr(case, name))] += 1
        seen["mask"][_kind(case.mask)] += 1
        if passed % 50 == 0:
            print(f"{passed} of {options.cases} passed, {time.monotonic() - started:.0f} s", flush=True)

    pool = WorkerPool()
    try:
        fuzz(pool, options.cases, options.ranks, options.seed, done)
    finally:
        pool.close()
    seconds = time.monotonic() - started
    print(f"{passed} cases, 0 failed, {seconds:.0f} s")
    for name, counts in seen.items():
        print(f"  {name}: " + "; ".join(f"{value} {count}" for value, count in sorted(counts.items())))
    if options.json:
        summary = {
            "cases": passed,
            "failed": 0,
            "seed": options.seed,
            "seconds": round(seconds),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({**summary, "seen": seen}, indent=1))


def _kind(mask: Mask) -> str:
    band = "window" if mask.left is not None else {0: "causal", None: "full"}.get(mask.right, "right window")
    return f"{band}, packed" if mask.documents else band


if __name__ == "__main__":
    sys.exit(main())
