"""Items of an iterator, made in a thread while the items before them are used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_WAIT_S = 0.2  # how often a thread that has nothing to do looks whether it is still needed


def read_ahead(items: Iterator[Item], num_ahead: int) -> Generator[Item]:
    """The same items in the same order, up to `num_ahead` of them in advance; an error comes where it would have come.

    The thread starts with the first item that is asked for. When this generator is closed, it closes `items` and ends.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(num_ahead)
    is_over = threading.Event()

    def put(item: Item | None, error: BaseException | None = None) -> None:
        while not is_over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=_WAIT_S)
                return

    def make() -> None:
        try:
            for item in items:
                put(item)
                if is_over.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)
        finally:
            if isinstance(items, Generator):  # ranks that share a stream must all hear that this one takes no more
                items.close()

    threading.Thread(target=make, name="read ahead", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType]
    finally:
        is_over.set()
