"""Runs `python train.py ...` as a user would, in its own process and a clean environment.

The process is a fork of one that has imported what takes seconds, unless a launcher or Python itself is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recipes.monitor.metric_registry import METRICS
from tests.fork_server import ForkedProgram

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable]  # as a launcher: nothing is imported yet
TIMEOUT_S = 200.0  # of a run; generous, for busy machines
ENDS_WITHIN_S = 20.0  # "a few seconds" on a busy machine
SMALL = ["data.sequence_length=256", "data.validation_sequences=2", "launch.num_ranks=2"]
LONG = [*SMALL, "num_steps=1000000", "logging.every_n_steps=2"]  # until a test ends it
# steps do not depend on num_steps
PLAIN = [
    "+experiment=ra_sp",
    *SMALL,
    "logging.every_n_steps=1",
    "breakdown=false",
    "optimizer.decay=constant",
    "optimizer.warmup_fraction=0",
]


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """Without variables of launchers, wandb or logins."""
    unwanted = ("WANDB_", "SLURM_", "HYDRA_", "HF_", "DS_", "MASTER_", "GLOO_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NETRC"):
        environment.pop(name, None)
    return {**environment, "HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", **extra}


def wandb(*arguments: str, home: Path) -> str:
    command = [sys.executable, "-m", "wandb", *arguments]
    result = subprocess.run(command, env=clean_environment(home), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def wandb_history(run: Path, home: Path) -> list[dict[str, Any]]:
    """The logged rows of a wandb run's folder."""
    records = map(json.loads, wandb("leet", "inspect", "--json", str(run), home=home).splitlines())
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def logged_names(*prefixes: str, conditions: tuple[str, ...] = ()) -> set[str]:
    """The metrics that a run logs over its steps, by the registry.

    Args:
        prefixes: such as train and validation.
        conditions: the conditions of metrics that hold.
    """
    metrics = [metric for metric in METRICS if metric.requires in ("", *conditions)]
    names = [name for metric in metrics for name in metric.logged_names]
    return {name for name in names if name.rpartition("/")[0] in ("", *prefixes)}


@dataclass
class Finished:
    """A run that has ended."""

    exit_code: int
    stdout: str
    stderr: str
    run_dir: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def ranks_were_started(self) -> bool:
        return "starting" in self.stdout or (self.run_dir / "logs").exists()


class Running:
    """A running program in its own session, with its output in files. A command that is a script is forked."""

    def __init__(self, command: list[str], environment: dict[str, str], run_dir: Path) -> None:
        self.run_dir = run_dir
        self._outputs = [run_dir.parent / f"{run_dir.name}.{name}" for name in ("stdout", "stderr")]
        self.process: subprocess.Popen[bytes] | ForkedProgram
        with self._outputs[0].open("w") as stdout, self._outputs[1].open("w") as stderr:
            if command[0].endswith(".py"):
                self.process = ForkedProgram(command, REPOSITORY, environment, self._outputs)
            else:
                self.process = subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
                )
        self._family: dict[int, psutil.Process] = {}

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text()

    def family(self) -> list[psutil.Process]:
        """All processes ever seen in its process tree that are still alive, itself included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self._family |= {process.pid: process for process in [parent, *parent.children(recursive=True)]}
        return [process for process in self._family.values() if _lives(process)]

    def listening_addresses(self) -> set[str]:
        """The addresses on which its processes listen."""
        found = set()
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                connections = process.net_connections("tcp")
                found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        return found

    def ranks(self) -> list[psutil.Process]:
        """Its ranks' processes, in rank order."""
        children = psutil.Process(self.process.pid).children()
        ranks = [child for child in children if re.search("spawn_main|forkserver", " ".join(child.cmdline()))]
        return sorted(ranks, key=lambda process: process.pid)

    def until(self, condition: Callable[[], Any]) -> Any:
        """What `condition` returns once it is true. Fails if the program ends first."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := condition()):
            assert self.process.poll() is None, f"ended early:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"timed out:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.05)
        return value

    def until_it_trains(self) -> list[psutil.Process]:
        """Its ranks, after a few steps. Remembers the family."""
        self.until(lambda: re.search(r"step +4/", self.stdout))
        self.family()
        return self.ranks()

    def finish(self, timeout_s: float = TIMEOUT_S) -> Finished:
        exit_code = self.process.wait(timeout_s)
        return Finished(exit_code, self.stdout, self.stderr, self.run_dir)

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + ENDS_WITHIN_S
        while left := self.family():
            assert time.monotonic() < deadline, f"still there: {[process.cmdline() for process in left]}"
            time.sleep(0.05)

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Program:
    """`train.py` with its output in a test's folder."""

    folder: Path

    def environment(self, *, wandb: bool = False, **extra: str) -> dict[str, str]:
        """With `wandb`, as for a user who has not logged in; otherwise wandb is off, which saves 5 s a run."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        mode = {} if wandb else {"WANDB_MODE": "disabled"}
        return clean_environment(home, **(mode | extra))

    @contextlib.contextmanager
    def started(
        self, *arguments: str, name: str = "run", launcher: list[str] | None = None, wandb: bool = False, **extra: str
    ) -> Iterator[Running]:
        """The running program; killed at the end of the block if it still runs."""
        run_dir = self.folder / name
        directory = f"hydra.sweep.dir={run_dir}" if "-m" in arguments else f"hydra.run.dir={run_dir}"
        own = ("HF_TOKEN", "PYTHONPATH")  # a fork reads these, too
        read_by_imports = (name for name in extra if name.startswith(("PYTHON", "HF_")) and name not in own)
        if launcher is None and any(read_by_imports):
            launcher = PYTHON
        command = [*(launcher or []), "train.py", *arguments]
        if not any(argument.startswith("hydra.run.dir=") for argument in arguments):
            command.append(directory)
        running = Running(command, self.environment(wandb=wandb, **extra), run_dir)
        try:
            yield running
        finally:
            running.end()

    def run(
        self, *arguments: str, name: str = "run", launcher: list[str] | None = None, wandb: bool = False, **extra: str
    ) -> Finished:
        with self.started(*arguments, name=name, launcher=launcher, wandb=wandb, **extra) as running:
            return running.finish()
