"""Through the engine, on every ZeRO stage: a resumed run and its export are bit-identical to an uninterrupted run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conf.schema import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelismConfig,
)
from recipes.checkpoint.manifest import newest_first, read_manifest
from recipes.export import export, find_checkpoint
from recipes.model.transformer import Transformer
from recipes.planning.plan import Plan
from ring_attention import LocalAttention
from tests.corpora import byte_corpus
from tests.errors import names
from tests.pool import WorkerPool, parallel_groups

LENGTH, NUM_STEPS = 21, 4
CORPUS = byte_corpus(["ring attention " * 40, "DeepSpeed " * 50], LENGTH)


def configuration(zero_stage: int, dtype: str, tied_head: bool) -> Config:
    return Config(
        model=ModelConfig(
            hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64, tied_head=tied_head, bias=True
        ),
        engine=EngineConfig(dtype=dtype, zero_stage=zero_stage, gradient_accumulation_steps=2),
        data=DataConfig(sequence_length=LENGTH),
        checkpoint=CheckpointConfig(keep=3),
        num_steps=NUM_STEPS,
    )


def two_starts(config: Config, run_dir: Path) -> tuple[list[str], list[list[float]], dict[str, Any]]:
    """On a rank: train with checkpoints at steps 2 and 4, break that of step 4, resume, and save it again.

    Returns:
        The printed lines, the losses of both starts, and the weights at the end (none on stage 3).
    """
    from recipes.checkpoint.manager import Checkpoints, choose_checkpoint
    from recipes.engine.build import build_engine, build_feed

    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    plan.resolve_config()
    groups = None if config.parallelism.method == "tensor_pipeline" else parallel_groups(1, 2)
    lines: list[str] = []
    losses: list[list[float]] = []
    weights: dict[str, Any] = {}
    for _ in range(2):
        resumed = choose_checkpoint(config, run_dir, lines.append)
        engine = build_engine(plan, groups)
        checkpoints = Checkpoints(config, run_dir, engine)
        if resumed:
            checkpoints.load(resumed)
        steps = build_feed(plan, engine, CORPUS).steps(last_read=resumed.last_read if resumed else None)
        losses.append([])
        for step in range(resumed.step + 1 if resumed else 1, NUM_STEPS + 1):
            batch = next(steps)
            losses[-1].append(engine.train_step(batch.micro_batches).loss.item())
            if step % 2 == 0:
                checkpoints.save(step, batch.last, 0.0, "")
        if config.engine.zero_stage < 3:
            weights = {name: tensor.detach().clone() for name, tensor in engine.model.state_dict().items()}
        engine.close()
        newest = newest_first(run_dir)[0]
        if not resumed and torch.distributed.get_rank() == 0:
            if config.parallelism.method == "sequence":
                export(newest, run_dir / "uninterrupted.safetensors")
            flip_a_bit(max(newest.glob("*.pt"), key=lambda path: path.stat().st_size))
        torch.distributed.barrier()
    return lines, losses, weights


def save_with_other_listings(config: Config, run_dir: Path) -> list[str]:
    """On a rank: save while the other rank does not see the first file, as on a network disk; the manifest's files."""
    from recipes.checkpoint.manager import Checkpoints
    from recipes.engine.build import build_engine

    plan = Plan(config, 2, "cpu", "CPU", None, ranks_per_host=2)
    plan.resolve_config()
    engine = build_engine(plan, parallel_groups(1, 2))
    names = Path.iterdir
    stale = lambda folder: iter(sorted(names(folder))[torch.distributed.get_rank() :])  # noqa: E731
    with mock.patch.object(Path, "iterdir", stale):
        Checkpoints(config, run_dir, engine).save(2, None, 0.0, "")
    engine.close()
    return sorted(read_manifest(newest_first(run_dir)[0]).files)


def test_every_file_is_in_the_manifest_even_if_ranks_see_others(pool: WorkerPool, tmp_path: Path):
    files, _ = pool.run(save_with_other_listings, configuration(1, "fp32", False), tmp_path, num_ranks=2)
    written = {path.name for path in newest_first(tmp_path)[0].iterdir()} - {"manifest.json"}
    assert len(written) >= 5  # a model, two optimizers, two random states
    assert set(files) == written


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "tied_head"),
    [
        (0, "bf16", True),
        (1, "fp32", False),
        (1, "bf16", True),
        (2, "fp32", True),
        (3, "bf16", True),
        (3, "fp32", False),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    pool: WorkerPool, tmp_path: Path, zero_stage, dtype, tied_head
):
    config = configuration(zero_stage, dtype, tied_head)
    (lines, losses, weights), (_, other_losses, _) = pool.run(two_starts, config, tmp_path, num_ranks=2)
    assert losses == other_losses
    assert len(losses[0]) == 4
    assert losses[1] == losses[0][2:]
    names(lines[1], "step_00000004", "broken", "checksum")
    resumed_after, renamed = lines[3:]
    names(resumed_after, "step 2")
    names(renamed, "step_00000004", "step_00000004.broken")

    find_checkpoint(newest_first(tmp_path)[0])  # saved again, and intact
    assert (tmp_path / "checkpoints" / "step_00000004.broken" / "manifest.json").exists()
    export(tmp_path, tmp_path / "resumed.safetensors")
    uninterrupted, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("uninterrupted", "resumed"))
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in resumed)

    model = Transformer(config.model, LocalAttention("auto"), seed=1)
    model.load_state_dict(resumed)
    if weights:  # training computes with these numbers in its dtype
        trained = {name: tensor.to(weights[name].dtype) for name, tensor in model.state_dict().items()}
        assert all(torch.equal(trained[name], weights[name]) for name in weights)
    if dtype == "bf16":  # the optimizer's weights have more digits
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in resumed.values())
    with safe_open(tmp_path / "resumed.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"


def test_tensor_and_pipeline_ranks_resume_too(pool: WorkerPool, tmp_path: Path):
    config = configuration(1, "bf16", False)
    config.attention = AttentionConfig(method="local")
    config.parallelism = ParallelismConfig("tensor_pipeline", tensor_degree=2)
    config.data.document_mask = False
    (_, losses, _), _ = pool.run(two_starts, config, tmp_path, num_ranks=2)
    assert losses[1] == losses[0][2:]
