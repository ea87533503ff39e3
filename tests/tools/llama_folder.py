"""A folder with a Llama of a configured shape and random weights, for measurements: as from_pretrained reads it.

    python -m tests.tools.llama_folder FOLDER model=llama_8b model.num_layers=8

draws bf16 weights on the GPU if there is one, and writes the tokenizer of scripts/make_tiny_llama.py beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import hydra
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train  # noqa: F401 - registers the schema
from conf.compose import to_config
from conf.schema import ModelConfig
from scripts.make_tiny_llama import VOCAB_SIZE, write_tokenizer


def llama_config(model: ModelConfig) -> LlamaConfig:
    """The configuration of a Llama of this shape."""
    return LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_size,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied_head,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A Llama folder with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="of train.py, such as model=llama_8b")
    options = parser.parse_args()
    with hydra.initialize(version_base="1.3", config_path="../../conf"):
        model = to_config(hydra.compose("config", options.overrides)).model
    if model.vocab_size < VOCAB_SIZE:
        parser.error(f"model.vocab_size={model.vocab_size}: the tokenizer needs model.vocab_size={VOCAB_SIZE} or more")
    config = llama_config(model)
    config.dtype = torch.bfloat16
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        built = LlamaForCausalLM(config)
    built.save_pretrained(options.folder)
    write_tokenizer(options.folder)
    print(f"{options.folder}: {sum(p.numel() for p in built.parameters()):,} parameters")


if __name__ == "__main__":
    main()
