"""A process that has imported torch, DeepSpeed, Hydra, datasets and transformers. Tests fork ranks and programs of it.

It imports `tests.imported`, for 10 s, once `start` is called or a process is forked. Some tests of the command line
start Python anew, as users do.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.run.errors import STOP_SIGNALS

IMPORTED = "tests.imported"


def context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    return context


def start() -> None:
    """Let the server import, and do not wait for it."""
    context()
    multiprocessing.forkserver.ensure_running()


class ForkedProgram:
    """A Python script in its own session, with the part of Popen's interface that tests use. Its ranks are forks of it.

    Args:
        command: the script and its arguments.
        outputs: the files of stdout and stderr.
    """

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], outputs: list[Path]) -> None:
        self._process = context().Process(target=_run, args=(command, folder, environment, outputs))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], folder: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(write_through=True)
    sys.argv = command
    sys.path[0:0] = [str(Path(command[0]).absolute().parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    import torch.multiprocessing

    spawn = torch.multiprocessing.start_processes

    def fork(function: Callable[..., None], args: tuple[Any, ...], *more: Any, **options: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return spawn(functools.partial(_forked_rank, function), args, *more, **options | {"start_method": "fork"})
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    torch.multiprocessing.start_processes = fork
    runpy.run_path(command[0], run_name="__main__")


def _forked_rank(function: Callable[..., None], *arguments: Any) -> None:
    """A new process has no signal handlers yet; a fork has its parent's."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    function(*arguments)
