"""What the model computes for each token beside matrix products: norms, rotary positions, SwiGLU, the loss.

Below `transformer`. On a GPU the operations in `LIGER_OPS` run Liger's fused kernels (the package liger-kernel, in
Triton), where it is installed; everything else, fp64 and the CPU are plain PyTorch, which is also what the tests hold
Liger against. Liger is imported at its first use, and by submodule: `liger_kernel.ops` itself may hand out other
kernels, depending on what else is installed. Written against 0.8.5.

Shapes: B batch, S local tokens, E hidden size, H query heads, K key-value heads, D head size, F MLP size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig

# the operations that Liger does faster; take one out and it is plain PyTorch
LIGER_OPS = ("rms_norm", "layer_norm", "rotary", "swiglu", "cross_entropy")

IGNORED_LABEL = -100  # torch's own ignore_index

_LIGER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def uses_liger(operation: str, tensor: Tensor) -> bool:
    """Whether Liger's kernel computes this operation of this tensor."""
    return operation in LIGER_OPS and tensor.is_cuda and tensor.dtype in _LIGER_DTYPES and has_liger()


@functools.cache
def _liger(submodule: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{submodule}"), name)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with a weight, computed in fp32 and cast at its end; the same parameter, by the same name."""

    def forward(self, x: Tensor) -> Tensor:
        if not uses_liger("rms_norm", x):
            return super().forward(x)
        # "gemma" is Liger's name for fp32 throughout, as torch has it. Not in place: that would overwrite the gradient
        # that a residual connection around the norm has still to read.
        in_place = False
        return _liger("rms_norm", "LigerRMSNormFunction").apply(x, self.weight, self.eps, 0.0, "gemma", in_place)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with a weight and a bias, computed in fp32; the same parameters, by the same names."""

    def forward(self, input: Tensor) -> Tensor:
        if not uses_liger("layer_norm", input):
            return super().forward(input)
        return _liger("layer_norm", "LigerLayerNormFunction").apply(input, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm over the last dim, E, that `model.norm` names."""
    norm = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def apply_rotary(q_BSHD: Tensor, k_BSKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x_i, x_{i+D/2}) of queries and keys in fp32 (fp64 for fp64 input): RoPE (Su et al. 2021).

    Args:
        cos: [1, S, 1, D/2] in fp32.
        sin: the same.

    Returns:
        (q, k) rotated, in their dtype; what was given stays as it is.
    """
    if not uses_liger("rotary", q_BSHD):
        return _rotated(q_BSHD, cos, sin), _rotated(k_BSKD, cos, sin)
    # Liger rotates in place, and takes the [B, H, S, D] views of contiguous [B, S, H, D]; it would make them contiguous
    # itself, but q and k that already are must not be overwritten. Its dtype is that of cos and sin. Its backward pass
    # overwrites the gradients of the rotated q and k, which attention has made for it alone.
    q, k = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q_BSHD, k_BSKD))
    no_position_ids, heads_dim, rotary_dim = None, 2, q_BSHD.shape[-1]
    q, k = _liger("rope", "LigerRopeFunction").apply(q, k, cos, sin, no_position_ids, heads_dim, rotary_dim)
    return q.transpose(1, 2), k.transpose(1, 2)


def _rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(x_BSHD.dtype, torch.float32)
    first, second = x_BSHD.to(compute_dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSHD.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) for [..., 2 F], gate before up, as one projection gives them: [..., F].

    One tensor rather than two: Liger reads its halves where they lie, two it would have to copy.
    """
    if uses_liger("swiglu", gate_up):
        # as a matrix: the gradient that 0.8.5 gives back is one, whatever shape it got
        out = _liger("swiglu", "LigerFusedGateUpSiLUMulFunction").apply(gate_up.flatten(0, -2))
        return out.unflatten(0, gate_up.shape[:-1])
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of cross-entropies in nats over labels other than IGNORED_LABEL, a scalar in fp32 (fp64 for fp64 input).

    Args:
        logits: [..., V].
        labels: [...], int64.
    """
    logits_TV, labels_T = logits.flatten(0, -2), labels.flatten()
    if uses_liger("cross_entropy", logits):
        # a copy in fp32: Liger overwrites what it gets with its gradient, and rounds token losses to its dtype
        logits_TV = logits_TV.to(torch.float32, copy=True)
        no_weights, z_loss, label_smoothing = None, 0.0, 0.0
        loss, *_ = _liger("cross_entropy", "LigerCrossEntropyFunction").apply(
            logits_TV, labels_T, no_weights, IGNORED_LABEL, z_loss, label_smoothing, "sum"
        )
        return loss
    compute_dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(compute_dtype), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
