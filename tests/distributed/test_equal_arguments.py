"""Ranks that call attention with different arguments all raise one error, before any message of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as torch_dist

from ring_attention import (
    CAUSAL,
    FULL,
    AllGatherAttention,
    HybridAttention,
    Mask,
    RingAttention,
    UlyssesAttention,
)
from tests.errors import names
from tests.pool import WorkerPool

Call = dict[str, Any]

# what the last of two ranks passes, where the first passes the defaults of `call`; and what the error names: the
# argument, its value on rank 0 and on rank 1
DIFFERENCES: dict[str, tuple[Call, str, object, object]] = {
    "length": ({"length": 5}, "query", [2, 4, 4, 8], [2, 5, 4, 8]),
    "batch": ({"batch": 3}, "query", [2, 4, 4, 8], [3, 4, 4, 8]),
    "heads": ({"heads": 8}, "query", [2, 4, 4, 8], [2, 4, 8, 8]),
    "kv heads": ({"kv_heads": 4}, "key", [2, 4, 2, 8], [2, 4, 4, 8]),
    "head size": ({"head_dim": 16}, "query", [2, 4, 4, 8], [2, 4, 4, 16]),
    "value head size": ({"value_head_dim": 16}, "value", [2, 4, 2, 8], [2, 4, 2, 16]),
    "dtype": ({"dtype": torch.float64}, "query", torch.float32, torch.float64),
    "mask": ({"mask": FULL}, "mask", (None, 0, True), (None, None, True)),
    "window": ({"mask": Mask(left=3)}, "mask", (None, 0, True), (3, 0, True)),
    "documents": ({"mask": CAUSAL.packed([0, 3, 8])}, "documents", None, ((0, 3, 8),)),
    "softcap": ({"softcap": 50.0}, "softcap", None, 50.0),
    "sinks": ({"sinks": torch.zeros(4)}, "sinks", None, [4]),
    "scale": ({"softmax_scale": 0.5}, "softmax_scale", None, 0.5),
    "tensors that do not fit": ({"value_length": 3}, "value", [2, 4, 2, 8], [2, 3, 2, 8]),
}
MODULES: dict[str, Callable[[Any], Any]] = {
    "ring": lambda world: RingAttention("auto", world),
    "zigzag": lambda world: RingAttention("auto", world, layout="zigzag"),
    "all_gather": lambda world: AllGatherAttention("auto", world),
    "ulysses": lambda world: UlyssesAttention("auto", world),
    "hybrid": lambda world: HybridAttention("auto", world, ulysses_degree=1),
}


def world() -> Any:
    import deepspeed.comm as dist

    return dist.get_world_group()


def call(
    module: Any,
    length: int = 4,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_head_dim: int | None = None,
    value_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    q, k, v = (
        torch.zeros(batch, tokens, number, size, dtype=dtype)
        for tokens, number, size in [
            (length, heads, head_dim),
            (length, kv_heads, head_dim),
            (value_length or length, kv_heads, value_head_dim or head_dim),
        ]
    )
    module(q, k, v, 0, **options)


def errors() -> list[tuple[str, str, str]]:
    """The error of each module and difference."""
    group: Any = torch_dist.new_group()  # in which no call has been compared before
    results = []
    for name, build in MODULES.items():
        module = build(group)
        for difference, (last, *_) in DIFFERENCES.items():
            try:
                call(module, **(last if module.sequence_rank == 1 else {}))
            except ValueError as error:
                results.append((name, difference, str(error)))
            else:
                results.append((name, difference, "accepted"))
    torch_dist.destroy_process_group(group)
    return results


def test_what_differs_between_ranks_is_refused_on_all_with_what_each_has(pool: WorkerPool):
    first, second = pool.run(errors, num_ranks=2)
    assert first == second
    for name, difference, message in first:
        assert message != "accepted", (name, difference)
        _, argument, on_first, on_second = DIFFERENCES[difference]
        names(message, argument, f"{on_first} on rank 0", f"{on_second} on rank 1")
        names(message, "layout(length).shard", "DistributedSampler")


def comparisons() -> list[int]:
    """How many collectives there were after each call, on a group of its own."""
    group: Any = torch_dist.new_group()
    gather = torch_dist.all_gather_object
    layers = [RingAttention("auto", group) for _ in range(3)]
    number, counts = 0, []

    def counting(*arguments: Any, **options: Any) -> None:
        nonlocal number
        number += 1
        gather(*arguments, **options)

    with patch.object(torch_dist, "all_gather_object", counting):
        for layer in layers:
            call(layer)
        counts.append(number)
        call(layers[0], mask=CAUSAL.packed([0, 3, 8]))
        counts.append(number)
        call(layers[0], mask=CAUSAL.packed([0, 5, 8]))
        call(layers[0])
        counts.append(number)
        call(layers[0], length=6)
        counts.append(number)
    torch_dist.destroy_process_group(group)
    return counts


def test_only_new_shapes_are_compared(pool: WorkerPool):
    """Once for all layers of a group; documents, which change with each batch, once."""
    assert pool.run(comparisons, num_ranks=2) == [[1, 2, 2, 3]] * 2


def wrong_num_kv_heads(num_kv_heads: int) -> str:
    module = UlyssesAttention("auto", world(), num_kv_heads=num_kv_heads)
    with pytest.raises(ValueError, match="num_kv_heads") as raised:
        call(module)
    call(UlyssesAttention("auto", world(), num_kv_heads=2))
    return str(raised.value)


@pytest.mark.parametrize("num_kv_heads", [1, 4, 5])
def test_another_number_of_kv_heads_than_the_keys_have_is_refused(pool: WorkerPool, num_kv_heads: int):
    for message in pool.run(wrong_num_kv_heads, num_kv_heads, num_ranks=2):
        names(message, f"num_kv_heads={num_kv_heads}", "2 heads")
