"""The time breakdown of a step on two ranks, and attention whose messages stay on their rank."""

from __future__ import annotations

import signal
from typing import Any
from unittest.mock import patch

import pytest
import torch

from conf.schema import Config, DataConfig, ModelConfig
from recipes.engine.build import build_engine, build_feed
from recipes.launch.stopping import StopRequest
from recipes.monitor.time_breakdown import NUM_PASSES, BreakdownStopped, measure_time_breakdown
from recipes.monitor.trace_analysis import PARTS, step_breakdown
from recipes.planning.plan import Plan
from recipes.run.errors import STOP_SIGNALS
from ring_attention import RingAttention
from ring_attention.transport import messages_stay_local
from tests.cases import Case, build, draw
from tests.corpora import byte_corpus
from tests.pool import WorkerPool, parallel_groups


def group() -> Any:
    return parallel_groups(data_degree=1, sequence_degree=2).get_sequence_parallel_group()


def profiled() -> dict[str, float]:
    attention, projection = RingAttention("auto", group(), layout="zigzag"), torch.nn.Linear(32, 32)
    x_BSHD = torch.randn(1, 256, 2, 32)

    def step() -> None:
        q = projection(x_BSHD)
        attention(q, q, q, 0).sum().backward()

    return step_breakdown(step)


def test_every_part_that_runs_takes_time(pool: WorkerPool):
    for times_s in pool.run(profiled, num_ranks=2):
        assert tuple(times_s) == PARTS
        assert all(times_s[part] > 0 for part in ("attention", "merge", "exchange", "gemm", "other", "idle"))
        assert times_s["optimizer"] == times_s["data"] == 0


CASES = [
    Case("ring"),
    Case("ulysses"),
    Case("ulysses", num_heads=6, num_kv_heads=3),  # uneven heads
    Case("all_gather"),
    Case("hybrid", ulysses_degree=2, layout="contiguous"),
]


def rank_0_alone(case: Case) -> list[list[int]] | None:
    """The shapes of out, dq, dk and dv, after only rank 0 runs forward and backward; all values are finite."""
    from deepspeed.utils import groups

    attention: Any = build(case, group())
    if attention.sequence_rank > 0:
        return None
    layout = case.global_layout
    q, k, v, dout = (layout.shard(tensor, 0, dim=1) for tensor in draw(case))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    mpu = parallel_groups(data_degree=1, sequence_degree=2)  # for uneven heads
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        with patch.object(groups, "mpu", mpu), messages_stay_local():
            out = attention(*leaves, case.batch_dim_idx)
            out.backward(dout)
    finally:
        torch.use_deterministic_algorithms(False)
    results = [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    assert all(tensor.isfinite().all() for tensor in results)
    return [list(tensor.shape) for tensor in results]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.num_kv_heads}")
def test_without_communication_a_rank_needs_no_other(pool: WorkerPool, case: Case):
    shapes, nothing = pool.run(rank_0_alone, case, num_ranks=2)
    assert nothing is None
    query, key = ([case.batch, case.length // 2, heads, case.head_dim] for heads in (case.num_heads, case.num_kv_heads))
    assert shapes == [query, query, key, key]


def stopped_by_rank_1(num_asked_before: int) -> tuple[int, bool]:
    """On a rank: how often the measurement of a run asked whether to stop, and whether it stopped."""
    config = Config(
        model=ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64),
        data=DataConfig(sequence_length=21),
    )
    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    plan.resolve_config()
    engine = build_engine(plan, parallel_groups(1, 2))
    corpus = byte_corpus(["ring attention " * 40], 21)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request, num_asked = StopRequest(), 0

    def must_stop() -> bool:
        nonlocal num_asked
        num_asked += 1
        if num_asked > num_asked_before and torch.distributed.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return request.is_on_any_rank(engine)

    steps = build_feed(plan, engine, corpus).steps
    try:
        measure_time_breakdown(plan, engine, steps, must_stop)
        return num_asked, False
    except BreakdownStopped:
        return num_asked, True
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        engine.close()


def test_a_signal_to_one_rank_stops_the_measurement_of_all(pool: WorkerPool):
    assert pool.run(stopped_by_rank_1, 0, num_ranks=2) == [(1, True)] * 2  # it came before the measurement
    assert pool.run(stopped_by_rank_1, 4, num_ranks=2) == [(5, True)] * 2
    assert pool.run(stopped_by_rank_1, 100, num_ranks=2) == [(1 + NUM_PASSES, False)] * 2
