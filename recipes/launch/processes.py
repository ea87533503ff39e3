"""Rank processes that we have started: the signals they get, who of them fails first, and that none is left.

Below `launch`, which starts them.
"""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import NoReturn

from recipes.run.errors import Preempted

UNWINDING_S = 10.0  # wandb's offline run takes one to four to close
END_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send either some time before they kill


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 act once the block is done: a process that is started halfway prints a traceback.

    Processes that are started in it have Ctrl-C blocked, until they say otherwise: imports would print one, too.
    """
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, *END_SIGNALS)
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def signals_passed_on(processes: list[BaseProcess]) -> Iterator[list[int]]:
    """The first SIGTERM or SIGUSR1 goes to the ranks, and into the list; a later one acts as it did before."""
    told: list[int] = []
    handlers = {number: signal.getsignal(number) for number in END_SIGNALS}

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    for number in END_SIGNALS:
        signal.signal(number, pass_on)
    try:
        yield told
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def first_to_fail(processes: list[BaseProcess]) -> int | None:
    """Wait until all ranks have ended well, or as they were told to; or the number of the first that has not."""
    left = {process.sentinel: rank for rank, process in enumerate(processes)}
    while left:
        for sentinel in multiprocessing.connection.wait(list(left)):
            assert isinstance(sentinel, int)
            rank = left.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode not in (0, Preempted.EXIT_CODE):
                return rank
    return None


def unwind_on_sigint() -> None:
    """In a rank: SIGINT, blocked so far, raises KeyboardInterrupt in the main thread, which has a few seconds to end.

    A thread waits for the signal: one that is stuck in a collective runs no handler, and is ended all the same.
    """

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        _thread.interrupt_main()
        time.sleep(UNWINDING_S)
        os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=wait, daemon=True, name="SIGINT").start()


def exit_by_sigint() -> NoReturn:
    """In a rank that has unwound: end as one that does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("SIGINT ends a process")


def end_rank_0_last(processes: list[BaseProcess]) -> None:
    """After Ctrl-C: the others end at once, the first when it has closed its files and its wandb run."""
    first, *others = processes
    # before the others end: the first, whose collective fails then, would be interrupted while it closes all that
    if first.pid is not None and first.is_alive():
        os.kill(first.pid, signal.SIGINT)  # one more than a terminal's, which nobody waits for
    kill_all(others)
    first.join(UNWINDING_S + 1)


def kill_all(processes: list[BaseProcess]) -> None:
    """Leave no rank behind, however the parent got here."""
    for process in processes:
        process.kill()  # a rank that trains takes SIGTERM for a wish
    for process in processes:
        process.join()
