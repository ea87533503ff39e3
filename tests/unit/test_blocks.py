"""The block kernels that run here against torch's own attention in fp64, and the registry's choices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attention.blocks import BLOCKS, BlockSpec, choose_block
from ring_attention.merge import merge_
from tests.measure import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(dtype: torch.dtype, num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    shapes = [(2, num_queries, num_heads, 16), (2, num_keys, num_kv_heads, 16), (2, num_keys, num_kv_heads, 16)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """out, dq, dk, dv by autograd through torch's own attention in fp64."""
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    q_t, k_t, v_t = (tensor.transpose(1, 2) for tensor in leaves)
    out = F.scaled_dot_product_attention(q_t, k_t, v_t, is_causal=causal, scale=0.3, enable_gqa=True).transpose(1, 2)
    out.backward(dout.double())
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("name", ["reference", "cpu_flash"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "causal"), [(9, 9, True), (5, 10, False), (12, 3, False), (1, 1, True)]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_a_block_equals_fp64_attention(name, dtype, num_queries, num_keys, causal, num_heads, num_kv_heads):
    q, k, v = draw(dtype, num_queries, num_keys, num_heads, num_kv_heads)
    dout = torch.randn(q.shape, dtype=torch.float64).to(dtype)
    out, lse = BLOCKS[name].forward(q, k, v, causal, 0.3)
    assert lse.shape == (2, num_heads, num_queries)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    gradients = BLOCKS[name].backward(dout, q, k, v, out.to(dtype), lse, causal, 0.3)
    for got, expected in zip([out, *gradients], oracle(q, k, v, dout, causal), strict=True):
        assert got.shape == expected.shape
        assert relative_error(got, expected) < TOLERANCE[dtype]


def test_merging_two_halves_equals_the_whole():
    q, k, v = draw(torch.float64, 6, 10, 4, 2)
    block = BLOCKS["reference"]
    whole_out, whole_lse = block.forward(q, k, v, False, 0.3)
    out, lse = block.forward(q, k[:, :3], v[:, :3], False, 0.3)
    merge_(out, lse, *block.forward(q, k[:, 3:], v[:, 3:], False, 0.3))
    assert relative_error(out, whole_out) < 1e-14
    assert relative_error(lse, whole_lse) < 1e-14


def test_merging_survives_scores_far_apart():
    out, lse = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), -1e4)
    merge_(out, lse, torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 1e4))
    assert out.tolist() == [[[[3.0, 3.0]]]]
    assert lse.tolist() == [[[1e4]]]


def spec(device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> BlockSpec:
    return BlockSpec(device_type, capability, dtype, 32, 8, head_dim)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (spec("cpu", None, torch.float32, 64), "cpu_flash"),
        (spec("cpu", None, torch.bfloat16, 512), "cpu_flash"),
        (spec("cuda", (9, 0), torch.bfloat16, 128), "cudnn"),
        (spec("cuda", (8, 0), torch.bfloat16, 128), "aten_flash"),
        (spec("cuda", (9, 0), torch.float16, 256), "aten_flash"),
        (spec("cuda", (9, 0), torch.float32, 128), "reference"),
        (spec("cuda", (9, 0), torch.bfloat16, 512), "reference"),
    ],
)
def test_the_fastest_kernel_that_can_is_chosen(wanted: BlockSpec, chosen: str):
    assert choose_block(wanted)[0].name == chosen


def test_a_fallback_says_what_was_not_possible():
    reason = choose_block(spec("cuda", (9, 0), torch.float32, 128))[1]
    assert "not cudnn: needs bf16 or fp16, not torch.float32" in reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash9", "block=flash9 is unknown: use auto, cudnn, aten_flash, cpu_flash, reference"),
        ("cudnn", "block=cudnn cannot run here: it does not run on cpu; use block=auto"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        choose_block(spec("cpu", None, torch.float32, 64), name)
