"""Starts the ranks of a run, or joins those that a launcher has started, and ends them all together.

What they do is a `Task`: a recipe, or the turns of `recipes.benchmark.compare`. Under `python train.py` the parent has composed
the configuration and starts one process per GPU, or a few on the CPU. Under torchrun, `deepspeed --no_local_rank` and
srun rank 0's task and run dir are what all ranks use. Every rank's output, of libraries too, goes to
RUN_DIR/logs/rank_N.log; the console shows rank 0's report.

The parent must not import DeepSpeed (seconds) nor touch a GPU (memory), so what needs them is imported by the ranks.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from conf.degrees import accumulation_steps, resolve_config, resolve_degrees
from conf.schema import Config, ConfigError
from recipes.checkpoint.manifest import check_same_run, newest_readable
from recipes.launch.environment import RENDEZVOUS, ranks_are_started
from recipes.launch.processes import (
    end_rank_0_last,
    exit_by_sigint,
    first_to_fail,
    kill_all,
    signals_deferred,
    signals_passed_on,
    unwind_on_sigint,
)
from recipes.launch.worker import Task, run_rank
from recipes.planning.plan import Plan
from recipes.run.errors import Preempted, RunFailed
from recipes.run.heartbeat import LOGS_DIR, STALL_FILE, clear_rank_states, describe_ranks, read_rank_state
from recipes.run.run_dir import SUMMARY_FILE

DEFAULT_CPU_RANKS = 4
TIMED_OUT = "Timed out waiting"  # gloo's words


@dataclass(frozen=True)
class _Outcome:
    """What a rank tells its parent: the recipe's result, or how it failed.

    Args:
        error: for people, whole: it names the rank, where that matters.
        refused: whether the configuration is at fault, not this rank.
    """

    rank: int
    result: float = float("nan")
    error: str = ""
    refused: bool = False


def count_ranks(config: Config) -> int:
    """How many ranks there are, or `launch` would start on this machine.

    Raises:
        ConfigError: if the configuration does not fit them.
    """
    if ranks_are_started():
        num_ranks = int(os.environ["WORLD_SIZE"])
        accumulation_steps(config, resolve_degrees(config, num_ranks))
        return num_ranks
    num_gpus = torch.cuda.device_count()
    num_ranks = config.launch.num_ranks or num_gpus or DEFAULT_CPU_RANKS
    if num_gpus and num_ranks > num_gpus:
        raise ConfigError(
            f"launch.num_ranks={num_ranks} is more than the GPUs here: use launch.num_ranks={num_gpus} or fewer, "
            "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    accumulation_steps(config, resolve_degrees(config, num_ranks))
    if not num_gpus or config.attention.kernel != "auto":  # the automatic choice cannot fail, and this takes GPU memory
        make_plan(config, num_ranks)
    return num_ranks


def make_plan(config: Config, num_ranks: int) -> Plan:
    """The plan for `num_ranks` ranks like this one; on a GPU machine it initialises CUDA.

    Raises:
        ConfigError: if the configuration does not fit the ranks or the device.
    """
    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if not torch.cuda.is_available():
        if config.engine.dtype == "fp16":
            raise ConfigError("engine.dtype=fp16 needs a GPU: use engine.dtype=bf16 or engine.dtype=fp32 on the CPU")
        if config.attention.transport == "copy_engine":
            raise ConfigError("attention.transport=copy_engine needs GPUs: use attention.transport=p2p on the CPU")
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_host
        return Plan(config, num_ranks, "cpu", "CPU", None, ranks_per_host, memory_bytes)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    return Plan(
        config, num_ranks, "cuda", properties.name, capability, ranks_per_host, memory_bytes=properties.total_memory
    )


def shared_plan(config: Config) -> Plan:
    """Rank 0's plan, settled, for all: hosts may have unequal numbers of GPUs, or kinds. Every rank must call it.

    Raises:
        ConfigError: on every rank, if the configuration does not fit rank 0's device.
    """
    import deepspeed.comm as dist

    shared: list[Plan | ConfigError | None] = [None]
    if dist.get_rank() == 0:
        try:
            shared = [make_plan(config, dist.get_world_size())]
        except ConfigError as error:
            shared = [error]
    dist.broadcast_object_list(shared, src=0)
    plan = shared[0]
    if isinstance(plan, ConfigError):
        raise plan
    assert plan is not None
    plan.resolve_config()
    return plan


def ended_before(config: Config, num_ranks: int, run_dir: Path) -> float | None:
    """The validation loss if the run dir has a run that went through all its steps; None if there is something to do.

    Raises:
        ConfigError: if its newest checkpoint is of another run. With attention=auto the ranks say so.
    """
    newest = newest_readable(run_dir)
    if newest is None:
        return None
    folder, manifest = newest
    if config.attention.method != "auto":
        ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        resolved = copy.deepcopy(config)
        resolve_config(resolved, resolve_degrees(config, num_ranks, ranks_per_host), num_ranks)
        check_same_run(folder, manifest, resolved)
    if manifest.step < config.num_steps:
        return None
    if os.environ.get("RANK", "0") == "0":
        print(f"all {manifest.step} steps of {run_dir} are done: to train anew use another hydra.run.dir")
    return json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))["validation_loss"]


def start(task: Task, num_ranks: int, run_dir: Path) -> float:
    """Run the task in ranks of our own, or as one of those that a launcher has started: rank 0's is used by all.

    Raises:
        RunFailed: if a rank that we started failed, or this one of a launcher's. If all of those raise it, rank 0
            has told people of it.
        Preempted: as `launch`; if all ranks of a launcher raise it, rank 0 has closed all.
    """
    if ranks_are_started():
        meeting = os.environ.get(RENDEZVOUS)
        try:
            return run_rank(task, run_dir, init_method=None)
        except (RunFailed, Preempted) as error:
            if error.of_all_ranks:
                _after_the_first(error)
            raise
        finally:
            if meeting:  # of this run alone, which is over if one rank's part is
                shutil.rmtree(meeting, ignore_errors=True)
    return launch(task, num_ranks, run_dir)


def _after_the_first(error: RunFailed | Preempted) -> None:
    """No rank goes before rank 0, which has had files to close, has told people: the launcher would end it."""
    import deepspeed.comm as dist

    if dist.get_rank() == 0 and isinstance(error, RunFailed):
        print(f"error: {error}", file=sys.stderr, flush=True)
    dist.barrier()


def launch(task: Task, num_ranks: int, run_dir: Path) -> float:
    """Start `num_ranks` processes on this machine, run the task, and return rank 0's result.

    Raises:
        RunFailed: if a rank failed. No process is left then, nor on Ctrl-C.
        Preempted: if SIGTERM or SIGUSR1 told the run to end. Ranks that train save a checkpoint first; all others
            end at once. After a second signal all do.
    """
    print(f"starting {num_ranks} rank{'s' if num_ranks > 1 else ''}; logs in {run_dir / LOGS_DIR}", flush=True)
    clear_rank_states(run_dir)
    try:
        outcomes = mp.get_context("spawn").SimpleQueue()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunFailed(
            f"there is no shared memory left, where the queue's lock is a file ({error}): remove what fills "
            "/dev/shm, or give the container more (docker run --shm-size=1g)"
        ) from error
    rendezvous_dir = Path(tempfile.mkdtemp(prefix="ring_attention_"))  # not the run dir: a network disk may lack locks
    processes: Any = None
    try:
        with signals_deferred():
            context = mp.start_processes(
                _launched_rank,
                (os.getpid(), task, num_ranks, run_dir, rendezvous_dir, outcomes),
                num_ranks,
                join=False,
                start_method="spawn",
            )
        assert context is not None
        processes = context.processes
        with signals_passed_on(processes) as told:
            failed = first_to_fail(processes)
        exit_codes = [process.exitcode or 0 for process in processes]
        if failed is not None:
            if exit_codes[failed] == -signal.SIGINT:
                raise KeyboardInterrupt  # Ctrl-C goes to all; this rank was faster than we
            if not told or -told[0] not in exit_codes:
                raise RunFailed(_explain_failure(exit_codes, failed, _received(outcomes), run_dir))
            raise Preempted
        if Preempted.EXIT_CODE in exit_codes:
            raise Preempted
        return next(outcome.result for outcome in _received(outcomes) if outcome.rank == 0)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what there is of the run: {run_dir}", flush=True)
        if processes:
            end_rank_0_last(processes)
        raise
    finally:
        kill_all(multiprocessing.active_children())  # those of an interrupted start, too
        shutil.rmtree(rendezvous_dir, ignore_errors=True)


def _launched_rank(
    rank: int,
    parent_pid: int,
    task: Task,
    num_ranks: int,
    run_dir: Path,
    rendezvous_dir: Path,
    outcomes: SimpleQueue[_Outcome],
) -> None:
    # SIGINT is sent when the parent dies, too; it must end a rank that is stuck in a collective
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if os.getppid() != parent_pid:  # it died while this rank was starting
        return
    tqdm.set_lock(threading.RLock())  # its own is a semaphore; one that a killed rank leaves makes Python warn
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
    )
    try:
        if rank == 0:
            unwind_on_sigint()  # it has files and a wandb run to close
        result = run_rank(task, run_dir, f"file://{rendezvous_dir / 'meeting'}")
    except Exception as error:
        explained = isinstance(error, (ConfigError, RunFailed))
        text = str(error) if explained else f"rank {rank} failed:\n{traceback.format_exc()[-20_000:]}"
        # more than a pipe holds would block
        outcomes.put(_Outcome(rank, error=text, refused=isinstance(error, ConfigError)))
        os._exit(1)  # at once: NCCL's own end can wait for a peer that is gone
    except KeyboardInterrupt:  # all is closed
        exit_by_sigint()
    except Preempted:
        os._exit(Preempted.EXIT_CODE)  # as at the end
    outcomes.put(_Outcome(rank, result))
    # all is closed; Python's own end takes seconds, and threads that libraries leave can abort it (apache/arrow#45214)
    os._exit(0)


def _received(outcomes: SimpleQueue[_Outcome]) -> list[_Outcome]:
    received = []
    while not outcomes.empty():
        received.append(outcomes.get())
    return received


_HINTS = {  # by exit code
    -signal.SIGKILL: "\nif nobody did that, the host's memory ran out: see dmesg and explain=true"
}


def _explain_failure(exit_codes: list[int], first_seen: int, received: list[_Outcome], run_dir: Path) -> str:
    """Names the rank that failed first: one ended by a signal, else the first to report; others follow.

    Args:
        exit_codes: when that was seen, before we ended any; 0 of those that still ran.
    """
    with contextlib.suppress(FileNotFoundError):  # which it is unless the watchdog has ended the run
        return (run_dir / LOGS_DIR / STALL_FILE).read_text(encoding="utf-8").rstrip()
    failed = [outcome for outcome in received if outcome.error]
    # where a peer reported, survivors may abort, as NCCL's watchdog does
    following = {-signal.SIGABRT} if failed else set()
    ended = [rank for rank, code in enumerate(exit_codes) if code < 0 and code not in following]
    if ended:
        rank = ended[0]
        place = read_rank_state(run_dir, rank)
        what = f"rank {rank} was ended by {signal.Signals(-exit_codes[rank]).name}{f' ({place})' if place else ''}"
    elif failed:
        rank, what = failed[0].rank, failed[0].error.rstrip()
        if failed[0].refused:
            return what
    else:
        rank, what = first_seen, f"rank {first_seen} exited with code {exit_codes[first_seen]}"
    overdue = _overdue_hops(run_dir) if ended else []
    if TIMED_OUT in what:  # the log has the traceback
        what = f"rank {rank} failed: {what.splitlines()[-1]}"
    if overdue or TIMED_OUT in what:
        overdue += describe_ranks(run_dir, len(exit_codes), time.time())
    overdue = "".join(f"\n{line}" for line in overdue)
    log = run_dir / LOGS_DIR / f"rank_{rank}.log"
    return f"{what}{overdue}\nthe other ranks were ended; its log: {log}{_HINTS.get(exit_codes[rank], '')}"


def _overdue_hops(run_dir: Path) -> list[str]:
    """What ranks on NCCL said before they aborted themselves: `ring_attention.transport`."""
    logs = sorted((run_dir / LOGS_DIR).glob("rank_*.log"))
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if line.startswith("TransferError: ")]
