"""A trained Hugging Face model as a folder that from_pretrained loads. Needs no GPU and no ranks.

Weights are the engine's, by its names: `HuggingFaceModel`'s parameters begin with "model.". `path` is model.path, and
`config` what `pretrained.model_config` makes of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import LoraConfig
from recipes.model.lora import add_lora, merge_lora
from recipes.model.pretrained import meta_model

PREFIX = "model."
MAX_SHARD_SIZE = "5GB"
GENERATION_FILE = "generation_config.json"


def save_model(folder: Path, path: str, config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write all weights and the configuration. `weights` loses its entries."""
    shell: Any = meta_model(config).to(dtype)
    _save(folder, path, shell, {name: weights.pop(PREFIX + name) for name in _saved_names(shell)})


def load_base(path: str, config: Any, dtype: torch.dtype) -> Any:
    """The model beside which LoRA's matrices were trained."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)


def save_merged(folder: Path, path: str, base: Any, lora: LoraConfig, weights: dict[str, Tensor]) -> None:
    """Write the base model's weights with the matrices of LoRA, in fp32 here, merged into them."""
    with_lora = add_lora(base, lora, seed=0)
    matrices = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if ".lora_" in name}
    with_lora.load_state_dict(matrices, strict=False, assign=True)  # they stay fp32
    merged: Any = merge_lora(with_lora)
    state = merged.state_dict()
    _save(folder, path, merged, {name: state[name] for name in _saved_names(merged)})


def save_adapter(folder: Path, config: Any, lora: LoraConfig, weights: dict[str, Tensor]) -> None:
    """Write the matrices of LoRA and their settings, as peft's PeftModel.from_pretrained loads them."""
    with_lora = add_lora(meta_model(config), lora, seed=0)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    with_lora.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def _saved_names(model: nn.Module) -> list[str]:
    """Of its parameters and buffers. Of parameters that share a tensor only the first."""
    first, every = (dict(model.named_parameters(remove_duplicate=only)).keys() for only in (True, False))
    return [name for name in model.state_dict() if name not in every - first]


def _save(folder: Path, path: str, shell: Any, state: dict[str, Tensor]) -> None:
    from transformers.utils import cached_file

    shell.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    # as it was: transformers would write what it understands of it
    original = cached_file(path, GENERATION_FILE, _raise_exceptions_for_missing_entries=False)
    if original is not None:
        shutil.copyfile(original, folder / GENERATION_FILE)
