"""The tiled loss equals the untiled loss, and full logits never exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import ModelConfig
from data.shard import IGNORED_LABEL
from recipes.model.head import Head
from recipes.model.transformer import Transformer
from ring_attention import LocalAttention
from tests.errors import names
from tests.tools.measure import relative_error
from tests.tools.memory import StorageCount

BATCH, LENGTH, HIDDEN, VOCABULARY, TILE, NUM_TILES = 2, 11, 12, 50, 4, 6  # 22 tokens: the last tile has 2
LIMIT = 1e-14
aten = torch.ops.aten


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
def test_tiled_loss_and_gradients_equal_untiled_ones(tile_tokens: int):
    x, weight, labels = inputs()
    tiled, untiled = (loss_and_gradients(x, weight, labels, tokens) for tokens in (tile_tokens, 0))
    for ours, expected in zip(tiled, untiled, strict=True):
        assert ours.dtype == expected.dtype
        assert relative_error(ours, expected) < LIMIT


def test_a_single_tile_is_bit_identical_to_no_tiles():
    x, weight, labels = inputs(torch.bfloat16)
    tiled, untiled = (loss_and_gradients(x, weight, labels, tokens) for tokens in (BATCH * LENGTH, 0))
    assert all(torch.equal(ours, expected) for ours, expected in zip(tiled, untiled, strict=True))


def test_without_valid_labels_loss_and_gradients_are_0():
    x, weight, labels = inputs()
    for tensor in loss_and_gradients(x, weight, torch.full_like(labels, IGNORED_LABEL), TILE):
        assert not tensor.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiling_loses_no_precision(dtype: torch.dtype):
    """1024 tiles of one token each against one matrix product."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 1024, HIDDEN, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) / 8
    labels = torch.randint(VOCABULARY, (1, 1024), generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    exact = loss_and_gradients(x.double(), weight.double(), labels, 0)
    tiled, untiled = (loss_and_gradients(x, weight, labels, tokens) for tokens in (1, 0))
    assert [tensor.dtype for tensor in tiled] == [torch.float32, dtype, dtype]
    assert relative_error(tiled[0], exact[0]) < 1e-4
    for ours, one_product, expected in zip(tiled[1:], untiled[1:], exact[1:], strict=True):
        assert relative_error(ours, expected) < 1.05 * relative_error(one_product, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_gradients_are_the_same_with_and_without_tiles(tied: bool):
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_size=32)
    config.tied_head = tied
    tokens = torch.randint(257, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(7))
    gradients = []
    for tile_tokens in (TILE, 0):
        model = Transformer(config, LocalAttention("reference"), tile_tokens=tile_tokens).double()
        loss = model(tokens[:, :-1], torch.arange(LENGTH).unsqueeze(0), tokens[:, 1:])
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    tiled, untiled = gradients
    assert tiled.keys() == untiled.keys()
    assert ("head.weight" in tiled) != tied
    for name, gradient in untiled.items():
        assert relative_error(tiled[name], gradient) < 1e-12, name


class Operators(TorchDispatchMode):
    """Counts matrix products, and the largest number of tokens that had logits in one tensor."""

    num_products = tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (aten.mm, aten.addmm)
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and VOCABULARY in output.shape and HIDDEN not in output.shape:
                self.tokens = max(self.tokens, output.numel() // VOCABULARY)
        return outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("tile_tokens", "tokens", "num_products"), [(TILE, TILE, 3 * NUM_TILES), (0, BATCH * LENGTH, 3)]
)
def test_logits_exist_for_one_tile_at_a_time(tile_tokens: int, tokens: int, num_products: int, dtype: torch.dtype):
    with Operators() as operators:
        loss_and_gradients(*inputs(dtype), tile_tokens)
    assert (operators.tokens, operators.num_products) == (tokens, num_products)


def test_a_transformed_tile_has_the_gradient_of_its_logits():
    x, weight, labels = inputs()
    gradients = []
    for tile_tokens in (TILE, 0):
        head = Head(HIDDEN, VOCABULARY, tile_tokens, lambda logits: 3 * torch.tanh(logits / 3)).double()
        head.load_state_dict({"weight": weight})
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(head(leaf, labels), (leaf, head.weight)))
    for tiled, untiled in zip(*gradients, strict=True):
        assert relative_error(tiled, untiled) < LIMIT


def test_sums_are_freed_before_the_weights_gradient_exists():
    """In the backward pass: the sums of dx, 22 tokens, are gone once the rounded gradient of the weight is there."""
    x, weight, labels = inputs(torch.bfloat16)
    head = Head(HIDDEN, VOCABULARY, TILE).bfloat16()
    head.load_state_dict({"weight": weight})
    loss = head(x.requires_grad_(), labels)
    with StorageCount() as count:
        start = count.now
        loss.backward()
    rounded, sums_of_tokens = 2 * VOCABULARY * HIDDEN, 4 * BATCH * LENGTH * HIDDEN
    assert rounded - sums_of_tokens / 2 <= count.peak - start < rounded


def test_a_second_backward_pass_fails():
    x, _, labels = inputs()
    loss = Head(HIDDEN, VOCABULARY, TILE).double()(x.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as raised:
        loss.backward()
    names(str(raised.value), "first backward pass", "compute the loss again")


def test_only_required_gradients_are_computed():
    x, _, labels = inputs()
    head = Head(HIDDEN, VOCABULARY, TILE).double()
    with Operators() as operators, torch.no_grad():
        loss = head(x.requires_grad_(), labels)
    assert not loss.requires_grad
    assert operators.num_products == NUM_TILES
    with Operators() as operators:
        head.requires_grad_(False)(x, labels).backward()
    assert operators.num_products == 2 * NUM_TILES


@pytest.mark.parametrize("tile_tokens", [0, TILE])
def test_scores_by_token_are_losses_and_hits_of_labelled_tokens(tile_tokens: int):
    x, weight, labels = inputs()
    logits = x @ weight.T
    labels[1, 4] = logits[1, 4].argmax()
    head = Head(HIDDEN, VOCABULARY, tile_tokens).double()
    head.load_state_dict({"weight": weight})
    losses, hits = head(x, labels, by_token=True)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )  # 0 if ignored
    assert torch.allclose(losses.flatten(), expected, rtol=1e-13, atol=0)
    assert torch.equal(hits, (logits.argmax(-1) == labels).double())
    assert hits[1, 4] == 1


def test_a_rank_without_labels_has_scores_of_0():
    x, _, labels = inputs()
    scores = Head(HIDDEN, VOCABULARY, TILE).double()(x, torch.full_like(labels, IGNORED_LABEL), by_token=True)
    assert torch.equal(scores, torch.zeros(2, BATCH, LENGTH, dtype=torch.float64))
