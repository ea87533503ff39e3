"""Hugging Face models on a GPU, with Liger's kernels and flash-attn-4 where they are installed, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.parity import HALF_RATIO_LIMIT, Cell, run_cell
from tests.families import tiny_model
from tests.pool import WorkerPool

pytestmark = pytest.mark.gpu

SIZES = {"vocab_size": 320, "hidden_size": 256, "head_dim": 64}  # heads that flash-attn-4 takes


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss", "olmo2"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_training_equals_one_process(gpu_pool: WorkerPool, tmp_path: Path, family: str, recompute: str):
    # longrope's factors are for heads of 16, and rounding must not change which experts a token goes to
    more = {"phi3": {"rope_parameters": None}, "gpt_oss": {"num_experts_per_tok": 4}}.get(family, {})
    tiny_model(family, "eager", **SIZES, **more).save_pretrained(tmp_path)
    stage, tile_tokens = (1, 0) if recompute == "none" else (3, 8)
    cell = Cell("bf16", stage, 1, 1, 1, 64, recompute=recompute, tile_tokens=tile_tokens, path=str(tmp_path))
    outcome = run_cell(gpu_pool, cell)
    assert outcome.half_ratio is not None
    assert outcome.half_ratio <= HALF_RATIO_LIMIT, outcome
