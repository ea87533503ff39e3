"""What must be equal on all ranks of a call is compared before their first message."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Hashable
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as torch_dist

from ring_attention.trace import report_status
from ring_attention.transport.local import messages_are_local
from ring_attention.transport.p2p import TransferError

_MAX_SHOWN = 120  # characters of a value in an error

_agreed: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()  # by group


def check_equal(
    group: torch_dist.ProcessGroup, values: dict[str, Hashable], changing: dict[str, Hashable], device: torch.device
) -> None:
    """Compare values over the ranks of `group`: one small collective, and only if `values` are new to the group.

    Every rank must call it. A rank that knows its values already takes no part, so ranks of which only some have new
    values wait for each other until the group's timeout.

    Args:
        values: by name.
        changing: values that are compared too, but are not new reasons to compare.
        device: of the tensors that the ranks exchange.

    Raises:
        ValueError: on every rank, if ranks differ; names what each has.
        TransferError: if a rank does not answer within the group's timeout.
    """
    agreed = _agreed.setdefault(group, set())
    key = tuple(values.values())
    if key in agreed or group.size() == 1 or messages_are_local():
        return
    own = {name: _shown(value) for name, value in (values | changing).items()}
    by_rank: list[Any] = [None] * group.size()
    report_status("wait", "comparing the arguments of attention over ranks")
    # NCCL sends objects by way of the current GPU, which need not be that of the tensors
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            torch_dist.all_gather_object(by_rank, own, group=group)
        except RuntimeError as error:
            raise TransferError(f"comparing the arguments of attention over ranks, {own}: {error}") from error
    report_status("wait")
    ranks = torch_dist.get_process_group_ranks(group)
    if differences := [text for name in own if (text := _difference(name, ranks, by_rank))]:
        raise ValueError(
            f"the ranks that share a sequence call attention with different arguments: {'; '.join(differences)}: all "
            "need equal ones. Give these ranks the same sequences (a DistributedSampler gives each rank its own), cut "
            "into equal parts by the module's layout(length).shard"
        )
    agreed.add(key)


def _shown(value: Hashable) -> str:
    """Different for different values, and short."""
    text = repr(list(value) if isinstance(value, torch.Size) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({sha256(text.encode()).hexdigest()[:8]})"


def _difference(name: str, ranks: list[int], by_rank: list[dict[str, str]]) -> str:
    """`name` is VALUE on rank 0, VALUE on ranks 1, 2; empty if all ranks have one value."""
    ranks_by_value: dict[str, list[int]] = defaultdict(list)
    for rank, values in zip(ranks, by_rank, strict=True):
        ranks_by_value[values[name]].append(rank)
    if len(ranks_by_value) == 1:
        return ""
    parts = [f"{value} on rank {', '.join(map(str, some))}" for value, some in ranks_by_value.items()]
    return f"{name} is {', '.join(parts)}"
