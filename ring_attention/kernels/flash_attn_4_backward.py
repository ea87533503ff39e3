"""FlashAttention-4's backward pass, its parts called one by one, so that many calls share one sum of dq.

The library's own function runs a kernel before, which zeroes an fp32 sum of dq and prepares the softmax's statistics,
then the kernel itself, then one for each gradient, which rounds. Here the first and that of dq run once for all tiles
of some queries: dq is rounded once and needs no merging, and the host starts two kernels less a tile. Where query heads
share keys the kernel sums dk and dv in fp32, too, and those of all calls on the same keys can be rounded together.

Shapes: B batch, S queries, T keys, H query heads, K key-value heads, D head size, E value head size. Documents of a
varlen call lie one after the other: the tensors have no B then.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels.base import DqSum, KernelParams, Segments, flash_window
from ring_attention.masked_block import MaskedBlock


@functools.cache
def library() -> Any:
    return importlib.import_module("flash_attn.cute.interface")  # takes seconds, so not before the first call


class FlashAttention4DqSum(DqSum):
    """dq of these queries in fp32, in the kernel's own order of numbers: that of its tiles, which all calls share."""

    def __init__(
        self,
        dout_BSHE: Tensor,
        q_BSHD: Tensor,
        out_BSHE: Tensor,
        lse_BHS: Tensor,
        segments: Segments | None = None,
    ) -> None:
        self._q_BSHD, self._dout_BSHE, self._out_BSHE, self._lse_BHS = q_BSHD, dout_BSHE, out_BSHE, lse_BHS
        self._segments = segments
        self._dtype = library().torch2cute_dtype_map[q_BSHD.dtype]
        self._tiles = _tile_sizes(q_BSHD.shape[-1], out_BSHE.shape[-1])
        self._columns = _round_up(q_BSHD.shape[-1], self._tiles.columns_of)
        self._cu_q, self._cu_k = (None, None) if segments is None else segments.cumulative(q_BSHD.device)
        self._is_started = False

    def _start(self) -> None:
        tensors = (self._q_BSHD, self._dout_BSHE, self._out_BSHE)
        self._q_BSHD, self._dout_BSHE, out_BSHE = (library().maybe_contiguous(x) for x in tensors)
        *batch, num_queries, num_heads, head_dim = self._q_BSHD.shape
        segments = self._segments
        padded = num_queries if segments is None else num_queries + len(segments.lengths) * self._tiles.queries
        rows = _round_up(padded, self._tiles.queries)
        self._dpsum = out_BSHE.new_empty((*batch, num_heads, rows), dtype=torch.float32)
        self._lse_log2 = torch.empty_like(self._dpsum)
        self._sum = out_BSHE.new_empty((*batch, num_heads, rows * self._columns), dtype=torch.float32)
        library()._bwd_preprocess(
            *(out_BSHE, self._dout_BSHE, self._dpsum, self._lse_BHS, self._lse_log2, self._sum, self._cu_q, None, None),
            *(self._dtype, head_dim, out_BSHE.shape[-1], self._tiles.queries),
            hdim_multiple_of=self._tiles.columns_of,
            fake_mode=False,
        )
        self._is_started = True

    def takes(self, block: MaskedBlock) -> bool:
        tile, num_queries = self._tiles.queries, self._q_BSHD.shape[1]
        return block.q_start % tile == 0 and (block.q_stop % tile == 0 or block.q_stop == num_queries)

    def add(
        self,
        rows: slice,
        block: MaskedBlock,
        k_BTKD: Tensor,
        v_BTKE: Tensor,
        params: KernelParams,
        key_sums_2BKN: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self._is_started:
            self._start()
        q, dout, total, statistics = self._q_BSHD, self._dout_BSHE, self._sum, (self._lse_log2, self._dpsum)
        if (block.q_start, block.q_stop, rows.stop - rows.start) != (0, q.shape[1], len(q)):
            start, stop = block.q_start, _round_up(block.q_stop, self._tiles.queries)
            q, dout = (x[rows, block.q_start : block.q_stop] for x in (q, dout))
            statistics = tuple(x[rows, :, start:stop] for x in statistics)
            total = total[rows, :, start * self._columns : stop * self._columns]
        window = flash_window(q.shape[1], k_BTKD.shape[1], params, None)
        if key_sums_2BKN is None:
            return self._launch_and_round(q, dout, statistics, total, k_BTKD, v_BTKE, params, window)
        self._launch(q, dout, statistics, total, k_BTKD, v_BTKE, params, window, key_sums_2BKN.unbind(0))
        return None, None

    def round_keys(self, key_sums_2BKN: Tensor, k_BTKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        # contiguous, as k may be a view that the kernel cannot write to
        dk, dv = (torch.empty_like(k_BTKD, memory_format=torch.contiguous_format) for _ in range(2))
        self._round_keys(key_sums_2BKN.unbind(0), dk, dv, scale)
        return dk, dv

    def add_all(
        self, k: Tensor, v: Tensor, params: KernelParams, dk: Tensor | None = None, dv: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The only `add`: all queries, or all documents of `segments`. Writes to dk and dv where they are given."""
        self._start()
        if self._segments is None:
            window = flash_window(self._q_BSHD.shape[1], k.shape[1], params, None)
        else:
            left = None if params.lower is None else -params.lower
            window = {"window_size_left": left, "window_size_right": params.upper}
        tensors = (self._q_BSHD, self._dout_BSHE, (self._lse_log2, self._dpsum), self._sum, k, v)
        return self._launch_and_round(*tensors, params, window, dk, dv)

    def result(self, scale: float, dq: Tensor | None = None) -> Tensor:
        """As in `DqSum`; written to dq if that is given."""
        dq, tiles = torch.empty_like(self._q_BSHD) if dq is None else dq, self._tiles
        shape = (tiles.queries, tiles.threads_of_dq, tiles.config.AtomLayoutMdQ, tiles.config.dQ_swapAB)
        self._round(self._sum, dq, scale, self._cu_q, shape)
        return dq

    def _launch_and_round(
        self,
        q: Tensor,
        dout: Tensor,
        statistics: tuple[Tensor, ...],
        total: Tensor,
        k: Tensor,
        v: Tensor,
        params: KernelParams,
        window: dict[str, int | None],
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        *batch, num_keys, num_kv_heads, _ = k.shape
        k, v = library().maybe_contiguous(k), library().maybe_contiguous(v)
        dk, dv = (torch.empty_like(x) if target is None else target for x, target in ((k, dk), (v, dv)))
        if q.shape[-2] == num_kv_heads:
            self._launch(q, dout, statistics, total, k, v, params, window, (dk, dv))
            return dk, dv
        tile = self._tiles.keys
        padded = num_keys if self._segments is None else num_keys + len(self._segments.lengths) * tile
        shape = (2, *batch, num_kv_heads, _round_up(padded, tile) * self._columns)
        sums = k.new_zeros(shape, dtype=torch.float32).unbind(0)
        self._launch(q, dout, statistics, total, k, v, params, window, sums)
        self._round_keys(sums, dk, dv, params.scale)
        return dk, dv

    def _launch(
        self,
        q: Tensor,
        dout: Tensor,
        statistics: tuple[Tensor, ...],
        total: Tensor,
        k: Tensor,
        v: Tensor,
        params: KernelParams,
        window: dict[str, int | None],
        sums: tuple[Tensor, ...],
    ) -> None:
        """`sums` are dk and dv or, where several query heads add to the same numbers, their sums."""
        left, right = window["window_size_left"], window["window_size_right"]
        is_causal = left is None and right == 0
        if is_causal:
            right = None
        kernel = _compiled(
            *(self._dtype, k.shape[-1], v.shape[-1], q.shape[-2] // k.shape[-2]),
            *(is_causal, left is not None, right is not None, self._tiles, params.softcap, self._segments is not None),
        )
        k, v = library().maybe_contiguous(k), library().maybe_contiguous(v)
        kernel(
            *(q, k, v, dout, *statistics, total, *sums, params.scale, self._cu_q, self._cu_k, None, None),
            *(left, right, None, None, None, library().AuxData(), None, None),
        )

    def _round_keys(self, sums: tuple[Tensor, ...], dk: Tensor, dv: Tensor, scale: float) -> None:
        tiles = self._tiles
        shape = (tiles.keys, tiles.threads, tiles.config.AtomLayoutNdKV, tiles.config.dKV_swapAB)
        self._round(sums[0], dk, scale, self._cu_k, shape)
        self._round(sums[1], dv, 1.0, self._cu_k, shape)

    def _round(self, total: Tensor, result: Tensor, scale: float, cumulative: Tensor | None, shape: tuple) -> None:
        tile, threads, layout, swapped = shape
        library()._bwd_postprocess_convert(
            *(total, result, scale, cumulative, None, 90, self._dtype, result.shape[-1], tile, threads),
            *(layout, swapped),
            hdim_multiple_of=self._tiles.columns_of,
            fake_mode=False,
        )


class _TileSizes:
    """How the library's backward kernel cuts queries and keys for a head size. Compared by identity."""

    def __init__(self, config: Any) -> None:
        self.config, self.queries, self.keys = config, config.m_block_size, config.n_block_size
        self.threads = config.num_wg * 128
        self.threads_of_dq = 128 if config.dQ_single_wg else self.threads
        self.columns_of = 64 if config.dKV_swapAB else 32  # sums have a multiple of so many columns


def key_sum_tile(num_heads: int, num_kv_heads: int, head_dim: int) -> int | None:
    """The least multiple of a tile's queries and of its keys; None if dk and dv have no sums, or sums of more columns.

    A head size of 256 has tiles of 64 queries and 48 keys: a call on 48 queries could not add its dq.
    """
    if num_heads == num_kv_heads:
        return None
    tiles = _tile_sizes(head_dim, head_dim)
    return math.lcm(tiles.queries, tiles.keys) if head_dim % tiles.columns_of == 0 else None


@functools.cache
def _tile_sizes(head_dim: int, value_head_dim: int) -> _TileSizes:
    """Those of causal calls for all: where the library takes others for full ones (80 queries instead of 64 for a head
    size of 128), they are no faster (8,192 x 4,096 tokens: 2.33 and 2.34 ms; 4,096 x 8,192: 2.47 and 2.43).
    """
    return _TileSizes(library()._tile_size_bwd_sm90(head_dim, value_head_dim, causal=True, local=False))


@functools.cache
def _compiled(
    dtype: Any,
    head_dim: int,
    value_head_dim: int,
    group: int,
    is_causal: bool,
    has_left: bool,
    has_right: bool,
    tiles: _TileSizes,
    softcap: float | None,
    is_varlen: bool,
) -> Any:
    """The kernel between the two, compiled in seconds for any lengths, batch sizes and numbers of heads."""
    interface, config = library(), tiles.config
    q, k, v, _, dout, _, dk, dv, _, lse_log2, dpsum, dq_sum, dk_sum, dv_sum, _ = interface.make_fake_bwd_tensors(
        dtype, group > 1, is_varlen, is_varlen
    )
    sums = (dk, dv) if group == 1 else (dk_sum, dv_sum)
    num_documents = interface.cute.sym_int()
    cumulative = [
        interface.fake_tensor(interface.Int32, (num_documents,), divisibility=1) if is_varlen else None
        for _ in range(2)
    ]
    scores = {}
    if softcap is not None:
        scores["score_mod"] = interface.utils.create_softcap_scoremod(softcap)
        scores["score_mod_bwd"] = interface.utils.create_softcap_scoremod_bwd(softcap)
    kernel = interface.FlashAttentionBackwardSm90(
        *(dtype, head_dim, value_head_dim, group, is_causal),
        is_local=has_left or has_right,
        tile_m=tiles.queries,
        tile_n=tiles.keys,
        Q_stage=config.num_stages_Q,
        dO_stage=config.num_stages_dO,
        PdS_stage=config.num_stages_PdS,
        SdP_swapAB=config.SdP_swapAB,
        dKV_swapAB=config.dKV_swapAB,
        dQ_swapAB=config.dQ_swapAB,
        AtomLayoutMSdP=config.AtomLayoutMSdP,
        AtomLayoutNdKV=config.AtomLayoutNdKV,
        AtomLayoutMdQ=config.AtomLayoutMdQ,
        num_threads=tiles.threads + 128,
        dQ_single_wg=config.dQ_single_wg,
        **scores,
    )
    return interface.cute.compile(
        *(kernel, q, k, v, dout, lse_log2, dpsum, dq_sum, *sums, 1.0, *cumulative, None, None),
        *(1 if has_left else None, 1 if has_right else None, None, None, None, interface.AuxData(), None, None),
        interface.cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
