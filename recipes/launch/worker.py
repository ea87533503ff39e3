"""What one rank does from its start to its end, whoever has started it: meets the others, runs its task, keeps a log.

Below `launch`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TextIO

import torch

from conf.schema import Config, ConfigError
from recipes.launch.disk_errors import full_disk_explained
from recipes.launch.environment import RENDEZVOUS
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, clear_rank_states, read_rank_state


class Task(Protocol):
    """What all ranks do once they are connected; travels to them, and is rank 0's for all."""

    @property
    def config(self) -> Config:
        """What the ranks are started with: timeouts, determinism."""
        ...

    def run(self, run_dir: Path, console: TextIO) -> float:
        """On one rank; rank 0's result is what `launch` returns.

        Args:
            console: where rank 0 writes what people see; other output goes to the rank's log.
        """
        ...


def run_rank(task: Task, run_dir: Path, init_method: str | None) -> float:
    """Run the task as the rank that the environment names; rank 0's task and run dir are used by all.

    Args:
        init_method: where ranks that we started meet; None: where the launcher's variables say.

    Raises:
        RunFailed: for any error of the task, where there is no parent of ours that tells people.
    """
    rank, num_ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_local_ranks == num_ranks:  # one machine: nothing needs to be reached from outside
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_ranks))
    if task.config.engine.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with a workspace of its own
        torch.use_deterministic_algorithms(True)

    import deepspeed.comm as dist

    from recipes.launch.startup import init_distributed
    from recipes.launch.watchdog import watched

    gc.freeze()  # what was imported stays: no looking for garbage in it, as DeepSpeed does six times at its start

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    has_parent = init_method is not None  # of ours, which tells people how ranks have ended
    if meeting := os.environ.get(RENDEZVOUS):
        Path(meeting).mkdir(mode=0o700, exist_ok=True)
        init_method = f"file://{meeting}/meeting"
    init_distributed(init_method, task.config.launch.timeout_s)
    if rank == 0:
        clear_rank_states(run_dir)  # a launcher that is not ours does not
    shared = [task, run_dir]
    dist.broadcast_object_list(shared, src=0)
    task, run_dir = shared
    (run_dir / LOGS_DIR).mkdir(parents=True, exist_ok=True)
    launch = task.config.launch
    log_path = run_dir / LOGS_DIR / f"rank_{rank}.log"
    try:
        with (
            _output_to(log_path) as console,
            full_disk_explained(run_dir, rank),
            watched(launch, run_dir, rank, num_ranks, console=None if has_parent else console),
        ):
            result = task.run(run_dir, console)
            dist.destroy_process_group()
            return result
    except Exception as error:
        if has_parent or isinstance(error, (ConfigError, RunFailed)):
            raise
        place = read_rank_state(run_dir, rank)
        what = "".join(traceback.format_exception_only(error)).rstrip()
        raise RunFailed(
            f"rank {rank} failed{f' ({place})' if place else ''}: {what}\nif another failed first, torchrun names it "
            f"below; this one's log: {log_path}"
        ) from error


@contextlib.contextmanager
def _output_to(log_path: Path) -> Iterator[TextIO]:
    """Send this process's stdout and stderr, of C++ libraries too, to a file; yields the console as it was."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log_path.open("a", encoding="utf-8") as log, os.fdopen(os.dup(1), "w", encoding="utf-8") as console:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield console
        except Exception:
            traceback.print_exc()  # into the log; the caller shows it to people
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, target in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, target)
                os.close(descriptor)
