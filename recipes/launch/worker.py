"""What every rank does, whoever has started it: joins the process group, runs its task, and keeps a log."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from conf.schema import Config, ConfigError
from recipes.checkpoint.manifest import remove_unfinished
from recipes.launch import startup
from recipes.launch.environment import RENDEZVOUS, make_private_folder
from recipes.launch.failure import full_disk_explained
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, clear_rank_states, position
from recipes.run.lock import locked


class Task(Protocol):
    """What all ranks do once they are connected; pickled, and rank 0's is used by all."""

    @property
    def config(self) -> Config: ...

    def run(self, run_dir: Path, console: TextIO) -> float:
        """Run on one rank; `launch` returns rank 0's result. People see what rank 0 writes to the console.

        All other output goes to the rank's log.
        """
        ...


def run_rank(task: Task, run_dir: Path, has_parent: bool) -> float:
    """Run the task as the rank that the environment names. All ranks use rank 0's task and run dir.

    With `has_parent`, `processes.launch` started it and explains its errors.

    Raises:
        RunFailed: in an external launcher's ranks, for any error of the task; on all of them, if another run holds the
            run dir.
    """
    rank, num_ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    startup.configure_rank(num_local_ranks, num_ranks, task.config.engine.deterministic)

    import deepspeed.comm as dist

    from recipes.launch.watchdog import watched

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    if rendezvous := os.environ.get(RENDEZVOUS):
        make_private_folder(Path(rendezvous))
    startup.init_distributed(rendezvous and f"file://{rendezvous}/rendezvous", task.config.launch.timeout_s)
    held = contextlib.ExitStack()
    shared: list[Any] = [task, run_dir, None]
    if rank == 0 and not has_parent:
        try:
            held.enter_context(locked(run_dir))
            clear_earlier_start(run_dir)
        except ConfigError as error:
            shared[2] = str(error)
    dist.broadcast_object_list(shared, src=0)
    task, run_dir, refusal = shared
    if refusal:
        raise RunFailed(refusal, of_all_ranks=True)
    log_path = run_dir / LOGS_DIR / f"rank_{rank}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            held,
            _output_to(log_path) as console,
            full_disk_explained(run_dir, rank),
            watched(task.config.launch, run_dir, rank, num_ranks, console=None if has_parent else console),
        ):
            result = task.run(run_dir, console)
            dist.destroy_process_group()
            return result
    except Exception as error:
        if has_parent or isinstance(error, (ConfigError, RunFailed)):
            raise
        what = "".join(traceback.format_exception_only(error)).rstrip()
        raise RunFailed(
            f"rank {rank} failed{position(run_dir, rank)}: {what}\nif another rank failed first, torchrun names it "
            f"below; this one's log: {log_path}"
        ) from error


def clear_earlier_start(run_dir: Path) -> None:
    """Remove what an earlier start has left behind, also a checkpoint that may fill the disk. Needs the lock."""
    clear_rank_states(run_dir)
    remove_unfinished(run_dir)


@contextlib.contextmanager
def _output_to(log_path: Path) -> Iterator[TextIO]:
    """Send this process's stdout and stderr, including that of C++ libraries, to a file; yields the console."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with log_path.open("a", encoding="utf-8") as log, os.fdopen(os.dup(1), "w", encoding="utf-8") as console:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield console
        except Exception:
            with contextlib.suppress(OSError):  # of a full disk, which may be the error itself
                traceback.print_exc()  # into the log; the caller shows it to people
            raise
        finally:
            for stream, descriptor, target in zip((sys.stdout, sys.stderr), saved, (1, 2), strict=True):
                _flush_or_drop(stream, target)
                os.dup2(descriptor, target)
                os.close(descriptor)


def _flush_or_drop(stream: TextIO, descriptor: int) -> None:
    """Flush the stream to its file; drop what a full disk refuses, which people would see later."""
    try:
        stream.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
        stream.flush()
