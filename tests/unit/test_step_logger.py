"""Step times and waits: what is measured, in one collective, and without waiting for the device before a log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import profile

from conf.schema import Config, EngineConfig
from recipes.engine import base
from recipes.monitor import device_metrics, step_logger
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.step_logger import StepLogger
from recipes.monitor.time_breakdown import BreakdownStopped, breakdown_cost
from recipes.planning.plan import Plan
from ring_attention.trace import numbered, observed_range, profiler_range
from tests.errors import names

WAIT_S = 0.5


class Clock:
    """Time that passes only when a test calls `sleep`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on GPUs the device measures time
    for module in (device_metrics, step_logger):
        monkeypatch.setattr(module, "time", clock)
    return clock


def two_ranks(own: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Extremes over this rank and one that measured twice as much."""
    return {name: (value, 2 * value) for name, value in own.items()}


def make_logger(has_ring: bool, extremes_over_ranks=two_ranks, reporter: Any = None) -> StepLogger:
    plan = Plan(Config(num_steps=10), 4 if has_ring else 1, "cpu", "CPU", None, ranks_per_host=4)
    assert plan.has_ring == has_ring
    attention = SimpleNamespace(transport_used="p2p", transport_reason="")
    engine = mock.Mock(extremes_over_ranks=extremes_over_ranks, attention=attention if reporter else None)
    return StepLogger(plan, engine, "train", reporter)


def step(logger: StepLogger, is_due: bool, clock: Clock) -> None:
    with logger.data():
        clock.sleep(WAIT_S)
    with logger.step(is_due, [128]), profiler_range("forward ring step 0"):
        for _ in range(2):
            with profiler_range("exchange wait"):
                clock.sleep(WAIT_S)
        with profiler_range("merge"):
            clock.sleep(WAIT_S)


OVER_RANKS = ("peak_memory_gib", "rank_spread_ms", "data_wait_ms", "exchange_wait_min_ms", "exchange_wait_max_ms")


def over_ranks(metrics: dict[str, float | None]) -> dict[str, float | None]:
    return {name: metrics[f"train/{name}"] for name in OVER_RANKS if f"train/{name}" in metrics}


def test_data_waits_are_of_all_steps_and_ring_waits_of_the_logged_one(clock):
    logger = make_logger(has_ring=True)
    for is_due in (False, False, True):
        step(logger, is_due, clock)
    metrics = logger.step_metrics(3, {"loss": 1.5})
    assert metrics["train/loss"] == 1.5
    step_time_s = 4 * WAIT_S  # data, two waits for the ring, merge
    assert {metrics[f"train/step_time_{kind}_s"] for kind in ("p50", "p95", "max")} == {step_time_s}
    assert metrics["train/eta_s"] == 7 * step_time_s
    numbers, ms = over_ranks(metrics), 1e3 * WAIT_S
    peak_memory_gib = numbers.pop("peak_memory_gib")
    assert peak_memory_gib is not None
    assert peak_memory_gib > 0
    assert numbers == {
        "rank_spread_ms": 4 * ms,
        "data_wait_ms": 2 * ms,  # mean over steps, maximum over ranks
        "exchange_wait_min_ms": 2 * ms,  # sum over one step, minimum over ranks
        "exchange_wait_max_ms": 4 * ms,
    }
    step(logger, True, clock)
    assert logger.step_metrics(4, {})["train/exchange_wait_min_ms"] == 2 * ms  # without earlier waits


def test_step_times_of_a_log_are_median_interpolated_percentile_and_maximum(clock):
    logger = make_logger(has_ring=False)
    for extra_s in (0.0, 10.0, 1.0):
        clock.sleep(extra_s)
        step(logger, False, clock)
    metrics = logger.step_metrics(3, {})
    times_s = [metrics[f"train/step_time_{kind}_s"] for kind in ("p50", "p95", "max")]
    assert times_s == pytest.approx([3.0, 3.0 + 0.9 * 9.0, 12.0])  # of 2, 3 and 12


def test_without_a_ring_no_ring_wait_is_measured(clock):
    logger = make_logger(has_ring=False)
    step(logger, True, clock)
    assert set(over_ranks(logger.step_metrics(1, {}))) == {"rank_spread_ms", "data_wait_ms", "peak_memory_gib"}


def test_a_log_needs_one_collective_and_nothing_is_read_before(clock):
    collectives: list[dict[str, float]] = []

    def extremes(own: dict[str, float]) -> dict[str, tuple[float, float]]:
        collectives.append(own)
        return two_ranks(own)

    logger = make_logger(has_ring=True, extremes_over_ranks=extremes)
    waits = AssertionError("reading times would wait for the device")
    with mock.patch.object(device_metrics, "durations_s", side_effect=waits):
        for _ in range(5):
            step(logger, False, clock)
        step(logger, True, clock)
    assert collectives == []
    logger.step_metrics(6, {})
    assert len(collectives) == 1


def test_time_between_a_log_and_the_next_step_counts_for_no_step(clock):
    logger = make_logger(has_ring=False)
    step(logger, True, clock)
    metrics = logger.step_metrics(1, {})
    clock.sleep(10 * WAIT_S)
    logger.write(1, metrics)
    step(logger, True, clock)
    assert logger.step_metrics(2, {})["train/step_time_max_s"] == 4 * WAIT_S


class TestBreakdown:
    PARTS_S = {f"parts/{part}_pct": 12.5 for part in PARTS} | {"parts/exposed_communication_ms": 7.0}

    @pytest.fixture
    def measure(self, monkeypatch) -> mock.Mock:
        measure = mock.Mock(return_value=self.PARTS_S)
        monkeypatch.setattr(step_logger, "measure_time_breakdown", measure)
        return measure

    def after_steps(self, clock: Clock, num_steps: int, step_s: float) -> tuple[StepLogger, mock.Mock]:
        """A logger after steps that another rank is twice as long in, and its reporter."""
        logger = make_logger(has_ring=True)
        logger._reporter = reporter = mock.Mock()
        logger.restart()
        for _ in range(num_steps):
            with logger.step(is_due=False, lengths=[128]):
                clock.sleep(step_s)
        logger.step_metrics(num_steps, {})
        reporter.reset_mock()
        return logger, reporter

    def test_it_takes_about_ten_steps(self):
        plan = Plan(Config(num_steps=10), 4, "cpu", "CPU", None, ranks_per_host=4)
        assert breakdown_cost(plan) == 10
        config = Config(engine=EngineConfig(gradient_accumulation_steps=64))
        assert breakdown_cost(Plan(config, 4, "cpu", "CPU", None, ranks_per_host=4)) == 2.5
        assert breakdown_cost(Plan(Config(), 1, "cpu", "CPU", None, ranks_per_host=1)) == 2  # no messages

    @pytest.mark.parametrize(
        ("num_steps", "step_s", "parts"),
        [
            (10, 1.0, []),  # 20 s on the slower rank
            (999, 2.0, ["40 s", "2%"]),  # of 1,998 s
            (1001 * 2, 2.0, []),
            (10_000, 30.0, ["60 s"]),  # less than 2 %, but a minute each on the slower rank
        ],
    )
    def test_it_is_left_out_with_a_line_where_it_would_take_long(self, clock, measure, num_steps, step_s, parts):
        logger, reporter = self.after_steps(clock, num_steps, step_s)
        logger.breakdown(mock.Mock())
        assert measure.called == (not parts)
        assert reporter.write_summary.called == (not parts)
        names(reporter.say.call_args.args[0], *(["breakdown", *parts] if parts else ["12.5 %"]))

    @pytest.mark.parametrize(
        ("error", "parts"),
        [
            (RuntimeError("CUDA out of memory\nand more"), ["RuntimeError", "CUDA out of memory"]),
            (AssertionError(), ["AssertionError"]),
            (BreakdownStopped(), ["signal"]),
        ],
    )
    def test_its_failure_is_one_line(self, clock, measure, error, parts):
        logger, reporter = self.after_steps(clock, 10, 1.0)
        measure.side_effect = error
        logger.breakdown(mock.Mock())
        lines = "\n".join(reporter.say.call_args.args).splitlines()
        assert len(lines) == 1
        names(lines[0], "breakdown", *parts)
        assert not reporter.write_summary.called


def test_perplexity_is_the_exponential_of_the_loss_or_infinity():
    assert device_metrics.perplexity(0.0) == 1
    assert device_metrics.perplexity(1.5) == pytest.approx(4.4816890703)
    assert device_metrics.perplexity(1e4) == float("inf")
    assert device_metrics.perplexity(float("nan")) != device_metrics.perplexity(float("nan"))


def test_observed_and_numbered_ranges_are_in_profiles():
    seen = []
    with profile() as profiler, observed_range("inner", lambda: seen.append("note")):
        for number, item in numbered("stage", "ab"):
            with profiler_range("inner"):
                seen.append(f"{number}{item}")
                torch.zeros(1).add_(1)
    assert seen == ["note", "0a", "note", "note", "1b", "note"]
    names = [event.name for event in profiler.events() or []]
    assert [names.count(name) for name in ("stage 0", "stage 1", "stage 2", "inner")] == [1, 1, 0, 2]
    with profiler_range("inner"):
        pass
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("of_ranks", "used", "reason"),
    [
        ([("p2p", ""), ("p2p", "")], "p2p", ""),
        ([("p2p", "no access"), ("p2p", "no access")], "p2p", "no access"),
        ([("copy_engine", ""), ("p2p", "no access")], "copy_engine on 1 ranks, p2p on 1 ranks", "no access"),
    ],
    ids=["as chosen", "not", "not on one"],
)
def test_a_run_says_once_what_carries_its_messages(monkeypatch, clock: Clock, of_ranks, used: str, reason: str):
    reporter = mock.Mock(step_line=lambda step, metrics: "step")

    def gather(received: list[Any], own: Any) -> None:
        assert own == ("p2p", "")
        received[:] = of_ranks

    monkeypatch.setattr(base.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(base.dist, "all_gather_object", gather)
    logger = make_logger(True, reporter=reporter)
    for number in (1, 2):
        step(logger, True, clock)
        logger.step_metrics(number, {})
    reporter.log_transport.assert_called_once_with(used, reason)
    lines = [line for call in reporter.say.call_args_list for line in call.args if line.startswith("transport")]
    assert len(lines) == bool(reason)
    for line in lines:
        names(line, used, reason)
