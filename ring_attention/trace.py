"""Named ranges in a profiler's trace, and status reports of where a process is.

`with profiler_range("merge"): ...` costs 0.2 us outside a profiler; `torch.profiler.record_function` costs 5. A range
counts as an operator, so the trace links it to kernels that are launched past torch's operators, from Triton or CuTe.
`recipes.monitor.trace_analysis` reads the names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch._C._profiler import _RecordFunctionFast  # torch's compiler labels its kernels with it; has no public name

T = TypeVar("T")

_observers: dict[str, Callable[[], None]] = {}
_num_viewers = 0  # of ring steps
_status_listener: Callable[[str, str], None] | None = None


def profiler_range(name: str) -> contextlib.AbstractContextManager[None]:
    """A range of this name in a profiler's trace, from entry to exit."""
    observer = _observers.get(name)
    return _RecordFunctionFast(name) if observer is None else _observed(name, observer)


@contextlib.contextmanager
def _observed(name: str, observer: Callable[[], None]) -> Iterator[None]:
    with _RecordFunctionFast(name):
        observer()
        try:
            yield
        finally:
            observer()


@contextlib.contextmanager
def observed_range(name: str, observer: Callable[[], None]) -> Iterator[None]:
    """Within, call `observer` at the start and end of each range of this name, on the thread that runs it.

    Every rank must enter it, as for `visible_ring_steps`.
    """
    _observers[name] = observer
    try:
        with visible_ring_steps():
            yield
    finally:
        del _observers[name]


@contextlib.contextmanager
def visible_ring_steps() -> Iterator[None]:
    """Within, passes have their ranges: none runs as a CUDA graph (`pass_graph`). Every rank must enter it."""
    global _num_viewers
    _num_viewers += 1
    try:
        yield
    finally:
        _num_viewers -= 1


def ring_steps_are_visible() -> bool:
    return _num_viewers > 0


def set_status_listener(listener: Callable[[str, str], None] | None) -> None:
    """From here on `report_status` calls `listener`, on whatever thread reports; None removes it."""
    global _status_listener
    _status_listener = listener


def report_status(kind: str, text: str = "") -> None:
    """Tell the listener where this process is; does nothing without a listener.

    Args:
        kind: "ring_step", or "wait" for a transfer that is waited for; callers may add others.
        text: empty once it is over.
    """
    if _status_listener is not None:
        _status_listener(kind, text)


def numbered(name: str, items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """`enumerate`, with a profiler range and a ring step status "NAME NUMBER" around the work on each item."""
    for number, item in enumerate(items):
        report_status("ring_step", f"{name} {number}")
        with profiler_range(f"{name} {number}"):
            yield number, item
    report_status("ring_step")
