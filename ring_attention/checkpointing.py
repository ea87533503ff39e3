"""Layers that are computed again in the backward pass, without their attention: its output and lse are kept.

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=selective_checkpointing)

Given `pack` and `unpack`, as autograd's `saved_tensors_hooks` takes them, they may be kept elsewhere, as on the host.
Attention is most of a long sequence's operations and all of its messages, while what is kept of it is O(L/P): the
output and a number per query and head. Keys, values and queries are computed again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

Result = tuple[Tensor, Tensor]  # out and lse

_how: Callable[[Callable[[], Result]], Result] | None = None  # results come about here and now; None: by computing them


def saved_or_computed(compute: Callable[[], Result]) -> Result:
    """What `compute` gives, or gave when this layer was computed first."""
    return compute() if _how is None else _how(compute)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def selective_checkpointing(
    pack: Callable[[Tensor], Any] = _as_it_is, unpack: Callable[[Any], Tensor] = _as_it_is
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`'s context_fn: what to be in while a layer is computed, and while it is computed again."""
    results: deque[tuple[Any, Any]] = deque()

    def keep(compute: Callable[[], Result]) -> Result:
        out, lse = compute()
        # detached: autograd makes `out` its own, with all that it came from
        results.append((pack(out.detach()), pack(lse)))
        return out, lse

    def give_back(compute: Callable[[], Result]) -> Result:
        out, lse = results.popleft()
        return unpack(out), unpack(lse)

    return _within(keep), _within(give_back)


@contextlib.contextmanager
def _within(how: Callable[[Callable[[], Result]], Result]) -> Iterator[None]:
    global _how
    before, _how = _how, how
    try:
        yield
    finally:
        _how = before
