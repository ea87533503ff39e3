"""How the tests say that two tensors are equal, and what attention should be: a dense softmax in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUANTITIES = ("out", "dq", "dk", "dv", "dsinks")
# errors relative to the size of the result; LIMIT has room for a handful of roundings
LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in fp64, absolute where expected is 0; infinite if anything is not finite."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    difference, size = (got - expected).norm().item(), expected.norm().item()
    if not torch.isfinite(got).all():
        return float("inf")
    return difference / size if size > 1e-12 else difference


@dataclass(frozen=True)
class Expected:
    """out, dq, dk, dv, and dsinks if there are sinks, in fp64; and for each the size of what cancels in it.

    A gradient can be far smaller than its terms: a query with one key has none at all. `rounded` is the size of the
    terms that a kernel rounds to the tensors' dtype, `summed` of those that it adds up in fp32 (fp64 for fp64).
    """

    values: list[Tensor]
    rounded: list[float]
    summed: list[float]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    allowed_BST: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Expected:
    """From q [B, S, H, D], k [B, T, K, D], v [B, T, K, E], dout [B, S, H, E] and a mask of 1 or B rows, by hand."""
    q, k, v, dout = (tensor.detach().double() for tensor in (q, k, v, dout))
    kv_heads, expand = k.shape[2], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(expand, 2), v.repeat_interleave(expand, 2)
    scores, slope = torch.einsum("bshd,bthd->bhst", q, k) * scale, torch.ones((), device=q.device)
    if softcap is not None:
        scores, slope = softcap * torch.tanh(scores / softcap), torch.cosh(scores / softcap) ** -2
    scores = scores.masked_fill(~allowed_BST[:, None], float("-inf"))
    if sinks_H is not None:  # a key more, whose value is 0
        sinks_BHS1 = sinks_H.detach().double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks_BHS1), -1)
    p, p_sinks = scores.softmax(-1).split((k.shape[1], scores.shape[-1] - k.shape[1]), -1)
    out = torch.einsum("bhst,bthd->bshd", p, v)

    def dp_and_delta(v: Tensor, dout: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("bshd,bthd->bhst", dout, v), (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)

    def results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dp: Tensor, delta: Tensor) -> list[Tensor]:
        ds = p * (dp - delta) * slope
        out = torch.einsum("bhst,bthd->bshd", p, v)
        dq = torch.einsum("bhst,bthd->bshd", ds, k) * scale
        dk = torch.einsum("bhst,bshd->bthd", ds, q) * scale
        dv = torch.einsum("bhst,bshd->bthd", p, dout)
        dsinks = [] if sinks_H is None else [-(p_sinks * delta).sum((0, 2, 3))]
        return [out, dq, *(gradient.unflatten(2, (kv_heads, expand)).sum(3) for gradient in (dk, dv)), *dsinks]

    dp, delta = dp_and_delta(v, dout, out)
    values = results(q, k, v, dout, dp, delta)
    # out is rounded before delta is summed over it: that error does not cancel with delta's terms
    rounded_delta = (dout * out).norm(dim=-1).transpose(1, 2).unsqueeze(-1)
    rounded = results(q.abs(), k.abs(), v, dout, dp.abs(), -rounded_delta)
    dp_terms, delta_terms = dp_and_delta(v.abs(), dout.abs(), out.abs())
    summed = results(q.abs(), k.abs(), v.abs(), dout.abs(), dp_terms, -delta_terms)
    return Expected(values, *([term.norm().item() for term in terms] for terms in (rounded, summed)))


def assert_equal_attention(got: Sequence[Tensor], expected: Expected, dtype: torch.dtype, about: object = "") -> None:
    """out, dq, dk, dv, and dsinks if expected, are `expected` to within the rounding of `dtype`."""
    sum_dtype = torch.promote_types(dtype, torch.float32)
    for name, tensor, want, rounded, summed in zip(
        QUANTITIES[: len(expected.values)], got, expected.values, expected.rounded, expected.summed, strict=True
    ):
        assert tensor.shape == want.shape, f"{name} has shape {list(tensor.shape)}, not {list(want.shape)}: {about}"
        assert tensor.isfinite().all(), f"{name} is not finite: {about}"
        error = (tensor.detach().to(want.device).double() - want).norm().item()
        allowed = LIMIT[dtype] * want.norm().item() + torch.finfo(dtype).eps * rounded
        allowed += torch.finfo(sum_dtype).eps * summed
        assert error <= allowed, f"{name} is off by {error:.1e}, {allowed:.1e} is allowed: {about}"
