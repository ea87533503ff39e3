"""When a step takes too long, and what is known of a rank that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from conf.schema import LaunchConfig
from recipes.launch.watchdog import MIN_STEPS, StallDetector
from recipes.run.heartbeat import Heartbeat, clear_rank_states, describe_ranks, read_rank_state, record_path


def timer_after(num_steps: int, step_s: float, first_s: float = 100.0, factor: float = 20.0) -> StallDetector:
    """At time 0, between two steps; a step may always take 60 s."""
    timer = StallDetector(LaunchConfig(stall_factor=factor, stall_s=60))
    for number in range(num_steps):
        timer.tell(str(number + 1), -1000.0)
        timer.tell("", -1000.0 + (step_s if number else first_s))
    return timer


def test_a_step_may_take_so_many_times_the_median_and_the_first_is_not_in_it():
    timer = timer_after(MIN_STEPS + 1, step_s=10.0, first_s=500.0)
    timer.tell("7", 0.0)
    assert timer.complaint(200.0) is None
    assert timer.complaint(201.0) == (
        "step 7 was not done after 201.0 s, which is 20 times the median of 5 steps before (10.000 s)"
    )


def test_short_steps_have_a_time_that_is_always_theirs():
    timer = timer_after(MIN_STEPS + 1, step_s=0.1)
    timer.tell("7", 0.0)
    assert timer.complaint(60.0) is None
    assert timer.complaint(60.1) is not None


@pytest.mark.parametrize(("num_steps", "factor"), [(MIN_STEPS, 20), (MIN_STEPS + 1, 0)])
def test_too_few_steps_say_nothing_and_zero_is_off(num_steps: int, factor: float):
    timer = timer_after(num_steps, step_s=0.1, factor=factor)
    timer.tell("9", 0.0)
    assert timer.complaint(1e6) is None


def test_what_passes_between_steps_and_what_is_forgiven_is_not_a_steps():
    timer = timer_after(MIN_STEPS + 1, step_s=0.1)
    assert timer.complaint(1e6) is None  # a validation, a checkpoint
    timer.tell("7", 0.0)
    timer.forgive(1000.0)  # Ctrl-Z
    assert timer.complaint(1050.0) is None
    assert timer.complaint(1070.0) is not None


def test_a_record_says_where_its_rank_is_and_is_whole_however_long_the_text(tmp_path):
    (tmp_path / "logs").mkdir()
    record = Heartbeat(tmp_path, 3)
    assert str(read_rank_state(tmp_path, 3)) == "starting"
    for kind, text in (
        ("step", "7"),
        ("part", "backward"),
        ("ring_step", "backward ring step 1"),
        ("wait", "x" * 5000),
    ):
        record.tell(kind, text)
    place = read_rank_state(tmp_path, 3)
    assert place is not None
    assert str(place).startswith("step 7, backward, backward ring step 1, waiting in xxx")
    assert (place.rank, place.pid, place.trouble) == (3, os.getpid(), "")
    assert record_path(tmp_path, 3).stat().st_size == 1024
    record.tell("wait", "")
    record.tell("part", "optimizer")  # ends the stage, too
    assert str(read_rank_state(tmp_path, 3)) == "step 7, optimizer"
    assert read_rank_state(tmp_path, 4) is None
    clear_rank_states(tmp_path)
    assert read_rank_state(tmp_path, 3) is None


RECORD_OF_ANOTHER_PROCESS = """
import sys, time
from pathlib import Path
from recipes.run.heartbeat import Heartbeat
record = Heartbeat(Path(sys.argv[1]), 1)
record.tell("step", "7")
record.tell("part", "data")
print("there", flush=True)
time.sleep(60)
"""


def test_who_stands_still_is_named_alive_stopped_or_gone(tmp_path):
    (tmp_path / "logs").mkdir()
    command = [sys.executable, "-c", RECORD_OF_ANOTHER_PROCESS, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        record, now = Heartbeat(tmp_path, 0), float("inf")
        record.tell("step", "7")
        record.tell("part", "data")
        record.tell("wait", "a hop")
        assert not any("<-" in line for line in describe_ranks(tmp_path, 2, now))  # nobody knows
        record.tell("part", "forward")
        first, second = describe_ranks(tmp_path, 2, now)
        assert first.endswith(": step 7, forward, for inf s")
        assert second.endswith(": step 7, data, for inf s <- behind")
        other.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
        assert describe_ranks(tmp_path, 2, now)[1].endswith(" <- behind <- its process is stopped by a signal")
    finally:
        other.kill()
        other.wait()
        if other.stdout:
            other.stdout.close()
    assert describe_ranks(tmp_path, 2, now)[1].endswith(": step 7, data, for inf s <- behind <- its process is gone")
