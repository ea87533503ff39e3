"""Step times and waits: what is measured, in one collective, and without waiting for the device before `take`."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.profiler import profile

import recipes.monitor.step_timer
from recipes.monitor import device_metrics
from recipes.monitor.step_timer import StepTimer, speed_metrics
from recipes.planning.throughput import Throughput
from ring_attention.trace import numbered, observed_range, profiler_range

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
    for module in (device_metrics, recipes.monitor.step_timer):
        monkeypatch.setattr(module, "time", clock)
    return clock


def two_ranks(own: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Extremes over this rank and one that measured twice as much."""
    return {name: (value, 2 * value) for name, value in own.items()}


def step(timer: StepTimer, is_logged: bool, clock: Clock) -> None:
    with timer.data():
        clock.sleep(WAIT_S)
    with timer.step(is_logged), profiler_range("forward ring step 0"):
        for _ in range(2):
            with profiler_range("exchange wait"):
                clock.sleep(WAIT_S)
        with profiler_range("merge"):
            clock.sleep(WAIT_S)


def test_data_waits_are_of_all_steps_and_ring_waits_of_the_logged_one(clock):
    timer = StepTimer(has_ring=True)
    for is_logged in (False, False, True):
        step(timer, is_logged, clock)
    times_s, numbers = timer.take(two_ranks)
    assert times_s == [4 * WAIT_S] * 3  # data, two waits for the ring, merge
    ms = 1e3 * WAIT_S
    assert numbers.pop("peak_memory_gib") > 0
    assert numbers == {
        "rank_spread_ms": 4 * ms,
        "data_wait_ms": 2 * ms,  # mean over steps, maximum over ranks
        "exchange_wait_min_ms": 2 * ms,  # sum over one step, minimum over ranks
        "exchange_wait_max_ms": 4 * ms,
    }
    step(timer, True, clock)
    assert timer.take(two_ranks)[1]["exchange_wait_min_ms"] == 2 * ms  # without earlier waits


def test_without_a_ring_no_ring_wait_is_measured(clock):
    timer = StepTimer(has_ring=False)
    step(timer, True, clock)
    assert set(timer.take(two_ranks)[1]) == {"rank_spread_ms", "data_wait_ms", "peak_memory_gib"}


def test_take_needs_one_collective_and_nothing_is_read_before(clock):
    timer, extremes = StepTimer(has_ring=True), mock.Mock(side_effect=two_ranks)
    with mock.patch.object(device_metrics, "durations_s", side_effect=device_metrics.durations_s) as read:
        for _ in range(5):
            step(timer, False, clock)
        step(timer, True, clock)
        assert read.call_count == extremes.call_count == 0
        timer.take(extremes)
        assert extremes.call_count == 1


def test_time_between_a_log_and_the_next_step_counts_for_no_step(clock):
    timer = StepTimer(has_ring=False)
    step(timer, True, clock)
    timer.take(two_ranks)
    clock.sleep(10 * WAIT_S)
    timer.restart()
    step(timer, True, clock)
    assert timer.take(two_ranks)[0] == [4 * WAIT_S]


def test_speed_metrics_have_median_maximum_and_eta():
    throughput = Throughput(200.0, 100.0, 50.0, 1e-10, None)
    numbers = speed_metrics(throughput, [0.1, 0.5, 0.9], num_steps_left=4)
    assert (numbers["step_time_p50_s"], numbers["step_time_max_s"], numbers["eta_s"]) == (0.5, 0.9, 2.0)


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
