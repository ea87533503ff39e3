"""Moves a tensor one hop around the ring. Knows nothing of attention; `ring` decides what to send and when.

The only module of the project that calls torch.distributed directly: DeepSpeed's wrapper has no batched isend/irecv.
"""

from __future__ import annotations

import torch
import torch.distributed as torch_dist
from torch import Tensor


class HopError(RuntimeError):
    """A hop did not complete; names the stage, the ring rank and the neighbours.

    Raised on gloo. On NCCL, where no host waits, the process group's watchdog ends the rank.
    """


class Hop:
    """A hop in flight. `wait` returns what was received; on CUDA only the current stream waits, the host goes on."""

    def __init__(self, works: list[torch_dist.Work], sent: Tensor, received: Tensor, where: str) -> None:
        self._works, self._received, self._where = works, received, where
        self._sent = sent  # must outlive the transfer

    def wait(self) -> Tensor:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise HopError(f"{self._where}: {error}") from error
        return self._received


class P2PExchange:
    """Batched isend/irecv to the next ring rank and from the previous one, on NCCL or gloo.

    Every rank of `group` must post the same hops in the same order. All ranks send equal shapes, which the equal local
    lengths of `Layout` guarantee.
    """

    def __init__(self, group: torch_dist.ProcessGroup) -> None:
        self._group = group
        self.ring_rank = torch_dist.get_rank(group)
        self.ring_degree = torch_dist.get_world_size(group)
        self._next = torch_dist.get_global_rank(group, (self.ring_rank + 1) % self.ring_degree)
        self._previous = torch_dist.get_global_rank(group, (self.ring_rank - 1) % self.ring_degree)

    def post(self, tensor: Tensor, purpose: str) -> Hop:
        """Start sending the contiguous `tensor` to the next rank and receiving the previous rank's. Returns at once.

        Args:
            purpose: what travels and at which stage, for the error that names it.
        """
        received = torch.empty_like(tensor)
        where = f"{purpose}: ring rank {self.ring_rank} of {self.ring_degree}, sending to global rank {self._next}, "
        where += f"receiving from global rank {self._previous}"
        operations = [  # the receive first: no rank may fill its peer's queue before it offers a buffer itself
            torch_dist.P2POp(torch_dist.irecv, received, self._previous, self._group),
            torch_dist.P2POp(torch_dist.isend, tensor, self._next, self._group),
        ]
        try:
            works = torch_dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise HopError(f"{where}: {error}") from error
        return Hop(works, tensor, received, where)


TRANSPORTS = {"p2p": P2PExchange}
