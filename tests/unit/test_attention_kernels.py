"""The CPU's attention kernels against a dense softmax in fp64, and the choice of a kernel."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ring_attention.accumulators import OnlineSoftmaxAccumulator
from ring_attention.attend import BackwardInputs, attend_backward, attend_forward
from ring_attention.kernel_calls import plan_calls
from ring_attention.kernels import (
    KERNELS,
    KernelParams,
    KernelSpec,
    SavedTensors,
    Scores,
    choose_kernel,
    flash_attn_4_backward,
)
from ring_attention.kernels.base import Segments, band_mask, flash_window, is_installed
from ring_attention.kv import KeysValues
from ring_attention.masked_block import MaskedBlock
from ring_attention.merge import merge
from ring_attention.tiles import AttentionTile
from tests.errors import names, refused
from tests.tools.measure import Expected, assert_equal_attention, dense_attention, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.3
BANDS = [  # queries, keys, lower, upper of trimmed blocks
    (9, 9, None, 0),
    (5, 10, None, None),
    (12, 3, None, None),
    (1, 1, None, None),
    (10, 6, None, 0),
    (6, 10, None, 4),
    (7, 9, None, 5),
    (9, 9, -3, 0),
    (9, 9, -2, 3),
    (7, 9, -1, 3),
    (9, 6, -3, None),
    (300, 300, -20, 0),
]


def draw(dtype: torch.dtype, num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    shapes = [(2, num_queries, num_heads, 16), (2, num_keys, num_kv_heads, 16), (2, num_keys, num_kv_heads, 16)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lower: int | None, upper: int | None, softcap: float | None = None
) -> Expected:
    distance = torch.arange(k.shape[1], device=q.device) - torch.arange(q.shape[1], device=q.device)[:, None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    allowed = allowed if lower is None else allowed & (distance >= lower)
    allowed = allowed if upper is None else allowed & (distance <= upper)
    return dense_attention(q, k, v, dout, allowed[None], SCALE, softcap)


def computed(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lower: int | None,
    upper: int | None,
    softcap: float | None = None,
) -> list[Tensor]:
    """out, dq, dk, dv of one masked block by a kernel, with as many calls as the kernel's `split` asks for."""
    block = MaskedBlock(0, q.shape[1], 0, k.shape[1], lower, upper)
    assert block.trimmed() == block, "the test's band is not trimmed"
    tiles, kv = [AttentionTile(None, block)], KeysValues.of_parts(k, v)
    calls = plan_calls(KERNELS[name], tiles, (0, len(q)), q.shape[1], kv.spans)
    accumulator, scores = OnlineSoftmaxAccumulator(q, v), Scores(SCALE, softcap)
    attend_forward(accumulator, KERNELS[name], scores, calls, q, kv, is_last=True)
    out, lse = accumulator.result()
    totals = [torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (q, k, v)]
    inputs = BackwardInputs(dout, q, out, lse)
    dq_sum = KERNELS[name].dq_sum(*inputs)
    for tile in attend_backward(KERNELS[name], scores, calls, inputs, kv, dq_sum):
        if tile.dq is not None:
            totals[0][:, tile.queries] += tile.dq
        assert tile.dk is not None
        assert tile.dv is not None
        totals[1][:, tile.keys] += tile.dk
        totals[2][:, tile.keys] += tile.dv
    if dq_sum is not None:
        totals[0] += dq_sum.result(SCALE)
    return [out, *totals]


def computed_segments(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lengths: list[tuple[int, int]],
    window: int | None,
    upper: int | None = 0,
) -> list[Tensor]:
    """out, dq, dk, dv of documents that lie one behind the other, row after row; `upper` None: not causal."""
    segments, params = Segments(lengths), KernelParams(None if window is None else -window, upper, SCALE)
    out, lse = KERNELS[name].forward_segments(q, k, v, segments, params)
    assert lse.shape == (len(q), q.shape[2], q.shape[1])
    saved = SavedTensors(q, k, v, out, lse)
    return [out, *KERNELS[name].backward_segments(dout, saved, segments, params)]


def oracle_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lengths: list[tuple[int, int]],
    window: int | None,
    upper: int | None = 0,
) -> Expected:
    allowed = torch.zeros(q.shape[:2].numel(), k.shape[:2].numel(), dtype=torch.bool, device=q.device)
    row = column = 0
    for num_queries, num_keys in lengths:
        diagonal = num_keys - num_queries
        lower = None if window is None else diagonal - window
        band = band_mask(num_queries, num_keys, lower, None if upper is None else diagonal, q.device)
        allowed[row : row + num_queries, column : column + num_keys] = band
        row, column = row + num_queries, column + num_keys
    one_q, one_k, one_v, one_dout = (x.flatten(0, 1)[None] for x in (q, k, v, dout))
    expected = dense_attention(one_q, one_k, one_v, one_dout, allowed[None], SCALE, None)
    return replace(
        expected,
        values=[x.unflatten(1, like.shape[:2])[0] for x, like in zip(expected.values, (q, q, k, v), strict=True)],
    )


@pytest.mark.parametrize("name", ["reference", "cpu_flash"])
@pytest.mark.parametrize(("window", "upper"), [(None, 0), (4, 0), (None, None)])
@pytest.mark.parametrize("lengths", [[(40, 40)], [(1, 1), (9, 9), (10, 10), (3, 3), (17, 17)]], ids=len)
def test_documents_in_one_call(name: str, window: int | None, upper: int | None, lengths: list[tuple[int, int]]):
    q, k, v = draw(torch.float32, 20, 20, 4, 2)
    dout = torch.randn_like(q)
    if KERNELS[name].refusal(KernelSpec.of(q, k, v, windowed=window is not None)):
        pytest.skip("no windows")
    got = computed_segments(name, q, k, v, dout, lengths, window, upper)
    assert_equal_attention(got, oracle_segments(q, k, v, dout, lengths, window, upper), torch.float32)


@pytest.mark.parametrize("name", ["reference", "cpu_flash"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_queries", "num_keys", "lower", "upper"), BANDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_a_kernel_equals_fp64_attention(name, dtype, num_queries, num_keys, lower, upper, num_heads, num_kv_heads):
    q, k, v = draw(dtype, num_queries, num_keys, num_heads, num_kv_heads)
    dout = torch.randn(q.shape, dtype=torch.float64).to(dtype)
    got = computed(name, q, k, v, dout, lower, upper)
    assert_equal_attention(got, oracle(q, k, v, dout, lower, upper), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0])
@pytest.mark.parametrize(("num_queries", "num_keys", "lower", "upper"), BANDS)
def test_a_softcap_equals_that_of_fp64_attention(dtype, softcap, num_queries, num_keys, lower, upper):
    q, k, v = draw(dtype, num_queries, num_keys, 4, 2)
    dout = torch.randn(q.shape, dtype=torch.float64).to(dtype)
    got = computed("reference", q, k, v, dout, lower, upper, softcap)
    assert_equal_attention(got, oracle(q, k, v, dout, lower, upper, softcap), dtype)


@pytest.mark.parametrize("name", ["reference", "cpu_flash"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_log_sum_exp_is_in_fp32_at_least(name, dtype):
    q, k, v = draw(dtype, 5, 7, 4, 2)
    out, lse = KERNELS[name].forward(q, k, v, KernelParams(None, None, SCALE))
    assert (out.shape, lse.shape) == (q.shape, (2, 4, 5))
    assert lse.dtype == torch.promote_types(dtype, torch.float32)


def test_merging_two_halves_equals_the_whole():
    q, k, v = draw(torch.float64, 6, 10, 4, 2)
    kernel, params = KERNELS["reference"], KernelParams(None, None, SCALE)
    whole_out, whole_lse = kernel.forward(q, k, v, params)
    out, lse = kernel.forward(q, k[:, :3], v[:, :3], params)
    parts = [kernel.forward(q, k[:, keys], v[:, keys], params) for keys in (slice(3, 5), slice(5, None))]
    merge(out, out, lse, parts)
    assert relative_error(out, whole_out) < 1e-14
    assert relative_error(lse, whole_lse) < 1e-14


def test_merging_into_a_row_that_has_seen_no_key_takes_the_new_result():
    out, lse = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), float("-inf"))
    merge(out, out, lse, [(torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), -5.0))])
    assert (out.tolist(), lse.tolist()) == ([[[[3.0, 3.0]]]], [[[-5.0]]])


def test_merging_survives_scores_far_apart():
    out, lse = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), -1e4)
    merge(out, out, lse, [(torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 1e4))])
    assert out.tolist() == [[[[3.0, 3.0]]]]
    assert lse.tolist() == [[[1e4]]]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernel packages that count as installed: none, until a test adds them."""
    installed: set[str] = set()
    monkeypatch.setattr("ring_attention.kernels.base.is_installed", installed.__contains__)
    return installed


def spec(device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> KernelSpec:
    return KernelSpec(device_type, capability, dtype, 32, 8, head_dim)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (spec("cpu", None, torch.float32, 64), "cpu_flash"),
        (spec("cpu", None, torch.bfloat16, 512), "cpu_flash"),
        (spec("cuda", (9, 0), torch.bfloat16, 128), "cudnn"),
        (spec("cuda", (8, 0), torch.bfloat16, 128), "aten_flash"),
        (spec("cuda", (9, 0), torch.float16, 256), "aten_flash"),
        (spec("cuda", (9, 0), torch.float32, 128), "mem_efficient"),
        (spec("cuda", (9, 0), torch.bfloat16, 512), "mem_efficient"),
        (spec("cuda", (9, 0), torch.float64, 128), "reference"),
        (replace(spec("cuda", (9, 0), torch.bfloat16, 128), windowed=True), "aten_flash"),
        (replace(spec("cuda", (9, 0), torch.bfloat16, 128), value_head_dim=64), "mem_efficient"),
        (replace(spec("cpu", None, torch.float32, 64), value_head_dim=32), "reference"),
        (replace(spec("cpu", None, torch.float32, 64), softcap=True), "reference"),
        (replace(spec("cuda", (9, 0), torch.bfloat16, 256), softcap=True), "reference"),
    ],
)
def test_the_fastest_kernel_that_can_do_it_is_chosen(wanted: KernelSpec, chosen: str, packages: set[str]):
    assert choose_kernel(wanted)[0].name == chosen


HOPPER_BF16 = spec("cuda", (9, 0), torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (HOPPER_BF16, "flash_attn_4"),
        (replace(HOPPER_BF16, dtype=torch.float16, head_dim=256), "flash_attn_4"),
        (replace(HOPPER_BF16, windowed=True), "flash_attn_4"),
        (replace(HOPPER_BF16, deterministic=True), "flash_attn_4"),
        (replace(HOPPER_BF16, head_dim=256, windowed=True, softcap=True), "flash_attn_4"),
        (replace(HOPPER_BF16, head_dim=512, softcap=True), "reference"),
        (replace(HOPPER_BF16, capability=(8, 0), softcap=True), "reference"),
        (replace(HOPPER_BF16, head_dim=512), "ffpa"),
        (replace(HOPPER_BF16, head_dim=320, dtype=torch.float16), "ffpa"),
        (replace(HOPPER_BF16, head_dim=512, deterministic=True), "ffpa"),
        (replace(HOPPER_BF16, dtype=torch.float32), "mem_efficient"),
        (replace(HOPPER_BF16, value_head_dim=64), "mem_efficient"),
        (replace(HOPPER_BF16, head_dim=100), "reference"),
        (replace(HOPPER_BF16, head_dim=288), "mem_efficient"),
        (replace(HOPPER_BF16, head_dim=520), "mem_efficient"),
        (replace(HOPPER_BF16, head_dim=512, windowed=True), "reference"),
        (replace(HOPPER_BF16, head_dim=512, num_heads=24), "mem_efficient"),
        (replace(HOPPER_BF16, capability=(8, 0)), "aten_flash"),
        (replace(HOPPER_BF16, capability=(10, 0)), "cudnn"),
        (replace(HOPPER_BF16, capability=(8, 0), head_dim=512), "mem_efficient"),
        (spec("cpu", None, torch.bfloat16, 128), "cpu_flash"),
    ],
)
def test_kernels_of_installed_packages_come_first(wanted: KernelSpec, chosen: str, packages: set[str]):
    packages |= {"flash_attn.cute", "ffpa_attn"}
    assert choose_kernel(wanted)[0].name == chosen


INSTALL = "pip install -e '.[kernels]'"


def reason_of(kernel: str, text: str) -> str:
    """What a choice says of a kernel that it did not take: up to the next kernel."""
    [reason] = re.findall(rf"not {kernel}: .*?(?=not (?:{'|'.join(KERNELS)}): |$)", text)
    return reason


def test_a_fallback_gives_the_reason(packages: set[str]):
    reason = choose_kernel(spec("cuda", (9, 0), torch.float32, 128))[1]
    names(reason_of("cudnn", reason), "bf16", "fp16", "torch.float32")


def test_a_fallback_says_what_to_install_if_that_helps(packages: set[str]):
    reason = choose_kernel(HOPPER_BF16)[1]
    names(reason_of("flash_attn_4", reason), "flash-attn-4", INSTALL)
    names(reason_of("ffpa", reason), "head_dim", 8, 320, 512, 128)
    assert INSTALL not in choose_kernel(replace(HOPPER_BF16, capability=(8, 0)))[1]


def test_a_fallback_from_large_heads_says_what_it_costs(packages: set[str]):
    tflops = ("109", "35", "465", "215")  # of both kernels, forward and backward, 16 heads x 512 on an H100
    kernel, reason = choose_kernel(replace(HOPPER_BF16, head_dim=512))
    assert kernel.name == "mem_efficient"
    names(reason_of("ffpa", reason), "ffpa-attn", INSTALL, *tflops)
    reason = choose_kernel(replace(HOPPER_BF16, head_dim=512, capability=(8, 0)))[1]
    names(reason_of("ffpa", reason), "9.x", "head_dim", "256", *tflops)
    assert INSTALL not in reason


def test_a_fallback_from_a_softcap_names_it(packages: set[str]):
    reason = choose_kernel(replace(HOPPER_BF16, softcap=True))[1]
    names(reason_of("flash_attn_4", reason), "flash-attn-4", INSTALL)
    for kernel in ("cudnn", "aten_flash", "mem_efficient"):
        names(reason_of(kernel, reason), "softcap")


def test_a_package_is_found_without_importing_it():
    assert is_installed("torch.testing")
    assert not is_installed("no_such_package")
    assert not is_installed("no_such_package.cute")


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "lower", "upper"), [*BANDS, (5, 10, None, 5), (313, 200, -200, None)]
)
def test_flash_windows_are_the_band(num_queries: int, num_keys: int, lower: int | None, upper: int | None):
    """The window counts from the diagonal that ends at the last query and key, as in the kernel's masks."""
    window = flash_window(num_queries, num_keys, KernelParams(lower, upper, SCALE), None)
    left, right = window["window_size_left"], window["window_size_right"]
    diagonal = torch.arange(num_queries)[:, None] + num_keys - num_queries
    keys = torch.arange(num_keys)
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left is not None:
        assert left >= 0
        allowed &= keys >= diagonal - left
    if right is not None:
        assert right >= 0
        allowed &= keys <= diagonal + right
    assert torch.equal(allowed, band_mask(num_queries, num_keys, lower, upper, torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "reason", "choices"),
    [
        ("cpu_flash", "64 32", "kernel=auto"),  # head sizes of keys and values
        ("cudnn", "cuda cpu", "kernel=auto"),
        ("flash9", "", "auto flash_attn_4 ffpa cudnn aten_flash mem_efficient cpu_flash reference"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name: str, reason: str, choices: str):
    with refused(ValueError, f"kernel={name}", *reason.split(), *choices.split()):
        choose_kernel(replace(spec("cpu", None, torch.float32, 64), value_head_dim=32), name)


@pytest.mark.parametrize(("head_dim", "queries", "keys", "expected"), [(128, 64, 128, 128), (256, 64, 48, 192)])
def test_key_sums_need_whole_tiles_of_queries_too(monkeypatch, head_dim: int, queries: int, keys: int, expected: int):
    tiles = SimpleNamespace(queries=queries, keys=keys, columns_of=64)
    monkeypatch.setattr(flash_attn_4_backward, "_tile_sizes", lambda head_dim, value_head_dim: tiles)
    q, k = torch.zeros(1, 8, 4, head_dim), torch.zeros(1, 8, 2, head_dim)
    assert KERNELS["flash_attn_4"].key_sum_tile(q, k, k) == expected
    assert KERNELS["flash_attn_4"].key_sum_tile(k, k, k) is None
