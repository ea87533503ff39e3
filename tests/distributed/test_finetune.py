"""Hugging Face models through the recipe's engine against eager attention in one process, without the recipe's code."""

from __future__ import annotations

import ctypes
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.schema import Config, EngineConfig, ModelConfig
from recipes.model.pretrained import resolve
from recipes.planning.memory import num_parameters
from tests.distributed.parity import Cell, run_cell, train_on_ranks
from tests.families import tiny_model
from tests.pool import WorkerPool
from tests.tools.measure import relative_error

CELLS = [  # dtype, stage, ring, data, accumulation, length
    Cell("fp32", 0, 2, 1, 1, 29),
    Cell("fp32", 1, 2, 1, 2, 29),
    Cell("fp32", 2, 2, 2, 1, 32),
    Cell("fp32", 3, 2, 1, 2, 29),
    Cell("fp32", 3, 2, 2, 1, 29, recompute="selective", tile_tokens=8, offload_activations=True),
    Cell("bf16", 1, 2, 1, 2, 29),
    Cell("bf16", 3, 2, 1, 1, 29, recompute="selective"),
    Cell("fp32", 3, 1, 1, 1, 29, method="ulysses", ulysses_degree=2),
    Cell("fp32", 1, 2, 1, 1, 29, method="all_gather", recompute="full", tile_tokens=8),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose matrices are large enough for ZeRO-3 to cut."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gemma2", "qwen3_moe"):
        tiny_model(family, "eager", vocab_size=320, hidden_size=512).save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[pytest.mark.slow] if cell.dtype == "bf16" else [], id=str(cell)) for cell in CELLS],
)
def test_training_equals_one_process(pool: WorkerPool, folders: Path, cell: Cell):
    outcome = run_cell(pool, replace(cell, path=str(folders / "llama")))
    assert outcome.passes, outcome


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_training_other_families_equals_one_process(pool: WorkerPool, folders: Path, family: str):
    outcome = run_cell(pool, Cell("fp32", 3, 2, 1, 1, 29, recompute="selective", path=str(folders / family)))
    assert outcome.passes, outcome


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_training_lora_on_ranks_equals_one_rank(pool: WorkerPool, folders: Path, zero_stage: int):
    cell = Cell("fp32", zero_stage, 2, 1, 2, 29, path=str(folders / "llama"), lora_rank=4)
    alone = pool.run(train_on_ranks, replace(cell, zero_stage=1, ring_degree=1), num_ranks=1)[0]
    ours = pool.run(train_on_ranks, cell, num_ranks=2)[0]
    assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
    trained = [name for name in alone.parameters if "lora_" in name]
    assert len(trained) == 2 * 7 * 2  # two matrices beside each of seven, in two layers
    for name in trained:
        assert alone.parameters[name].any(), name
        assert relative_error(ours.parameters[name], alone.parameters[name]) < 1e-5, name


def bytes_while_loading(path: str) -> tuple[int, int]:
    """This rank's own memory beyond its start, while ZeRO-3 loads a model and afterwards."""
    from recipes.engine.base import deepspeed_config
    from recipes.model.huggingface import load_model

    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # M_MMAP_THRESHOLD: give freed memory back at once
    config = resolve(Config(model=ModelConfig(path=path), engine=EngineConfig(zero_stage=3)))
    settings = deepspeed_config(config, num_parameters(config.model), num_ranks=4)
    start, peak, is_loaded = own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_loaded.wait(0.002):
            peak = max(peak, own_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(config, torch.device("cpu"), settings)
    is_loaded.set()
    watcher.join()
    del model.config  # the model lives until here
    return peak, own_bytes() - start


def own_bytes() -> int:
    """The process's memory without files that it maps."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.slow
def test_no_rank_holds_the_model_while_zero_3_loads_it(pool: WorkerPool, folders: Path, tmp_path: Path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 320}
    model = tiny_model("llama", "eager", torch.bfloat16, **sizes)
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    model_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    largest_bytes = 2 * max(parameter.numel() for parameter in model.parameters())
    pool.run(bytes_while_loading, str(folders / "llama"), num_ranks=4)  # imports what loading needs
    for peak, loaded in pool.run(bytes_while_loading, str(tmp_path), num_ranks=4):
        assert peak < model_bytes / 4 + 4 * largest_bytes + 2**25
        assert peak < 0.6 * model_bytes
        assert loaded < model_bytes / 4 + 2**25
