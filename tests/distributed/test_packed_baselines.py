"""Other libraries' attention of packed documents, as `bench_attention` calls it, against one process."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.benchmark.baselines import ShardedAttention, _flex_context_parallel
from recipes.benchmark.packed_baselines import PACKED_BASELINES
from ring_attention import CAUSAL, LocalAttention
from ring_attention.kernels import KernelSpec
from tests.pool import WorkerPool, parallel_groups

ENDS = (0, 1, 100, 256, 390, 512)


def full_sequences() -> list[Tensor]:
    """q, k, v, dout, equal on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, ENDS[-1], heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def relative_error(got: Tensor, full: Tensor, attention: ShardedAttention) -> float:
    wanted = attention.layout.shard(full, attention.rank, dim=1)
    return ((got - wanted).norm() / wanted.norm()).item()


def reference(inputs: list[Tensor]) -> list[Tensor]:
    """The output, then the gradients of q, k, v."""
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out = LocalAttention("reference")(*leaves, 0, mask=CAUSAL.packed(ENDS))
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def ulysses_errors() -> list[float]:
    inputs = full_sequences()
    spec = KernelSpec.of(inputs[0], inputs[1], inputs[2])
    attention = PACKED_BASELINES["DeepSpeed Ulysses"](parallel_groups(1, 2), ENDS, spec)
    shards = [attention.layout.shard(x, attention.rank, dim=1) for x in inputs]
    leaves = [x.requires_grad_() for x in shards[:3]]
    out = attention.attend(leaves[0], leaves[1], leaves[2])
    results = [out.detach(), *torch.autograd.grad(out, leaves, shards[3])]
    return [relative_error(*pair, attention) for pair in zip(results, reference(inputs), strict=True)]


def test_deepspeeds_ulysses_keeps_documents_apart(pool: WorkerPool):
    for errors in pool.run(ulysses_errors, num_ranks=2):
        assert max(errors) < 1e-12


def flex_error_and_blocks() -> tuple[float, list[int]]:
    inputs = full_sequences()
    with torch.compiler.set_stance("force_eager"):  # compiling for the CPU takes a minute
        attention = _flex_context_parallel(parallel_groups(1, 2), ENDS, "cpu")
        q, k, v = (attention.layout.shard(x, attention.rank, dim=1) for x in inputs[:3])
        out = attention.attend(q, k, v)
    expected = reference(inputs)[0]
    return relative_error(out, expected, attention), attention.layout.positions(attention.rank)[::128].tolist()


def test_pytorchs_context_parallelism_keeps_documents_apart_and_places_blocks_by_their_work(pool: WorkerPool):
    errors, blocks = zip(*pool.run(flex_error_and_blocks, num_ranks=2), strict=True)
    assert max(errors) < 1e-12
    # 1, 2, 1 and 2 blocks of keys
    assert [sorted(own) for own in blocks] == [[128, 256], [0, 384]]
