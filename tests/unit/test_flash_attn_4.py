"""Our use of flash-attn-4, on the CPU with a stand-in for the library: results are written to given tensors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention.kernels import KernelParams, SavedTensors, flash_attn_4, flash_attn_4_backward
from ring_attention.kernels.base import Segments
from ring_attention.kernels.reference import ReferenceKernel
from tests.tools.measure import assert_equal_attention
from tests.unit.test_attention_kernels import SCALE, draw, oracle_segments

LENGTHS = [(3, 3), (1, 4), (8, 13)]  # 12 queries and 20 keys


class Library:
    """Functions of `flash_attn.cute.interface`, computed by the reference kernel. Sums stay here, not in their tensors.

    `written` has the addresses that kernels, rather than copies, wrote results to.
    """

    torch2cute_dtype_map = {torch.float32: "fp32"}  # noqa: RUF012
    AuxData = SimpleNamespace

    def __init__(self) -> None:
        self.written: list[int] = []
        self._sums: dict[int, Any] = {}
        self._flash_attn_fwd = self.Forward(self)

    def maybe_contiguous(self, x: Tensor) -> Tensor:
        return x

    class Forward:
        def __init__(self, library: Library) -> None:
            self.library = library
            self.compile_cache: Any = {"kernel": self.kernel}

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **options: Any) -> tuple:
            out, lse = torch.empty_like(q), q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]))
            self.compile_cache["kernel"](q, k, v, out, lse, softmax_scale, options)
            return out, lse, None, None

        def kernel(
            self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, options: dict[str, Any]
        ) -> None:
            self.library.written.append(out.data_ptr())
            left, right = options["window_size_left"], options["window_size_right"]
            cumulative = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
            for queries, keys, params in _documents(q, k, cumulative, left, right, scale):
                part, part_lse = ReferenceKernel().forward(q[queries], k[keys], v[keys], params)
                out[queries] = part
                lse.view(-1, *lse.shape[-2:])[..., queries[-1]] = part_lse

    def _bwd_preprocess(
        self,
        out: Tensor,
        dout: Tensor,
        dpsum: Tensor,
        lse: Tensor,
        lse_log2: Tensor,
        total: Tensor,
        *rest: Any,
        **_: Any,
    ) -> None:
        self._sums[total.data_ptr()] = out, lse

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, _: Any, __: Any, total: Tensor, *rest: Any) -> None:
        dk_sum, dv_sum, scale, cu_q, cu_k, _, _, left, right, *_ = rest
        right = 0 if left is None and right is None else right  # causal; the tests have no other masks
        out, lse = self._sums[total.data_ptr()]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for queries, keys, params in _documents(q, k, (cu_q, cu_k), left, right, scale):
            part_lse = lse.view(-1, *lse.shape[-2:])[..., queries[-1]]
            saved = SavedTensors(q[queries], k[keys], v[keys], out[queries], part_lse)
            dq[queries], dk[keys], dv[keys] = ReferenceKernel().backward(dout[queries], saved, params)
        self._sums[total.data_ptr()] = dq
        for result, target in ((dk, dk_sum), (dv, dv_sum)):
            if target.shape == result.shape:  # as many key-value heads as query heads
                self.written.append(target.copy_(result).data_ptr())
            self._sums[target.data_ptr()] = result

    def _bwd_postprocess_convert(self, total: Tensor, result: Tensor, *rest: Any, **_: Any) -> None:
        self.written.append(result.copy_(self._sums[total.data_ptr()]).data_ptr())


def _documents(
    q: Tensor, k: Tensor, cumulative: tuple[Any, Any], left: int | None, right: int | None, scale: float
) -> Iterator[tuple[Any, Any, KernelParams]]:
    """Of each document: indices of its queries and keys that give [B, S, H, D], and the band from its first ones."""
    spans = [[(0, x.shape[-3])] for x in (q, k)]
    if cumulative[0] is not None:
        spans = [list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)) for ends in cumulative]
    for (q_start, q_stop), (k_start, k_stop) in zip(*spans, strict=True):
        diagonal = (k_stop - k_start) - (q_stop - q_start)
        lower, upper = None if left is None else diagonal - left, None if right is None else diagonal + right
        first = slice(None) if q.dim() == 4 else None
        yield (first, slice(q_start, q_stop)), (first, slice(k_start, k_stop)), KernelParams(lower, upper, scale)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    for module in (flash_attn_4, flash_attn_4_backward):
        monkeypatch.setattr(module, "library", lambda: library)
    recorder = flash_attn_4._Recorder(library._flash_attn_fwd.compile_cache)
    library._flash_attn_fwd.compile_cache = recorder
    monkeypatch.setattr(flash_attn_4, "_recorder", lambda: recorder)
    config = SimpleNamespace(AtomLayoutMdQ=1, dQ_swapAB=False, AtomLayoutNdKV=1, dKV_swapAB=False)
    tiles = SimpleNamespace(queries=64, keys=128, threads=384, threads_of_dq=384, columns_of=32, config=config)
    monkeypatch.setattr(flash_attn_4_backward, "_tile_sizes", lambda *head_dims: tiles)
    monkeypatch.setattr(flash_attn_4_backward, "_compiled", lambda *kind: library.kernel)
    return library


@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [[(12, 20)], LENGTHS], ids=["one document", "three"])
def test_results_go_where_they_belong(library: Library, lengths: list[tuple[int, int]], batch: int, num_kv_heads: int):
    """To some tokens of larger tensors: by the kernels themselves, and for several rows by copies."""
    kernel, is_one = flash_attn_4.FlashAttention4Kernel(), len(lengths) == 1
    segments = None if is_one else Segments(lengths * batch)
    params = KernelParams(None, 8 if is_one else 0, SCALE)  # segments count from their last query and key
    q, k, v = (x[:batch] for x in draw(torch.float32, 12, 20, 4, num_kv_heads))
    dout, parts = torch.randn_like(q), []
    for _ in range(2):  # the second pass launches what the first compiled
        wholes = [torch.full((batch, 30, *x.shape[2:]), float("nan")) for x in (q, q, k, v)]
        parts = [whole[:, 5 : 5 + x.shape[1]] for whole, x in zip(wholes, (q, q, k, v), strict=True)]
        out, lse = kernel.forward_to(parts[0], q, k, v, segments, params)
        saved, targets = SavedTensors(q, k, v, out, lse), (parts[1], parts[2], parts[3])
        results = [out, *kernel.backward_to(targets, dout, saved, segments, params)]
        assert all(result is part for result, part in zip(results, parts, strict=True))
        assert_equal_attention(parts, oracle_segments(q, k, v, dout, lengths * batch, None), torch.float32)
        for whole, part in zip(wholes, parts, strict=True):
            assert whole[:, :5].isnan().all()
            assert whole[:, 5 + part.shape[1] :].isnan().all()
    assert ({part.data_ptr() for part in parts} <= {*library.written}) == (batch == 1)
