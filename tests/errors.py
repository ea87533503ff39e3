"""How the tests check a message: the values, fields and choices that it names, and what to type. Its words are free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest


def names(text: str, *parts: object) -> None:
    """Assert that each part is in the text as a whole: not 1 in 128 or 0.1, and not ring_degree=2 in ring_degree=24."""
    missing = [str(part) for part in parts if not is_named(text, str(part))]
    assert not missing, f"does not name {missing}: {text}"


def is_named(text: str, part: str) -> bool:
    return re.search(rf"(?<![\w-])(?<!\w[.,]){re.escape(part)}(?!\w|[.,/-]\w)", text) is not None


def some_line_names(lines: Iterable[str], *parts: object) -> None:
    """Assert that a line is in which each part is."""
    lines = list(lines)
    assert any(all(is_named(line, str(part)) for part in parts) for line in lines), f"none names {parts}: {lines}"


@contextmanager
def refused(error: type[Exception], *parts: object) -> Iterator[None]:
    """The block raises an error whose message names the parts."""
    with pytest.raises(error) as caught:
        yield
    names(str(caught.value), *parts)
