"""What `ring_attention.hf` refuses: models that would not be exact, by layer or setting, with the reason."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

from torch import nn

NAME = "ring"  # of attn_implementation
# what a layer may be, in a configuration's layer_types
_LAYER_TYPES = {"full_attention": "causal", "sliding_attention": "causal within a window"}
# settings that must be unset, and why
_REFUSED = {
    "use_bidirectional_attention": "only causal attention is supported",
    "output_attentions": "the weights of attention never exist: set it to False",
    "output_router_logits": "the auxiliary loss would see this rank's tokens alone: set it to False",
}


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text layers."""
    return model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def problems(model: nn.Module) -> Iterator[str]:
    """Why a model of transformers would not be exact, one clause for each reason; nothing if it would be."""
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        yield "it is no model of transformers"
        return
    if not _can_generate_tokens(model):
        yield "it has no causal head: load it with AutoModelForCausalLM"
        return
    config = text_config(model)
    if config._attn_implementation != NAME:
        yield f'attn_implementation is "{config._attn_implementation}": load it with attn_implementation="{NAME}"'
    if getattr(model.config, "vision_config", None) or getattr(model.config, "audio_config", None):
        yield "images and sounds attend in both directions: load the text model alone, by its own ForCausalLM class"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        yield "its attention is not causal: take a model for generating text"
    yield from _layer_problems(model, config)
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            yield f"{name}={getattr(config, name)}: {reason}"
    for name, value in config.to_dict().items():
        if isinstance(value, (int, float)) and value and _is_random(name):
            yield f"{name}={value} would differ between ranks: load it with {name}=0.0, or set that in its config.json"
    yield from _module_problems(model)


def _is_random(name: str) -> bool:
    """Whether a setting is a probability or an amount of noise in training. Classifiers' are not for this head."""
    is_random = name.endswith(("dropout", "dropout_prob", "pdrop", "layerdrop", "jitter_noise"))
    return is_random and not name.startswith(("classifier", "summary"))


def _module_problems(model: nn.Module) -> Iterator[str]:
    """One for each reason, with the first module that it is about."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            found[f"dropout of {module.p}, which would differ between ranks: set it to 0"].append(name)
        if isinstance(module, (nn.Conv1d, nn.RNNBase)):
            found[f"{type(module).__name__}, which mixes tokens of this rank alone: take another model"].append(name)
    for reason, names in found.items():
        yield f"{names[0]}{f' and {len(names) - 1} others' if len(names) > 1 else ''}: {reason}"


def _can_generate_tokens(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and model.get_output_embeddings() is not None  # pyright: ignore[reportCallIssue]


def _layer_problems(model: nn.Module, config: Any) -> Iterator[str]:
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        yield "its configuration does not say how many layers it has (num_hidden_layers): take another model"
        return
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        kinds[kind].append(index)
    for kind in kinds.keys() - set(_LAYER_TYPES):
        layers = ", ".join(map(str, kinds[kind]))
        yield f"layers {layers} are {kind}: only {' and '.join(_LAYER_TYPES)} are exact; take another model"
    if getattr(config, "num_kv_shared_layers", 0):
        yield f"its last {config.num_kv_shared_layers} layers read the keys of others, which ring attention does not"
    if kinds.keys() - set(_LAYER_TYPES):
        return
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        yield "its code does not look attn_implementation up, so it would compute each rank's tokens alone"
        return
    attends = collections.Counter(
        module.layer_idx
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    )
    if lacking := [index for index in range(config.num_hidden_layers) if attends[index] != 1]:  # pyright: ignore[reportArgumentType]
        yield f"layers {', '.join(map(str, lacking))} do not have one attention each, as state-space layers have none"


def num_learned_positions(model: nn.Module) -> int | None:
    """How many positions have a learned embedding; None if the model has none, such as one with rotary embeddings."""
    num_positions = getattr(text_config(model), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    # OPT and BioGPT have two rows more
    learned = any(module.num_embeddings - 2 <= (num_positions or 0) <= module.num_embeddings for module in embeddings)
    return num_positions if learned else None


def rope_types(module: nn.Module) -> set[str]:
    """The kinds of rotary embedding that a module computes; empty if it is none."""
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind} if isinstance(kind, str) else set()
