"""Hugging Face models under ring attention against eager attention in one process: outputs and every gradient."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ring_attention import (
    AllGatherAttention,
    HybridAttention,
    RingAttention,
    UlyssesAttention,
    hf,
)
from ring_attention.layout import LAYOUTS
from ring_attention.sequence_attention import SequenceAttention
from tests.families import FAMILIES, MORE_FAMILIES, VOCAB_SIZE, tiny_model
from tests.pool import WorkerPool

LENGTH = 203  # of no rank count a multiple
BOUNDARIES = [0, 50, 51, 140, LENGTH]  # of packed documents
LIMIT = 1e-5
METHODS: dict[str, Any] = {
    "ring": RingAttention,
    "ulysses": UlyssesAttention,
    "hybrid": functools.partial(HybridAttention, ulysses_degree=2),
    "all_gather": AllGatherAttention,
}


Result = tuple[float, Tensor, dict[str, Tensor]]  # loss, logits, gradients


def world() -> Any:
    import deepspeed.comm as dist

    return dist.get_world_group()


def whole_batch(packed: bool, num_rows: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (num_rows, LENGTH), generator=generator)
    if not packed:
        return {"input_ids": ids, "labels": ids}
    lengths = torch.tensor(BOUNDARIES).diff().tolist()
    labels = ids.clone()
    labels[:, BOUNDARIES[:-1]] = hf.IGNORED_LABEL  # `shard` does it, too; `eager` does not
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@functools.cache
def eager(family: str, packed: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> Result:
    """One process: each document alone, since transformers 5.24 lets gpt-oss's eager attention see all of them."""
    model, batch = tiny_model(family, "eager", dtype, **changes), whole_batch(packed)
    labels, logits, losses = F.pad(batch["labels"][:, 1:], (0, 1), value=hf.IGNORED_LABEL), [], []
    for start, stop in itertools.pairwise(BOUNDARIES if packed else [0, LENGTH]):
        out = model(input_ids=batch["input_ids"][:, start:stop], use_cache=False).logits
        logits.append(out.to(torch.promote_types(dtype, torch.float32)))
        losses.append(F.cross_entropy(logits[-1].flatten(0, 1), labels[:, start:stop].flatten(), reduction="sum"))
    loss = torch.stack(losses).sum() / (labels != hf.IGNORED_LABEL).sum()
    loss.backward()
    return loss.item(), torch.cat(logits, 1).detach().double(), gradients(model)


def ring(model: nn.Module, attention: SequenceAttention, batch: dict[str, Any]) -> Result:
    """The same over the ranks: this rank's loss, and logits and gradients of all."""
    import torch.distributed as dist

    hf.check(model)
    shard = hf.shard(batch, attention)
    out = model(**shard)
    loss = hf.loss(out, shard)
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (attention.sequence_rank, out.logits.detach().double()))
    parts = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
    layout = attention.layout(LENGTH, tuple(BOUNDARIES) if "position_ids" in batch else None)
    return loss.item(), layout.unshard(parts, 1), gradients(model)


def error(found: Result, expected: Result) -> float:
    """The largest relative error of loss, logits and gradients."""
    errors = [abs(found[0] - expected[0]) / expected[0], ((found[1] - expected[1]).norm() / expected[1].norm()).item()]
    assert found[2].keys() == expected[2].keys()
    errors += [((found[2][name] - grad).norm() / grad.norm()).item() for name, grad in expected[2].items()]
    return max(errors)


def family_errors(family: str, method: str) -> dict[tuple[str, bool], float]:
    hf.register()
    errors, model = {}, tiny_model(family, "ring")
    for layout in LAYOUTS:
        attention = METHODS[method]("auto", world(), layout=layout)
        for packed in (False, True):
            model.zero_grad()
            found = ring(model, attention, whole_batch(packed))
            errors[layout, packed] = error(found, eager(family, packed))
    eager.cache_clear()  # other tests count what their ranks hold
    return errors


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_eager_attention_in_one_process(pool: WorkerPool, family: str, num_ranks: int):
    for errors in pool.run(family_errors, family, "ring", num_ranks=num_ranks):
        assert max(errors.values()) < LIMIT, errors


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_more_families_equal_eager_attention_in_one_process(pool: WorkerPool, family: str):
    for errors in pool.run(family_errors, family, "ring", num_ranks=2):
        assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(("method", "num_ranks"), [("ring", 2), ("ulysses", 2), ("all_gather", 2), ("hybrid", 4)])
def test_every_method_equals_eager_attention_in_one_process(pool: WorkerPool, family, method, num_ranks):
    for errors in pool.run(family_errors, family, method, num_ranks=num_ranks):
        assert max(errors.values()) < LIMIT, errors


def bf16_errors(family: str) -> tuple[float, float]:
    """Of the ring and of one process, both in bf16, against one process in fp64; weights are rounded to bf16 in all."""
    hf.register()
    attention = RingAttention("auto", world(), layout="zigzag")
    # rounding must not change which experts a token goes to
    changes = {"num_experts_per_tok": 4} if "num_experts_per_tok" in FAMILIES[family] else {}
    exact = eager(family, True, torch.float64, **changes)
    ours = ring(tiny_model(family, "ring", torch.bfloat16, **changes), attention, whole_batch(True))
    alone = eager(family, True, torch.bfloat16, **changes)
    eager.cache_clear()
    return mean_error(ours, exact), mean_error(alone, exact)


def mean_error(found: Any, expected: Any) -> float:
    """Of logits and gradients: single gradients of tiny models are noise."""
    pairs = [(found[1], expected[1]), *((found[2][name], grad) for name, grad in expected[2].items())]
    return torch.stack([(ours - exact).norm() / exact.norm() for ours, exact in pairs]).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_in_bf16_is_that_of_one_process(pool: WorkerPool, family: str):
    for ours, one_process in pool.run(bf16_errors, family, num_ranks=2):
        assert ours < 1.5 * one_process, (ours, one_process)
