"""Plain matrix products and softmax in fp32 or fp64: the tests' oracle and the last resort. Memory O(S * T)."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_attention.kernels.base import EqualHeadsKernel, KernelParams, SavedTensors, band_mask


def _upcast(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _scores(q_BSHD: Tensor, k_BTHD: Tensor, params: KernelParams) -> Tensor:
    scores_BHST = torch.einsum("bshd,bthd->bhst", q_BSHD, k_BTHD) * params.scale
    return scores_BHST if params.softcap is None else params.softcap * torch.tanh(scores_BHST / params.softcap)


def _masked(scores_BHST: Tensor, params: KernelParams) -> Tensor:
    if params.lower is None and params.upper is None:
        return scores_BHST
    num_queries, num_keys = scores_BHST.shape[2:]
    allowed = band_mask(num_queries, num_keys, params.lower, params.upper, scores_BHST.device)
    return scores_BHST.masked_fill(~allowed, float("-inf"))


class ReferenceKernel(EqualHeadsKernel):
    name = "reference"
    speed = "plain matrix products with O(S^2) memory"
    device_type = None
    dtypes = ()
    has_value_head_dim = has_softcap = True

    def _forward(self, q_BSHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        q, k, v = _upcast(q_BSHD, k_BTHD, v_BTHE)
        scores_BHST = _masked(_scores(q, k, params), params)
        lse_BHS = torch.logsumexp(scores_BHST, -1)
        probabilities_BHST = torch.exp(scores_BHST - lse_BHS.unsqueeze(-1))
        return torch.einsum("bhst,bthd->bshd", probabilities_BHST, v), lse_BHS

    def _backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out = _upcast(dout_BSHE, *saved[:4])
        scores_BHST = _scores(q, k, params)
        probabilities_BHST = torch.exp(_masked(scores_BHST, params) - saved.lse_BHS.unsqueeze(-1))
        dv = torch.einsum("bhst,bshd->bthd", probabilities_BHST, dout)
        dprobabilities_BHST = torch.einsum("bshd,bthd->bhst", dout, v)
        delta_BHS1 = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        dscores_BHST = probabilities_BHST * (dprobabilities_BHST - delta_BHS1) * params.scale
        if params.softcap is not None:  # d tanh(x) = (1 - tanh(x)^2) dx
            dscores_BHST *= 1 - (scores_BHST / params.softcap).square()
        dq = torch.einsum("bhst,bthd->bshd", dscores_BHST, k)
        dk = torch.einsum("bhst,bshd->bthd", dscores_BHST, q)
        return dq, dk, dv
