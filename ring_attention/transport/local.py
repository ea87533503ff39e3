"""Messages that stay on their rank. The time a step then saves is the communication that its compute does not hide."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor

_stay_local = False


def messages_are_local() -> bool:
    return _stay_local


@contextlib.contextmanager
def messages_stay_local() -> Iterator[None]:
    """Within, no attention module sends anything: each rank receives a copy of what it sends.

    For benchmarks only: all results within are garbage, and so are the weights after a training step. Every rank must
    enter it, with modules made before, because making one builds process groups.

    The copies keep uninitialised memory out of the results: a GPU at its power limit multiplies NaN faster than
    numbers. They take about a tenth of the time of the messages between GPUs, which the difference misses.
    """
    global _stay_local
    # Ulysses' all-to-all is DeepSpeed's. Its module is loaded if there is a module that uses it.
    deepspeed_layer: Any = sys.modules.get("deepspeed.sequence.layer")
    deepspeed_comm = getattr(deepspeed_layer, "dist", None)
    if deepspeed_layer is not None:
        deepspeed_layer.dist = SimpleNamespace(**vars(deepspeed_comm) | {"all_to_all_single": _all_to_all_single})
    before, _stay_local = _stay_local, True
    try:
        yield
    finally:
        _stay_local = before
        if deepspeed_layer is not None:
            deepspeed_layer.dist = deepspeed_comm


def copy_local(received: Tensor, sent: Tensor) -> None:
    """Fill `received` with the first numbers of `sent`, and with 0 if there are too few."""
    received, sent = received.view(-1), sent.reshape(-1)
    num_copied = min(len(received), len(sent))
    received[:num_copied] = sent[:num_copied]
    received[num_copied:] = 0


def _all_to_all_single(received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> SimpleNamespace:
    copy_local(received, sent)
    return SimpleNamespace(wait=lambda: None)  # DeepSpeed waits for it as for a collective
