"""Packed documents in one exchange, on ranks: exact, deterministic, and no document sees another."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from ring_attention import Mask, direct
from ring_attention.direct_routing import goes_direct
from tests.cases import Case, attend, build, check, draw, many_on_rank
from tests.distributed import test_copy_engine
from tests.pool import WorkerPool

LAYOUTS = ("balanced", "balanced", "zigzag", "contiguous")


def is_direct(case: Case) -> bool:
    layout = case.global_layout
    return goes_direct(layout, case.mask.within(layout.padded_length))


def random_cases(num_ranks: int, number: int, dtype: torch.dtype = torch.float64) -> list[Case]:
    """Of one exchange: documents of log-normal lengths, windows, sinks, softcaps, grouped heads, rows, orders."""
    generator, cases = random.Random(num_ranks), []
    while len(cases) < number:
        length, ends = generator.randrange(20, 160), [0]
        while ends[-1] < length:
            ends.append(min(length, ends[-1] + 1 + int(generator.lognormvariate(2.3, 0.8))))
        num_kv_heads = generator.choice([1, 2, 4])
        case = Case(
            "ring",
            num_ranks,
            layout=generator.choice(LAYOUTS),
            mask=Mask(generator.choice([None, None, 0, 5, 20])).packed(ends),
            length=length,
            batch=generator.choice([1, 1, 3]),
            num_heads=num_kv_heads * generator.choice([1, 2, 3]),
            num_kv_heads=num_kv_heads,
            value_head_dim=generator.choice([None, None, 24]),
            dtype=dtype,
            kernel=generator.choice(["reference", "auto"]) if dtype == torch.float64 else "auto",
            batch_dim_idx=generator.choice([0, 1]),
            contiguous=generator.choice([True, False]),
            softcap=generator.choice([None, None, 1.5]),
            sinks=generator.choice([True, False]),
        )
        if case.kernel == "auto" and (case.softcap or case.value_head_dim):
            case = replace(case, kernel="reference")
        cases += [case] if is_direct(case) else []
    return cases


def checked(cases: list[Case], ranks: list[list[list[Tensor]]]) -> None:
    for case, shards in zip(cases, zip(*ranks, strict=True), strict=True):
        check(case, list(shards))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_random_documents_equal_whole_attention(pool: WorkerPool, num_ranks: int, dtype: torch.dtype):
    cases = random_cases(num_ranks, 20, dtype)
    checked(cases, pool.run(many_on_rank, cases, num_ranks=num_ranks))


def test_with_ulysses_inside(pool: WorkerPool):
    cases = [
        replace(case, method="hybrid", num_ranks=4, ulysses_degree=2, num_kv_heads=2, num_heads=4)
        for case in random_cases(2, 12)
    ]
    assert all(map(is_direct, cases))
    checked(cases, pool.run(many_on_rank, cases, num_ranks=4))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_by_copies(pool: WorkerPool, num_ranks: int):
    """Several ranks copy into one buffer. It grows, and is overwritten as soon as the protocol allows."""
    cases = [replace(case, transport="copy_engine") for case in random_cases(num_ranks, 16)]
    ranks = pool.run(test_copy_engine.many_on_rank, cases, None, num_ranks=num_ranks)
    checked(cases, [results for results, _, _ in ranks])
    assert sum(copies for _, copies, _ in ranks) > 0
    assert sum(p2p for _, _, p2p in ranks) == 0


ENDS = [0, 8, 14, 31, 47, 52, 64]  # in the balanced layout, 14 to 31 are on two ranks and 47 to 52 on three
CASE = Case("ring", 4, mask=Mask().packed(ENDS), length=64, batch=1, layout="balanced", dtype=torch.bfloat16)


def passes(case: Case, changed: slice | None) -> tuple[list[Tensor], list[Tensor]]:
    """On each rank: results of two passes. Before the second, q, k, v and dout of these tokens are replaced."""
    import deepspeed.comm as dist

    attention, whole = build(case, dist.get_world_group()), draw(case)
    other = [tensor.clone() for tensor in whole]
    if changed is not None:
        for tensor in other:
            tensor[:, changed] = torch.randn_like(tensor[:, changed]) * 100
    with mock.patch.object(direct.RingFunction, "apply", side_effect=AssertionError("not in one exchange")):
        return attend(case, attention, whole), attend(case, attention, other)


@pytest.mark.parametrize("layout", ["balanced", "zigzag", "contiguous"])
@pytest.mark.parametrize("left", [None, 7])
@pytest.mark.parametrize(("start", "stop"), [(14, 31), (47, 52)])
def test_no_token_sees_another_document(pool: WorkerPool, layout: str, left: int | None, start: int, stop: int):
    """Replacing one document does not change a bit of out, dq, dk and dv of the others."""
    case = replace(CASE, layout=layout, mask=Mask(left).packed(ENDS))
    ranks = pool.run(passes, case, slice(start, stop), num_ranks=4)
    others = torch.ones(64, dtype=torch.bool)
    others[start:stop] = False
    for part in range(4):
        before, after = (case.global_layout.unshard([rank[index][part] for rank in ranks], dim=1) for index in (0, 1))
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, ~others], after[:, ~others])


def test_equal_inputs_give_equal_bits(pool: WorkerPool):
    for first, second in pool.run(passes, replace(CASE, num_heads=8), None, num_ranks=4):
        assert all(torch.equal(*parts) for parts in zip(first, second, strict=True))
