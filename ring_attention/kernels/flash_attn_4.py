"""FlashAttention-4 (package flash-attn-4, in CuTe DSL): Hopper, half precision, [B, S, H, D] and GQA without copies.

Written against 4.0.0b36, `flash_attn/cute/interface.py`. Its functions are not public, so the `kernels` extra pins it.
Its kernels for Blackwell (a head_dim up to 128, or 256) are refused because nobody has measured them. The first call of
each kind compiles for seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ring_attention.kernels.base import (
    ANYWHERE,
    AttentionKernel,
    DqSum,
    GradientTargets,
    KernelParams,
    KernelSpec,
    SavedTensors,
    Segments,
    flash_window,
    refuse_missing_package,
)
from ring_attention.kernels.flash_attn_4_backward import FlashAttention4DqSum, key_sum_tile, library

_MANY_DOCUMENTS = 256  # above, the library has more kernels run before its own
_MAX_LAUNCHES = 1024


class Launch(NamedTuple):
    """A compiled kernel of the library, and its arguments behind q, k, v, out and lse."""

    kernel: Callable[..., None]
    options: tuple[Any, ...]


class FlashAttention4Kernel(AttentionKernel):
    name = "flash_attn_4"
    speed = "flash-attn-4: 681 TFLOP/s forward, 620 backward on an H100 at 32 heads x 128; cuDNN SDPA 611 and 546"
    head_dims = range(64, 257, 8)
    has_softcap = has_varlen = can_be_captured = sums_keys = True

    def __init__(self) -> None:
        self._launches: dict[Hashable, Launch] = {}

    def _refusal(self, spec: KernelSpec) -> str | None:
        if spec.capability is None or spec.capability[0] != 9:
            return "ranked only where it was measured: compute capability 9.x (Hopper)"
        # last, so that it is said only where installing it helps
        return refuse_missing_package(spec, "flash-attn-4", "flash_attn.cute")

    def forward(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, params: KernelParams) -> tuple[Tensor, Tensor]:
        return self.forward_to(None, q_BSHD, k_BTKD, v_BTKE, None, params)

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        if _needs_library(None):
            window = flash_window(saved.q_BSHD.shape[1], saved.k_BTKD.shape[1], params, None)
            return _library_backward((*saved[:4], dout_BSHE, saved.lse_BHS), params, window)
        return self.backward_to(ANYWHERE, dout_BSHE, saved, None, params)

    def dq_sum(self, dout_BSHE: Tensor, q_BSHD: Tensor, out_BSHE: Tensor, lse_BHS: Tensor) -> DqSum | None:
        if torch.are_deterministic_algorithms_enabled():  # the library's order of additions is per call
            return None
        return FlashAttention4DqSum(dout_BSHE, q_BSHD, out_BSHE, lse_BHS)

    def key_sum_tile(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor) -> int | None:
        if torch.are_deterministic_algorithms_enabled() or k_BTKD.shape != v_BTKE.shape:
            return None
        return key_sum_tile(q_BSHD.shape[2], k_BTKD.shape[2], k_BTKD.shape[3])

    def forward_segments(
        self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor]:
        return self.forward_to(None, q_BSHD, k_BTKD, v_BTKE, segments, params)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _needs_library(segments):
            return self.backward_to(ANYWHERE, dout_BSHE, saved, segments, params)
        q, k, v, out, dout = (x.flatten(0, 1) for x in (*saved[:4], dout_BSHE))
        lse_HT = saved.lse_BHS.transpose(0, 1).flatten(1)
        gradients = _library_backward((q, k, v, out, dout, lse_HT), params, _varlen(segments, saved.q_BSHD, params))
        dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(gradients, saved[:3], strict=True))
        return dq, dk, dv

    def forward_to(
        self,
        target_BSHE: Tensor | None,
        q_BSHD: Tensor,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor]:
        if not _are_contiguous(target_BSHE):
            return super().forward_to(target_BSHE, q_BSHD, k_BTKD, v_BTKE, segments, params)
        key = (q_BSHD.shape, k_BTKD.shape, v_BTKE.shape, q_BSHD.dtype, params)
        if segments is None:
            # the kernel calls no left bound with a right bound of 0 causal
            window = flash_window(q_BSHD.shape[1], k_BTKD.shape[1], params, None)
            return _forward(self._launches, key, target_BSHE, q_BSHD, k_BTKD, v_BTKE, params, window)
        q, k, v = (x.flatten(0, 1) for x in (q_BSHD, k_BTKD, v_BTKE))
        target, options = _flat(target_BSHE), _varlen(segments, q_BSHD, params)
        out_THE, lse_HT = _forward(segments.launches, key, target, q, k, v, params, options)
        lse_BHS = lse_HT.unflatten(1, q_BSHD.shape[:2]).transpose(0, 1)
        return out_THE.unflatten(0, q_BSHD.shape[:2]) if target_BSHE is None else target_BSHE, lse_BHS

    def backward_to(
        self,
        targets: GradientTargets,
        dout_BSHE: Tensor,
        saved: SavedTensors,
        segments: Segments | None,
        params: KernelParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _needs_library(segments) or not _are_contiguous(*targets):
            return super().backward_to(targets, dout_BSHE, saved, segments, params)
        q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = saved
        if segments is None:
            dq_sum = FlashAttention4DqSum(dout_BSHE, q_BSHD, out_BSHE, lse_BHS)
            dk, dv = dq_sum.add_all(k_BTKD, v_BTKE, params, *targets[1:])
            return dq_sum.result(params.scale, targets[0]), dk, dv
        q, k, v, out, dout = (x.flatten(0, 1) for x in (*saved[:4], dout_BSHE))
        flat_dq, flat_dk, flat_dv = map(_flat, targets)
        dq_sum = FlashAttention4DqSum(dout, q, out, lse_BHS.transpose(0, 1).flatten(1), segments)
        dk, dv = dq_sum.add_all(k, v, params, flat_dk, flat_dv)
        gradients = (dq_sum.result(params.scale, flat_dq), dk, dv)
        dq, dk, dv = (
            x.unflatten(0, like.shape[:2]) if target is None else target
            for x, like, target in zip(gradients, saved[:3], targets, strict=True)
        )
        return dq, dk, dv


def _needs_library(segments: Segments | None) -> bool:
    """Whether a backward pass is one call of the library."""
    is_many = segments is not None and len(segments.lengths) > _MANY_DOCUMENTS
    return is_many or torch.are_deterministic_algorithms_enabled()


def _are_contiguous(*targets: Tensor | None) -> bool:
    """Whether the kernels can write there. Some tokens of several rows are not contiguous."""
    return all(target is None or target.is_contiguous() for target in targets)


def _flat(target_BSHD: Tensor | None) -> Tensor | None:
    return None if target_BSHD is None else target_BSHD.flatten(0, 1)


def _varlen(segments: Segments, q_BSHD: Tensor, params: KernelParams) -> dict[str, Any]:
    cu_q, cu_k = segments.cumulative(q_BSHD.device)
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": segments.max_queries,
        "max_seqlen_k": segments.max_keys,
        "window_size_left": None if params.lower is None else -params.lower,
        "window_size_right": params.upper,
    }


def _softcap(params: KernelParams) -> dict[str, float]:
    """Beside any band and head size. Left out where there is none: the backward pass takes no None."""
    return {} if params.softcap is None else {"softcap": params.softcap}


def _forward(
    launches: dict[Hashable, Launch],
    key: Hashable,
    target: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: KernelParams,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The library's function checks and plans for 0.1 ms. So a layer launches what the layer before it launched."""
    launch = launches.get(key)
    if launch is None:
        recorder = _recorder()
        # pack_gqa, the library's choice with grouped heads, is up to 6 % slower for the lengths of a ring's tiles
        results = library()._flash_attn_fwd(
            *(q, k, v), softmax_scale=params.scale, return_lse=True, pack_gqa=False, **options, **_softcap(params)
        )
        if len(launches) == _MAX_LAUNCHES:  # documents make new shapes with each batch
            launches.clear()
        launches[key] = recorder.launch
        out, lse = results[:2]
        return out if target is None else target.copy_(out), lse
    out = q.new_empty((*q.shape[:-1], v.shape[-1])) if target is None else target
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    aligned = (library().maybe_contiguous(x.detach()) for x in (q, k, v))
    launch.kernel(*aligned, out, lse, *launch.options)
    return out, lse


def _library_backward(
    tensors: tuple[Tensor, ...], params: KernelParams, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's own function, which alone has a fixed order of additions, and many documents."""
    deterministic = torch.are_deterministic_algorithms_enabled()  # what PyTorch's own kernels go by
    return library()._flash_attn_bwd(
        *tensors, softmax_scale=params.scale, deterministic=deterministic, **options, **_softcap(params)
    )


class _Recorder:
    """Stands where the library keeps its compiled kernels, and remembers what was launched last."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.launch: Launch

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kernels

    def __setitem__(self, key: Hashable, kernel: Any) -> None:
        self._kernels[key] = kernel

    def __getitem__(self, key: Hashable) -> Callable[..., None]:
        compiled = self._kernels[key]

        def run(*arguments: Any) -> None:
            self.launch = Launch(compiled, arguments[5:])
            compiled(*arguments)

        return run


@functools.cache
def _recorder() -> _Recorder:
    forward = library()._flash_attn_fwd
    forward.compile_cache = _Recorder(forward.compile_cache)
    return forward.compile_cache
