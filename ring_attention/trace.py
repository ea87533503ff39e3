"""Names in a profiler's trace for what the attention modules do: `with profiler_range("merge"): ...`.

Used by `ring` and `exchange`; `recipes.monitor.trace_analysis` reads the names. Outside a profiler a range costs 0.2 us;
torch.profiler.record_function, for the same entry in the trace, 5 us. It also counts as an operator, so that a kernel
which is launched past torch's operators, from Triton or CuTe, is linked to the range that it was launched in.

Who wants to know how long ranges of one name take, without a profiler, has them `observed_range`; who wants to know where
the process is, for when it stands still, is told by `report_status`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch._C._profiler import _RecordFunctionFast  # torch's compiler labels its kernels with it; has no public name

T = TypeVar("T")

_observers: dict[str, Callable[[], None]] = {}
_follower: Callable[[str, str], None] | None = None


def profiler_range(name: str) -> contextlib.AbstractContextManager[None]:
    """A range of this name in a profiler's trace, from entry to exit."""
    note = _observers.get(name)
    return _RecordFunctionFast(name) if note is None else _notifying_range(name, note)


@contextlib.contextmanager
def observed_range(name: str, note: Callable[[], None]) -> Iterator[None]:
    """Within, `note` is called where a range of this name begins and where it ends, on the thread that runs it."""
    _observers[name] = note
    try:
        yield
    finally:
        del _observers[name]


def set_status_listener(follower: Callable[[str, str], None] | None) -> None:
    """From here on `report_status` calls `follower`, on whatever thread; None ends that."""
    global _follower
    _follower = follower


def report_status(kind: str, text: str = "") -> None:
    """Say where this process is to who follows it: nothing else is done, and nothing where nobody does.

    Args:
        kind: "ring_step", or "wait", which is who is waited for; callers may have others.
        text: empty once that is over.
    """
    if _follower is not None:
        _follower(kind, text)


def numbered(name: str, items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """`enumerate`, with what is done with each item labelled and told as the stage "NAME NUMBER"."""
    for number, item in enumerate(items):
        stage = f"{name} {number}"
        report_status("ring_step", stage)
        with profiler_range(stage):
            yield number, item
    report_status("ring_step")


@contextlib.contextmanager
def _notifying_range(name: str, note: Callable[[], None]) -> Iterator[None]:
    with _RecordFunctionFast(name):
        note()
        try:
            yield
        finally:
            note()
