"""A Hugging Face model as the recipe's model: loaded, its attention on the ring, its loss and MLPs by tiles.

Shapes: B batch, S local tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from conf.schema import Config, ConfigError
from data.shard import DocumentEnds
from recipes.model.head import Head
from recipes.model.lora import add_lora
from recipes.model.mlp import Activation, tiled_mlp
from recipes.model.ops import gated
from recipes.model.pretrained import logit_transform, model_config
from recipes.model.recompute import Recompute
from recipes.model.rope import rope_switch
from recipes.planning.plan import DTYPES
from ring_attention import CAUSAL, hf
from ring_attention.decoding import CachedAttention
from ring_attention.sequence_attention import SequenceAttention

# model types whose RMSNorm rounds once, after the weight, in transformers; Liger rounds before it, too, as Llama does
SCALES_IN_FP32 = ("gpt_oss", "olmo2", "olmo3")


class MlpParts(NamedTuple):
    """The up projections (gate before up, or both in one), the down projection, and what lies between."""

    ups: list[nn.Linear]
    down: nn.Linear
    activation: Activation


class HuggingFaceModel(nn.Module):
    """The model at model.path. `forward` returns the SUM of this rank's token losses, as `Transformer` does.

    With ZeRO-3 every parameter is cut over the ranks as it is read, so no rank ever holds the model.

    Args:
        device: of the weights.
        tile_tokens, mlp_tile_tokens: as in `Transformer`.
        deepspeed_config: what the engine will be started with.
    """

    def __init__(
        self,
        config: Config,
        attention: SequenceAttention,
        device: torch.device,
        tile_tokens: int,
        mlp_tile_tokens: int,
        deepspeed_config: dict[str, Any],
    ) -> None:
        super().__init__()
        hf.register()
        self._plan_arguments = attention, config.data.sequence_length - 1
        model = load_model(config, device, deepspeed_config)
        hf.check(model)
        self.notes = _use_liger(model, device)  # for people: what runs slower than it could
        self._causal = [model]  # in a list: only `model`, which may wrap it, is a submodule
        self.model = add_lora(model, config.lora, config.seed) if config.lora.rank else model
        layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        recompute = Recompute(config.engine.recompute, len(layers), config.engine.offload_activations)
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = recompute.mode != "none"
            layer._gradient_checkpointing_func = functools.partial(recompute, index)  # pyright: ignore[reportArgumentType]
        num_tiled = sum(_tile_mlps(layer, mlp_tile_tokens) for layer in layers) if mlp_tile_tokens else len(layers)
        if num_tiled < len(layers):
            why = "LoRA changes them" if config.lora.rank else "they are not down(act(gate) * up)"
            self.notes.append(
                f"{len(layers) - num_tiled} of {len(layers)} layers run their MLP on all tokens at once: {why}"
            )
        self.rope_switch = rope_switch(model.config.get_text_config())  # as in `Transformer`
        _replace_head(model, tile_tokens)

    @property
    def stop_tokens(self) -> set[int]:
        """Those that end a text by the model's generation_config.json, as transformers' generate takes them."""
        given = getattr(self._causal[0].generation_config, "eos_token_id", None)
        return set(given) if isinstance(given, list) else set() if given is None else {given}

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        labels_BS: Tensor | None = None,
        documents: DocumentEnds | None = None,
        by_token: bool = False,
    ) -> Tensor:
        """The sum of the cross-entropies of labels in nats, a scalar in fp32; without labels the logits [B, S, V].

        The arguments are those of `TokenBatch`; with `by_token` it gives `Head.token_scores`.
        """
        attention, max_position = self._plan_arguments
        mask = CAUSAL
        if documents is not None:
            mask = CAUSAL.packed(documents)
            max_position = max(stop - start for row in documents for start, stop in itertools.pairwise(row)) - 1
        hidden_BSE = self._layers_output(tokens_BS, positions_BS, hf.BatchPlan(attention, mask, None, max_position))
        return self._causal[0].get_output_embeddings()(hidden_BSE, labels_BS, by_token)

    def hidden_states(self, tokens_BS: Tensor, positions_BS: Tensor, cached: CachedAttention) -> Tensor:
        """As `Transformer.hidden_states`."""
        return self._layers_output(tokens_BS, positions_BS, hf.BatchPlan(cached, CAUSAL, None, cached.max_position))

    def logits(self, hidden_BSE: Tensor) -> Tensor:
        """[B, S, V]."""
        return self._causal[0].get_output_embeddings()(hidden_BSE)

    def _layers_output(self, tokens_BS: Tensor, positions_BS: Tensor, plan: hf.BatchPlan) -> Tensor:
        positions_BS = positions_BS.clamp(max=plan.max_position)  # padding must not look like a longer document
        inputs = {"input_ids": tokens_BS, "position_ids": positions_BS, "use_cache": False}
        return self._causal[0].base_model(**inputs, ring_plan=plan).last_hidden_state


def load_model(config: Config, device: torch.device, deepspeed_config: dict[str, Any]) -> Any:
    """The transformers model at model.path with its weights, cut over the ranks on ZeRO-3.

    Raises:
        ConfigError: if its files lack weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would go to the rank's log
    zero3 = config.engine.zero_stage == 3
    # transformers cuts parameters while it reads them, as long as this object lives
    holder = HfDeepSpeedConfig(deepspeed_config) if zero3 else None
    assert config.model.path is not None
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        config=model_config(config.model),
        dtype=DTYPES[config.engine.dtype],
        attn_implementation=hf.NAME,
        device_map=None if zero3 or device.type == "cpu" else device,
        output_loading_info=True,
    )
    model, loading = loaded
    if lacking := sorted(loading["missing_keys"]):  # transformers would draw them
        raise ConfigError(f"model.path={config.model.path}: its files lack {', '.join(lacking)}: download them again")
    del holder
    return model


def _use_liger(model: nn.Module, device: torch.device) -> list[str]:
    """Use Liger's kernels for norms, rotary embeddings and MLPs. The loss is the recipe's.

    Returns why there are none, for a GPU.
    """
    if device.type != "cuda":
        return []
    if importlib.util.find_spec("liger_kernel") is None:
        return ["norms, rotary embeddings and MLPs are plain PyTorch: pip install -e '.[kernels]' for Liger's kernels"]
    patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    model_type = model.config.model_type  # pyright: ignore[reportAttributeAccessIssue]
    if model_type not in patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return [f"norms, rotary embeddings and MLPs are plain PyTorch: Liger has no kernels for {model_type}"]
    patch._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    if model_type in SCALES_IN_FP32:
        norms: list[Any] = [module for module in model.modules() if hasattr(module, "casting_mode")]
        for norm in norms:
            norm.casting_mode = "gemma"  # Liger's name for: round once, after the weight
    return []


def _replace_head(model: Any, tile_tokens: int) -> None:
    old = model.get_output_embeddings()  # linear, without bias: `resolve` has checked it
    with torch.device("meta"):
        head = Head(0, 0, tile_tokens, logit_transform(model.config.get_text_config()))
    head.weight, head.in_features, head.out_features = old.weight, old.in_features, old.out_features
    model.set_output_embeddings(head)


def _tile_mlps(layer: nn.Module, tile_tokens: int) -> bool:
    """Let the gated MLPs of a layer run by tiles. Returns whether it has any."""
    found = {module: parts for module in layer.modules() if (parts := _mlp_parts(module)) is not None}
    for module, parts in found.items():
        module.forward = functools.partial(_tiled, parts, tile_tokens)
        set_z3_leaf_module(module, True)  # ZeRO-3 gathers all its weights once for all tiles
    return bool(found)


def _tiled(parts: MlpParts, tile_tokens: int, x_BSE: Tensor) -> Tensor:
    return tiled_mlp(x_BSE, *parts, tile_tokens)


def _mlp_parts(module: nn.Module) -> MlpParts | None:
    """What `tiled_mlp` needs of a gated MLP; None for any other module."""
    children = dict(module.named_children())
    names = ["gate_up_proj"] if "gate_up_proj" in children else ["gate_proj", "up_proj"]
    linears = [children.get(name) for name in (*names, "down_proj")]
    act = children.get("act_fn") or children.get("activation_fn")
    if act is None or any(type(linear) is not nn.Linear for linear in linears):
        return None
    *ups, down = linears
    sample = torch.linspace(-4, 4, 9)
    is_silu = torch.equal(act(sample), F.silu(sample))  # transformers has a class of its own for it
    activation = functools.partial(gated, F.silu if is_silu else act)
    parts = MlpParts(ups, down, activation)  # pyright: ignore[reportArgumentType]
    return parts if _computes(module, names, activation) else None


def _computes(module: nn.Module, names: list[str], activation: Activation) -> bool:
    """Whether the class of an MLP computes what its parts say and nothing else: tried on a copy with small weights."""
    small = copy.copy(module)
    small._modules = dict(module._modules)
    generator = torch.Generator().manual_seed(0)

    def linear(inputs: int, outputs: int) -> nn.Linear:
        made = nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32)
        for parameter in made.parameters():
            parameter.data.normal_(generator=generator)
        return made

    ups = [linear(8, 12 if len(names) == 1 else 6) for _ in names]
    down = linear(6, 8)
    small._modules.update(zip(names, ups, strict=True), down_proj=down)
    x = torch.randn(5, 8, generator=generator)
    with torch.no_grad():
        return torch.allclose(type(module).forward(small, x), tiled_mlp(x, ups, down, activation, 0), rtol=1e-5)
