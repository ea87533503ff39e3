"""The time of a call on the slowest rank, for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch

from recipes.engine.base import extremes_over_ranks
from recipes.monitor.device_metrics import StepClock


class CallSeconds(NamedTuple):
    """Seconds of a call, and those until the host had issued it."""

    total: float
    issued: float


def seconds_of_a_call(call: Callable[[], Any], device: torch.device, timed_s: float) -> CallSeconds:
    """On the slowest rank: means over calls that take `timed_s` together. Every rank must call it."""
    clock = StepClock()

    def seconds(num_calls: int) -> CallSeconds:
        dist.barrier()
        clock.restart()
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        issued_s = time.perf_counter() - started
        clock.tick()
        extremes = extremes_over_ranks({"total": clock.take()[0], "issued": issued_s}, device)
        return CallSeconds(extremes["total"][1] / num_calls, extremes["issued"][1] / num_calls)

    return seconds(max(1, round(timed_s / seconds(1).total)))
