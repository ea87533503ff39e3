"""A model of Hugging Face's before it is loaded: what its folder must hold, its shape, and whether it would be exact.

The launcher's parent calls `resolve`, so that mistakes are refused before ranks start. It reads no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import INFERENCE, Config, ConfigError, ModelConfig
from recipes.model.lora import check_lora, num_trained
from recipes.model.model_folder import CONFIG_FILE, check_config, check_folder, check_hub, one_line
from recipes.model.rope import change_rope, reach

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
        num_stored = None
        folder = Path(path).expanduser()
        if folder.exists() or path.startswith((".", "/", "~")):
            if config.recipe == "plan" or config.explain_gpu:  # without the weights, as with a name on the hub
                check_config(folder)
            else:
                num_stored = check_folder(folder)
            resolved.model.path = str(folder.resolve())
        else:
            check_hub(path)
        hf_config = model_config(resolved.model)
        model = _checked_model(hf_config, num_stored)
        if config.lora.rank:
            check_lora(model, config.lora)
    except ValueError as error:
        setting = "model.path"
        if config.recipe in INFERENCE and getattr(config, config.recipe).model == path:
            setting = f"{config.recipe}.model"  # as it was typed
        raise ConfigError(f"{setting}={path}: {error}") from error
    try:
        _fill_shape(resolved.model, hf_config, model)
    except (AttributeError, RuntimeError) as error:  # the second where it differs between layers, as in Gemma 4
        raise ConfigError(
            f"model.path={path}: {CONFIG_FILE} does not say its shape as planned for ({one_line(error)}): take another"
        ) from error
    resolved.model.num_trained = num_trained(model, config.lora) if config.lora.rank else None
    resolved.data.tokenizer = resolved.data.tokenizer or resolved.model.path
    return resolved


def model_config(model: ModelConfig) -> Any:
    """The transformers configuration of model.path with model.rope, read from the folder or the hub.

    Raises:
        ValueError: if it cannot be read or its kind is not supported; in one line.
    """
    from huggingface_hub.errors import GatedRepoError, StrictDataclassError
    from transformers import AutoConfig
    from transformers.utils import logging

    assert model.path is not None
    logging.set_verbosity_error()  # its warnings are about code that does not run here
    try:
        # without trust_remote_code=False it asks at the terminal whether to run the repository's code
        config = AutoConfig.from_pretrained(model.path, attn_implementation="ring", trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise ValueError(
                "it is gated on the hub: accept its terms there, then set HF_TOKEN to your token"
            ) from error
        where = "it" if Path(model.path).is_dir() else "no such folder is here, and as a name on the hub it"
        raise ValueError(
            f"{where} cannot be read ({one_line(error)}): give a folder with {CONFIG_FILE}, or a name on the hub, "
            "OWNER/NAME"
        ) from error
    if others := [name for name in config.architectures or () if not name.endswith("ForCausalLM")]:
        raise ValueError(f"{', '.join(others)} is not supported: give a model whose class ends in ForCausalLM")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(f"its weights are quantized ({method}), which cannot be trained: give a model in bf16")
    if model.rope is not None:
        change_rope(config, model.rope)
    return config


def meta_model(config: Any) -> nn.Module:
    """The model without weights. Raises ValueError if transformers has no causal model of this kind."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _checked_model(config: Any, num_stored: int | None) -> nn.Module:
    """The model without weights, of which `num_stored` values are in files. Raises ValueError if it is not exact."""
    from ring_attention import hf

    model = meta_model(config)
    hf.check(model)
    _check_head(model)
    num_weights = _num_weights(model)
    if num_stored is not None and num_stored < num_weights:
        raise ValueError(
            f"its files have {num_stored:,} weights, but {CONFIG_FILE} describes a model of {num_weights:,}: download "
            "both again"
        )
    return model


def _num_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
    """Raises ValueError unless the model makes its logits as `HuggingFaceModel` does: its layers' output through a
    linear layer without bias, then `logit_transform`.

    Its own code is run with its layers and its head replaced by stubs.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"its head is {head}: only a linear layer without bias is supported, take another model")
    hidden, given = torch.linspace(-1, 1, 24).view(1, 6, 4), torch.linspace(-8, 8, 30).view(1, 6, 5)
    prefix, head_stub = model.base_model_prefix, _Stub(given)
    layers = getattr(model, prefix)
    (name,) = (name for name, module in model.named_modules() if module is head)
    try:
        setattr(model, prefix, _Stub(_Outputs(hidden)))
        model.set_submodule(name, head_stub)
        out = type(model).forward(model, input_ids=torch.zeros(1, 6, dtype=torch.long), use_cache=False)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # it asks more of its layers than a stub has
        raise ValueError(f"its forward pass is not layers and then a head ({one_line(error)}): take another") from error
    finally:
        setattr(model, prefix, layers)
        model.set_submodule(name, head)
    transform = logit_transform(model.config.get_text_config())
    expected = transform(given) if transform else given
    (seen,) = head_stub.inputs or (torch.zeros(0),)
    if seen.shape != hidden.shape or not torch.allclose(seen.float(), hidden, rtol=1e-3):
        raise ValueError("its head does not get its layers' output as it is: its loss would be wrong, take another")
    if not torch.allclose(out.logits.float(), expected, rtol=1e-3):
        raise ValueError("its logits are not its head's, nor a known scale or cap of them: its loss would be wrong")


class _Stub(nn.Module):
    """A module with one answer, which remembers what it was given last."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer, self.inputs = answer, ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.inputs = args
        return self._answer


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
    model.num_weights = _num_weights(built)
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    if window:
        model.window = window
        model.num_window_layers = kinds.count("sliding_attention") if kinds else text.num_hidden_layers
    model.softcap = getattr(text, "attn_logit_softcapping", None)
    model.max_positions, model.stretched_by = reach(text)
