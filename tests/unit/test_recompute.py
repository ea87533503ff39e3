"""What a layer saves for the backward pass: the storages that are alive after a forward pass."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import ModelConfig
from recipes.model import activation_offload
from recipes.model.transformer import Transformer
from ring_attention import LocalAttention

LENGTH = 256


class Storages(TorchDispatchMode):
    """The storages that operators make within."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                reference = StorageWeakRef(storage)
                self._made[reference.cdata] = reference, storage.nbytes()
        return outputs

    def alive_bytes(self) -> int:
        return sum(num_bytes for reference, num_bytes in self._made.values() if not reference.expired())


def saved_bytes(recompute: str, num_layers: int) -> int:
    config = ModelConfig(num_layers=num_layers, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute=recompute)
    tokens = torch.randint(0, 257, (1, LENGTH))
    with Storages() as storages:
        loss = model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens)
    num_bytes = storages.alive_bytes()
    loss.backward()
    return num_bytes - storages.alive_bytes()  # weights, which have views, are still alive


def test_what_a_layer_saves():
    per_token = {
        recompute: (saved_bytes(recompute, 4) - saved_bytes(recompute, 2)) / 2 / LENGTH / 4  # fp32
        for recompute in ("none", "selective", "full")
    }
    assert per_token["full"] == 64  # its input
    assert per_token["selective"] == 64 + 4 * 16 + 4  # and attention's output and lse
    assert per_token["none"] > 10 * 64


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_two_layers_are_on_the_device_however_many_there_are(recompute: str):
    """After a forward pass, and whenever a layer is recomputed."""
    num_layers, kind, seen = 6, activation_offload._Layer, []
    config = ModelConfig(num_layers=num_layers, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute=recompute, offload=True)
    layers: list[Any] = []  # what each has saved

    def on_device() -> list[int]:
        return [index for index, kept in enumerate(layers) if (layer := kept()) and layer.on_device]

    def make(*arguments: Any) -> activation_offload._Layer:
        layers.append(weakref.ref(made := kind(*arguments)))
        return made

    def saved_with_graphs() -> int:
        alive = [layer for kept in layers if (layer := kept())]
        return sum(tensor.grad_fn is not None for layer in alive for tensor in layer.on_device or [])

    graphs: list[int] = []  # saved tensors with a graph, which would live as long as they do
    tokens = torch.randint(0, 257, (1, LENGTH))
    with patch.object(activation_offload, "_Layer", side_effect=make):
        loss = model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens)
    assert on_device() == [4, 5]
    assert [bool(layer.on_host) for kept in layers if (layer := kept())] == [True] * 4 + [False] * 2
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: seen.append((index, on_device())))
        layer.get_submodule("attention.out").register_forward_pre_hook(lambda *_: graphs.append(saved_with_graphs()))
    loss.backward()
    assert seen == [(5, [4, 5]), (4, [3, 4]), (3, [2, 3]), (2, [1, 2]), (1, [0, 1]), (0, [0])]
    assert graphs == [0] * num_layers
    assert on_device() == []


def test_micro_batches_share_their_host_buffers():
    config = ModelConfig(num_layers=5, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute="selective", offload=True)
    buffers: set[int] = set()
    room_for = activation_offload.ActivationOffload._room_for

    def noted(self: activation_offload.ActivationOffload, tensor: torch.Tensor) -> torch.Tensor:
        buffer = room_for(self, tensor)
        buffers.add(buffer.data_ptr())
        return buffer

    with patch.object(activation_offload.ActivationOffload, "_room_for", noted):
        for _ in range(3):
            tokens = torch.randint(0, 257, (1, LENGTH))
            model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens).backward()
    assert len(buffers) == 3 * 3  # three layers' input, out and lse


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_two_forward_passes_may_come_before_their_backward_passes(recompute: str):
    config = ModelConfig(num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    gradients = []
    for moves in (False, True):
        torch.manual_seed(1)
        model = Transformer(config, LocalAttention("auto"), recompute=recompute, offload=moves)
        tokens = torch.randint(0, 257, (2, 1, LENGTH))
        losses = [model(row, torch.arange(LENGTH).unsqueeze(0), row) for row in tokens]
        sum(losses, torch.zeros(())).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        assert got is not None
        assert torch.equal(got, expected)
