"""Selective checkpointing: the backward pass recomputes a layer without its attention, whose out and lse are saved.

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=selective_checkpointing)

Attention is most of a long sequence's operations and all of its messages, but out and lse take only O(L/P) memory.
`pack` and `unpack`, as in autograd's `saved_tensors_hooks`, can save them elsewhere, such as on the host.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

Result = tuple[Tensor, Tensor]  # out and lse
Policy = Callable[[Callable[[], Result]], Result]

_policy: Policy | None = None  # how attention gets its result now; None computes it


def saved_or_computed(compute: Callable[[], Result]) -> Result:
    """The result of `compute`, or what was saved when this layer was first computed."""
    return compute() if _policy is None else _policy(compute)


def selective_checkpointing(
    pack: Callable[[Tensor], Any] = lambda tensor: tensor, unpack: Callable[[Any], Tensor] = lambda tensor: tensor
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`'s context_fn: the contexts of a layer's forward pass and of its recomputation."""
    saved: deque[tuple[Any, Any]] = deque()

    def save(compute: Callable[[], Result]) -> Result:
        out, lse = compute()
        # detached: autograd attaches the whole graph to `out`
        saved.append((pack(out.detach()), pack(lse)))
        return out, lse

    def restore(compute: Callable[[], Result]) -> Result:
        out, lse = saved.popleft()
        return unpack(out), unpack(lse)

    return _use(save), _use(restore)


@contextlib.contextmanager
def _use(policy: Policy) -> Iterator[None]:
    global _policy
    before, _policy = _policy, policy
    try:
        yield
    finally:
        _policy = before
