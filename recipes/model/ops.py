"""The model's token-wise operations: norms, rotary positions, SwiGLU, the loss; and sums over tiles.

On a GPU each uses the fastest measured (docs/lab_notebook.md) of plain PyTorch, torch.compile and Liger (the package
liger-kernel, if installed). Elsewhere all are plain PyTorch, the reference in the tests.

    norms           plain PyTorch
    rotary, loss    torch.compile: one pass each way, while Liger first copies what it would overwrite
    SwiGLU          Liger, whose backward pass is the fastest

Shapes: B batch, S local tokens, H query heads, K key-value heads, N all heads, D head size, F MLP size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from data.shard import IGNORED_LABEL


@functools.cache
def _compiled(function: Callable) -> Callable:
    # with static shapes first, dynamic where they change: all dynamic is 6 times slower for rotary
    return torch.compile(function)


def make_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """The norm over the hidden size that `model.norm` names."""
    norm = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def rotary_qkv(
    qkv_BSND: Tensor, head_counts: tuple[int, int, int], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the heads of q, k and v, and rotate the pairs (x_i, x_{i+D/2}) of q and k: RoPE (Su et al. 2021).

    Computes in fp32 (fp64 for fp64 input).

    Args:
        head_counts: of q, k and v, in this order along N.
        cos: [1, S, 1, D/2] in fp32, as is `sin`.

    Returns:
        q [B, S, H, D], k and v [B, S, K, D] in the input's dtype, contiguous. v follows k in memory, so that a ring
        sends both as one message without a copy.
    """
    function = _compiled(_rotary_qkv) if qkv_BSND.is_cuda else _rotary_qkv
    q_BSHD, kv_2BSKD = function(qkv_BSND, head_counts, cos, sin)
    k_BSKD, v_BSKD = kv_2BSKD.unbind(0)
    return q_BSHD, k_BSKD, v_BSKD


def _rotary_qkv(qkv_BSND: Tensor, head_counts: tuple[int, int, int], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_BSHD, k_BSKD, v_BSKD = qkv_BSND.split(head_counts, dim=2)
    return _rotated(q_BSHD, cos, sin), torch.stack((_rotated(k_BSKD, cos, sin), v_BSKD))


def _rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(x_BSHD.dtype, torch.float32)
    first, second = x_BSHD.to(compute_dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSHD.dtype)


@functools.cache
def _liger_swiglu() -> Any:
    """Liger's function, or None if liger-kernel is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    # by submodule: `liger_kernel.ops` may return other kernels, depending on what else is installed
    return importlib.import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) for [..., 2 F], gate before up: [..., F].

    One tensor rather than two: Liger reads its halves in place, and would have to copy two.
    """
    if gate_up.is_cuda and gate_up.dtype != torch.float64 and (liger := _liger_swiglu()):
        # as a matrix: Liger 0.8.5 returns the gradient as one, whatever the input's shape
        return liger.apply(gate_up.flatten(0, -2)).unflatten(0, gate_up.shape[:-1])
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None = None) -> Tensor:
    """act(gate) * up for [..., F] each; without `up`, `gate` is [..., 2 F] and has both."""
    if up is None:
        return swiglu(gate) if act is F.silu else act(gate.chunk(2, -1)[0]) * gate.chunk(2, -1)[1]
    if gate.is_cuda and gate.dtype != torch.float64 and act is F.silu and _liger_swiglu():
        pair = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return pair.apply(gate.flatten(0, -2), up.flatten(0, -2)).unflatten(0, gate.shape[:-1])
    return act(gate) * up


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of cross-entropies in nats over labels other than IGNORED_LABEL, a scalar in fp32 (fp64 for fp64 input).

    Args:
        logits: [..., V].
        labels: [...], int64.
    """
    function = _compiled(_cross_entropy_sum) if logits.is_cuda else _cross_entropy_sum
    return function(logits.flatten(0, -2), labels.flatten())


def _cross_entropy_sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(compute_dtype), labels_T, ignore_index=IGNORED_LABEL, reduction="sum")


def cross_entropy_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy_sum`; writes its gradient over the logits. Autograd does not see it.

    Args:
        logits: [..., V], contiguous.
        labels: [...], int64.
    """
    function = _compiled(_cross_entropy_gradient_) if logits.is_cuda else _cross_entropy_gradient_
    return function(logits.view(-1, logits.shape[-1]), labels.flatten())


def _cross_entropy_gradient_(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    log_probabilities_TV = F.log_softmax(logits_TV.to(compute_dtype), -1)
    loss = F.nll_loss(log_probabilities_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    # d loss / d logits = probabilities - one-hot labels; compiled, one pass that reads and writes each logit
    labels_T1 = labels_T.unsqueeze(1)
    is_label_TV = labels_T1 == torch.arange(logits_TV.shape[1], device=logits_TV.device)
    gradient_TV = log_probabilities_TV.exp_().add_(is_label_TV, alpha=-1)
    logits_TV.copy_(gradient_TV.mul_(labels_T1 != IGNORED_LABEL))
    return loss


def fp32_zeros_like(tensor: Tensor) -> Tensor:
    """An accumulator of the tensor's shape: fp32, or fp64 for fp64."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without rounding the product of half-precision factors to their dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]
    else:  # the CPU has no such product
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
