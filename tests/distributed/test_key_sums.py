"""dK and dV that travel between ranks as a kernel's sums, in fp32 where keys and values are in bf16."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ring_attention import CAUSAL, FULL, ring
from ring_attention.kernels import KERNELS
from tests.cases import Case, check, many_on_rank
from tests.distributed import test_copy_engine
from tests.pool import WorkerPool
from tests.unit.test_ring import SummingKernel

LENGTH = 48  # halves of each rank's tokens are whole pairs, which the kernel sums
# one document, several in ring steps, several in one exchange, and one again: their gradients travel in turn as sums,
# rounded, rounded, as sums, through the same buffers
MASKS = [CAUSAL, CAUSAL.packed([0, 5, LENGTH]), CAUSAL.packed(range(0, LENGTH + 1, 6)), FULL, CAUSAL]


def cases_of(transport: str, dtype: torch.dtype) -> list[Case]:
    cases = [
        Case("ring", 4, 1, layout, mask, LENGTH, batch, dtype=dtype, kernel="reference", transport=transport)
        for batch in (1, 3)
        for layout in ("zigzag", "contiguous")
        for mask in MASKS
    ]
    return [*cases, replace(cases[0], method="hybrid", ulysses_degree=2)]


def with_sums(cases: list[Case]) -> tuple[list[list[Tensor]], int]:
    """On each rank: results, and in how many passes gradients travelled as sums."""
    kernels = patch.dict(KERNELS, {"reference": SummingKernel(sums_keys=True)})
    with kernels, patch.object(ring, "SummedKeyGradients", wraps=ring.SummedKeyGradients) as summed:
        by_copies = cases[0].transport == "copy_engine"
        results = test_copy_engine.many_on_rank(cases, None)[0] if by_copies else many_on_rank(cases)
        return results, summed.call_count


@pytest.mark.parametrize("transport", ["p2p", "copy_engine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_equal_whole_attention(pool: WorkerPool, transport: str, dtype: torch.dtype):
    cases = cases_of(transport, dtype)
    ranks = pool.run(with_sums, cases, num_ranks=4)
    for case, *shards in zip(cases, *(results for results, _ in ranks), strict=True):
        check(case, shards)
    num_single = sum(case.mask.documents is None for case in cases)
    assert [num_passes for _, num_passes in ranks] == [num_single] * 4
