"""However a run ends, no process is left: a rank dies or raises, Ctrl-C, SIGTERM, a killed parent."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.program import ENDS_WITHIN_S, LONG, REPOSITORY, SMALL, Finished, Program, Running, wandb
from tests.cli.secrets import PLANTED, assert_no_secrets
from tests.errors import names


def has_wandb_core(running: Running) -> bool:
    return any("wandb-core" in process.name() for process in running.family())


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_ranks_listen_on_loopback_only(program):
    with program.started(*LONG, wandb=True) as running:
        ranks = running.until_it_trains()
        assert len(ranks) == 2
        assert has_wandb_core(running)
        addresses = running.listening_addresses()
        assert addresses
        assert addresses <= {"127.0.0.1", "::1"}

        ranks[1].kill()
        killed = time.monotonic()
        result = running.finish()
        assert time.monotonic() - killed < ENDS_WITHIN_S
        assert result.exit_code == 1
        error, *rest = result.stderr.splitlines()
        names(error, "error", "rank 1", "SIGKILL")
        assert re.search(r"step \d+, \w+|steps \d+ and \d+", error)  # its position
        names("\n".join(rest), running.run_dir / "logs" / "rank_1.log", "dmesg", "explain=true", "no checkpoint")
        assert "Traceback" not in result.stderr
        running.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["as a terminal sends it", "to the parent"])
def test_ctrl_c_ends_a_training_run_without_a_traceback_and_closes_its_wandb_run(program, to_all: bool):
    with program.started(*LONG, wandb=True) as running:
        running.until_it_trains()
        (os.killpg if to_all else os.kill)(running.process.pid, signal.SIGINT)
        result = running.finish(ENDS_WITHIN_S)
        assert result.exit_code == 130
        assert result.stderr == ""
        running.assert_nothing_is_left()
    [run] = result.run_dir.glob("wandb/offline-run-*")
    shown = wandb("leet", "inspect", "--summary", str(run), home=program.folder)
    assert re.search(r"^state +failed ", shown, re.MULTILINE)
    assert re.search(rf"^ +step +{result.metrics[-1]['step']}$", shown, re.MULTILINE)


@pytest.mark.slow
def test_sigterm_to_the_parent_ends_a_starting_run_without_a_traceback(program):
    with program.started(*LONG) as running:
        running.until(lambda: len(running.ranks()) == 2)
        running.family()
        running.process.terminate()
        result = running.finish(ENDS_WITHIN_S)
        assert result.exit_code == 143
        assert result.stderr == ""
        names(result.stdout.splitlines()[-1], "SIGTERM", "no checkpoint", result.run_dir)
        running.assert_nothing_is_left()


@pytest.mark.slow
def test_sigterm_after_the_last_step_lets_a_complete_run_end_well(program):
    with program.started(*SMALL, "num_steps=5") as running:
        running.until(lambda: re.search("^measuring ", running.stdout, re.MULTILINE))  # the breakdown of a step
        running.family()
        running.process.terminate()
        result = running.finish(ENDS_WITHIN_S)
        assert result.exit_code == 0
        assert re.search(r"^done: 5 steps, ", result.stdout, re.MULTILINE)
        assert not (result.run_dir / "logs" / "preempted").exists()
        running.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["starting", "training"])
def test_a_killed_parent_takes_its_ranks_along(program, phase):
    with program.started(*LONG, wandb=True) as running:
        if phase == "training":
            running.until_it_trains()
        else:
            running.until(lambda: len(running.ranks()) == 2)
            running.family()
        running.process.kill()
        running.assert_nothing_is_left()


# what train.py does with two ranks, its own or a launcher's, but one of them raises once it trains
RAISES = """
import os, runpy, sys
from pathlib import Path
import recipes.launch.launcher
import recipes.registry
from conf.schema import Config, ModelConfig

class Raises(recipes.registry.RecipeTask):
    def run(self, run_dir, console):
        import torch
        import recipes.pretrain
        original = recipes.pretrain.pretrain
        def pretrain(*arguments, **options):
            if os.environ["RANK"] == "1":
                {statement}
            return original(*arguments, **options)
        recipes.pretrain.pretrain = pretrain
        return super().run(run_dir, console)

if __name__ == "__main__":
    from raises import Raises  # under a name that other processes know it by
    if "RANK" in os.environ:
        recipes.registry.RecipeTask = Raises
        sys.argv = ["train.py", "num_steps=1000000", "hydra.run.dir=" + sys.argv[1]]
        sys.path[0] = {repository!r}
        runpy.run_path({repository!r} + "/train.py", run_name="__main__")
        sys.exit()
    try:
        recipes.launch.launcher.launch(Raises(Config(num_steps=1000000{fields})), 2, Path(sys.argv[1]))
    except recipes.launch.launcher.RunFailed as error:
        sys.exit(f"error: {{error}}")
"""
NO_MEMORY = "torch.empty(2**58, dtype=torch.uint8)"  # PyTorch's own error, on any machine


def raising(program: Program, statement: str, fields: str = "", launcher: list[str] | None = None) -> Finished:
    """A run of two ranks, one of which executes the statement; checks that no process and no secret is left."""
    script = program.folder / "raises.py"
    script.write_text(RAISES.format(statement=statement, fields=fields, repository=str(REPOSITORY)))
    run_dir = program.folder / "run"
    command = [*(launcher or []), str(script), str(run_dir)]
    environment = program.environment(wandb=False, PYTHONPATH=f"{REPOSITORY}:{program.folder}", **PLANTED)
    running = Running(command, environment, run_dir)
    try:
        while running.process.poll() is None:
            running.family()
            time.sleep(0.05)
        running.assert_nothing_is_left()
        assert_no_secrets(program.folder)
        return running.finish()
    finally:
        running.end()


def test_a_rank_that_raises_is_named_with_its_error_and_ends_the_run(program):
    result = raising(program, 'raise RuntimeError("the sky is falling on this rank")')
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    log = result.run_dir / "logs" / "rank_1.log"
    first, *_, raised, last = result.stderr.splitlines()
    names(first, "rank 1")
    assert result.stderr.count("Traceback (most recent call last):") == 1
    assert raised == "RuntimeError: the sky is falling on this rank"
    names(last, log)
    assert "RuntimeError: the sky is falling on this rank" in log.read_text()


def test_a_rank_out_of_memory_ends_the_run_with_the_plan_and_three_overrides(program):
    result = raising(program, NO_MEMORY)
    assert result.exit_code == 1
    log = result.run_dir / "logs" / "rank_1.log"
    lines = result.stderr.splitlines()
    names(lines[0], "error", "rank 1", "out of memory", "starting")
    assert "DefaultCPUAllocator" in lines[1]
    names(lines[2], "ranks", "1 data x 2 ring", "CPU")
    *overrides, last = lines[-4:]
    best_first = ["engine.recompute=selective", "engine.zero_stage=3", "data.sequence_length=1024"]
    assert [override.split()[0] for override in overrides] == best_first
    names(last, log)
    assert "Traceback" not in result.stdout + result.stderr
    assert "Traceback" in log.read_text()
    assert "DefaultCPUAllocator" in log.read_text()


@pytest.mark.slow
def test_a_launchers_rank_out_of_memory_is_reported_once(program):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    result = raising(program, NO_MEMORY, launcher=[torchrun, "--standalone", "--nproc-per-node=2"])
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    names(error, "rank 1", "out of memory", "starting")
    assert result.stderr.count("  engine.zero_stage=3  ") == 1
    assert "DefaultCPUAllocator" in (result.run_dir / "logs" / "rank_1.log").read_text()


def test_a_model_refused_by_the_ranks_is_reported_once(program):
    """As on GPUs, whose memory only the ranks look at."""
    result = raising(program, "pass", fields=", model=ModelConfig(hidden_size=2**20)")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    names(lines[0], "error", "tiny", "engine.zero_stage=1", "2 ranks")
    assert re.search(r"[\d,.]+ GiB > [\d,.]+ GiB", lines[1])
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stdout + result.stderr
