"""Ranks started by torchrun, DeepSpeed's launcher or srun join one run instead of starting their own ranks."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.checkpoint.manifest import newest_first, read_manifest
from tests.cli.program import LONG, REPOSITORY, SMALL, Finished, Program, Running, wandb
from tests.errors import names, some_line_names

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"]
JOB = [*SMALL, "num_steps=6", "logging.every_n_steps=2"]


def assert_one_run_of_two_ranks(result: Finished) -> None:
    assert result.exit_code == 0, result.stderr
    assert len(re.findall("^ +ranks  1 data x 2 ring", result.stdout, re.MULTILINE)) == 1
    assert len(re.findall("^done: 6 steps", result.stdout, re.MULTILINE)) == 1
    assert sorted(path.name for path in (result.run_dir / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    assert [line["step"] for line in result.metrics] == [1, 2, 4, 6]
    assert len(list((result.run_dir / "wandb").glob("offline-run-*"))) == 1
    assert (result.run_dir / "config.yaml").exists()


def test_ranks_of_torchrun_are_one_run_and_profile_each_rank(program):
    profiled = ["+debug=profile", "profile_steps=[4,4]"]
    result = program.run("+experiment=ra_sp", *profiled, *JOB, launcher=TORCHRUN, wandb=True)
    assert_one_run_of_two_ranks(result)
    assert sorted(path.name for path in (result.run_dir / "profile").iterdir()) == ["rank_0.json", "rank_1.json"]
    events = json.loads((result.run_dir / "profile" / "rank_1.json").read_text())["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("ph") == "X")
    assert [name for name in names if name.startswith("ProfilerStep")] == ["ProfilerStep#3"]  # counted from 0
    ring_steps = {name: count for name, count in names.items() if " ring step " in name}
    # 2 layers; the backward pass computes half of the local attention in one step more
    assert ring_steps == dict.fromkeys(
        ["forward ring step 0", "forward ring step 1", *(f"backward ring step {step}" for step in (0, 1, 2))], 2
    )
    assert all(names[name] > 0 for name in ("attention kernel", "merge", "exchange wait", "optimizer", "data"))
    some_line_names(result.stdout.splitlines(), "memory snapshots", "none", "GPU")


def test_ranks_of_deepspeeds_launcher_are_one_run_and_overfit_one_batch(program):
    launcher = [str(BIN / "deepspeed"), "--num_gpus=2", "--no_local_rank", "--master_port", str(free_port())]
    environment = {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:/usr/bin:/bin"}
    result = program.run("+debug=overfit", *JOB, launcher=launcher, wandb=True, **environment)
    assert_one_run_of_two_ranks(result)
    losses = [line["train/loss"] for line in result.metrics]
    assert losses[-1] == min(losses) < losses[0] - 1


def test_under_torchrun_rank_0_closes_its_run_and_reports_a_common_error_before_others_exit(program):
    """Without checkpoints, torchrun's SIGTERM would kill it."""
    launcher = [*TORCHRUN, "tests/tools/bad_loss.py", "3"]
    half_written = program.folder / "run" / "checkpoints" / "writing" / "step_00000004"  # of a run that was killed
    half_written.mkdir(parents=True)
    result = program.run(*SMALL, "num_steps=6", "checkpoint.keep=0", launcher=launcher, wandb=True)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    names(error, "step 3", "nan", "rank 1")
    some_line_names(result.stderr.splitlines(), "no checkpoint", "engine.on_bad_step=skip")
    assert not half_written.parent.exists()
    [run] = result.run_dir.glob("wandb/offline-run-*")
    shown = wandb("leet", "inspect", "--summary", str(run), home=program.folder)
    assert re.search(r"^state +failed ", shown, re.MULTILINE)


def test_under_torchrun_a_rank_that_loses_another_reports_its_position(program):
    with program.started(*LONG, launcher=TORCHRUN, wandb=True) as running:
        running.until(lambda: re.search(r"step +4/", running.stdout))
        ranks = [process for process in running.family() if "train.py" in process.cmdline()]
        [first] = [process for process in ranks if process.environ().get("RANK") == "0"]
        first.kill()
        result = running.finish()
        running.assert_nothing_is_left()
    assert result.exit_code == 1
    position = r"step \d+, \w+"
    [error] = re.findall(rf"^error: rank 1 .*{position}.*$", result.stderr, re.MULTILINE)
    assert re.search(r"\w+Error: ", error)
    names(result.stderr, result.run_dir / "logs" / "rank_1.log")
    assert "[rank1]: Traceback" not in result.stderr


@pytest.mark.parametrize(("launcher", "number"), [(None, signal.SIGUSR1), (TORCHRUN, signal.SIGTERM)])
def test_a_signal_to_the_started_program_saves_a_checkpoint(program, launcher: list[str] | None, number: int):
    with program.started(*LONG, launcher=launcher, wandb=launcher is not None) as running:
        running.until(lambda: re.search(r"step +4/", running.stdout))
        running.family()
        running.process.send_signal(number)
        result = running.finish()
        running.assert_nothing_is_left()
    assert result.exit_code == 143 or launcher
    assert (result.run_dir / "logs" / "preempted").exists()
    [checkpoint] = newest_first(result.run_dir)
    some_line_names(result.stdout.splitlines(), "preempted", f"step {read_manifest(checkpoint).step}", "same command")


@contextlib.contextmanager
def srun(program: Program, *arguments: str, launcher: list[str] | None = None) -> Iterator[list[Running]]:
    """Two tasks with the environment that `srun --ntasks=2` sets; there is no SLURM here."""
    job = str(random.randrange(10**9))
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                program.started(
                    *arguments,
                    name=f"task_{task}",
                    launcher=launcher,
                    SLURM_JOB_ID=job,
                    SLURM_PROCID=str(task),
                    SLURM_LOCALID=str(task),
                    SLURM_STEP_NUM_TASKS="2",
                    SLURM_STEP_TASKS_PER_NODE="2",
                    SLURM_STEP_NODELIST="localhost",
                    wandb=True,
                )
            )
            for task in range(2)
        ]
    assert list(Path(tempfile.gettempdir()).glob(f"ring_attention_*{job}*")) == []


def finished_by_srun(program: Program, *arguments: str) -> list[Finished]:
    with srun(program, *arguments) as tasks:
        return [task.finish() for task in tasks]


def test_tasks_of_srun_are_one_run_in_rank_0s_run_dir_and_listen_on_loopback_only(program):
    """Each task composes its own run dir. Also covers +debug=anomaly, which only shows as a line per step."""
    addresses = set()

    def trains() -> bool:
        for task in tasks:
            addresses.update(task.listening_addresses())
        return "step 1/" in tasks[0].stdout

    with srun(program, "+debug=anomaly", *SMALL, "num_steps=2") as tasks:
        tasks[0].until(trains)
        first, second = [task.finish() for task in tasks]
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert addresses
    assert addresses <= {"127.0.0.1", "::1"}
    assert [line["step"] for line in first.metrics] == [1, 2]
    assert sorted(path.name for path in (first.run_dir / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    assert not second.run_dir.exists()
    assert second.stdout == ""


def test_no_preempted_task_of_srun_exits_before_rank_0_has_closed_its_run(program):
    """`srun --kill-on-bad-exit=1` would kill it."""
    slow_to_close = ["tests/tools/bad_loss.py", "1000000"]  # forked
    with srun(program, *LONG, launcher=slow_to_close) as (first, second):
        first.until(lambda: re.search(r"step +4/", first.stdout))
        second.process.send_signal(signal.SIGUSR1)
        assert second.finish().exit_code == 143
        [run] = first.run_dir.glob("wandb/offline-run-*")
        shown = wandb("leet", "inspect", "--summary", str(run), home=program.folder)
        result = first.finish()
    assert result.exit_code == 143
    assert re.search(rf"^ +step +{result.metrics[-1]['step']}$", shown, re.MULTILINE), shown


def test_a_mistake_under_a_launcher_is_reported_once(program):
    for arguments, parts in (
        (["-m", "optimizer.lr=1e-3,3e-3"], ["-m", "python train.py -m"]),
        (["--local_rank=0"], ["--local_rank=0", "deepspeed --no_local_rank"]),
        (["parallelism.ring_degree=3"], ["parallelism.ring_degree=3", "2 ranks", "parallelism.ring_degree=2"]),
        (["data.sequence_lenght=8"], ["data.sequence_lenght", "data.sequence_length"]),
    ):
        first, second = finished_by_srun(program, *arguments)
        [error] = first.stderr.splitlines()
        assert error.startswith("error: ")
        names(error, *parts)
        assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
        assert (first.exit_code, second.exit_code) == (1, 1)
        assert not first.run_dir.exists()


LATE = f"""
import os, runpy, sys, time

sys.path.insert(0, {str(REPOSITORY)!r})
time.sleep(2 if os.environ["RANK"] == "0" else 0)
del sys.argv[0]
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_mistake_under_torchrun_is_reported_although_rank_0_is_slower(program):
    """torchrun ends rank 0 as soon as another rank exits."""
    script = program.folder / "late.py"
    script.write_text(LATE)
    result = program.run("parallelism.ring_degree=3", launcher=[*TORCHRUN, str(script)])
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    names(error, "parallelism.ring_degree=3", "2 ranks")
    assert result.exit_code == 1


def test_explain_under_a_launcher_prints_one_plan_for_its_ranks(program):
    first, second = finished_by_srun(program, "explain=true")
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    some_line_names(first.stdout.splitlines(), "ranks", "1 data x 2 ring", "CPU")
    assert second.stdout == ""
    assert not first.run_dir.exists()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
