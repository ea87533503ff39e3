"""A training run on GPUs logs all metrics that GPUs have, measures waits with CUDA events, and records memory."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch

from conf.schema import Config, DataConfig, EngineConfig, LoggingConfig
from tests.cli.program import logged_names
from tests.pool import WorkerPool

pytestmark = pytest.mark.gpu

NUM_RANKS = torch.cuda.device_count()


def train(run_dir: Path, dtype: str, num_ranks: int) -> None:
    """Runs on each rank."""
    import deepspeed.comm as dist

    from recipes.launch.launcher import make_plan
    from recipes.monitor.reporter import Reporter
    from recipes.pretrain import pretrain

    config = Config(
        engine=EngineConfig(dtype=dtype),
        data=DataConfig(sequence_length=512, validation_sequences=1),
        logging=LoggingConfig(every_n_steps=2, wandb="disabled"),
        num_steps=6,
        breakdown=False,
        profile=True,
        memory_snapshot=True,
    )
    plan = make_plan(config, num_ranks)
    if dist.get_rank() > 0:
        pretrain(plan, run_dir, None)
        return
    with Reporter(plan, run_dir, io.StringIO()) as reporter:
        pretrain(plan, run_dir, reporter)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_run_logs_all_metrics_for_gpus(gpu_pool: WorkerPool, tmp_path, dtype):
    gpu_pool.run(train, tmp_path, dtype, NUM_RANKS, num_ranks=NUM_RANKS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    conditions = ("a GPU", dtype, *["a ring"] * (NUM_RANKS > 1))
    logged = {name for line in lines for name in line} - {"train/mfu_pct"}  # logged only if the GPU's peak is known
    assert logged == logged_names("train", "validation", conditions=conditions)
    last = lines[-1]
    assert 0 < last["train/peak_active_memory_gib"] <= last["train/peak_memory_gib"]
    assert last["train/allocation_retries"] == 0
    if NUM_RANKS > 1:
        assert 0 <= last["train/exchange_wait_min_ms"] <= last["train/exchange_wait_max_ms"]
        assert last["train/exchange_wait_max_ms"] < 1e3 * last["train/step_time_max_s"]
    for rank in range(NUM_RANKS):
        snapshot = pickle.loads((tmp_path / "profile" / f"memory_rank_{rank}.pickle").read_bytes())
        assert snapshot["segments"]
        assert snapshot["device_traces"]
        assert "forward ring step 0" in (tmp_path / "profile" / f"rank_{rank}.json").read_text()
