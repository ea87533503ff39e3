"""Recognises what attention a module computes, for scripts that pass their own module to DistributedAttention.

A ring cannot run a module that sees whole sequences, but most such modules are plain softmax attention, causal or full.
The module is run on as many random tokens as the sequence has, at most 32768, and compared with a kernel. A module that
differs on them, such as one with a sliding window, a bias, dropout or another order of dims, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ring_attention.kernels import KernelParams, KernelSpec, choose_kernel
from ring_attention.mask import CAUSAL, FULL, Mask

_MAX_TOKENS = 32768
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}


class ModuleRecognizer:
    """Remembers the mask of one module. Runs the module again for longer sequences and other kinds of calls."""

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[int, Mask]] = {}

    def mask_of(
        self, module: Callable, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, num_ranks: int
    ) -> Mask:
        """The mask of `module`, which must be softmax attention with a scale of 1 / sqrt(D).

        Args:
            query, key, value: a call's tensors, for their shapes, dtype and device. The module sees what
                DistributedAttention would pass: all tokens, and 1 / num_ranks of the heads if that divides them.

        Raises:
            ValueError: if the module is neither causal nor full attention.
        """
        shapes = (query.shape[2:], key.shape[2:], value.shape[2:])
        kind = (query.dtype, *shapes, batch_dim_idx, getattr(module, "training", None))
        num_tokens = min(query.shape[1 - batch_dim_idx] * num_ranks, _MAX_TOKENS)
        num_tested, mask = self._known.get(kind, (0, CAUSAL))
        if num_tokens > num_tested:
            mask = _recognize(module, query, key, value, batch_dim_idx, num_ranks, num_tokens)
            self._known[kind] = num_tokens, mask
        return mask


def _recognize(
    module: Callable, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int, num_ranks: int, num_tokens: int
) -> Mask:
    sequence_dim, divides = 1 - batch_dim_idx, key.shape[2] % num_ranks == 0
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for tensor in (query, key, value):
        shape = list(tensor.shape)
        shape[sequence_dim], shape[2] = num_tokens, shape[2] // (num_ranks if divides else 1)
        inputs.append(torch.randn(shape, generator=generator))
    # A large first value reveals every query that does not see the first token, and so any shorter window.
    first = inputs[2].select(sequence_dim, 0)
    first.copy_(first.sign() * num_tokens)
    q, k, v = (tensor.to(query.device, query.dtype) for tensor in inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[query.device] if query.is_cuda else []):
        got = module(q, k, v)
    if not isinstance(got, Tensor) or got.shape[:3] != q.shape[:3]:
        raise ValueError(_refusal(module, f"its output is not shaped like the query, {list(q.shape)}"))
    if batch_dim_idx == 1:
        q, k, v, got = (tensor.transpose(0, 1) for tensor in (q, k, v, got))
    kernel, errors = choose_kernel(KernelSpec.of(q, k, v))[0], {}
    for name, mask in (("causal", CAUSAL), ("full", FULL)):
        upper = mask.right if num_tokens > 1 else None  # with one token they are the same
        with torch.no_grad():
            expected = kernel.forward(q, k, v, KernelParams(None, upper, 1 / math.sqrt(q.shape[-1])))[0].float()
        row_errors = (got.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        if (error := row_errors.max().item()) < _TOLERANCE[query.dtype]:
            return mask
        errors[name] = error
    found = " and ".join(f"{error:.1e} of {name} attention's" for name, error in errors.items())
    raise ValueError(_refusal(module, f"on random tokens its worst row is off by {found} size"))


def _refusal(module: Callable, reason: str) -> str:
    name = getattr(module, "__name__", type(module).__name__)
    return (
        f"local_attention={name} is not recognised: {reason}. It must be plain softmax attention of [B, S, H, D], "
        'causal or full, with scale 1 / sqrt(D). For a sliding window or documents pass "auto" and a mask=Mask(...), '
        "for another scale softmax_scale=; dropout and biases are not supported"
    )
