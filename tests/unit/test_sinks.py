"""Attention sinks: against the eager attention of gpt-oss, and which heads a rank of Ulysses has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ring_attention import FULL, LocalAttention
from ring_attention.sinks import ulysses_heads
from tests.tools.measure import LIMIT, assert_equal_attention, dense_attention, relative_error


def eager_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, softcap: float | None) -> Tensor:
    """As Hugging Face computes it: sinks are a column of logits, which is dropped after the softmax."""
    logits = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    sink_logits = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    probabilities = torch.cat((logits, sink_logits), -1).softmax(-1)[..., :-1]
    return torch.einsum("bhst,bthd->bshd", probabilities, v)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_out_and_gradients_are_those_of_eager_attention(softcap: float | None):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 12, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    leaves.append(torch.randn(4, dtype=torch.float64, requires_grad=True))
    q, k, v, sinks = leaves
    out = LocalAttention("auto", mask=FULL)(q, k, v, 0, softcap=softcap, sinks=sinks)
    expected, dout = eager_attention(q, k, v, sinks, softcap), torch.randn_like(out)
    assert relative_error(out, expected) < 1e-14
    for got, want in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        assert relative_error(got, want) < 1e-13


def test_in_bf16_the_gradient_of_sinks_is_at_least_as_exact_as_that_of_eager_attention():
    """Heads of two tokens: in some, the terms of <dout, out> nearly cancel, and the rounding of out is what is left."""
    q, k, v, dout = (torch.randn(1, 2, 256, 16).bfloat16() for _ in range(4))
    sinks, allowed = torch.randn(256).bfloat16(), torch.ones(1, 2, 2, dtype=torch.bool)

    def results(attention: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, sinks)]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    ours = results(lambda q, k, v, sinks: LocalAttention("auto", mask=FULL)(q, k, v, 0, sinks=sinks))
    eager = results(lambda q, k, v, sinks: eager_attention(q, k, v, sinks, None))
    expected = dense_attention(q, k, v, dout, allowed, 0.25, sinks_H=sinks).values
    assert relative_error(ours[-1], expected[-1]) < relative_error(eager[-1], expected[-1])
    for head in range(256):
        parts = [tensor[:, :, [head]] for tensor in (q, k, v, dout)]
        got = [*(tensor[:, :, [head]] for tensor in ours[:-1]), ours[-1][[head]]]
        of_head = dense_attention(*parts, allowed_BST=allowed, scale=0.25, sinks_H=sinks[[head]])
        assert_equal_attention(got, of_head, torch.bfloat16, head)


@pytest.mark.parametrize("trained", [("query",), ("sinks",)])
def test_either_may_be_frozen(trained: tuple[str, ...]):
    torch.manual_seed(0)
    leaves = {"query": torch.randn(1, 6, 2, 8, requires_grad=True), "sinks": torch.randn(2, requires_grad=True)}
    key = torch.randn(1, 6, 2, 8)

    def gradients(names: tuple[str, ...]) -> dict[str, Tensor]:
        inputs = {name: leaf if name in names else leaf.detach() for name, leaf in leaves.items()}
        out = LocalAttention("auto")(inputs["query"], key, key, 0, sinks=inputs["sinks"])
        wanted = [inputs[name] for name in names]
        return dict(zip(names, torch.autograd.grad(out.square().sum(), wanted), strict=True))

    both = gradients(("query", "sinks"))
    for name, gradient in gradients(trained).items():
        assert torch.equal(gradient, both[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sinks_of_any_float_dtype_have_gradients_of_theirs(dtype: torch.dtype):
    torch.manual_seed(0)
    q, exact = torch.randn(2, 16, 4, 8).bfloat16(), torch.randn(4).bfloat16()
    plain, sinks = (exact.detach().to(wanted).requires_grad_() for wanted in (torch.float32, dtype))
    for leaf in (plain, sinks):
        LocalAttention("auto")(q, q, q, 0, sinks=leaf).float().square().sum().backward()
    assert plain.grad is not None
    assert sinks.grad is not None
    assert sinks.grad.dtype == dtype
    assert relative_error(sinks.grad, plain.grad) < LIMIT[torch.bfloat16]


def test_a_sink_far_below_the_scores_changes_nothing():
    q = torch.randn(1, 8, 2, 8)
    attention = LocalAttention("auto")
    for sink in (-1e4, float("-inf")):
        sinks = torch.full((2,), sink, requires_grad=True)
        out = attention(q, q, q, 0, sinks=sinks)
        assert torch.equal(out, attention(q, q, q, 0))
        out.sum().backward()
        assert sinks.grad is not None
        assert sinks.grad.tolist() == [0.0, 0.0]


def test_a_sink_far_above_the_scores_takes_all():
    q = torch.randn(1, 8, 2, 8)
    assert LocalAttention("auto")(q, q, q, 0, sinks=torch.full((2,), 1e4)).abs().max() == 0


@pytest.mark.parametrize("ulysses_degree", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (16, 8), (14, 7), (20, 5), (6, 6)])
def test_heads_are_dealt_out_as_deepspeed_deals_them(ulysses_degree: int, num_heads: int, num_kv_heads: int):
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list  # takes seconds

    blocks = [ulysses_heads(num_heads, num_kv_heads, rank, ulysses_degree) for rank in range(ulysses_degree)]
    meta = AutoTPMeta(num_kv_heads=num_kv_heads)
    assert [b.stop - b.start for b in blocks] == get_shard_size_list(num_heads, ulysses_degree, meta)
    assert [head for b in blocks for head in range(b.start, b.stop)] == list(range(num_heads))
