"""Preemption: a signal to any rank makes all ranks stop after the same step."""

from __future__ import annotations

import signal

import torch
from torch import Tensor

from recipes.launch.processes import STOP_SIGNALS


class StopRequest:
    """From its construction on, SIGTERM and SIGUSR1 ask the run to stop after a checkpoint; before, they end a rank.

    Schedulers signal one rank or all, at no common step. So the reduction of each step's loss also counts the ranks
    with a stop request, and every rank acts on the count of the step before. That count has already been copied to the
    host, so no host waits for the step that it has just enqueued.
    """

    def __init__(self) -> None:
        self.is_received = False
        self._previous: tuple[Tensor, torch.Event | None] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.is_received = True

    def is_agreed(self, num_stop_requests: Tensor) -> bool:
        """Whether to stop after this step, equal on all ranks.

        Args:
            num_stop_requests: of this step, as in `StepResult`.
        """
        previous, self._previous = self._previous, _copied_to_host(num_stop_requests)
        if previous is None:
            return False
        count, copied = previous
        if copied is not None:
            copied.synchronize()
        return count.item() > 0


def _copied_to_host(number: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A host tensor that is valid after the event. `item` on the device's would wait for all work enqueued since."""
    if not number.is_cuda:
        return number, None
    on_host = torch.empty_like(number, device="cpu", pin_memory=True)
    on_host.copy_(number, non_blocking=True)
    return on_host, torch.cuda.current_stream().record_event()
