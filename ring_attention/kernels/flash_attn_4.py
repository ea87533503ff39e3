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
    AttentionKernel,
    DqSum,
    KernelParams,
    KernelSpec,
    SavedTensors,
    Segments,
    flash_window,
    refuse_missing_package,
)
from ring_attention.kernels.flash_attn_4_backward import FlashAttention4DqSum, key_sum_tile, library
from ring_attention.masked_block import MaskedBlock

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
        # the kernel calls no left bound with a right bound of 0 causal
        window = flash_window(q_BSHD.shape[1], k_BTKD.shape[1], params, None)
        key = (q_BSHD.shape, k_BTKD.shape, v_BTKE.shape, q_BSHD.dtype, params)
        return _forward(self._launches, key, q_BSHD, k_BTKD, v_BTKE, params, window)

    def backward(self, dout_BSHE: Tensor, saved: SavedTensors, params: KernelParams) -> tuple[Tensor, Tensor, Tensor]:
        q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = saved
        if torch.are_deterministic_algorithms_enabled():
            window = flash_window(q_BSHD.shape[1], k_BTKD.shape[1], params, None)
            return _library_backward((*saved[:4], dout_BSHE, saved.lse_BHS), params, window)
        dq_sum = FlashAttention4DqSum(dout_BSHE, q_BSHD, out_BSHE, lse_BHS)
        whole = MaskedBlock(0, q_BSHD.shape[1], 0, k_BTKD.shape[1], params.lower, params.upper)
        dk, dv = dq_sum.add(slice(0, len(q_BSHD)), whole, k_BTKD, v_BTKE, params)
        assert dk is not None
        assert dv is not None
        return dq_sum.result(params.scale), dk, dv

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
        q, k, v = (x.flatten(0, 1) for x in (q_BSHD, k_BTKD, v_BTKE))
        key = (q_BSHD.shape, k_BTKD.shape, v_BTKE.shape, q_BSHD.dtype, params)
        out_THE, lse_HT = _forward(segments.launches, key, q, k, v, params, _varlen(segments, q_BSHD, params))
        shape = q_BSHD.shape[:2]
        return out_THE.unflatten(0, shape), lse_HT.unflatten(1, shape).transpose(0, 1)

    def backward_segments(
        self, dout_BSHE: Tensor, saved: SavedTensors, segments: Segments, params: KernelParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, dout = (x.flatten(0, 1) for x in (*saved[:4], dout_BSHE))
        lse_HT = saved.lse_BHS.transpose(0, 1).flatten(1)
        if torch.are_deterministic_algorithms_enabled() or len(segments.lengths) > _MANY_DOCUMENTS:
            gradients = _library_backward((q, k, v, out, dout, lse_HT), params, _varlen(segments, saved.q_BSHD, params))
        else:
            dq_sum = FlashAttention4DqSum(dout, q, out, lse_HT, segments)
            dk, dv = dq_sum.add_segments(k, v, params)
            gradients = (dq_sum.result(params.scale), dk, dv)
        dq, dk, dv = (x.unflatten(0, like.shape[:2]) for x, like in zip(gradients, saved[:3], strict=True))
        return dq, dk, dv


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
        return results[:2]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
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
