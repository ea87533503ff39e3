"""The paper's 16 GPUs: its table as forecast, and what would have to be true for its +20.8 %.

Each method takes its fastest micro-batch of those that leave a GPU as many tokens as H100s were measured to hold in
training (`wide_*_pretrain_4xH100.json`). Batches are the paper's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from conf.degrees import resolve_degrees
from conf.schema import Config
from docs.tools.markdown import table
from docs.tools.measured_steps import kernel_of
from recipes.planning.cluster import Cluster, parse_cluster
from recipes.planning.speeds import FITTED, Constants
from recipes.planning.step_time import StepTime
from tests.tools.long_step import composed

CLUSTER = parse_cluster("2x8xh100")
PAPER = 1.208  # RA+SP against the baseline
BASELINE = "TP=8 x PP=2"
METHODS = {
    BASELINE: "+experiment=tp_pp parallelism=tp8_pp2",
    "RA+SP, ring of 16": "+experiment=ra_sp",
    "Ulysses 16": "+experiment=ulysses",
    "RA+SP, ring of 2 x Ulysses 8": "+experiment=hybrid",
    "DP": "+experiment=dp parallelism.data_degree=16",
}
RING, HYBRID = "RA+SP, ring of 16", "RA+SP, ring of 2 x Ulysses 8"
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
MAX_TOKENS = {"paper_10k": 20_000, "paper_100k": 100_000}  # of one GPU in a micro-batch


@functools.cache
def _config(method: str, workload: str, recipe: str) -> Config:
    return composed(f"{METHODS[method]} workload={workload} recipe={recipe}")


@functools.cache
def paper_step(
    method: str,
    workload: str,
    recipe: str = "forward",
    cluster: Cluster = CLUSTER,
    constants: Constants = FITTED,
    batch: int | None = None,
) -> StepTime:
    """The fastest step of a method.

    Args:
        batch: sequences of a step; None: the paper's.
    """
    given = _config(method, workload, recipe)
    degrees = resolve_degrees(given, cluster.num_gpus, cluster.gpus_per_host)
    batch = batch or given.engine.train_batch_size
    assert batch is not None
    steps = []
    for size in MICRO_BATCHES:
        tokens = size * given.data.sequence_length / degrees.sequence / degrees.tensor
        if batch % (degrees.data * size) == 0 and tokens <= MAX_TOKENS[workload]:
            engine = dataclasses.replace(given.engine, train_batch_size=batch, micro_batch_size=size)
            config = dataclasses.replace(given, engine=engine)
            kernel = kernel_of(config.model)
            steps.append(StepTime(config, degrees, config.attention.method, kernel, cluster, constants=constants))
    return max(steps, key=lambda step: step.tokens_per_s)


def paper_table(workload: str) -> str:
    """All methods, forward and training."""
    body = []
    for recipe in ("forward", "pretrain"):
        base = paper_step(BASELINE, workload, recipe).tokens_per_s
        for method in METHODS:
            step = paper_step(method, workload, recipe)
            parts = step.parts
            waits = [f"{100 * seconds / parts.total:.1f} %" for seconds in (parts.messages + parts.host, parts.bubble)]
            cells = [recipe, method, step.config.engine.micro_batch_size, f"{step.tokens_per_s / 1e6:.3f}M"]
            cells += [f"{step.tokens_per_s / CLUSTER.num_gpus / 1e3:.1f}k"]
            cells += [f"{1e3 * parts.total / step.config.data.sequence_length:.4f}"]
            body.append([*cells, f"{100 * (step.tokens_per_s / base - 1):+.1f} %", *waits])
    header = "pass | method | micro-batch | TPS | TPS per GPU | TPOT ms | vs TP=8 x PP=2 | messages | bubble"
    return table(header, body)


class _Cause(NamedTuple):
    """Something that could be otherwise.

    Args:
        assumed: what it is in the forecast.
        span: how far it may go.
        lead: how far a method is ahead of the baseline for a given value.
        unit: as it stands behind the value.
    """

    name: str
    assumed: float
    span: tuple[int, int]
    lead: Callable[[str, float], float]
    unit: str


def paper_causes(workload: str) -> str:
    """One thing at a time: what would put RA+SP 20.8 % ahead in forward passes, no more and no less."""
    body = []
    for cause in _causes(workload):
        cells = [_needed(cause, method) for method in (RING, HYBRID)]
        body.append([cause.name, f"{cause.assumed:,.0f} {cause.unit}".strip(), *cells])
    return table(f"what | assumed | {RING} | {HYBRID}", body)


def _causes(workload: str) -> list[_Cause]:
    batch = paper_step(BASELINE, workload).config.engine.train_batch_size
    assert batch is not None

    def by_cluster(name: str) -> Callable[[str, float], float]:
        def lead(method: str, value: float) -> float:
            cluster = dataclasses.replace(CLUSTER, **{name: value})
            steps = [paper_step(each, workload, cluster=cluster) for each in (method, BASELINE)]
            return steps[0].tokens_per_s / steps[1].tokens_per_s

        return lead

    def by_baseline(name: str) -> Callable[[str, float], float]:
        def lead(method: str, value: float) -> float:
            constants = dataclasses.replace(FITTED, **{name: value / 100 * getattr(FITTED, name)})
            base = paper_step(BASELINE, workload, constants=constants)
            return paper_step(method, workload).tokens_per_s / base.tokens_per_s

        return lead

    def by_batch(method: str, value: float) -> float:
        base = paper_step(BASELINE, workload, batch=32 * round(value / 32))  # all micro-batches divide it
        return paper_step(method, workload).tokens_per_s / base.tokens_per_s

    within, between = "link_within_gb_per_s", "link_between_gb_per_s"
    share = "% of ours"
    return [
        _Cause("a GPU's link between hosts", CLUSTER.link_between_gb_per_s, (5, 5_000), by_cluster(between), "GB/s"),
        _Cause("a GPU's link within a host", CLUSTER.link_within_gb_per_s, (25, 2_500), by_cluster(within), "GB/s"),
        _Cause("sequences in a step of the baseline", batch, (32, 32_768), by_batch, ""),
        _Cause("speed of the baseline's matrix products", 100, (20, 500), by_baseline("matmul_share"), share),
        _Cause("speed of the baseline's attention kernels", 100, (20, 500), by_baseline("forward_share"), share),
    ]


def _needed(cause: _Cause, method: str) -> str:
    """The value that gives `PAPER`, by bisection in its logarithm between `assumed` and one of the ends of `span`."""

    def is_ahead(value: float) -> bool:
        return cause.lead(method, value) > PAPER

    now = is_ahead(cause.assumed)
    ends = [end for end in cause.span if is_ahead(end) != now]
    if not ends:
        leads = [f"{100 * (cause.lead(method, end) - 1):+.1f} % at {end:,}" for end in cause.span]
        return f"no value: {', '.join(leads)}"
    same, other = math.log(cause.assumed), math.log(ends[0])
    for _ in range(14):
        middle = (same + other) / 2
        same, other = (middle, other) if is_ahead(math.exp(middle)) == now else (same, middle)
    return f"{math.exp(other):,.0f} {cause.unit}".strip()
