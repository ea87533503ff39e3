"""Where the time of a step goes: shares of its wall time by kind of work.

Beside `metrics`, which has the numbers that a run logs. What is labelled in a profile is said here and in
`ring_attention.trace`: ranges that code opens with `profiler_range(name)`, operators, and names of kernels.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from recipes.monitor.metric_registry import PARTS
from ring_attention.trace import profiler_range

COMPUTE = ("attention", "merge", "gemm", "optimizer", "other")

_RANGES = {
    "attention block": "attention",
    "merge": "merge",
    "exchange wait": "exchange",
    "exchange copy": "exchange",
    "optimizer": "optimizer",
    "data": "data",
}
_COMMUNICATION = ("c10d::", "_c10d_functional::", "gloo:", "nccl:")  # how torch names it on the host
_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "einsum")
_MATRIX_PRODUCTS += ("_addmm_activation", "_scaled_mm", "_grouped_mm")
_ATTENTION_KERNEL = re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)
_GEMM_KERNEL = re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)
_RUNTIME_CALL = re.compile(r"(cuda|cu|hip)[A-Z]")  # cudaLaunchKernel, cuLaunchKernelEx: numbered apart from operators
_WINDOW = "recorded steps"


@dataclass(frozen=True)
class Breakdown:
    """Of one rank: `shares` of the recorded steps' wall time, a key for each of PARTS, which sum to 1.

    `step_time_s` is that of a step under the profiler, whose own work on the host is in it.
    """

    step_time_s: float
    shares: dict[str, float]

    @property
    def exposed_communication_s(self) -> float:
        """Per step: communication runs, or is waited for, and nothing else does."""
        return self.shares["exchange"] * self.step_time_s


def step_breakdown(step: Callable[[], None], num_steps: int = 2) -> Breakdown:
    """Profile `step`, `num_steps` times after one that is not recorded. Every rank must call it.

    The parts, where several run at once the first of compute, exchange, data:

        attention  block kernels, forward and backward
        merge      joining partial results and partial gradients
        gemm       matrix products outside attention
        optimizer  the range "optimizer", and Optimizer.step
        other      every other operator: norms, activations, casts, copies
        exchange   communication of any kind that no compute hides
        data       fetching and copying the batch: the range "data"
        idle       nothing runs: launches that the host is late with, a pipeline's bubble; on the CPU Python itself

    On a GPU, what runs are kernels and copies; on the CPU, operators of the calling thread, which are autograd's too.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1)) as profiler:
        step()
        _synchronize()
        profiler.step()
        if dist.is_initialized():
            dist.barrier()  # else a rank waits within its first step for one whose profiler starts late
            _synchronize()
        with profiler_range(_WINDOW):
            for _ in range(num_steps):
                step()
            _synchronize()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    spans, start_ns, stop_ns = label(read_events(results.events()))
    times_ns = sweep(spans, start_ns, stop_ns)
    whole_ns = stop_ns - start_ns
    return Breakdown(whole_ns / 1e9 / num_steps, {part: times_ns[part] / whole_ns for part in PARTS})


class Event(NamedTuple):
    """What a profile says of an operator, a range, or (on_device) a kernel or copy.

    Args:
        number: an operator's own; `launched_by` is that of the operator that launched a kernel, 0 for none.
        is_async: it may end on another thread, and does not contain what runs meanwhile on its own.
    """

    name: str
    start_ns: int
    stop_ns: int
    thread: int
    number: int
    launched_by: int = 0
    is_async: bool = False
    on_device: bool = False


Span = tuple[int, int, str]  # start and stop in ns, and one of PARTS other than "idle"


class _Enclosing(NamedTuple):
    """What an operator or range stands in, itself included."""

    stop_ns: int
    thread: int
    range_part: str | None  # of the innermost labelled range
    operator_part: str | None  # of the innermost operator whose name says it
    in_operator: bool

    @property
    def part(self) -> str | None:
        return self.range_part or self.operator_part


def label(events: Iterable[Event]) -> tuple[list[Span], int, int]:
    """What ran in a profile, with the start and the stop, in ns, of its recorded steps."""
    events = list(events)
    (window,) = (event for event in events if event.name == _WINDOW and not event.on_device)
    host = [event for event in events if not event.on_device and not event.is_async]
    host.sort(key=lambda event: (event.thread, event.start_ns, -event.stop_ns))
    part_of: dict[int, str | None] = {}
    on_host: list[Span] = []
    stack: list[_Enclosing] = []
    for event in host:
        while stack and (stack[-1].thread != event.thread or stack[-1].stop_ns < event.stop_ns):
            stack.pop()
        outer = stack[-1] if stack else _Enclosing(0, 0, None, None, False)
        opened, is_operator = _range_part(event.name), event.name.startswith("aten::")
        inner = _Enclosing(
            event.stop_ns,
            event.thread,
            opened or outer.range_part,
            _operator_part(event.name) or outer.operator_part,
            is_operator or outer.in_operator,
        )
        stack.append(inner)
        part_of[event.number] = inner.part
        if event.thread != window.thread:
            continue  # gloo's threads copy with operators, too
        if opened in ("exchange", "data"):
            on_host.append((event.start_ns, event.stop_ns, opened))
        elif is_operator and not outer.in_operator:
            on_host.append((event.start_ns, event.stop_ns, inner.part or "other"))
    on_device = [
        (event.start_ns, event.stop_ns, _kernel_part(event.name, part_of.get(event.launched_by)))
        for event in events
        if event.on_device
    ]
    if on_device:  # then the host only launches and waits, or fetches
        spans = on_device + [span for span in on_host if span[2] == "data"]
    else:
        messages = [event for event in events if event.is_async and event.name.startswith(_COMMUNICATION)]
        spans = on_host + [(event.start_ns, event.stop_ns, "exchange") for event in messages]
    return spans, window.start_ns, window.stop_ns


def _range_part(name: str) -> str | None:
    if name.startswith("Optimizer."):  # torch labels step and zero_grad of every optimizer
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


def sweep(spans: Iterable[Span], start_ns: int, stop_ns: int) -> dict[str, int]:
    """ns of each of PARTS between start and stop, every instant counted once.

    Compute goes before exchange, exchange before data, and of those alike the one that started first.
    """
    clipped = ((max(start, start_ns), min(stop, stop_ns), start, part) for start, stop, part in spans)
    waiting = sorted((span for span in clipped if span[0] < span[1]), key=lambda span: span[0], reverse=True)
    instants = sorted({start_ns, stop_ns, *(x for span in waiting for x in span[:2])})
    running: tuple[list, list, list] = ([], [], [])  # heaps: compute, exchange, data
    times_ns: dict[str, int] = dict.fromkeys(PARTS, 0)
    for now, then in itertools.pairwise(instants):
        while waiting and waiting[-1][0] == now:
            _, stop, start, part = waiting.pop()
            kind = 0 if part in COMPUTE else 1 if part == "exchange" else 2
            heapq.heappush(running[kind], (start, stop, part))
        for heap in running:
            while heap and heap[0][1] <= now:
                heapq.heappop(heap)
        part = next((heap[0][2] for heap in running if heap), "idle")
        times_ns[part] += then - now
    return times_ns


def read_events(kineto_events: Iterable[Any]) -> Iterator[Event]:
    """The profiler's own records: its public events do not say in torch 2.11 which operator launched a kernel.

    Left out are calls of CUDA's runtime and the profiler's own overhead (number 0), which have no numbers of operators.
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


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
