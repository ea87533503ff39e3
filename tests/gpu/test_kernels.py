"""Liger's kernels against plain PyTorch in fp64, forward and gradients, through recipes/kernels.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig
from recipes import kernels
from tests.measure import LIMIT, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not kernels.has_liger(), reason="liger-kernel is not installed")]
OPERATIONS = ("rms_norm", "layer_norm", "rotary", "swiglu", "cross_entropy")  # tested also where not in LIGER_OPS
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def norm(name: str, hidden_size: int, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    module = kernels.make_norm(ModelConfig(norm=name, hidden_size=hidden_size)).to("cuda")
    inputs = [draw(dtype, 2, 100, hidden_size), *(draw(dtype, hidden_size) for _ in module.parameters())]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return run, inputs


def case(operation: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """A function of tensors that need gradients, and these."""
    torch.manual_seed(1)
    if operation == "rms_norm":
        return norm("rmsnorm", 1000, dtype)
    if operation == "layer_norm":
        return norm("layernorm", 1000, dtype)
    if operation == "rotary":
        qkv = draw(dtype, 2, 100, 8, 48)  # 4 heads, 2 of keys and 2 of values, as one projection gives them
        angles = torch.randn(1, 100, 1, 24, device="cuda")
        cos, sin = angles.cos(), angles.sin()

        def rotate(qkv: Tensor) -> Tensor:
            q, k, v = qkv.split((4, 2, 2), dim=2)
            return torch.cat((*kernels.apply_rotary(q, k, cos, sin), v), dim=2)

        return rotate, [qkv]
    if operation == "swiglu":
        return kernels.swiglu, [draw(dtype, 2, 100, 2 * 700)]
    labels = torch.randint(0, 257, (2, 100), device="cuda")
    labels[:, ::7] = kernels.IGNORED_LABEL
    return lambda logits: kernels.cross_entropy_sum(logits, labels), [draw(dtype, 2, 100, 257)]


def results(run: Callable, inputs: list[Tensor], dout: Tensor | None) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout if dout is not None else torch.ones_like(out) / 3)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_liger_equals_plain_torch_in_fp64(operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "LIGER_OPS", OPERATIONS)
    run, inputs = case(operation, dtype)
    assert kernels.uses_liger(operation, inputs[0])
    dout = None if operation == "cross_entropy" else draw(dtype, *run(*inputs).shape)
    expected = results(run, [x.double() for x in inputs], None if dout is None else dout.double())
    got = results(run, inputs, dout)
    for tensor, want in zip(got, expected, strict=True):
        assert tensor.dtype == (torch.float32 if operation == "cross_entropy" and tensor.dim() == 0 else dtype)
        assert relative_error(tensor, want) < LIMIT[dtype]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_given_is_overwritten(operation: str, monkeypatch: pytest.MonkeyPatch):
    """Liger works in place: its backward pass twice, and what was given, must be as with plain PyTorch."""
    monkeypatch.setattr(kernels, "LIGER_OPS", OPERATIONS)
    run, inputs = case(operation, torch.float32)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = run(*leaves)
    if out.dim():
        dout = draw(torch.float32, *out.shape)
        given = dout.clone()
        first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert torch.equal(dout, given)
        for a, b in zip(first, torch.autograd.grad(out, leaves, dout), strict=True):
            assert torch.equal(a, b)
    else:
        torch.autograd.grad(out, leaves)
    for leaf, tensor in zip(leaves, inputs, strict=True):
        assert torch.equal(leaf, tensor)


def test_rotary_leaves_contiguous_queries_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "LIGER_OPS", OPERATIONS)
    q, k = draw(torch.bfloat16, 1, 10, 4, 32), draw(torch.bfloat16, 1, 10, 2, 32)
    given = q.clone(), k.clone()
    cos = sin = torch.full((1, 10, 1, 16), 0.5, device="cuda")
    kernels.apply_rotary(q, k, cos, sin)
    assert torch.equal(q, given[0])
    assert torch.equal(k, given[1])
