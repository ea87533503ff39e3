"""The transport `p2p`: batched isend/irecv over one communicator, on NCCL or gloo."""

from __future__ import annotations

import collections
import functools
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ring_attention.trace import profiler_range, report_status
from ring_attention.transport.collectives import group_timeout, rank_and_size
from ring_attention.transport.local import copy_local, messages_are_local

_WATCH_INTERVAL_S = 1.0


class TransferError(RuntimeError):
    """A hop did not complete; names the stage, the ring rank and the neighbours.

    Raised on gloo. On GPUs, where no host waits, it is printed to stderr at the process group's timeout, and the rank
    aborts.
    """


class P2PMessage(NamedTuple):
    """To or from a ring rank: vectors that arrive as one, in that `receive_buffer` of the receiver."""

    parts: tuple[Tensor, ...]
    peer: int
    room: str

    @property
    def tensor(self) -> Tensor:
        """One vector: a copy if there are several."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


class Transfer:
    """Messages in flight. After `wait` they have arrived; on CUDA only the current stream waits, the host goes on.

    Args:
        moves: what is done with each peer; gloo has one work for each, NCCL one for all.
        sent: what must outlive the transfer.
    """

    def __init__(self, works: list[torch_dist.Work], moves: list[str], sent: list[Tensor], where: str) -> None:
        self._works, self._moves, self._sent, self._where = works, moves, sent, where

    def wait(self) -> None:
        with profiler_range("exchange wait"):
            for index, work in enumerate(self._works):
                move = self._moves[index] if len(self._works) == len(self._moves) else ", ".join(self._moves)
                report_status("wait", f"{self._where}, {move}")
                try:
                    work.wait()
                except RuntimeError as error:
                    raise TransferError(f"{self._where}, {move}: {error}") from error
            report_status("wait")
        self._works = []  # they hold what was moved
        self._sent.clear()


class P2PTransport:
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

    def connect(self, tensor: Tensor, rooms: dict[str, int]) -> None:
        """Get ready for tensors on this one's device. Every rank must call it before its hops, all alike.

        Makes NCCL's communicator, once: that takes all ranks, and a hop may have fewer.

        Args:
            rooms: how many bytes at most will be received in each.
        """
        if tensor.is_cuda and self._watch is None:
            self._watch = _connect(self.group, tensor.device)

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where a message is received, a vector; it may be overwritten once the room is given out again.

        Args:
            name: both ends of a move must give the same; messages that are needed at once have rooms of their own.
        """
        return torch.empty(numel, dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        """Start sending and receiving, one message per rank and way. Returns at once.

        Args:
            purpose: what travels and at which ring step, for the error that names it.
        """
        if messages_are_local():
            for number, receive in enumerate(receives):
                received = receive.tensor
                copy_local(received, sends[number].tensor if number < len(sends) else received[:0])
            return Transfer([], [], [], purpose)
        return self._post(purpose, sends, receives)

    def _post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        # receives first: no rank may fill its peer's queue before it offers a buffer itself
        moves = [(torch_dist.irecv, move.tensor, move.peer) for move in receives]
        moves += [(torch_dist.isend, move.tensor, move.peer) for move in sends]
        where, names = f"{purpose}: ring rank {self.ring_rank} of {self.ring_degree}", self._names(sends, receives)
        try:
            works = torch_dist.batch_isend_irecv(
                [
                    torch_dist.P2POp(function, tensor, self._global_ranks[peer], self.group)
                    for function, tensor, peer in moves
                ]
            )
        except RuntimeError as error:
            raise TransferError(f"{where}, {', '.join(names)}: {error}") from error
        if self._watch is not None:
            self._watch.add(works, f"{where}, {', '.join(names)}")
        return Transfer(works, names, [tensor for _, tensor, _ in moves[len(receives) :]], where)

    def _names(self, sends: list[P2PMessage], receives: list[P2PMessage]) -> list[str]:
        return [
            f"{verb} ring rank {move.peer} (global rank {self._global_ranks[move.peer]})"
            for verb, moves in (("receiving from", receives), ("sending to", sends))
            for move in moves
        ]


class Completable(Protocol):
    def is_completed(self) -> bool: ...


class _Watch:
    """Ends a rank whose hop is overdue, on GPUs, where no host waits: names the hop on stderr and aborts.

    NCCL's own watchdog does that too, but about a minute after the timeout, and it knows no stages. As for it,
    TORCH_NCCL_ASYNC_ERROR_HANDLING=0 lets the rank wait.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._hops: collections.deque[tuple[float, Sequence[Completable], str]] = collections.deque()
        threading.Thread(target=self._run, daemon=True, name="hop watch").start()

    def add(self, works: Sequence[Completable], where: str) -> None:
        self._hops.append((time.monotonic(), works, where))

    def _run(self) -> None:
        while True:
            time.sleep(_WATCH_INTERVAL_S)
            while self._hops and all(work.is_completed() for work in self._hops[0][1]):
                self._hops.popleft()
            if not self._hops or time.monotonic() - self._hops[0][0] < self._timeout_s - _WATCH_INTERVAL_S:
                continue
            posted, _, where = self._hops.popleft()
            print(
                f"TransferError: {where}: not done after {time.monotonic() - posted:.0f} s", file=sys.stderr, flush=True
            )
            if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") != "0":
                os.abort()


@functools.cache
def _connect(group: torch_dist.ProcessGroup, device: torch.device) -> _Watch:
    torch_dist.all_reduce(torch.zeros(1, device=device), group=group)
    return _Watch(group_timeout(group).total_seconds())
