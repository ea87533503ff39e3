"""Process groups of the ranks that share a sequence, and collectives over them."""

from __future__ import annotations

import collections
import contextlib
import json
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C import _distributed_c10d  # the flight recorder has no public name
from torch.distributed import distributed_c10d

from ring_attention.transport.local import messages_are_local

# torch 2.13 renamed them
_all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
_reduce_scatter = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor


def all_gather(message: Tensor, group: torch_dist.ProcessGroup) -> Tensor:
    """[N] -> [P, N]: the vectors of all ranks of `group`. Every rank must call it."""
    gathered = message.new_empty(torch_dist.get_world_size(group), len(message))
    if messages_are_local():
        gathered.copy_(message)
    else:
        _all_gather(gathered.flatten(), message, group=group)
    return gathered


def reduce_scatter(messages: Tensor, group: torch_dist.ProcessGroup) -> Tensor:
    """[P, N] -> [N]: row r of the sum over ranks, on rank r. Every rank of `group` must call it."""
    scattered = messages.new_empty(messages.shape[1])
    if messages_are_local():
        scattered.copy_(messages[0])
    else:
        _reduce_scatter(scattered, messages.flatten(), group=group)
    return scattered


def world_size() -> int:
    """The number of all ranks; 1 without a process group."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank_in_world() -> int:
    """This rank's number; 0 without a process group."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def ranks_of(group: torch_dist.ProcessGroup) -> list[int]:
    """The numbers of a group's ranks."""
    return torch_dist.get_process_group_ranks(group)


def sum_over_world_(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place; unchanged without a process group. Every rank must call it."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def gather_over_world(value: Any) -> list[Any]:
    """All ranks' values, in the order of ranks. Every rank must call it."""
    values = [value] * world_size()
    if torch_dist.is_initialized():
        torch_dist.all_gather_object(values, value)
    return values


def rank_and_size(group: torch_dist.ProcessGroup) -> tuple[int, int]:
    """This rank's number in `group`, and the number of its ranks.

    Raises:
        ValueError: if `group` is None.
    """
    if group is None:
        raise ValueError("no process group: pass one, such as ParallelGroups(...).get_sequence_parallel_group()")
    return torch_dist.get_rank(group), torch_dist.get_world_size(group)


def same_ranks(group: Any, other: Any) -> bool:
    return torch_dist.get_process_group_ranks(group) == torch_dist.get_process_group_ranks(other)


def device_backend(group: torch_dist.ProcessGroup, device_type: str) -> Any:
    """The backend that carries `group`'s tensors of this device type; None if there is none.

    `get_backend` knows one for the whole group: "undefined" after init_process_group() without arguments.
    """
    if torch.device(device_type) not in group._device_types:
        return None
    return group._get_backend(torch.device(device_type))  # has no public name


def group_timeout(group: torch_dist.ProcessGroup) -> timedelta:
    """How long a collective of `group` may take before it ends its rank; on GPUs, if `group` is for GPUs."""
    backend = device_backend(group, "cuda") or device_backend(group, "cpu")
    return backend.options._timeout


def flight_record() -> tuple[bytes, list[str]]:
    """Torch's flight recorder: the pickle that `torchfrtrace` reads, and a line for each operation not yet ended."""
    name = "_dump_nccl_trace" if torch.cuda.is_available() else "_dump_fr_trace"
    record = getattr(_distributed_c10d, name)(True, True, False)
    entries = json.loads(getattr(_distributed_c10d, f"{name}_json")(True, True)).get("entries", [])
    return record, [
        f"{entry['profiling_name']} of {entry['process_group'][1]}, {entry['state']}, sizes {entry['input_sizes']}"
        for entry in entries
        if not entry["retired"]  # gloo's operations stay "scheduled" until they are retired
    ]


_subgroups = weakref.WeakValueDictionary[tuple[Any, tuple[int, ...]], torch_dist.ProcessGroup]()  # torch holds them
_num_built: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()


def subgroup(group: Any, ranks: Sequence[int]) -> torch_dist.ProcessGroup:
    """The process group of some ranks of `group`, with the timeout of `group`.

    Those ranks must call it. On NCCL every other rank of the world must make as many calls, each for its own group:
    DeepSpeed has torch split groups off the world's communicator. Cached, because each gloo group has a polling thread.
    """
    if torch_dist.get_process_group_ranks(group) == [torch_dist.get_global_rank(group, rank) for rank in ranks]:
        return group
    key = (group, tuple(ranks))
    if _subgroups.get(key) not in distributed_c10d._world.pg_map:  # not built, or destroyed
        _subgroups[key] = new_subgroup(group, ranks)
    return _subgroups[key]


def new_subgroup(
    group: torch_dist.ProcessGroup, ranks: Sequence[int], backend: str | None = None
) -> torch_dist.ProcessGroup:
    """As `subgroup`, but never cached, and on any backend; None is the default group's."""
    key = (group.group_name, tuple(ranks))
    _num_built[key] += 1
    with _group_name(f"{group.group_name}/{','.join(map(str, ranks))}/{_num_built[key]}"):
        built = torch_dist.new_group(
            [torch_dist.get_global_rank(group, rank) for rank in ranks],
            backend=backend,
            timeout=group_timeout(group),
            use_local_synchronization=True,
        )
    assert isinstance(built, torch_dist.ProcessGroup), "called by a rank outside"
    return built


@contextlib.contextmanager
def _group_name(name: str) -> Iterator[None]:
    """Within, torch gives this name to a group that its ranks build alone. Ranks find each other by the name.

    Torch's own has the number of groups that the process is in, which differs between ranks after a group of some ranks
    only, such as a logging group, and then all wait in vain (pytorch#173608).
    """
    torchs = distributed_c10d._hash_ranks_to_str
    distributed_c10d._hash_ranks_to_str = lambda ranks: name  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str = torchs
