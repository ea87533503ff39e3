"""LoRA: small trainable matrices beside the frozen weights of a Hugging Face model, by peft."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import nn

from conf.schema import LoraConfig

ADAPTER = "default"  # peft's name of the only one


def check_lora(model: Any, lora: LoraConfig) -> None:
    """Raises ValueError unless peft is installed and each of lora.target_modules names linear layers of the model."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"lora.rank={lora.rank} needs peft: type pip install -e '.[hf]' -c constraints.txt")
    linear = _linear_layers(model)
    unknown = [target for target in lora.target_modules or () if not any(_is_named(name, target) for name in linear)]
    if unknown:
        legal = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"lora.target_modules names {', '.join(unknown)}, but its linear layers are {', '.join(legal)}: type "
            f"lora.target_modules=[{legal[0]}], for example, or leave it out for all of them"
        )


def num_trained(model: Any, lora: LoraConfig) -> int:
    """The weights of the trainable matrices: rank x (inputs + outputs) of each layer that gets them."""
    return sum(
        lora.rank * (layer.in_features + layer.out_features)
        for name, layer in _linear_layers(model).items()
        if not lora.target_modules or any(_is_named(name, target) for target in lora.target_modules)
    )


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    """All but the head, by name."""
    head = model.get_output_embeddings()
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Linear) and module is not head}


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_lora(model: Any, lora: LoraConfig, seed: int) -> Any:
    """The model with frozen weights and trainable matrices, equal on all ranks."""
    import peft

    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=lora.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers'
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


@torch.no_grad()
def merge_lora(model: Any) -> nn.Module:
    """The model of `add_lora` without the matrices, their products added to its weights and rounded once."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        weight.copy_(weight.float() + layer.get_delta_weight(ADAPTER).float())
    return model.unload()
