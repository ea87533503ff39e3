"""Hugging Face models and LoRA through the engine: resuming, resharding, and exports that transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conf.schema import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
)
from recipes.checkpoint.manager import Checkpoints, choose_checkpoint
from recipes.checkpoint.manifest import newest_first, read_manifest
from recipes.export import consolidated_weights, export
from recipes.planning.plan import Plan
from tests.corpora import byte_corpus
from tests.errors import names, refused
from tests.families import tiny_model
from tests.pool import WorkerPool, parallel_groups

LENGTH, VOCAB_SIZE, SAVED, NUM_STEPS = 37, 2048, 2, 3
CORPUS = byte_corpus(["ring attention " * 40, "DeepSpeed " * 50], LENGTH)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# of logits between the ring and eager attention in one process
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}


class Trained(NamedTuple):
    """What a rank says at the end."""

    losses: list[float]
    loaded: dict[str, Tensor]  # all weights before the first step
    weights: dict[str, Tensor]  # all weights at the end
    logits: Tensor  # of the validation sequence


def configuration(folder: Path, tokenizer: Path, zero_stage: int, dtype: str, lora_rank: int) -> Config:
    return Config(
        model=ModelConfig(path=str(folder)),
        lora=LoraConfig(rank=lora_rank),
        attention=AttentionConfig(method="ring"),
        engine=EngineConfig(dtype=dtype, zero_stage=zero_stage, gradient_accumulation_steps=2),
        data=DataConfig(sequence_length=LENGTH, tokenizer=str(tokenizer)),
        checkpoint=CheckpointConfig(keep=3),
        num_steps=NUM_STEPS,
    )


def save_family(folder: Path, family: str, dtype: str, **changes: Any) -> Path:
    tiny_model(family, "eager", DTYPES[dtype], vocab_size=VOCAB_SIZE, **changes).save_pretrained(folder)
    return folder


def train(config: Config, run_dir: Path, num_ranks: int) -> Trained:
    """On a rank: train from the newest checkpoint, if there is one, with checkpoints after SAVED and at the end."""
    from recipes.engine.build import build_engine, build_feed
    from recipes.model.pretrained import resolve

    plan = Plan(resolve(config), num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)
    plan.resolve_config()
    resumed = choose_checkpoint(plan.config, run_dir, lambda _: None)
    engine: Any = build_engine(plan, parallel_groups(1, num_ranks))
    checkpoints = Checkpoints(plan.config, run_dir, engine)
    if resumed:
        checkpoints.load(resumed)
    loaded, losses = all_weights(engine), []
    feed = build_feed(plan, engine, CORPUS)
    steps = feed.steps(last_read=resumed.last_read if resumed else None)
    for step in range(resumed.step + 1 if resumed else 1, NUM_STEPS + 1):
        batch = next(steps)
        losses.append(engine.train_step(batch.micro_batches).loss.item())
        if step >= SAVED:
            checkpoints.save(step, batch.last, 0.0, "")
    (batch,) = feed.validation()["texts"]
    trained = Trained(losses, loaded, all_weights(engine), logits_of(engine, batch))
    engine.close()
    return trained


def all_weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    parameters = list(engine.model.parameters()) if engine.config.engine.zero_stage == 3 else []
    with deepspeed.zero.GatheredParameters(parameters):
        return {name.removeprefix("model."): x.detach().clone() for name, x in engine.model.state_dict().items()}


@torch.no_grad()
def logits_of(engine: Any, batch: Any) -> Tensor:
    engine.deepspeed.eval()
    own = engine.deepspeed(batch.tokens_BS, batch.positions_BS, None, batch.documents)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (engine.sequence_rank, own))
    parts = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
    return engine.attention.layout(LENGTH).unshard(parts, 1)


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "bf16"), (0, "fp32"), (1, "bf16"), (2, "fp32"))),
        (3, "bf16"),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    pool: WorkerPool, tmp_path: Path, tiny_llama: Path, zero_stage: int, dtype: str, lora_rank: int
):
    config = configuration(save_family(tmp_path / "model", "llama", dtype), tiny_llama, zero_stage, dtype, lora_rank)
    uninterrupted, _ = pool.run(train, config, tmp_path, 2, num_ranks=2)
    shutil.rmtree(newest_first(tmp_path)[0])
    resumed, _ = pool.run(train, config, tmp_path, 2, num_ranks=2)
    assert resumed.losses == uninterrupted.losses[SAVED:]
    assert equal(resumed.weights, uninterrupted.weights)
    assert torch.equal(resumed.logits, uninterrupted.logits)
    if lora_rank:
        folder = newest_first(tmp_path)[0]
        assert all(".lora_" in name for name in consolidated_weights(folder, read_manifest(folder)))
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size < (tmp_path / "model" / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        ((2, 3), (1, 1), "fp32"),
        ((2, 1), (2, 3), "bf16"),
        ((1, 2), (2, 3), "fp32"),
        ((2, 3), (2, 2), "bf16"),
        ((2, 0), (1, 0), "bf16"),
    ],
)
def test_another_number_of_ranks_or_zero_stage_resumes(
    pool: WorkerPool, tmp_path: Path, tiny_llama: Path, before, after, dtype: str, lora_rank: int
):
    folder = save_family(tmp_path / "model", "llama", dtype, tie_word_embeddings=True)
    (num_ranks, stage), (other_num_ranks, other_stage) = before, after
    config = configuration(folder, tiny_llama, stage, dtype, lora_rank)
    uninterrupted, *_ = pool.run(train, config, tmp_path, num_ranks, num_ranks=num_ranks)
    shutil.rmtree(newest_first(tmp_path)[0])
    checkpoint = newest_first(tmp_path)[0]
    saved = consolidated_weights(checkpoint, read_manifest(checkpoint), DTYPES[dtype])
    config.engine = replace(config.engine, zero_stage=other_stage)
    resumed, *_ = pool.run(train, config, tmp_path, other_num_ranks, num_ranks=other_num_ranks)
    assert all(torch.equal(resumed.loaded[name.removeprefix("model.")], tensor) for name, tensor in saved.items())
    assert resumed.losses == pytest.approx(uninterrupted.losses[SAVED:], abs={"fp32": 1e-5, "bf16": 5e-3}[dtype])


@pytest.mark.parametrize(
    ("family", "changes", "zero_stage", "dtype"),
    [
        ("llama", {}, 3, "bf16"),
        pytest.param("llama", {"tie_word_embeddings": True}, 0, "bf16", marks=pytest.mark.slow),
        ("llama", {"tie_word_embeddings": True}, 3, "fp32"),
        pytest.param("llama", {}, 2, "fp32", marks=pytest.mark.slow),
        pytest.param(
            "mixtral", {"num_experts_per_tok": 4}, 1, "bf16", marks=pytest.mark.slow
        ),  # rounding changes no route
        ("mixtral", {}, 3, "fp32"),
    ],
)
def test_the_exported_folder_is_the_trained_model(
    pool: WorkerPool,
    tmp_path: Path,
    tiny_llama: Path,
    family: str,
    changes: dict[str, Any],
    zero_stage: int,
    dtype: str,
):
    from transformers import AutoModelForCausalLM

    folder, output = save_family(tmp_path / "model", family, dtype, **changes), tmp_path / "exported"
    config = configuration(folder, tiny_llama, zero_stage, dtype, 0)
    trained, _ = pool.run(train, config, tmp_path, 2, num_ranks=2)
    export(tmp_path, output)
    model = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
    assert model.dtype == DTYPES[dtype]
    assert equal(model.state_dict(), trained.weights)
    assert relative_error(eager_logits(model), trained.logits) < TOLERANCE[dtype]

    config.model = ModelConfig(path=str(output))
    again, _ = pool.run(train, config, tmp_path / "again", 2, num_ranks=2)
    assert equal(again.loaded, trained.weights)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "bf16"), (1, "fp32"), (3, "bf16"), (3, "fp32")])
def test_lora_is_exported_as_an_adapter_or_merged(
    pool: WorkerPool, tmp_path: Path, tiny_llama: Path, zero_stage: int, dtype: str
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_family(tmp_path / "model", "llama", dtype)
    config = configuration(folder, tiny_llama, zero_stage, dtype, 4)
    trained, _ = pool.run(train, config, tmp_path, 2, num_ranks=2)
    for name, merge in (("adapter", False), ("merged", True)):
        export(tmp_path, tmp_path / name, merge)

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    assert equal(adapted.state_dict(), trained.weights)
    assert relative_error(eager_logits(adapted), trained.logits) < TOLERANCE[dtype]

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.dtype == DTYPES[dtype]
    assert relative_error(eager_logits(merged), trained.logits) < TOLERANCE[dtype]
    masters = consolidated_weights(newest_first(tmp_path)[0], read_manifest(newest_first(tmp_path)[0]))
    layer = "model.layers.1.mlp.up_proj"
    down, up = (masters[f"model.base_model.model.{layer}.lora_{part}.default.weight"] for part in "AB")
    before = trained.weights[f"base_model.model.{layer}.base_layer.weight"]
    expected = (before.float() + config.lora.alpha / 4 * (up @ down)).to(DTYPES[dtype])
    assert not torch.equal(expected, before)
    torch.testing.assert_close(merged.state_dict()[f"{layer}.weight"], expected, rtol=1e-6, atol=1e-7)


def test_a_changed_base_of_lora_is_refused(pool: WorkerPool, tmp_path: Path, tiny_llama: Path):
    base = save_family(tmp_path / "model", "llama", "fp32")
    weights = base / "model.safetensors"
    config = configuration(base, tiny_llama, 1, "fp32", 4)
    pool.run(train, config, tmp_path, 2, num_ranks=2)
    newest = newest_first(tmp_path)[0]
    shutil.rmtree(newest)
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for function in (train, read_for_inference):
        for text in pool.run(refusal, function, config, tmp_path, 2, num_ranks=2):
            names(text, f"model.path={base}", weights.name)
    with refused(ConfigError, f"model.path={base}", weights.name, "--merge"):
        export(tmp_path, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    export(tmp_path, tmp_path / "adapter")
    weights.write_bytes(before)  # with another time stamp
    pool.run(train, config, tmp_path, 2, num_ranks=2)
    assert newest.exists()
    export(tmp_path, tmp_path / "merged", merge=True)


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """On a rank: the error of a user."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


def read_for_inference(config: Config, run_dir: Path, num_ranks: int) -> None:
    """On a rank: load the newest checkpoint's weights into a model, as recipe=generate does."""
    from recipes.engine.build import build_engine
    from recipes.inference.source import load_weights
    from recipes.model.pretrained import resolve

    plan = Plan(resolve(config), num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)
    plan.resolve_config()
    engine = build_engine(plan, parallel_groups(1, num_ranks))
    load_weights(engine.model, str(newest_first(run_dir)[0]))


@torch.no_grad()
def eager_logits(model: Any) -> Tensor:
    (pack,) = CORPUS.validation()["texts"]
    assert len(pack.boundaries) == 2  # one document
    tokens, _ = pack.read(0, LENGTH)
    return model(input_ids=torch.from_numpy(tokens)[None]).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
