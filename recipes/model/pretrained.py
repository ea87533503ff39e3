"""A model of Hugging Face's before it is loaded: what its folder must hold, its shape, and whether it would be exact.

The launcher's parent calls `resolve`, so that mistakes are refused before ranks start. It reads no weights.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import Config, ConfigError, ModelConfig

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by engine.dtype
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_GATES = ("gate_proj", "gate_up_proj")


def resolve(config: Config) -> Config:
    """The configuration with the shape of the model at model.path; unchanged without one.

    Raises:
        ConfigError: if the model cannot be loaded, or would not be exact under ring attention.
    """
    path = config.model.path
    if path is None or config.model.num_weights is not None:
        return config
    from ring_attention import hf

    resolved = copy.deepcopy(config)
    try:
        hf.register()
        folder = Path(path).expanduser()
        if folder.exists() or path.startswith((".", "/", "~")):
            check_folder(folder)
            resolved.model.path = str(folder.resolve())
        hf_config = model_config(resolved.model)
        model = meta_model(hf_config)
        hf.check(model)
        _check_head(model)
    except ValueError as error:
        raise ConfigError(f"model.path={path}: {error}") from error
    _fill_shape(resolved.model, hf_config, model)
    resolved.data.tokenizer = resolved.data.tokenizer or resolved.model.path
    return resolved


def model_config(model: ModelConfig) -> Any:
    """The transformers configuration of model.path with model.rope, read from the folder or the hub.

    Raises:
        ValueError: if it cannot be read or has no causal head; in one line.
    """
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, attn_implementation="ring")
    except (OSError, ValueError, KeyError) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, GatedRepoError) or "gated repo" in str(error):
            raise ValueError(
                "it is gated on the hub: accept its terms there, then set HF_TOKEN to your token"
            ) from error
        raise ValueError(
            f"it cannot be read ({' '.join(str(error).split())[:200]}): give a folder with {CONFIG_FILE}, or a name on "
            "the hub, OWNER/NAME"
        ) from error
    architectures = config.architectures or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ValueError(f"{', '.join(architectures)} has no causal head: give a model whose class ends in ForCausalLM")
    if model.rope is not None:
        _stretch(config, model.rope)
    return config


def meta_model(config: Any) -> nn.Module:
    """The model without weights. Raises ValueError if transformers has no causal model of this kind."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def logit_transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a model does to its head's logits: a scale, a cap, or None for nothing. `_check_head` tries it."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return None if scale == 1.0 else lambda logits: logits * scale
    return lambda logits: cap * torch.tanh(logits * (scale / cap))


class _Outputs:
    """The outputs of a model's layers; what else is asked for is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


def _check_head(model: Any) -> None:
    """Raises ValueError unless the model makes its logits as `logit_transform` says.

    Its own code is run on given logits, with its layers and its head replaced.
    """
    given = torch.linspace(-8, 8, 2 * 3 * 5).view(1, 6, 5)
    prefix, head = model.base_model_prefix, model.get_output_embeddings()
    layers = getattr(model, prefix)
    (name,) = (name for name, module in model.named_modules() if module is head)
    try:
        setattr(model, prefix, _Stub(_Outputs(torch.zeros(1, 6, 4))))
        model.set_submodule(name, _Stub(given))
        out = type(model).forward(model, input_ids=torch.zeros(1, 6, dtype=torch.long), use_cache=False)
    finally:
        setattr(model, prefix, layers)
        model.set_submodule(name, head)
    transform = logit_transform(model.config.get_text_config())
    if not torch.allclose(out.logits.float(), transform(given) if transform else given, rtol=1e-3):
        raise ValueError("its logits are not its head's, nor a known scale or cap of them: its loss would be wrong")


class _Stub(nn.Module):
    """A module with one answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer


def check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder has a configuration and complete weights in safetensors files."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}: give the folder that save_pretrained or the hub's download wrote"
        )
    names = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / INDEX_FILE} is not what was written: download it again") from error
    for name in names:
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    """The header says how long the file must be."""
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.bin")))
        advice = f"only {others}: convert it with transformers' save_pretrained" if others else "download it again"
        raise ValueError(f"{path} is missing: {advice}")
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        size = path.stat().st_size
        try:
            header = json.loads(file.read(length)) if length <= size else {}
        except ValueError:
            header = {}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if not ends or size != 8 + length + max(ends):
        raise ValueError(f"{path} is cut off or damaged: it has {size:,} bytes; download it again")


def _stretch(config: Any, rope: Any) -> None:
    """Change the rotary embedding in the configuration as a user of transformers would, who edits config.json."""
    before = config.rope_parameters
    if not isinstance(rope, dict):
        raise ValueError(f"model.rope={rope} must be a dictionary, such as model.rope='{{rope_type:yarn,factor:4}}'")
    nested = isinstance(next(iter(before.values()), None), dict)
    if nested and not rope.keys() <= before.keys():
        kinds = ", ".join(before)
        raise ValueError(f"its layers have rotary embeddings by kind: type model.rope={{KIND:{{...}}}} with {kinds}")
    original = config.max_position_embeddings
    changed = {kind: _merged(before[kind], rope[kind], original) for kind in rope} if nested else None
    config.rope_parameters = {**before, **changed} if changed is not None else _merged(before, rope, original)
    one = config.rope_parameters if not nested else next(iter(changed.values()), {})  # pyright: ignore[reportOptionalMemberAccess]
    if "factor" in rope or nested:
        config.max_position_embeddings = int(original * one.get("factor", 1))
    config.validate_rope()


def _merged(before: dict[str, Any], rope: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    kept = {} if rope.get("rope_type", before.get("rope_type")) != before.get("rope_type") else before
    base = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if name in before}
    merged = {**base, **kept, **rope}
    merged.setdefault("rope_type", "default")
    if merged["rope_type"] in ("yarn", "llama3", "longrope", "dynamic"):
        merged.setdefault("original_max_position_embeddings", max_position_embeddings)
    return merged


def _fill_shape(model: ModelConfig, config: Any, built: nn.Module) -> None:
    """What the planner counts with."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    model.name = Path(model.path or "").name
    model.num_layers, model.hidden_size, model.num_heads = text.num_hidden_layers, text.hidden_size, heads
    model.num_kv_heads = getattr(text, "num_key_value_heads", None) or heads
    model.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    experts = next((getattr(text, name) for name in _EXPERTS if getattr(text, name, None)), 1)
    model.num_experts = experts
    model.experts_per_token = getattr(text, "num_experts_per_tok", 1) or 1 if experts > 1 else 1
    model.mlp_size = (experts > 1 and getattr(text, "moe_intermediate_size", None)) or text.intermediate_size
    gated = any(name.rpartition(".")[2] in _GATES for name, _ in built.named_modules())
    gated = gated or any(name.rpartition(".")[2] in _GATES for name, _ in built.named_parameters())
    model.mlp = "swiglu" if gated else "gelu"
    model.vocab_size = text.vocab_size
    model.tied_head = bool(getattr(text, "tie_word_embeddings", False))
    model.num_weights = sum(parameter.numel() for parameter in built.parameters())
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    if window:
        model.window = window
        model.num_window_layers = kinds.count("sliding_attention") if kinds else text.num_hidden_layers
    model.softcap = getattr(text, "attn_logit_softcapping", None)
