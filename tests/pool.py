"""Rank processes shared by all tests, because importing torch and DeepSpeed takes seconds.

`WorkerPool.run` calls a module-level function on every rank of a process group (gloo on the CPU, NCCL on GPUs) and
returns each rank's result. There is one set of processes per number of ranks, started on first use: CPU ranks as forks
of `tests.fork_server`. Ranks cannot change sets, because DeepSpeed numbers modules per process and needs equal numbers
on all ranks.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import fork_server

if TYPE_CHECKING:
    from ring_attention.groups import ParallelGroups

COLLECTIVE_TIMEOUT_S = 120.0


@functools.cache
def parallel_groups(data_degree: int, sequence_degree: int) -> ParallelGroups:
    """On a rank: its groups, built once, because each gloo group has a thread that wakes up 100 times a second."""
    from ring_attention.groups import ParallelGroups

    return ParallelGroups(data_degree, sequence_degree)


class RankError(AssertionError):
    """A rank raised or died; the message has its traceback."""


class WorkerPool:
    """Ranks that run functions.

    Args:
        device: "cpu" (gloo, even on a GPU machine) or "cuda" (NCCL, one GPU per rank).
        timeout_s: of collectives; a function may take twice that plus a minute.
    """

    def __init__(self, device: str = "cpu", timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
        self.device, self._timeout_s = device, timeout_s
        self._sets: dict[int, list[tuple[Any, Connection]]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="ring_attention_pool_")
        self._num_started = 0

    def run(self, function: Callable[..., Any], *arguments: Any, num_ranks: int) -> list[Any]:
        """`function(*arguments)` on ranks 0..num_ranks-1; the results in rank order.

        Raises:
            RankError: if a rank raised or died. The next run starts new processes.
        """
        workers = self._sets.get(num_ranks) or self._start(num_ranks)
        for _, connection in workers:
            connection.send((function, arguments))
        outcomes = [_receive(connection, 60 + 2 * self._timeout_s) for _, connection in workers]
        errors = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(outcomes) if failed]
        if errors:
            self._stop(num_ranks)
            raise RankError("\n".join(errors))
        return [result for _, result in outcomes]

    def close(self) -> None:
        for num_ranks in list(self._sets):
            self._stop(num_ranks)

    def _start(self, num_ranks: int) -> list[tuple[Any, Connection]]:
        context = multiprocessing.get_context("spawn") if self.device == "cuda" else fork_server.context()
        self._num_started += 1
        rendezvous = Path(self._folder.name) / f"rendezvous{self._num_started}"
        workers = self._sets[num_ranks] = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(self.device, rank, num_ranks, rendezvous, there, self._timeout_s), daemon=True
            )
            process.start()
            there.close()
            workers.append((process, here))
        return workers

    def _stop(self, num_ranks: int) -> None:
        for process, _ in self._sets.pop(num_ranks):
            process.kill()
            process.join()


def _receive(connection: Connection, patience_s: float) -> tuple[bool, Any]:
    try:
        if not connection.poll(patience_s):
            return True, "did not answer in time"
        return connection.recv()
    except EOFError:
        return True, "died"


def _work(device: str, rank: int, num_ranks: int, rendezvous: Path, connection: Connection, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if device == "cpu":
        import tests.imported  # noqa: F401  # already there, unless the fork server could not import it
    import logging

    import torch

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)

    from recipes.launch.startup import init_distributed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    init_distributed(f"file://{rendezvous}", timeout_s)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, function(*arguments)))
        except Exception:
            connection.send((True, traceback.format_exc()))
