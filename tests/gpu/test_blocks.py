"""The CUDA block kernels against attention in fp64: forward, and backward with a given out and lse."""

import pytest
import torch

from ring_attention.blocks import BLOCKS, BlockSpec
from tests.measure import relative_error
from tests.unit.test_blocks import oracle

pytestmark = pytest.mark.gpu

LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("name", ["cudnn", "aten_flash", "reference"])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 8, 64), (8, 2, 128), (4, 1, 128)])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "causal"), [(512, 512, True), (313, 313, True), (626, 313, False), (313, 626, False)]
)
def test_a_block_equals_fp64_attention(name, dtype, num_heads, num_kv_heads, head_dim, num_queries, num_keys, causal):
    shapes = [(2, num_queries, num_heads, head_dim)] + 2 * [(2, num_keys, num_kv_heads, head_dim)]
    q, k, v = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    block = BLOCKS[name]
    if refusal := block.supports(BlockSpec.of(q, k)):
        pytest.skip(refusal)
    dout = torch.randn_like(q)
    expected_out, *expected_gradients = oracle(q, k, v, dout, causal)
    out, lse = block.forward(q, k, v, causal, 0.3)
    assert lse.shape == (2, num_heads, num_queries)
    assert lse.dtype == torch.float32
    gradients = block.backward(dout, q, k, v, expected_out.to(dtype), lse, causal, 0.3)
    for quantity, got, expected in zip(
        ("out", "dq", "dk", "dv"), [out, *gradients], [expected_out, *expected_gradients], strict=True
    ):
        assert got.shape == expected.shape
        assert relative_error(got, expected) < LIMIT[dtype], quantity


@pytest.mark.parametrize("name", ["cudnn", "aten_flash"])
def test_slices_of_larger_tensors_are_read_right(name):
    """The ring passes views: chunks of q, of the log-sum-exp, and of a received buffer."""
    q, k, v = (torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    block, late, early = BLOCKS[name], slice(256, 512), slice(0, 256)
    if refusal := block.supports(BlockSpec.of(q, k)):
        pytest.skip(refusal)
    dout = torch.randn_like(q)
    out, lse = block.forward(q[:, late], k[:, early], v[:, early], False, 0.3)
    whole_out, whole_lse = torch.randn_like(q), torch.randn(2, 4, 512, device="cuda")
    whole_out[:, late], whole_lse[:, :, late] = out, lse
    gradients = block.backward(
        dout[:, late], q[:, late], k[:, early], v[:, early], whole_out[:, late], whole_lse[:, :, late], False, 0.3
    )
    expected = oracle(q[:, late], k[:, early], v[:, early], dout[:, late], False)
    for got, want in zip([out, *gradients], expected, strict=True):
        assert relative_error(got, want) < LIMIT[torch.bfloat16]
