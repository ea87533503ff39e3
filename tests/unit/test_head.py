"""The loss tile by tile against the loss of all logits: equal, and without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ModelConfig
from recipes.head import Head
from recipes.kernels import IGNORED_LABEL
from recipes.transformer import Transformer
from ring_attention import LocalAttention
from tests.measure import relative_error

BATCH, LENGTH, HIDDEN, VOCABULARY, TILE = 2, 11, 16, 50, 4  # 22 tokens: the last tile has two
LIMIT = 1e-14


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, the head's weight and labels."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[:, ::3] = IGNORED_LABEL
    return x.to(dtype), weight.to(dtype), labels


def loss_and_gradients(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, tile_tokens: int, factor: float = 1 / 3
) -> list[torch.Tensor]:
    head = Head(HIDDEN, VOCABULARY, tile_tokens).to(x.dtype)
    head.load_state_dict({"weight": weight})
    x = x.clone().requires_grad_()
    loss = head(x, labels)
    (loss * factor).backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    return [loss.detach(), x.grad, head.weight.grad]


@pytest.mark.parametrize("tile_tokens", [1, TILE, 21])
def test_loss_and_gradients_are_those_of_all_logits(tile_tokens: int):
    x, weight, labels = inputs()
    tiled, whole = (loss_and_gradients(x, weight, labels, tokens) for tokens in (tile_tokens, 0))
    for ours, expected in zip(tiled, whole, strict=True):
        assert ours.dtype == expected.dtype
        assert relative_error(ours, expected) < LIMIT


def test_a_tile_that_holds_all_tokens_changes_no_bit():
    x, weight, labels = inputs(torch.bfloat16)
    tiled, whole = (loss_and_gradients(x, weight, labels, tokens) for tokens in (BATCH * LENGTH, 0))
    assert all(torch.equal(ours, expected) for ours, expected in zip(tiled, whole, strict=True))


def test_without_a_label_that_counts_loss_and_gradients_are_0():
    x, weight, labels = inputs()
    for tensor in loss_and_gradients(x, weight, torch.full_like(labels, IGNORED_LABEL), TILE):
        assert not tensor.any()


def test_in_half_precision_the_sum_over_tiles_costs_no_precision():
    """1024 tiles of a token against one product; summed in bf16 the weight's gradient would be 5 times as far off."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 1024, HIDDEN, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) / 8
    labels = torch.randint(VOCABULARY, (1, 1024), generator=generator)
    x, weight = x.bfloat16(), weight.bfloat16()
    exact = loss_and_gradients(x.double(), weight.double(), labels, 0)
    tiled, whole = (loss_and_gradients(x, weight, labels, tokens) for tokens in (1, 0))
    assert [tensor.dtype for tensor in tiled] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, one_product, expected in zip(tiled, whole, exact, strict=True):
        assert relative_error(ours, expected) < 1.5 * relative_error(one_product, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_learns_the_same_with_a_head_of_its_own_or_the_embeddings(tied: bool):
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_size=32)
    config.tied_head = tied
    tokens = torch.randint(257, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(7))
    gradients = []
    for tile_tokens in (TILE, 0):
        model = Transformer(config, LocalAttention("reference"), tile_tokens=tile_tokens).double()
        loss = model(tokens[:, :-1], torch.arange(LENGTH).unsqueeze(0), tokens[:, 1:])
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    tiled, whole = gradients
    assert tiled.keys() == whole.keys()
    assert ("head.weight" in tiled) != tied
    for name, gradient in whole.items():
        assert relative_error(tiled[name], gradient) < 1e-12, name


class LargestLogits(TorchDispatchMode):
    """How many tokens had logits in one tensor at most."""

    tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.shape[-1:] == (VOCABULARY,):
                self.tokens = max(self.tokens, output.numel() // VOCABULARY)
        return outputs


@pytest.mark.parametrize(("tile_tokens", "expected"), [(TILE, TILE), (0, BATCH * LENGTH)])
def test_logits_exist_for_one_tile_at_a_time(tile_tokens: int, expected: int):
    x, weight, labels = inputs()
    with LargestLogits() as largest:
        loss_and_gradients(x, weight, labels, tile_tokens)
    assert max(largest.tokens, 0) == expected


def products(tile_tokens: int, with_gradients: bool) -> float:
    """Matrix products of a forward pass, in units of that of x and the weight."""
    x, weight, labels = inputs()
    head = Head(HIDDEN, VOCABULARY, tile_tokens).double()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_gradients):
        loss = head(x.requires_grad_(), labels)
    assert loss.requires_grad == with_gradients
    return counter.get_total_flops() / (2 * x.numel() * len(weight))


def test_gradients_are_computed_only_where_they_are_wanted():
    assert products(TILE, with_gradients=True) == 3
    assert products(TILE, with_gradients=False) == 1
