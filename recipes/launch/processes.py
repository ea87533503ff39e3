"""Rank processes started by `launcher`: their signals, which fails first, and that none is left behind."""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from recipes.run.errors import Preempted

CLOSING_S = 10.0  # wandb's offline run takes one to four to close
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send one of them some time before they kill


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 take effect after the block; processes that are starting would print tracebacks.

    Processes started in the block have SIGINT blocked until they unblock it, for the same reason.
    """
    received: list[int] = []
    numbers = (signal.SIGINT, *STOP_SIGNALS)
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        _restore(handlers)
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def signals_passed_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass the first SIGTERM or SIGUSR1 on to the ranks and put it in the list; later ones act as before the block."""
    passed_on: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def pass_on(number: int, _: object) -> None:
        passed_on.append(number)
        _restore(handlers)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    try:
        yield passed_on
    finally:
        _restore(handlers)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def first_to_fail(processes: Sequence[BaseProcess]) -> int | None:
    """Wait until all ranks have ended well or preempted, or return the first rank that has not."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            assert isinstance(sentinel, int)
            rank = running.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode not in (0, Preempted.EXIT_CODE):
                return rank
    return None


def close_on_sigint() -> None:
    """In a rank: on SIGINT, blocked so far, raise KeyboardInterrupt in the main thread, which has CLOSING_S to exit.

    A thread waits for the signal: a main thread that is stuck in a collective runs no handler, and must end too.
    """

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        _thread.interrupt_main()
        time.sleep(CLOSING_S)
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=wait, daemon=True, name="SIGINT").start()


def die_on_sigint() -> None:
    """In a rank: SIGINT, blocked so far, ends the process at once, even one that is stuck in a collective."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def exit_by_sigint() -> NoReturn:
    """In a rank that has closed its files: exit with the code of SIGINT."""
    die_on_sigint()
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("SIGINT ends a process")


def end_rank_0_last(processes: Sequence[BaseProcess]) -> None:
    """After Ctrl-C: kill all ranks but rank 0, which first closes its files and its wandb run."""
    first, *others = processes
    # interrupt rank 0 before the others die, or their failed collective would be what it closes on
    if first.pid is not None and first.is_alive():
        os.kill(first.pid, signal.SIGINT)  # a second SIGINT, after a terminal's, is ignored
    kill_all(others)
    first.join(CLOSING_S + 1)


def kill_all(processes: Sequence[BaseProcess]) -> None:
    """Leave no rank behind, however the parent got here. Not by SIGTERM, a stop request to ranks that train."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
