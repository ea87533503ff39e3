"""What steps wait for: measured where it should be, in one message over the ranks, and read only when it is taken."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.profiler import profile

import recipes.monitor.step_timer
from recipes.engine.deepspeed_engine import loss_scaling
from recipes.monitor import device_metrics
from recipes.monitor.step_timer import StepTimer, speed
from recipes.planning.throughput import Throughput
from ring_attention.trace import numbered, observed_range, profiler_range

WAIT_S = 0.5


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on GPUs time is the device's
    for module in (device_metrics, recipes.monitor.step_timer):
        monkeypatch.setattr(module, "time", clock)
    return clock


def two_ranks(own: dict[str, float]) -> dict[str, tuple[float, float]]:
    """As if another rank had measured twice as much."""
    return {name: (value, 2 * value) for name, value in own.items()}


def step(watch: StepTimer, is_logged: bool, clock: Clock) -> None:
    with watch.data():
        clock.sleep(WAIT_S)
    with watch.step(is_logged), profiler_range("forward ring step 0"):
        for _ in range(2):
            with profiler_range("exchange wait"):
                clock.sleep(WAIT_S)
        with profiler_range("merge"):
            clock.sleep(WAIT_S)


def test_waits_are_those_for_data_of_all_steps_and_those_for_the_ring_of_the_logged_one(clock):
    watch = StepTimer(has_ring=True)
    for is_logged in (False, False, True):
        step(watch, is_logged, clock)
    times_s, numbers = watch.take(two_ranks)
    assert times_s == [4 * WAIT_S] * 3  # for data, twice for the ring, and the merge
    ms = 1e3 * WAIT_S
    assert numbers.pop("peak_memory_gib") > 0
    assert numbers == {
        "rank_spread_ms": 4 * ms,
        "data_wait_ms": 2 * ms,  # a mean over steps, of the slower rank
        "exchange_wait_min_ms": 2 * ms,  # a sum, of one step
        "exchange_wait_max_ms": 4 * ms,
    }
    step(watch, True, clock)
    assert watch.take(two_ranks)[1]["exchange_wait_min_ms"] == 2 * ms  # the ones before are gone


def test_without_a_ring_there_is_no_wait_for_it(clock):
    watch = StepTimer(has_ring=False)
    step(watch, True, clock)
    assert set(watch.take(two_ranks)[1]) == {"rank_spread_ms", "data_wait_ms", "peak_memory_gib"}


def test_all_ranks_are_asked_once_and_nothing_is_read_before(clock):
    watch, extremes = StepTimer(has_ring=True), mock.Mock(side_effect=two_ranks)
    with mock.patch.object(device_metrics, "durations_s", side_effect=device_metrics.durations_s) as read:
        for _ in range(5):
            step(watch, False, clock)
        step(watch, True, clock)
        assert read.call_count == extremes.call_count == 0
        watch.take(extremes)
        assert extremes.call_count == 1


def test_what_passes_between_a_log_and_the_next_step_is_nobodys_time(clock):
    watch = StepTimer(has_ring=False)
    step(watch, True, clock)
    watch.take(two_ranks)
    clock.sleep(10 * WAIT_S)
    watch.restart()
    step(watch, True, clock)
    assert watch.take(two_ranks)[0] == [4 * WAIT_S]


def test_the_slowest_step_is_logged():
    throughput = Throughput(0.5, 100, 10, 2, 1.0, None)
    numbers = speed(throughput, [0.1, 0.5, 0.9], num_steps_left=4)
    assert (numbers["step_time_p50_s"], numbers["step_time_max_s"], numbers["eta_s"]) == (0.5, 0.9, 2.0)


def test_a_perplexity_is_the_exponential_of_a_loss_also_of_one_beyond_floats():
    assert device_metrics.perplexity(0.0) == 1
    assert device_metrics.perplexity(1.5) == pytest.approx(4.4816890703)
    assert device_metrics.perplexity(1e4) == float("inf")
    assert device_metrics.perplexity(float("nan")) != device_metrics.perplexity(float("nan"))


def test_an_observed_range_is_in_a_profile_too_and_numbered_ones_say_which():
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


def test_only_fp16_has_a_loss_scale():
    engine = mock.Mock(skipped_steps=3, optimizer=mock.Mock(cur_scale=torch.tensor(1024.0)))
    assert loss_scaling(engine, "bf16") == {}
    assert loss_scaling(engine, "fp16") == {"loss_scale": 1024.0, "skipped_steps": 3}
