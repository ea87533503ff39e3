"""Starts a run's ranks as processes of this machine, passes signals on to them, and ends them together.

A rank's output, including that of libraries, goes to RUN_DIR/logs/rank_N.log; the console shows rank 0's report.
"""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from conf.schema import ConfigError
from recipes.checkpoint.manifest import remove_unfinished, resume_hint
from recipes.launch.environment import RENDEZVOUS
from recipes.launch.failure import Outcome, explain_failure
from recipes.launch.startup import exit_now
from recipes.launch.worker import Task, clear_earlier_start, run_rank
from recipes.run.errors import STOP_SIGNALS, Preempted, RunFailed
from recipes.run.run_dir import LOGS_DIR, PREEMPTED_FILE

CROWDED_RANKS_PER_CORE = 4  # a rank imports libraries for several seconds of a core
CLOSING_S = 10.0  # wandb's offline run takes one to four to close


def starting(num_ranks: int, run_dir: Path) -> str:
    """The first line of a run. On the CPU it says if the ranks are so many that nothing will happen for minutes."""
    num_cores = len(os.sched_getaffinity(0))
    is_crowded = not torch.cuda.device_count() and num_ranks > CROWDED_RANKS_PER_CORE * num_cores
    wait = f" on {num_cores} CPU cores, which takes minutes: launch.num_ranks=4 is quicker" if is_crowded else ""
    return f"starting {num_ranks} rank{'s' if num_ranks > 1 else ''}{wait}; logs in {run_dir / LOGS_DIR}"


def launch(task: Task, num_ranks: int, run_dir: Path) -> float:
    """Start processes on this machine, run the task, and return rank 0's result. No process is left afterwards.

    Raises:
        RunFailed: if a rank failed.
        Preempted: on SIGTERM or SIGUSR1. Ranks that train save a checkpoint first; others end at once, as all do on a
            second signal.
    """
    print(starting(num_ranks, run_dir), flush=True)
    clear_earlier_start(run_dir)
    # neither a queue, whose lock needs /dev/shm, nor files, which need room on a disk
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(num_ranks)]
    rendezvous = tempfile.mkdtemp(prefix="ring_attention_")  # network disks may lack locks
    processes: Any = None
    try:
        with signals_deferred():
            arguments = (os.getpid(), task, num_ranks, run_dir, rendezvous, [writer for _, writer in pipes])
            context: Any = mp.start_processes(_rank_process, arguments, num_ranks, join=False, start_method="spawn")
        processes = context.processes
        with signals_passed_on(processes) as passed_on:
            failed = first_to_fail(processes)
        exit_codes = [process.exitcode or 0 for process in processes]
        outcomes: list[Outcome] = [reader.recv() for reader, _ in pipes if reader.poll()]
        if failed is None:
            if Preempted.EXIT_CODE in exit_codes:
                raise Preempted
            return next(outcome.result for outcome in outcomes if outcome.rank == 0)
        if exit_codes[failed] in (-signal.SIGINT, 128 + signal.SIGINT):
            raise KeyboardInterrupt  # a terminal sends Ctrl-C to all, and this rank was faster than we
        if passed_on and -passed_on[0] in exit_codes:
            raise Preempted(number=passed_on[0])
        raise RunFailed(explain_failure(exit_codes, failed, outcomes, run_dir))
    except KeyboardInterrupt:
        print(f"\ninterrupted; {resume_hint(run_dir)}; the run so far: {run_dir}", flush=True)
        if processes:
            end_rank_0_last(processes)
        raise
    except Preempted as error:
        if not (run_dir / LOGS_DIR / PREEMPTED_FILE).exists():  # else rank 0 has said what resumes
            name = signal.Signals(error.number).name
            print(f"ended by {name} without saving; {resume_hint(run_dir)}; the run so far: {run_dir}", flush=True)
        raise
    finally:
        kill_all(multiprocessing.active_children())  # includes the processes of an interrupted start
        remove_unfinished(run_dir)  # which may be what fills the disk
        shutil.rmtree(rendezvous, ignore_errors=True)


def _rank_process(
    rank: int, parent_pid: int, task: Task, num_ranks: int, run_dir: Path, rendezvous: str, pipes: list[Connection]
) -> None:
    if rank:
        die_on_sigint()  # which is also sent when the parent dies
    if os.getppid() != parent_pid:  # the parent died while this rank was starting
        return
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS: rendezvous}
    try:
        if rank == 0:
            close_on_sigint()  # it has files and a wandb run to close
        result = run_rank(task, run_dir, has_parent=True)
    except Exception as error:
        is_explained = isinstance(error, (ConfigError, RunFailed))
        # a pipe holds 64 KiB; a longer message would block
        text = str(error) if is_explained else f"rank {rank} failed:\n{traceback.format_exc()[-20_000:]}"
        pipes[rank].send(Outcome(rank, error=text, refused=isinstance(error, ConfigError)))
        exit_now(1)
    except KeyboardInterrupt:
        exit_now(128 + signal.SIGINT)
    except Preempted:
        exit_now(Preempted.EXIT_CODE)
    pipes[rank].send(Outcome(rank, result))
    exit_now(0)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 take effect after the block. Processes that start in it have SIGINT blocked.

    Until they run our code they would print tracebacks.
    """
    received: list[int] = []
    try:
        with _handled((signal.SIGINT, *STOP_SIGNALS), lambda number, _: received.append(number)):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    finally:
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def signals_passed_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass the first SIGTERM or SIGUSR1 on to the ranks and put it in the list; a later one raises Preempted."""
    passed_on: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if passed_on:
            raise Preempted(number=number)
        passed_on.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    with _handled(STOP_SIGNALS, pass_on):
        yield passed_on


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def first_to_fail(processes: Sequence[BaseProcess]) -> int | None:
    """Wait until all ranks have ended well or preempted, or return the first rank that has not."""
    running: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
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
