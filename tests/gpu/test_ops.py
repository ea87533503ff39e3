"""recipes/model/ops.py on a GPU, compiled or with Liger, against plain PyTorch in fp64 on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recipes.model import ops
from tests.tools.measure import LIMIT, relative_error

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rotary() -> tuple[Callable, Tensor]:
    qkv, angles = torch.randn(2, 100, 8, 48), torch.randn(1, 100, 1, 24)  # 4 heads, 2 of keys, 2 of values

    def rotate(qkv: Tensor) -> Tensor:
        cos, sin = (x.to(qkv.device) for x in (angles.cos(), angles.sin()))
        return torch.cat(ops.rotary_qkv(qkv, (4, 2, 2), cos, sin), 2)

    return rotate, qkv


def swiglu() -> tuple[Callable, Tensor]:
    return ops.swiglu, torch.randn(2, 100, 2 * 700)


def loss() -> tuple[Callable, Tensor]:
    labels = torch.randint(0, 257, (2, 100))
    labels[:, ::7] = ops.IGNORED_LABEL
    return lambda logits: ops.cross_entropy_sum(logits, labels.to(logits.device)), torch.randn(2, 100, 257)


@pytest.mark.parametrize("case", [rotary, swiglu, loss])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_operation_equals_plain_torch_in_fp64(case: Callable, dtype: torch.dtype):
    """Output and gradient, twice: operations must not modify their inputs."""
    torch.manual_seed(1)
    run, x = case()
    x = x.to(dtype)
    exact = x.double().requires_grad_()
    expected = run(exact)
    dout = torch.randn_like(expected).to(dtype) if expected.dim() else torch.tensor(1 / 3)
    (gradient,) = torch.autograd.grad(expected, exact, dout.double())
    leaf, given = x.cuda().requires_grad_(), dout.cuda()
    for _ in range(2):
        out = run(leaf)
        (got,) = torch.autograd.grad(out, leaf, given.to(out.dtype))
        assert relative_error(got.cpu(), gradient) < LIMIT[dtype]
        assert relative_error(out.detach().cpu(), expected.detach()) < LIMIT[dtype]
    assert torch.equal(leaf.detach().cpu(), x)
    assert torch.equal(given.cpu(), dout)
