"""Where the time of a step goes, from the profiler's trace.

`read_events` reads the profile, `classify` makes spans of one part each, and `time_per_part` sweeps over them. Ranges
that code opens with `profiler_range(name)`, operators and the names of kernels say what runs.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from recipes.monitor.metric_registry import PARTS
from ring_attention.trace import profiler_range, visible_ring_steps

_RANGES = {
    "attention kernel": "attention",
    "merge": "merge",
    "exchange wait": "exchange",
    "exchange copy": "exchange",
    "optimizer": "optimizer",
    "data": "data",
}
_COMMUNICATION = ("c10d::", "_c10d_functional::", "gloo:", "nccl:")  # as torch names it on the host
_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "einsum")
_MATRIX_PRODUCTS += ("_addmm_activation", "_scaled_mm", "_grouped_mm")
_ATTENTION_KERNEL = re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)
_GEMM_KERNEL = re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)
_RUNTIME_CALL = re.compile(r"(cuda|cu|hip)[A-Z]")  # cudaLaunchKernel, cuLaunchKernelEx: they have numbers of their own
_WINDOW = "recorded steps"
_PRIORITIES = {"exchange": 1, "data": 2}  # of all others 0: they go first


def step_breakdown(step: Callable[[], object], num_steps: int = 2) -> dict[str, float]:
    """The seconds of a step for each of PARTS, on this rank; they sum to its wall time, which profiling lengthens.

    Profiles `num_steps` calls of `step`, after one that is not recorded. Every rank must call it.

    The parts; if several run at once, compute counts before exchange, and exchange before data:

        attention  attention kernels, forward and backward
        merge      merging partial outputs and partial gradients
        gemm       matrix products outside attention
        optimizer  the range "optimizer", and Optimizer.step
        other      every other operator: norms, activations, casts, copies
        exchange   communication, or waiting for it, that no compute hides
        data       fetching and copying the batch: the range "data"
        idle       nothing runs: late launches, a pipeline's bubble; on the CPU Python itself

    On a GPU, kernels and copies count. On the CPU, operators of the calling thread count; it also runs autograd.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    cycle = schedule(wait=0, warmup=1, active=1)
    with visible_ring_steps(), profile(activities=activities, schedule=cycle) as profiler:
        step()
        _synchronize()
        profiler.step()
        dist.barrier()  # else the first step includes waiting for a rank whose profiler starts late
        _synchronize()
        with profiler_range(_WINDOW):
            for _ in range(num_steps):
                step()
            _synchronize()
    results: Any = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    spans, start_ns, stop_ns = classify(read_events(results.events()))
    times_ns = time_per_part(spans, start_ns, stop_ns)
    return {part: time_ns / 1e9 / num_steps for part, time_ns in times_ns.items()}


class Event(NamedTuple):
    """An operator, a range, or (`on_device`) a kernel or copy in a profile."""

    name: str
    start_ns: int
    stop_ns: int
    thread: int
    number: int  # an operator's own
    launched_by: int = 0  # the number of the operator that launched a kernel; 0 if unknown
    is_async: bool = False  # may end on another thread, and does not contain what runs meanwhile on its own
    on_device: bool = False


def read_events(kineto_events: Iterable[Any]) -> Iterator[Event]:
    """The profiler's raw records. Its public events do not say, in torch 2.11, which operator launched a kernel.

    Left out are calls of the CUDA runtime and the profiler's own overhead (number 0), which have no operator's number.
    """
    for event in kineto_events:
        on_device = event.device_type() != torch.autograd.DeviceType.CPU
        if on_device:
            if event.is_user_annotation():
                continue  # a range's shadow on the device, from its first kernel to its last
        elif event.linked_correlation_id() or not event.correlation_id() or _RUNTIME_CALL.match(event.name()):
            continue
        yield Event(
            event.name(),
            event.start_ns(),
            event.end_ns(),
            event.start_thread_id(),
            event.correlation_id(),
            event.linked_correlation_id(),
            event.is_async(),
            on_device,
        )


Span = tuple[int, int, str]  # start and stop in ns, and one of PARTS other than "idle"


def classify(events: Iterable[Event]) -> tuple[list[Span], int, int]:
    """The spans of a profile, and the start and stop of its recorded steps in ns.

    A kernel belongs to the part of the operator that launched it. Without kernels, outermost operators count.
    """
    events = list(events)
    (window,) = (event for event in events if event.name == _WINDOW and not event.on_device)
    host = [event for event in events if not event.on_device and not event.is_async]
    host.sort(key=lambda event: (event.thread, event.start_ns, -event.stop_ns))
    parts: dict[int, str | None] = {}  # by an operator's number
    on_host: list[Span] = []
    # open operators and ranges, each with the parts of the innermost range and of the innermost operator that have one
    scopes: list[tuple[Event, str | None, str | None]] = []
    covered_until_ns = 0  # by outermost operators
    for event in host:
        while scopes and (scopes[-1][0].thread != event.thread or scopes[-1][0].stop_ns < event.stop_ns):
            scopes.pop()
        _, outer_range_part, outer_operator_part = scopes[-1] if scopes else (event, None, None)
        own_range_part = _range_part(event.name)
        range_part = own_range_part or outer_range_part
        operator_part = _operator_part(event.name) or outer_operator_part
        scopes.append((event, range_part, operator_part))
        parts[event.number] = range_part or operator_part
        if event.thread != window.thread:
            continue  # gloo's threads also copy with operators
        if own_range_part in ("exchange", "data"):
            on_host.append((event.start_ns, event.stop_ns, own_range_part))
        elif event.name.startswith("aten::") and event.stop_ns > covered_until_ns:
            covered_until_ns = event.stop_ns
            on_host.append((event.start_ns, event.stop_ns, range_part or operator_part or "other"))
    on_device = [
        (event.start_ns, event.stop_ns, _kernel_part(event.name, parts.get(event.launched_by)))
        for event in events
        if event.on_device
    ]
    if on_device:  # the host only launches, waits and fetches data
        spans = on_device + [span for span in on_host if span[2] == "data"]
    else:
        messages = [event for event in events if event.is_async and event.name.startswith(_COMMUNICATION)]
        spans = on_host + [(event.start_ns, event.stop_ns, "exchange") for event in messages]
    return spans, window.start_ns, window.stop_ns


def _range_part(name: str) -> str | None:
    if name.startswith("Optimizer."):  # torch names step and zero_grad of every optimizer like this
        return "optimizer"
    return "exchange" if name.startswith(_COMMUNICATION) else _RANGES.get(name)


def _operator_part(name: str) -> str | None:
    if not name.startswith("aten::"):
        return None
    if "attention" in name:
        return "attention"
    return "gemm" if name.removeprefix("aten::") in _MATRIX_PRODUCTS else None


def _kernel_part(name: str, launched_in: str | None) -> str:
    if "nccl" in name.lower():
        return "exchange"
    if launched_in is not None:
        return launched_in
    if _ATTENTION_KERNEL.search(name):
        return "attention"
    return "gemm" if _GEMM_KERNEL.search(name) else "other"


def time_per_part(spans: Iterable[Span], start_ns: int, stop_ns: int) -> dict[str, int]:
    """The ns of each of PARTS between start and stop. Every instant counts once.

    Compute goes before exchange, and exchange before data. Of equals, the span that started first counts.
    """
    clipped = [(max(start, start_ns), min(stop, stop_ns), start, part) for start, stop, part in spans]
    waiting = sorted((span for span in clipped if span[0] < span[1]), reverse=True)
    instants = sorted({start_ns, stop_ns, *(edge for span in waiting for edge in span[:2])})
    running: list[tuple[int, int, int, str]] = []  # a heap of (priority, start, stop, part)
    times_ns: dict[str, int] = dict.fromkeys(PARTS, 0)
    for now, following in itertools.pairwise(instants):
        while waiting and waiting[-1][0] == now:
            _, stop, start, part = waiting.pop()
            heapq.heappush(running, (_PRIORITIES.get(part, 0), start, stop, part))
        while running and running[0][2] <= now:
            heapq.heappop(running)
        times_ns[running[0][3] if running else "idle"] += following - now
    return times_ns


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
