"""The CUDA attention kernels against fp64 attention: forward, and backward with a given out and lse."""

from dataclasses import replace

import pytest
import torch

from ring_attention.kernels import ANYWHERE, KERNELS, KernelParams, KernelSpec, SavedTensors
from ring_attention.kernels.base import Segments
from ring_attention.masked_block import MaskedBlock
from tests.tools.measure import assert_equal_attention
from tests.unit.test_attention_kernels import SCALE, computed, computed_segments, oracle, oracle_segments

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ["flash_attn_4", "ffpa", "cudnn", "aten_flash", "mem_efficient", "reference"]
BANDS = [  # queries, keys, lower, upper
    (512, 512, None, 0),
    (313, 313, None, 0),
    (626, 313, None, None),
    (313, 626, None, None),
    (626, 313, None, 0),
    (313, 626, None, 313),
    (400, 500, None, 250),
    (512, 512, -100, 0),
    (313, 313, -50, 70),
    (200, 313, None, 200),
    (313, 200, -200, None),
    (500, 400, -150, 30),
    (1, 1, None, None),
    (1, 3, None, None),
    (50, 3, -20, None),
    (700, 100, -650, 40),
]


def draw(num_queries, num_keys, num_heads, num_kv_heads, head_dim, value_head_dim, dtype):
    sizes = [(num_queries, num_heads, head_dim), (num_keys, num_kv_heads, head_dim)]
    sizes += [(num_keys, num_kv_heads, value_head_dim), (num_queries, num_heads, value_head_dim)]
    torch.manual_seed(num_queries + num_keys)
    return [torch.randn(2, *size, device="cuda").to(dtype) for size in sizes]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(8, 8, 64), (8, 2, 128), (4, 1, 128), (4, 4, 512), (4, 2, 512)]
)
@pytest.mark.parametrize(("num_queries", "num_keys", "lower", "upper"), BANDS)
def test_a_kernel_equals_fp64_attention(
    name, dtype, num_heads, num_kv_heads, head_dim, num_queries, num_keys, lower, upper
):
    q, k, v, dout = draw(num_queries, num_keys, num_heads, num_kv_heads, head_dim, head_dim, dtype)
    if refusal := KERNELS[name].refusal(KernelSpec.of(q, k, v, windowed=lower is not None)):
        pytest.skip(refusal)
    block = MaskedBlock(0, num_queries, 0, num_keys, lower, upper).trimmed()
    assert block is not None
    queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
    arguments = (q[:, queries], k[:, keys], v[:, keys], dout[:, queries], block.lower, block.upper)
    assert_equal_attention(computed(name, *arguments), oracle(*arguments), dtype)


@pytest.mark.parametrize("name", ["flash_attn_4", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("num_queries", "num_keys", "lower", "upper"), [(313, 313, None, 0), (400, 500, -150, 250)])
def test_softcap(name, dtype, head_dim, num_queries, num_keys, lower, upper):
    """Far below the largest scores, which are about 4 * SCALE * sqrt(head_dim)."""
    q, k, v, dout = draw(num_queries, num_keys, 4, 2, head_dim, head_dim, dtype)
    if refusal := KERNELS[name].refusal(KernelSpec.of(q, k, v, windowed=lower is not None, softcap=True)):
        pytest.skip(refusal)
    got = computed(name, q, k, v, dout, lower, upper, softcap=5.0)
    assert_equal_attention(got, oracle(q, k, v, dout, lower, upper, softcap=5.0), dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "value_head_dim"),
    [(size, size) for size in (8, 20, 40, 96, 192, 256, 320, 392, 512)] + [(192, 128), (64, 256)],
)
def test_head_sizes(name, dtype, head_dim, value_head_dim):
    q, k, v, dout = draw(200, 200, 4, 2, head_dim, value_head_dim, dtype)
    if refusal := KERNELS[name].refusal(KernelSpec.of(q, k, v)):
        pytest.skip(refusal)
    assert_equal_attention(computed(name, q, k, v, dout, None, 0), oracle(q, k, v, dout, None, 0), dtype)


SEGMENTS = {
    "squares": [(1, 1), (200, 200), (3, 3), (129, 129), (51, 51), (384, 384)],
    "one": [(768, 768)],
    "earlier keys": [(100, 228), (1, 1), (155, 283), (184, 184), (72, 72)],  # fewer queries
    "many": [(3, 3)] * 256,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 8, 64), (8, 2, 128), (4, 2, 256)])
@pytest.mark.parametrize(("window", "upper"), [(None, 0), (64, 0), (None, None)])
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
def test_documents_in_one_call(name, dtype, num_heads, num_kv_heads, head_dim, window, upper, lengths):
    num_queries, num_keys = (sum(sizes) // 2 for sizes in zip(*lengths, strict=True))  # of two rows
    q, k, v, dout = draw(num_queries, num_keys, num_heads, num_kv_heads, head_dim, head_dim, dtype)
    kernel = KERNELS[name]
    if refusal := kernel.refusal(KernelSpec.of(q, k, v, windowed=window is not None)):
        pytest.skip(refusal)
    if not kernel.has_varlen and upper == 0 and any(queries != keys for queries, keys in lengths):
        pytest.skip("is given squares alone")
    got = computed_segments(name, q, k, v, dout, lengths, window, upper)
    assert_equal_attention(got, oracle_segments(q, k, v, dout, lengths, window, upper), dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 8, 64), (8, 2, 128), (4, 2, 256)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [[(384, 384)], [(1, 1), (200, 200), (3, 3), (129, 129), (51, 51)]], ids=len)
def test_results_in_given_tensors(name, dtype, num_heads, num_kv_heads, head_dim, batch, lengths):
    """Some tokens of larger tensors: the same numbers, and no other token changes. The second call is cached."""
    q, k, v, dout = (x[:batch] for x in draw(384, 384, num_heads, num_kv_heads, head_dim, head_dim, dtype))
    kernel, params = KERNELS[name], KernelParams(None, 0, SCALE)
    if refusal := kernel.refusal(KernelSpec.of(q, k, v)):
        pytest.skip(refusal)
    segments = Segments(lengths * batch) if len(lengths) > 1 else None
    out, lse = kernel.forward_to(None, q, k, v, segments, params)
    saved = SavedTensors(q, k, v, out, lse)
    expected = [out, *kernel.backward_to(ANYWHERE, dout, saved, segments, params)]
    for _ in range(2):
        wholes = [torch.full((batch, 500, *x.shape[2:]), float("nan"), device="cuda", dtype=dtype) for x in saved[:3]]
        wholes.insert(0, torch.full_like(wholes[0], float("nan")))
        targets = [whole[:, 77:461] for whole in wholes]
        results = [kernel.forward_to(targets[0], q, k, v, segments, params)[0]]
        results += kernel.backward_to((targets[1], targets[2], targets[3]), dout, saved, segments, params)
        for whole, target, result, values in zip(wholes, targets, results, expected, strict=True):
            assert result is target
            # kernels add to dq in any order
            torch.testing.assert_close(result, values.to(dtype), rtol=0.02, atol=1e-3 * values.abs().max().item())
            assert whole[:, :77].isnan().all()
            assert whole[:, 461:].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_larger_tensors(name):
    """The ring passes views of q, of the log-sum-exp and of a receive buffer."""
    q, k, v, dout = draw(512, 512, 4, 4, 64, 64, torch.bfloat16)
    kernel, late, early = KERNELS[name], slice(256, 512), slice(0, 256)
    if refusal := kernel.refusal(KernelSpec.of(q, k, v)):
        pytest.skip(refusal)
    params = KernelParams(None, None, SCALE)
    out, lse = kernel.forward(q[:, late], k[:, early], v[:, early], params)
    assert (lse.shape, lse.dtype) == ((2, 4, 256), torch.float32)
    whole_out, whole_lse = torch.randn_like(q), torch.randn(2, 4, 512, device="cuda")
    whole_out[:, late], whole_lse[:, :, late] = out, lse
    saved = SavedTensors(q[:, late], k[:, early], v[:, early], whole_out[:, late], whole_lse[:, :, late])
    gradients = kernel.backward(dout[:, late], saved, params)
    expected = oracle(q[:, late], k[:, early], v[:, early], dout[:, late], None, None)
    assert_equal_attention([out, *gradients], expected, torch.bfloat16)


@pytest.mark.parametrize("name", ["flash_attn_4", "ffpa", "aten_flash"])  # cuBLAS, for the reference, needs a setting
@pytest.mark.parametrize("head_dim", [128, 512])
@pytest.mark.parametrize(("num_queries", "lower"), [(1000, None), (1000, -300), (400, None)])
def test_deterministic_kernels_give_the_same_bits(name, head_dim, num_queries, lower):
    q, k, v, dout = draw(num_queries, 1000, 4, 2, head_dim, head_dim, torch.bfloat16)
    spec = replace(KernelSpec.of(q, k, v, windowed=lower is not None), deterministic=True)
    if refusal := KERNELS[name].refusal(spec):
        pytest.skip(refusal)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [computed(name, q, k, v, dout, lower, None if num_queries < 1000 else 0) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [128, 512])
def test_one_tensor_for_keys_and_values_and_transposed_dims(name, head_dim):
    """[S, B, H, D] callers pass transposed views, and some models use one tensor for keys and values."""
    tensors = draw(300, 300, 4, 4, head_dim, head_dim, torch.bfloat16)
    q, k, _, dout = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors)
    if refusal := KERNELS[name].refusal(KernelSpec.of(q, k, k)):
        pytest.skip(refusal)
    assert_equal_attention(computed(name, q, k, k, dout, None, 0), oracle(q, k, k, dout, None, 0), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_strides_of_out_and_dout_may_differ_from_the_call_before(name):
    q, k, v, dout = draw(256, 256, 8, 8, 64, 64, torch.bfloat16)
    kernel, params = KERNELS[name], KernelParams(None, 0, SCALE)
    if refusal := kernel.refusal(KernelSpec.of(q, k, v)):
        pytest.skip(refusal)
    out, lse = kernel.forward(q, k, v, params)
    expected = kernel.backward(dout, SavedTensors(q, k, v, out, lse), params)
    dout_by_heads, out_by_heads = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dout, out))
    got = kernel.backward(dout_by_heads, SavedTensors(q, k, v, out_by_heads, lse), params)
    for got_gradient, expected_gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(got_gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (4, 2, 96), (4, 2, 256)])
def test_calls_on_some_queries_and_keys_share_a_sum_of_dq(dtype, num_heads, num_kv_heads, head_dim):
    """The tiles of a zigzag rank: a triangle, all queries with early keys, late ones with all, one row alone."""
    q, k, v, dout = draw(500, 500, num_heads, num_kv_heads, head_dim, head_dim, dtype)
    kernel = KERNELS["flash_attn_4"]
    if refusal := kernel.refusal(KernelSpec.of(q, k, v)):
        pytest.skip(refusal)
    blocks = [MaskedBlock(0, 500, 0, 300, None, None), MaskedBlock(256, 500, 300, 500, None, None)]
    blocks += [MaskedBlock(0, 256, 300, 500, None, 0), MaskedBlock(100, 130, 300, 500, 1, None)]
    out, lse = kernel.forward(q, k, v, KernelParams(None, None, SCALE))
    dq_sum = kernel.dq_sum(dout, q, out, lse)
    assert dq_sum is not None
    assert [dq_sum.takes(block) for block in blocks] == [True, True, True, False]
    alone = torch.zeros_like(q, dtype=torch.float64)
    for rows, block in ((slice(0, 2), blocks[0]), (slice(0, 2), blocks[1]), (slice(1, 2), blocks[2])):
        queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        params = KernelParams(block.lower, block.upper, SCALE)
        tensors = q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries], lse[rows, :, queries]
        dq, dk, dv = kernel.backward(dout[rows, queries], SavedTensors(*tensors), params)
        alone[rows, queries] += dq.double()
        for got, expected in zip(dq_sum.add(rows, block, *tensors[1:3], params), (dk, dv), strict=True):
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    error = (dq_sum.result(SCALE).double() - alone).norm() / alone.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (8, 2, 128), (4, 1, 256)])
def test_calls_share_sums_of_dk_and_dv_also_with_another_rank(dtype, num_heads, num_kv_heads, head_dim):
    """Two ranks' queries against some and all keys. The second rank's sums are added to the first's."""
    q, k, v, dout = draw(512, 512, num_heads, num_kv_heads, head_dim, head_dim, dtype)
    kernel = KERNELS["flash_attn_4"]
    if refusal := kernel.refusal(KernelSpec.of(q, k, v)):
        pytest.skip(refusal)
    assert kernel.key_sum_tile(q[:, :, :num_kv_heads], k, v) is None
    tile = kernel.key_sum_tile(q, k, v)
    assert tile is not None
    half = 256 // tile * tile
    k, v = (x[:, : 2 * half].contiguous() for x in (k, v))
    out, lse = kernel.forward(q, k, v, KernelParams(None, None, SCALE))
    params, gradients = KernelParams(None, None, SCALE), torch.zeros(2, *k.shape, dtype=torch.float64, device=k.device)
    zeros = torch.zeros(2, 2, num_kv_heads, 2 * half * head_dim, device=k.device)
    totals = [zeros.clone(), zeros.clone()]
    late = (half, 2 * half)
    blocks = [MaskedBlock(0, 512, 0, half), MaskedBlock(0, 256, *late), MaskedBlock(256, 512, *late)]
    for number, (rows, block) in enumerate(zip((slice(0, 2), slice(0, 2), slice(1, 2)), blocks, strict=True)):
        dq_sum = kernel.dq_sum(dout, q, out, lse)
        assert dq_sum is not None
        queries, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        part = totals[number % 2][:, rows, :, block.k_start * head_dim : block.k_stop * head_dim]
        assert dq_sum.add(rows, block, k[rows, keys], v[rows, keys], params, part) == (None, None)
        tensors = q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries], lse[rows, :, queries]
        _, *own = kernel.backward(dout[rows, queries], SavedTensors(*tensors), params)
        for total, values in zip(gradients, own, strict=True):
            total[rows, keys] += values.double()
    owner = kernel.dq_sum(dout, q, out, lse)
    assert owner is not None
    rounded = owner.round_keys(totals[0] + totals[1], k, SCALE)
    for got, expected in zip(rounded, gradients, strict=True):
        assert (got.double() - expected).norm() / expected.norm() < (4e-3 if dtype == torch.bfloat16 else 5e-4)
