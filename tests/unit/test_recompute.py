"""What a layer keeps for the backward pass, by counting the storages that are alive after a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import ModelConfig
from recipes.transformer import Transformer
from ring_attention import LocalAttention

LENGTH = 256


class Storages(TorchDispatchMode):
    """Those that operators made within."""

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


def kept_bytes(recompute: str, num_layers: int) -> int:
    config = ModelConfig(num_layers=num_layers, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192)
    model = Transformer(config, LocalAttention("auto"), recompute=recompute)
    tokens = torch.randint(0, 257, (1, LENGTH))
    with Storages() as storages:
        loss = model(tokens, torch.arange(LENGTH).unsqueeze(0), tokens)
    num_bytes = storages.alive_bytes()
    loss.backward()
    return num_bytes - storages.alive_bytes()  # what is alive still are weights, of which there were views


def test_what_a_layer_keeps():
    per_token = {
        recompute: (kept_bytes(recompute, 4) - kept_bytes(recompute, 2)) / 2 / LENGTH / 4  # fp32
        for recompute in ("none", "selective", "full")
    }
    assert per_token["full"] == 64  # its input
    assert per_token["selective"] == 64 + 4 * 16 + 4  # and attention's output and lse
    assert per_token["none"] > 10 * 64
