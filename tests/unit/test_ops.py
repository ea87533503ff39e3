"""The plain PyTorch path of recipes/model/ops.py against its formulas."""

import math

import pytest
import torch

from conf.schema import ModelConfig
from recipes.model import ops
from ring_attention.kv import KeysValues
from tests.tools.measure import relative_error

LIMIT = 1e-14
generator = torch.Generator().manual_seed(3)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms(norm: str):
    config = ModelConfig(norm=norm, hidden_size=24, norm_eps=1e-3)
    ours = ops.make_norm(config).double()
    weights = {name: draw(24) for name in ours.state_dict()}
    ours.load_state_dict(weights)
    x = draw(2, 5, 24)
    centred = x if norm == "rmsnorm" else x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weights["weight"]
    expected = expected + weights.get("bias", 0)
    assert relative_error(ours(x), expected) < LIMIT


def test_rotary_rotates_each_pair_of_queries_and_keys_by_its_angle():
    qkv, angles = draw(2, 7, 4 + 2 + 2, 6), draw(1, 7, 1, 3)
    given = qkv.clone()
    q, k, v = ops.rotary_qkv(qkv, (4, 2, 2), angles.cos(), angles.sin())
    for x, got in ((given[:, :, :4], q), (given[:, :, 4:6], k)):
        rotated = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * angles)
        assert relative_error(got, torch.cat((rotated.real, rotated.imag), -1)) < LIMIT
    assert torch.equal(v, given[:, :, 6:])
    assert torch.equal(qkv, given)


def test_keys_and_values_form_one_message_in_the_projections_dtype():
    qkv, half = draw(1, 3, 2 + 1 + 1, 4).bfloat16(), torch.full((1, 3, 1, 2), 0.5)
    q, k, v = ops.rotary_qkv(qkv, (2, 1, 1), half, half)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    message = KeysValues.of_parts(k, v).message
    assert message is not None
    assert torch.equal(message, torch.cat((k.flatten(), v.flatten())))
    assert KeysValues.of_parts(v, k).message is None


def test_only_adjacent_keys_and_values_form_a_message():
    memory = torch.arange(2 * 3 * 2 * 2 * 4).view(2, 3, 2, 2, 4)  # [k and v, S, B, K, D]
    assert KeysValues.of_parts(*memory.unbind(0)).message is not None
    assert KeysValues.of_parts(*memory.transpose(1, 2).unbind(0)).message is None  # [B, S, K, D] of [S, B, K, D]
    assert KeysValues.of_parts(memory[0], memory[1].transpose(0, 1)).message is None
    assert KeysValues.of_parts(memory[0].transpose(0, 1), memory[1]).message is None
    assert KeysValues.of_parts(memory[0], memory.clone()[1]).message is None  # the right offset in other memory
    assert KeysValues.of_parts(memory[0, :1], memory[1, :1]).message is None  # a gap between them


def test_swiglu_is_the_silu_of_the_first_half_times_the_second():
    gate, up = draw(2, 5, 6), draw(2, 5, 6)
    got = ops.swiglu(torch.cat((gate, up), -1))
    assert relative_error(got, gate / (1 + torch.exp(-gate)) * up) < LIMIT


def test_the_loss_is_a_sum_over_valid_labels():
    logits, labels = draw(2, 3, 5), torch.tensor([[0, -100, 4], [2, 2, -100]])
    got = ops.cross_entropy_sum(logits, labels)
    expected = sum(
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True)
        if label >= 0
    )
    assert got.item() == pytest.approx(expected, rel=1e-13)
    assert ops.cross_entropy_sum(logits.bfloat16(), labels).dtype == torch.float32
    assert ops.cross_entropy_sum(logits, torch.full_like(labels, -100)).item() == 0


def test_the_losss_gradient_takes_the_place_of_the_logits():
    logits, labels = draw(2, 3, 5).requires_grad_(), torch.tensor([[0, -100, 4], [2, 2, -100]])
    expected = ops.cross_entropy_sum(logits, labels)
    (gradient,) = torch.autograd.grad(expected, logits)
    got = logits.detach().clone()
    assert ops.cross_entropy_gradient_(got, labels) == expected
    assert relative_error(got, gradient) < LIMIT
    assert not got[labels == -100].any()
