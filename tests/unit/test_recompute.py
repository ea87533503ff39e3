"""What layers save for the backward pass: counts the storages that are alive after a forward pass."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import ModelConfig
from recipes.model.transformer import Transformer
from ring_attention import LocalAttention

LENGTH = 256


class Storages(TorchDispatchMode):
    """Tracks the storages that operators create."""

    def __init__(self) -> None:
        super().__init__()
        self._created: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                reference = StorageWeakRef(storage)
                self._created[reference.cdata] = reference, storage.nbytes()
        return outputs

    def alive_bytes(self) -> int:
        return sum(num_bytes for reference, num_bytes in self._created.values() if not reference.expired())


def saved_bytes(recompute: str, num_layers: int) -> int:
    config = ModelConfig(num_layers=num_layers, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute=recompute)
    tokens = torch.randint(0, 257, (1, LENGTH))
    with Storages() as storages:
        loss = model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens)
    num_bytes = storages.alive_bytes()
    loss.backward()
    return num_bytes - storages.alive_bytes()  # what is still alive are weights that had views


def test_bytes_saved_per_layer():
    per_token = {
        recompute: (saved_bytes(recompute, 4) - saved_bytes(recompute, 2)) / 2 / LENGTH / 4  # fp32
        for recompute in ("none", "selective", "full")
    }
    assert per_token["full"] == 64  # its input
    assert per_token["selective"] == 64 + 4 * 16 + 4  # and attention's output and lse
    assert per_token["none"] > 10 * 64


class HostCopies(TorchDispatchMode):
    """Follows saved tensors to the host and back: copies that need not block. On the CPU the host is other memory.

    Args:
        tensors_per_layer: how many are copied; layers are numbered in the order of their copies.
    """

    def __init__(self, tensors_per_layer: int = 1) -> None:
        super().__init__()
        self.num_out = self.num_back = 0
        self.layer_of_buffer: dict[int, int] = {}  # by address on the host
        self._tensors_per_layer = tensors_per_layer
        self._on_device: list[tuple[int, StorageWeakRef]] = []
        self._copied_back: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and (args[2:] or (kwargs or {}).get("non_blocking")):
            target, source = args[:2]
            is_back = source.data_ptr() in self.layer_of_buffer
            if is_back:
                layer = self.layer_of_buffer[source.data_ptr()]
                self._copied_back.append(weakref.ref(target))
            else:
                layer = self.layer_of_buffer[target.data_ptr()] = self.num_out // self._tensors_per_layer
            self.num_back += is_back
            self.num_out += not is_back
            on_device = target if is_back else source
            self._on_device.append((layer, StorageWeakRef(on_device.untyped_storage())))
        return func(*args, **(kwargs or {}))

    def layers_on_device(self) -> list[int]:
        """Of those that are copied."""
        return sorted({layer for layer, reference in self._on_device if not reference.expired()})

    def num_with_graph(self) -> int:
        """How many tensors on the device, copied back, hold a graph: it would live as long as they do."""
        alive = [tensor for reference in self._copied_back if (tensor := reference()) is not None]
        return sum(tensor.grad_fn is not None for tensor in alive)


@pytest.mark.parametrize(("recompute", "tensors_per_layer"), [("selective", 3), ("full", 1)])
def test_two_layers_are_on_the_device_whatever_the_number_of_layers(recompute: str, tensors_per_layer: int):
    """After a forward pass, and whenever a layer is recomputed. The last two layers stay there and are not copied."""
    config = ModelConfig(num_layers=6, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute=recompute, offload=True)
    tokens = torch.randint(0, 257, (1, LENGTH))
    seen, graphs = [], []
    with HostCopies(tensors_per_layer) as copies:
        loss = model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens)
        assert (copies.num_out, copies.num_back) == (4 * tensors_per_layer, 0)
        assert copies.layers_on_device() == []
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: seen.append((index, copies.layers_on_device())))
            attention_out = layer.get_submodule("attention.out")
            attention_out.register_forward_pre_hook(lambda *_: graphs.append(copies.num_with_graph()))
        loss.backward()
    assert seen == [(5, []), (4, [3]), (3, [2, 3]), (2, [1, 2]), (1, [0, 1]), (0, [0])]
    assert graphs == [0] * 6
    assert copies.num_back == copies.num_out
    assert copies.layers_on_device() == []


def test_micro_batches_share_host_buffers():
    config = ModelConfig(num_layers=5, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute="selective", offload=True)
    with HostCopies() as copies:
        for _ in range(3):
            tokens = torch.randint(0, 257, (1, LENGTH))
            model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens).backward()
    assert len(copies.layer_of_buffer) == 3 * 3  # input, out and lse of three layers
    assert copies.num_out == 3 * 3 * 3  # in three micro-batches


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_two_forward_passes_before_their_backward_passes(recompute: str):
    config = ModelConfig(num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    gradients = []
    for offload in (False, True):
        torch.manual_seed(1)
        model = Transformer(config, LocalAttention("auto"), recompute=recompute, offload=offload)
        tokens = torch.randint(0, 257, (2, 1, LENGTH))
        losses = [model(row, torch.arange(LENGTH).unsqueeze(0), row) for row in tokens]
        sum(losses, torch.zeros(())).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        assert got is not None
        assert torch.equal(got, expected)
