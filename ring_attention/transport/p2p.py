"""The transport `p2p`: batched isend/irecv over one communicator, on NCCL or gloo."""

from __future__ import annotations

import collections
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ring_attention.trace import profiler_range, report_status
from ring_attention.transport.collectives import group_timeout, rank_and_size
from ring_attention.transport.local import copy_local, messages_are_local

Waits = list[tuple[str, Callable[[], object]]]  # what each waits for, in words, and the function that waits

_WATCHDOG_INTERVAL_S = 1.0


class TransferError(RuntimeError):
    """A transfer did not complete. Names the ring step, the ring rank and the neighbours.

    Raised on gloo. On GPUs, where no host waits, the watchdog prints it at the group's timeout and aborts the rank.
    """


class P2PMessage(NamedTuple):
    """A message to or from a ring rank: vectors that arrive as one, in the receiver's `receive_buffer` of that name.

    `start`: how many numbers lie before it in that buffer, which then takes messages of several peers at once.
    """

    parts: tuple[Tensor, ...]
    peer: int
    buffer: str
    start: int = 0

    @property
    def tensor(self) -> Tensor:
        """The message as one vector: a copy if there are several parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


class Transfer:
    """Messages in flight. They have arrived after `wait`, where on CUDA the current stream waits and the host does not.

    Args:
        waits: one per message on gloo, one for all messages on GPUs.
        sent: tensors that must outlive the transfer.
    """

    def __init__(self, waits: Waits, sent: list[Tensor]) -> None:
        self.waits, self.sent = waits, sent

    def wait(self) -> None:
        with profiler_range("exchange wait"):
            for where, wait in self.waits:
                report_status("wait", where)
                try:
                    wait()
                except RuntimeError as error:
                    raise TransferError(f"{where}: {error}") from error
            report_status("wait")
        self.waits, self.sent = [], []  # both hold tensors


class P2PTransport:
    """Batched isend/irecv between ring ranks, on NCCL or gloo.

    Every rank of `group` must post the same transfers in the same order. A rank skips a transfer in which it neither
    sends nor receives. A receive must have the size of what is sent.

    `used` says after `connect` what carries this rank's messages, and `reason` why that is not this transport.

    Args:
        order: the group's ranks in ring order (`topology.ring_order`); None keeps the group's order.
    """

    used: str | None = None
    reason: str = ""

    def __init__(self, group: torch_dist.ProcessGroup, order: Sequence[int] | None = None) -> None:
        self.group = group
        own_rank, self.ring_degree = rank_and_size(group)
        self.order = list(range(self.ring_degree) if order is None else order)
        self.ring_rank = self.order.index(own_rank)
        self._global_ranks = [torch_dist.get_global_rank(group, rank) for rank in self.order]
        self._watchdog: TransferWatchdog | None = None  # on GPUs only

    def connect(self, tensor: Tensor, buffer_bytes: dict[str, int]) -> None:
        """Get ready for transfers on the device of `tensor`. Every rank must call it first, with equal arguments.

        `buffer_bytes` has the largest message of each receive buffer, by name. The first call creates NCCL's
        communicator, which takes all ranks; a transfer may have fewer.
        """
        self.used = "p2p"
        if tensor.is_cuda and self._watchdog is None:
            self._watchdog = _connect(self.group, tensor.device)

    @property
    def graphs(self) -> dict[Hashable, Any] | None:
        """Those of passes (`pass_graph`), which last as long as the receive buffers; None if messages allow none."""
        return None

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector to receive a message in, with the name in the sender's P2PMessage.

        Its contents last until the buffer of that name is asked for again.
        """
        return torch.empty(numel, dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        """Start to send and receive, at most one message per peer and direction. Returns at once.

        `purpose` says for errors what is transferred, and at which ring step.
        """
        if messages_are_local():
            for number, receive in enumerate(receives):
                received = receive.tensor
                copy_local(received, sends[number].tensor if number < len(sends) else received[:0])
            return Transfer([], [])
        return self._post(purpose, sends, receives)

    def _post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        # receives first: no rank may fill its peer's queue before it offers a buffer itself
        messages = [(torch_dist.irecv, message) for message in receives]
        messages += [(torch_dist.isend, message) for message in sends]
        operations = [
            torch_dist.P2POp(function, message.tensor, self._global_ranks[message.peer], self.group)
            for function, message in messages
        ]
        whole, each = self._describe(purpose, sends, receives)
        # NCCL's stream waits for what is on this one so far
        earlier_work = None if self._watchdog is None else torch.cuda.current_stream().record_event()
        try:
            works = torch_dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise TransferError(f"{whole}: {error}") from error
        if self._watchdog is not None and earlier_work is not None:
            self._watchdog.add(earlier_work.query, [work.is_completed for work in works], whole)
        descriptions = each if len(works) == len(each) else [whole] * len(works)
        waits: Waits = [(where, work.wait) for where, work in zip(descriptions, works, strict=True)]
        return Transfer(waits, [operation.tensor for operation in operations[len(receives) :]])

    def _describe(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> tuple[str, list[str]]:
        """The transfer, and each of its messages, for errors."""
        where = f"{purpose}: ring rank {self.ring_rank} of {self.ring_degree}"
        names = [
            f"{verb} ring rank {message.peer} (global rank {self._global_ranks[message.peer]})"
            for verb, messages in (("receiving from", receives), ("sending to", sends))
            for message in messages
        ]
        return ", ".join([where, *names]), [f"{where}, {name}" for name in names]


class _Watched(NamedTuple):
    can_begin: Callable[[], bool]
    is_completed: Sequence[Callable[[], bool]]
    where: str


class TransferWatchdog:
    """Aborts a rank whose transfer is overdue, and names the transfer on stderr. For GPUs, where no host waits.

    Time counts from when the transfer could begin: the host posts it up to whole steps ahead of the GPU.

    NCCL's own watchdog, a minute later, knows no ring steps. TORCH_NCCL_ASYNC_ERROR_HANDLING=0 lets the rank wait on.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._transfers: collections.deque[_Watched] = collections.deque()
        threading.Thread(target=self._run, daemon=True, name="transfer watchdog").start()

    def add(self, can_begin: Callable[[], bool], is_completed: Sequence[Callable[[], bool]], where: str) -> None:
        """Watch a transfer, which begins after all that were added before.

        Args:
            can_begin: whether the GPU has done what comes before it.
            is_completed: the transfer is done once all of them return True.
        """
        self._transfers.append(_Watched(can_begin, is_completed, where))

    def _run(self) -> None:
        began: float | None = None  # when the first transfer that is not done could begin
        while True:
            time.sleep(_WATCHDOG_INTERVAL_S)
            while self._transfers and all(is_completed() for is_completed in self._transfers[0].is_completed):
                self._transfers.popleft()
                began = None
            if not self._transfers:
                continue
            if began is None and self._transfers[0].can_begin():
                began = time.monotonic()
            if began is None or (waited_s := time.monotonic() - began) < self._timeout_s - _WATCHDOG_INTERVAL_S:
                continue
            where, began = self._transfers.popleft().where, None
            print(f"TransferError: {where}: not done after {waited_s:.0f} s", file=sys.stderr, flush=True)
            if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") != "0":
                os.abort()


@functools.cache
def _connect(group: torch_dist.ProcessGroup, device: torch.device) -> TransferWatchdog:
    torch_dist.all_reduce(torch.zeros(1, device=device), group=group)
    return TransferWatchdog(group_timeout(group).total_seconds())
