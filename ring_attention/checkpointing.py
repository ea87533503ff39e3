"""Selective checkpointing: the backward pass recomputes a layer without its attention, whose out and lse are saved.

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=selective_checkpointing)

Attention is most of a long sequence's operations and all of its messages, but out and lse take only O(L/P) memory. A
layer can be recomputed several times, as by backward(retain_graph=True). `pack` and `unpack`, as in autograd's
`saved_tensors_hooks`, can save out and lse elsewhere, such as on the host.
"""

from __future__ import annotations

from collections.abc import Callable
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
    saved: list[tuple[Any, Any]] = []

    def save(compute: Callable[[], Result]) -> Result:
        out, lse = compute()
        # detached: autograd attaches the whole graph to `out`
        saved.append((pack(out.detach()), pack(lse)))
        return out, lse

    def make_restore() -> Policy:
        remaining = iter(saved)

        def restore(compute: Callable[[], Result]) -> Result:
            out, lse = next(remaining)
            return unpack(out).detach(), unpack(lse)  # detached: each recomputation attaches its own graph

        return restore

    return _PolicyContext(lambda: save), _PolicyContext(make_restore)


class _PolicyContext(AbstractContextManager[None]):
    """Within, attention gets its results by a policy. `checkpoint` enters it again for each recomputation."""

    def __init__(self, make_policy: Callable[[], Policy]) -> None:
        self._make_policy = make_policy

    def __enter__(self) -> None:
        global _policy
        self._before, _policy = _policy, self._make_policy()

    def __exit__(self, *exception: object) -> None:
        global _policy
        _policy = self._before
