"""Hugging Face models on GPUs, with Liger's kernels and flash-attn-4 where they are installed, against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.parity import HALF_RATIO_LIMIT, Cell, run_cell
from tests.families import tiny_model
from tests.pool import WorkerPool

pytestmark = pytest.mark.gpu

NUM_RANKS = min(2, max(1, torch.cuda.device_count()))
SIZES = {"vocab_size": 320, "hidden_size": 256, "head_dim": 64}  # heads that flash-attn-4 takes
# a ratio of errors needs more than a few numbers (sinks have one a head, routers one an expert), and rounding must not
# change which experts a token goes to
WIDE = {"num_attention_heads": 16, "num_local_experts": 16, "num_experts_per_tok": 16}
LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
CHANGES = {"phi3": {"rope_parameters": None}, "gpt_oss": {**WIDE, **LAYERS}}  # longrope's factors are for heads of 16


@pytest.mark.parametrize("ring_degree", sorted({1, NUM_RANKS}))
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss", "olmo2"])
def test_training_equals_one_process(
    gpu_pool: WorkerPool, tmp_path: Path, family: str, recompute: str, ring_degree: int
):
    tiny_model(family, "eager", **SIZES, **CHANGES.get(family, {})).save_pretrained(tmp_path)
    stage, tile_tokens, transport = (1, 0, "p2p") if recompute == "none" else (3, 8, "copy_engine")
    cell = Cell("bf16", stage, ring_degree, 1, 1, 64, transport=transport if ring_degree > 1 else "p2p")
    cell = replace(cell, recompute=recompute, tile_tokens=tile_tokens, path=str(tmp_path))
    outcome = run_cell(gpu_pool, cell)
    assert outcome.half_ratio is not None
    assert outcome.half_ratio <= HALF_RATIO_LIMIT, outcome


@pytest.mark.parametrize("ring_degree", sorted({1, NUM_RANKS}))
@pytest.mark.parametrize(
    ("method", "layout"), [("ring", "zigzag"), ("ring", "balanced"), ("all_gather", "zigzag")], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", ""])
def test_packed_documents_equal_documents_alone(
    gpu_pool: WorkerPool, tmp_path: Path, family: str, method: str, layout: str, ring_degree: int
):
    """Several documents a row, in varlen calls; without a family the recipe's own transformer."""
    if family:
        tiny_model(family, "eager", **SIZES, **CHANGES.get(family, {})).save_pretrained(tmp_path)
    cell = Cell("bf16", 3, ring_degree, 1, 1, 128, layout, method=method, recompute="selective", packed=True)
    cell = replace(cell, path=str(tmp_path) if family else "")
    outcome = run_cell(gpu_pool, cell)
    assert outcome.half_ratio is not None
    assert outcome.half_ratio <= HALF_RATIO_LIMIT, outcome
