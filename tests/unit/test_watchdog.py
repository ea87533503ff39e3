"""When a step counts as hung, and what is known about a rank that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from conf.schema import LaunchConfig
from recipes.launch.watchdog import MIN_STEPS, StallDetector
from recipes.run.heartbeat import Heartbeat, clear_rank_states, describe_ranks, read_rank_state, record_path
from tests.errors import names


def detector_after(num_steps: int, step_s: float, first_s: float = 100.0, factor: float = 20.0) -> StallDetector:
    """At time 0, between two steps; stall_s is 60."""
    detector = StallDetector(LaunchConfig(stall_factor=factor, stall_s=60))
    for number in range(num_steps):
        detector.update(str(number + 1), -1000.0)
        detector.update("", -1000.0 + (step_s if number else first_s))
    return detector


def test_a_step_may_take_stall_factor_times_the_median_without_the_first_step():
    detector = detector_after(MIN_STEPS + 1, step_s=10.0, first_s=500.0)
    detector.update("7", 0.0)
    assert detector.stall_message(200.0) is None
    message = detector.stall_message(201.0)
    assert message is not None
    names(message, "step 7", "201.0 s", 20, 5, "10.000 s")


def test_a_step_may_always_take_stall_s():
    detector = detector_after(MIN_STEPS + 1, step_s=0.1)
    detector.update("7", 0.0)
    assert detector.stall_message(60.0) is None
    assert detector.stall_message(60.1) is not None


@pytest.mark.parametrize(("num_steps", "factor"), [(MIN_STEPS, 20), (MIN_STEPS + 1, 0)])
def test_no_stall_after_too_few_steps_or_with_factor_zero(num_steps: int, factor: float):
    detector = detector_after(num_steps, step_s=0.1, factor=factor)
    detector.update("9", 0.0)
    assert detector.stall_message(1e6) is None


def test_steps_of_another_length_have_a_median_of_their_own():
    detector = detector_after(MIN_STEPS + 1, step_s=0.1)
    detector.restart()
    detector.update("7", 0.0)
    assert detector.stall_message(1e6) is None


def test_time_between_steps_and_discounted_time_do_not_count():
    detector = detector_after(MIN_STEPS + 1, step_s=0.1)
    assert detector.stall_message(1e6) is None  # a validation, a checkpoint
    detector.update("7", 0.0)
    detector.discount(1000.0)  # Ctrl-Z
    assert detector.stall_message(1050.0) is None
    assert detector.stall_message(1070.0) is not None


def test_a_record_has_its_ranks_state_and_one_size_however_long_the_text(tmp_path):
    (tmp_path / "logs").mkdir()
    record = Heartbeat(tmp_path, 3)
    assert str(read_rank_state(tmp_path, 3)) == "starting"
    for kind, text in (
        ("step", "7"),
        ("part", "backward"),
        ("ring_step", "backward ring step 1"),
        ("wait", "x" * 5000),
    ):
        record.update(kind, text)
    state = read_rank_state(tmp_path, 3)
    assert state is not None
    assert str(state).startswith("step 7, backward, backward ring step 1, waiting in xxx")
    assert (state.rank, state.pid, state.process_problem) == (3, os.getpid(), "")
    assert record_path(tmp_path, 3).stat().st_size == 1024
    record.update("wait", "")
    record.update("part", "optimizer")  # clears the ring step too
    assert str(read_rank_state(tmp_path, 3)) == "step 7, optimizer"
    assert read_rank_state(tmp_path, 4) is None
    clear_rank_states(tmp_path)
    assert read_rank_state(tmp_path, 3) is None


OTHER_PROCESS = """
import sys, time
from pathlib import Path
from recipes.run.heartbeat import Heartbeat
record = Heartbeat(Path(sys.argv[1]), 1)
record.update("step", "7")
record.update("part", "data")
print("there", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("num_bytes", [0, 3, 20, 40, 60, -1])
def test_a_torn_record_is_no_state_and_leaves_the_others_readable(tmp_path, num_bytes):
    (tmp_path / "logs").mkdir()
    for rank in (0, 1):
        Heartbeat(tmp_path, rank).update("step", "7")
    torn = record_path(tmp_path, 1)
    torn.write_bytes(torn.read_bytes()[:num_bytes].ljust(torn.stat().st_size, b"\0"))
    assert read_rank_state(tmp_path, 1) is None
    [line] = describe_ranks(tmp_path, 2, 0.0)
    assert line.startswith("rank 0 ")


def test_a_rank_that_is_behind_is_marked_with_its_processs_problem(tmp_path):
    (tmp_path / "logs").mkdir()
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        record, now = Heartbeat(tmp_path, 0), float("inf")
        record.update("step", "7")
        record.update("part", "data")
        record.update("wait", "a transfer")
        assert not any("<-" in line for line in describe_ranks(tmp_path, 2, now))  # no rank is behind
        record.update("part", "forward")
        first, second = describe_ranks(tmp_path, 2, now)
        names(first, "rank 0", "step 7, forward")
        names(second, "rank 1", "step 7, data", "<- behind")
        assert "<-" not in first
        other.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
        names(describe_ranks(tmp_path, 2, now)[1], "<- behind", "stopped")
    finally:
        other.kill()
        other.wait()
        if other.stdout:
            other.stdout.close()
    names(describe_ranks(tmp_path, 2, now)[1], "rank 1", "step 7, data", "<- behind", "gone")
