"""However a run ends, all of its processes end: a rank dies or raises, Ctrl-C, SIGTERM, the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.cli.program import ENDS_WITHIN_S, LONG, REPOSITORY, Running


def listening_addresses(running: Running) -> set[str]:
    connections = [c for process in running.family() for c in process.net_connections("tcp")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def has_wandb_core(running: Running) -> bool:
    return any("wandb-core" in process.name() for process in running.family())


def test_a_killed_rank_ends_the_run_which_until_then_listened_on_loopback_only(program):
    with program.started(*LONG) as running:
        ranks = running.until_it_trains()
        assert len(ranks) == 2
        assert has_wandb_core(running)
        addresses = listening_addresses(running)
        assert addresses
        assert addresses <= {"127.0.0.1", "::1"}

        ranks[1].kill()
        killed = time.monotonic()
        result = running.finish()
        assert time.monotonic() - killed < ENDS_WITHIN_S
        assert result.exit_code == 1
        assert result.stderr == (
            "error: rank 1 was ended by SIGKILL\n"
            f"the other ranks were ended; its log: {running.run_dir / 'logs' / 'rank_1.log'}\n"
        )
        running.assert_nothing_is_left()


def test_ctrl_c_ends_a_training_run_without_a_traceback(program):
    with program.started(*LONG) as running:
        running.until_it_trains()
        os.killpg(running.process.pid, signal.SIGINT)  # a terminal sends it to all
        result = running.finish(ENDS_WITHIN_S)
        assert result.exit_code == 130
        assert result.stderr == ""
        running.assert_nothing_is_left()


def test_sigterm_to_the_parent_ends_a_starting_run_without_a_traceback(program):
    with program.started(*LONG) as running:
        running.until(lambda: len(running.ranks()) == 2)
        running.family()
        running.process.terminate()
        result = running.finish(ENDS_WITHIN_S)
        assert result.exit_code == 143
        assert result.stderr == ""
        running.assert_nothing_is_left()


@pytest.mark.parametrize("phase", ["starting", "training"])
def test_a_killed_parent_takes_its_ranks_along(program, phase):
    with program.started(*LONG) as running:
        if phase == "training":
            running.until_it_trains()
        else:
            running.until(lambda: len(running.ranks()) == 2)
            running.family()
        running.process.kill()
        running.assert_nothing_is_left()


RAISES = """
import sys
from pathlib import Path
import recipes.launch
from conf.schema import Config

def patched(rank, *arguments):
    import recipes.pretrain
    whole = recipes.pretrain.pretrain
    def pretrain(*arguments):
        if rank == 1:
            raise RuntimeError("the sky is falling on this rank")
        return whole(*arguments)
    recipes.pretrain.pretrain = pretrain
    launched(rank, *arguments)

launched = recipes.launch._launched_rank
recipes.launch._launched_rank = patched
if __name__ == "__main__":
    try:
        recipes.launch.launch(Config(num_steps=1000000), 2, Path(sys.argv[1]))
    except recipes.launch.RunFailed as error:
        sys.exit(f"error: {error}")
"""


def test_a_rank_that_raises_is_named_with_its_error_and_ends_the_run(program):
    script = program.folder / "raises.py"
    script.write_text(RAISES)
    run_dir = program.folder / "run"
    command = [sys.executable, str(script), str(run_dir)]
    environment = program.environment(PYTHONPATH=str(REPOSITORY))
    result = subprocess.run(command, env=environment, cwd=program.folder, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert result.stderr.startswith("error: rank 1 failed:\nTraceback (most recent call last):\n")
    log = run_dir / "logs" / "rank_1.log"
    assert result.stderr.endswith(
        f"RuntimeError: the sky is falling on this rank\nthe other ranks were ended; its log: {log}\n"
    )
    assert "RuntimeError: the sky is falling on this rank" in log.read_text()
