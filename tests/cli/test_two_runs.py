"""Two runs at once: in one run dir, where the second is refused, and in two of their own, with +debug=deterministic.

test_launchers.py runs the other presets.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.cli.program import LONG, SMALL, Finished, Program, Running

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2"]


def assert_refused(result: Finished, first: Running, pid: int) -> None:
    """In one line that names the process, with nothing touched. torchrun adds lines of its own."""
    host = re.escape(socket.gethostname())
    line = rf"error: {re.escape(str(first.run_dir))} is used by process {pid} on {host} since [^:]+:\d\d:\d\d .+"
    assert len(re.findall(f"^{line}$", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert result.exit_code == 1
    assert result.stdout == ""
    steps = [row["step"] for row in first_rows(first)]
    assert steps == [1, *range(2, 2 * len(steps), 2)]


def second_run(program: Program, first: Running, *arguments: str, launcher: list[str] | None = None) -> Finished:
    return program.run(*arguments, f"hydra.run.dir={first.run_dir}", name="second", launcher=launcher)


def first_rows(first: Running) -> list[dict[str, int]]:
    return Finished(0, "", "", first.run_dir).metrics


def test_a_second_run_in_one_run_dir_is_refused_until_the_first_has_died(program: Program):
    with program.started(*LONG, "checkpoint.every_n_steps=4") as first:
        first.until_it_trains()
        for arguments in (LONG, ["recipe=compare", "+experiment=paper_table"], ["recipe=max_length", *SMALL]):
            assert_refused(second_run(program, first, *arguments), first, first.process.pid)
        first.process.send_signal(signal.SIGKILL)
        first.assert_nothing_is_left()
    assert (first.run_dir / "lock").exists()
    with program.started(*LONG) as resumed:
        resumed.until(lambda: "resuming after step " in resumed.stdout)


def test_a_launchers_rank_0_holds_the_run_dir_until_it_has_died(program: Program):
    with program.started(*LONG, "checkpoint.every_n_steps=4", launcher=TORCHRUN) as first:
        first.until(lambda: re.search(r"step +8/", first.stdout))
        ranks = [process for process in first.family() if "train.py" in process.cmdline()]
        [rank_0] = [process for process in ranks if process.environ().get("RANK") == "0"]
        assert_refused(second_run(program, first, *LONG), first, rank_0.pid)
        assert_refused(second_run(program, first, *LONG, launcher=TORCHRUN), first, rank_0.pid)
        rank_0.kill()
        first.finish()
    with program.started(*LONG) as resumed:
        resumed.until(lambda: "resuming after step " in resumed.stdout)


def test_of_two_runs_that_start_at_once_in_one_run_dir_one_trains(program: Program):
    job = ["+experiment=ra_sp", *SMALL, "num_steps=4", "logging.every_n_steps=1", "breakdown=false"]
    with (
        program.started(*job) as one,
        program.started(*job, f"hydra.run.dir={one.run_dir}", name="other") as other,
    ):
        results = [one.finish(), other.finish()]
    codes = [result.exit_code for result in results]
    assert sorted(codes) == [0, 1], results
    assert "is used by process " in results[codes.index(1)].stderr
    assert [row["step"] for row in first_rows(one)] == [1, 2, 3, 4]


pytestmark = pytest.mark.slow


def test_deterministic_runs_at_the_same_time_do_not_collide_and_give_the_same_losses(program):
    arguments = ["+experiment=ra_sp", "+debug=deterministic", *SMALL, "num_steps=4", "logging.every_n_steps=1"]
    with (
        program.started(*arguments, name="one", wandb=True) as one,
        program.started(*arguments, name="other", wandb=True) as other,
    ):
        results = [one.finish(), other.finish()]
    losses = [[line["train/loss"] for line in result.metrics] for result in results]
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    for result in results:
        assert len(list((result.run_dir / "wandb").glob("offline-run-*"))) == 1
        assert str(result.run_dir / "logs") in result.stdout
