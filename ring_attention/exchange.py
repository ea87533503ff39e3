"""Moves tensors between the ranks that share a sequence. Knows nothing of attention; `ring` and `gather` decide what.

The only module of the project that calls torch.distributed directly: DeepSpeed's wrapper has no batched isend/irecv,
and its groups no timeout. All traffic of a ring goes over one communicator, in hops that all ranks post in one
order, receives before sends: the first hop that is not done can always be completed, so nothing waits in a circle.
"""

from __future__ import annotations

import collections
import functools
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ring_attention.trace import labelled

_WATCH_INTERVAL_S = 1.0


class HopError(RuntimeError):
    """A hop did not complete; names the stage, the ring rank and the neighbours.

    Raised on gloo. On NCCL, where no host waits, it is printed to stderr at the process group's timeout, and the rank
    aborts.
    """


class Hop:
    """Messages in flight. After `wait` they have arrived; on CUDA only the current stream waits, the host goes on.

    Args:
        moves: what is done with each peer; gloo has one work for each, NCCL one for all.
        sent: what must outlive the transfer.
    """

    def __init__(self, works: list[torch_dist.Work], moves: list[str], sent: list[Tensor], where: str) -> None:
        self._works, self._moves, self._sent, self._where = works, moves, sent, where

    def wait(self) -> None:
        with labelled("exchange wait"):
            for index, work in enumerate(self._works):
                try:
                    work.wait()
                except RuntimeError as error:
                    move = self._moves[index] if len(self._works) == len(self._moves) else ", ".join(self._moves)
                    raise HopError(f"{self._where}, {move}: {error}") from error
        self._sent.clear()


class P2PExchange:
    """Batched isend/irecv between ring ranks, on NCCL or gloo.

    Every rank of `group` must post the same hops in the same order; one that neither sends nor receives in a hop
    leaves it out. A receive must have the size of what is sent.

    Args:
        order: the group's ranks in ring order (`topology.ring_order`); None is their own order.
    """

    def __init__(self, group: torch_dist.ProcessGroup, order: Sequence[int] | None = None) -> None:
        self.group = group
        own_rank, self.ring_degree = rank_and_size(group)
        self.order = list(range(self.ring_degree) if order is None else order)
        self.ring_rank = self.order.index(own_rank)
        self._global_ranks = [torch_dist.get_global_rank(group, rank) for rank in self.order]
        self._watch: _Watch | None = None

    def connect(self, tensor: Tensor) -> None:
        """Make NCCL's communicator, once: it takes all ranks, and a hop may have fewer. Every rank must call it."""
        if tensor.is_cuda and self._watch is None:
            self._watch = _connect(self.group, tensor.device)

    def post(self, purpose: str, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> Hop:
        """Start sending and receiving contiguous tensors, each with a ring rank, one per rank and way. Returns at once.

        Args:
            purpose: what travels and at which stage, for the error that names it.
        """
        # receives first: no rank may fill its peer's queue before it offers a buffer itself
        moves = [(torch_dist.irecv, "receiving from", *move) for move in receives]
        moves += [(torch_dist.isend, "sending to", *move) for move in sends]
        where = f"{purpose}: ring rank {self.ring_rank} of {self.ring_degree}"
        names = [f"{verb} ring rank {peer} (global rank {self._global_ranks[peer]})" for _, verb, _, peer in moves]
        try:
            works = torch_dist.batch_isend_irecv(
                [
                    torch_dist.P2POp(function, tensor, self._global_ranks[peer], self.group)
                    for function, _, tensor, peer in moves
                ]
            )
        except RuntimeError as error:
            raise HopError(f"{where}, {', '.join(names)}: {error}") from error
        if self._watch is not None:
            self._watch.add(works, f"{where}, {', '.join(names)}")
        return Hop(works, names, [tensor for tensor, _ in sends], where)


class _Watch:
    """Ends a rank whose hop is overdue, on NCCL, where no host waits: names the hop on stderr and aborts.

    NCCL's own watchdog does that too, but about a minute after the timeout, and it knows no stages. As for it,
    TORCH_NCCL_ASYNC_ERROR_HANDLING=0 lets the rank wait.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._hops: collections.deque[tuple[float, list[torch_dist.Work], str]] = collections.deque()
        threading.Thread(target=self._run, daemon=True, name="hop watch").start()

    def add(self, works: list[torch_dist.Work], where: str) -> None:
        self._hops.append((time.monotonic(), works, where))

    def _run(self) -> None:
        while True:
            time.sleep(_WATCH_INTERVAL_S)
            while self._hops and all(work.is_completed() for work in self._hops[0][1]):
                self._hops.popleft()
            if not self._hops or time.monotonic() - self._hops[0][0] < self._timeout_s - _WATCH_INTERVAL_S:
                continue
            posted, _, where = self._hops.popleft()
            print(f"HopError: {where}: not done after {time.monotonic() - posted:.0f} s", file=sys.stderr, flush=True)
            if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") != "0":
                os.abort()


@functools.cache
def _connect(group: torch_dist.ProcessGroup, device: torch.device) -> _Watch:
    torch_dist.all_reduce(torch.zeros(1, device=device), group=group)
    return _Watch(group_timeout(group).total_seconds())


# named anew in torch 2.13
_all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
_reduce_scatter = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor


def all_gather(message: Tensor, group: torch_dist.ProcessGroup) -> Tensor:
    """[N] -> [P, N]: the vectors of all ranks of `group`, which all must call it."""
    gathered = message.new_empty(torch_dist.get_world_size(group), len(message))
    _all_gather(gathered.flatten(), message, group=group)
    return gathered


def reduce_scatter(messages: Tensor, group: torch_dist.ProcessGroup) -> Tensor:
    """[P, N] -> [N]: row r of the sum over ranks, on rank r. Every rank of `group` must call it."""
    scattered = messages.new_empty(messages.shape[1])
    _reduce_scatter(scattered, messages.flatten(), group=group)
    return scattered


def rank_and_size(group: torch_dist.ProcessGroup) -> tuple[int, int]:
    """This rank's number in `group`, and how many there are.

    Raises:
        ValueError: for None, which is no group.
    """
    if group is None:
        raise ValueError(
            "the process group is None: pass one, such as ParallelGroups(...).get_sequence_parallel_group()"
        )
    return torch_dist.get_rank(group), torch_dist.get_world_size(group)


def same_ranks(group: Any, other: Any) -> bool:
    return torch_dist.get_process_group_ranks(group) == torch_dist.get_process_group_ranks(other)


def group_timeout(group: torch_dist.ProcessGroup) -> timedelta:
    """After which a collective of `group` that does not complete ends its rank."""
    device = "cuda" if torch_dist.get_backend(group) == "nccl" else "cpu"
    return group._get_backend(torch.device(device)).options._timeout  # has no public name


_subgroups: dict[tuple[torch_dist.ProcessGroup, tuple[int, ...]], torch_dist.ProcessGroup] = {}


def subgroup(group: Any, ranks: tuple[int, ...]) -> torch_dist.ProcessGroup:
    """The process group of some ranks of `group`, with its timeout.

    Its own ranks must call it, and on NCCL all others of the world as often, each for its own: DeepSpeed has torch
    split groups off the world's communicator.

    Built once, as long as it lives: a gloo group has a thread that wakes up a hundred times a second.
    """
    global_ranks = [torch_dist.get_global_rank(group, rank) for rank in ranks]
    if global_ranks == torch_dist.get_process_group_ranks(group):
        return group
    for key, known in list(_subgroups.items()):
        if not _exists(known):
            del _subgroups[key]
    if (group, ranks) not in _subgroups:
        built = torch_dist.new_group(global_ranks, timeout=group_timeout(group), use_local_synchronization=True)
        assert isinstance(built, torch_dist.ProcessGroup), "called by a rank outside"
        _subgroups[group, ranks] = built
    return _subgroups[group, ranks]


def _exists(group: torch_dist.ProcessGroup) -> bool:
    try:
        return bool(torch_dist.get_process_group_ranks(group))
    except (KeyError, ValueError):  # destroyed
        return False


TRANSPORTS = {"p2p": P2PExchange}


def make_exchange(transport: str, group: torch_dist.ProcessGroup, order: Sequence[int] | None = None) -> P2PExchange:
    """The named transport on `group`.

    Raises:
        ValueError: for a name that is no key of TRANSPORTS.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport={transport!r} is unknown: use one of {', '.join(TRANSPORTS)}")
    return TRANSPORTS[transport](group, order)
