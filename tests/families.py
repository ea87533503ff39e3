"""Tiny models with random weights, one per family of causal language models that transformers has."""

from __future__ import annotations

from typing import Any

import torch

VOCAB_SIZE, WINDOW = 96, 24
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
# model type: what its configuration needs beside the sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"use_sliding_window": True, **_WINDOWS},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "gemma2": {**_WINDOWS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_WINDOWS, "query_pre_attn_scalar": 16},
    "gpt_oss": {**_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {
        "original_max_position_embeddings": 128,  # counts, rather than that below
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0 + 0.1 * n for n in range(8)],
            "long_factor": [2.0 + 0.3 * n for n in range(8)],
            "partial_rotary_factor": 1.0,
        },
    },
    "granite": {
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
    },
    "olmo2": {},
    "olmo3": _WINDOWS,
    "glm4": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere2": {**_WINDOWS, "logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_MOE, "num_experts": 4},
}
# names of the same sizes in mixtures of experts
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "moe_intermediate_size": 48,
}
_MORE_MOE = (
    *("afmoe", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hy_v3", "kolibri1", "laguna", "mellum", "mimo_v2_flash"),
    *("minimax_m2", "qwen2_moe", "sarvam_moe", "solar_open"),
)
# families that need no more than the sizes
MORE_FAMILIES = (
    *_MORE_MOE,
    *("apertus", "arcee", "aria_text", "beam", "bitnet", "cohere", "cohere2_moe", "cwm", "ernie4_5", "exaone"),
    *("exaone4", "flex_olmo", "flint", "gemma", "glm", "gpt_neox", "granite_swa", "granitemoe", "granitemoe_swa"),
    *("granitemoeshared", "helium", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe"),
    *("modernbert-decoder", "nanochat", "olmo", "olmoe", "persimmon", "phi", "starcoder2", "vaultgemma"),
)


def tiny_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    own = _EXPERTS if family in _MORE_MOE else FAMILIES.get(family, {})
    return AutoConfig.for_model(family, **(_SIZES | own | changes))


def tiny_model(family: str, attn_implementation: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same weights for each call. No parameter is 0 or 1, so that a wrong gradient of any shows."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}  # the default has no fp64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            offset = 1.0 if "norm" in name else 0.0
            drawn = offset + scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.bfloat16())  # so that all dtypes start from equal weights
    return model.to(dtype)
