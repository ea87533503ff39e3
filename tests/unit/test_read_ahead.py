"""Items read ahead are the same items, and errors come where they would have come."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from data.read_ahead import read_ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_items_keep_their_order():
    assert list(read_ahead(iter(range(100)), 3)) == list(range(100))


def test_an_error_comes_after_the_items_before_it():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    ahead = read_ahead(items(), 3)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second"):
        next(ahead)


def test_only_some_items_are_made_in_advance_and_while_the_others_are_used():
    made = []
    ahead = read_ahead((made.append(number) or number for number in itertools.count()), 2)
    assert next(ahead) == 0
    time.sleep(0.5)
    assert made == [0, 1, 2, 3]  # two wait, and one more waits for its place
    ahead.close()


def test_the_thread_ends_with_the_generator():
    ahead = read_ahead(itertools.count(), 2)
    next(ahead)
    assert threads()
    ahead.close()
    for thread in threads():
        thread.join(2)
    assert not threads()


def test_closing_closes_the_items_in_the_thread_that_makes_them():
    closed_in = []

    def items() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed_in.append(threading.current_thread().name)

    ahead = read_ahead(items(), 2)
    next(ahead)
    ahead.close()
    for thread in threads():
        thread.join(2)
    assert closed_in == ["read ahead"]
