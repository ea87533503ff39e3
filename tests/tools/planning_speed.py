"""How long packed documents take to plan: `python -m tests.tools.planning_speed`, on one core, a minute.

1,000 documents of log-normal lengths, 1,048,576 tokens in all, the balanced layout. A rank's plan is the layout, the
keys that ranks exchange, and the rank's kernel calls. These are of one exchange, or where ranks need too many keys for
it, of a forward pass around the ring, which takes longer to plan. Times are CPU time, the least of REPETITIONS, which
differ by one token so that nothing is cached. A cell has the least, the median and the most of NUM_MIXES mixes.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable

from ring_attention import CAUSAL
from ring_attention.direct_plan import direct_plan
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout
from ring_attention.ring import forward_calls

NUM_DOCUMENTS, NUM_TOKENS, NUM_MIXES, REPETITIONS = 1000, 2**20, 8, 20
SIGMAS = (0.5, 1.0, 1.3, 1.7)  # of the logarithm of a document's length
RING_DEGREES = (2, 4, 8, 16, 32, 64)


def mix(sigma: float, seed: int) -> tuple[int, ...]:
    """0, then the end of each document."""
    generator = random.Random(seed)
    edges = [0.0, *itertools.accumulate(generator.lognormvariate(0, sigma) for _ in range(NUM_DOCUMENTS))]
    return tuple(round(edge / edges[-1] * NUM_TOKENS) for edge in edges)


def plan_layout(layout: Layout) -> None:
    layout.runs(0)


def plan_rank(layout: Layout) -> None:
    arguments = layout, CAUSAL.packed(layout.documents or ()), layout.ring_degree // 2, 1, KERNELS["flash_attn_4"]
    if direct_plan(*arguments) is None:
        forward_calls(*arguments)


def least_ms(plan: Callable[[Layout], None], ring_degree: int, ends: tuple[int, ...]) -> float:
    times_ms = []
    for repetition in range(REPETITIONS):
        documents = *ends[:-1], ends[-1] + repetition
        layout = Layout("balanced", ring_degree, NUM_TOKENS + REPETITIONS, documents=documents)
        started = time.process_time()
        plan(layout)
        times_ms.append(1000 * (time.process_time() - started))
    return min(times_ms)


def main() -> None:
    print("| sigma | ranks | layout, ms | a rank's plan, ms |\n|---|---|---|---|")
    for sigma, ring_degree in itertools.product(SIGMAS, RING_DEGREES):
        cells = []
        for plan in (plan_layout, plan_rank):
            times_ms = [least_ms(plan, ring_degree, mix(sigma, seed)) for seed in range(NUM_MIXES)]
            cells.append(f"{min(times_ms):.1f}, {statistics.median(times_ms):.1f}, {max(times_ms):.1f}")
        print(f"| {sigma} | {ring_degree} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
