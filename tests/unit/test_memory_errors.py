"""The message, overrides and memory snapshot of a rank that runs out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import (
    AttentionConfig,
    CompareConfig,
    DataConfig,
    EngineConfig,
    ParallelismConfig,
)
from recipes.launch.memory_errors import helpful_overrides, out_of_memory_cause, out_of_memory_explained
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import Heartbeat
from tests.errors import names
from tests.unit.test_memory import plan, tensor_pipeline

ALLOCATOR = "PYTORCH_ALLOC_CONF=expandable_segments:True"
RECOMPUTE = "engine.recompute=selective"
HOST = "engine.offload_optimizer=true"
HALF = "data.sequence_length=1024"
RING_8 = "parallelism.data_degree=1 parallelism.ring_degree=8"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [RECOMPUTE, "engine.zero_stage=3", ALLOCATOR]),
        ({"engine": EngineConfig(zero_stage=3)}, [RECOMPUTE, ALLOCATOR, HOST]),
        ({"engine": EngineConfig(zero_stage=3, offload_optimizer=True)}, [RECOMPUTE, ALLOCATOR, HALF]),
        (
            {"engine": EngineConfig(zero_stage=3, recompute="selective")},
            ["engine.offload_activations=true", ALLOCATOR, HOST],
        ),
        (
            {"engine": EngineConfig(zero_stage=0, recompute="full", offload_activations=True), "num_ranks": 1},
            [ALLOCATOR, f"engine.zero_stage=1 {HOST}", HALF],
        ),
        (  # a CPU rank's memory is the host's
            {"engine": EngineConfig(zero_stage=3, recompute="full"), "device_type": "cpu"},
            [HALF, "model.num_layers=16", "model.mlp_size=7168"],
        ),
        (
            {"engine": EngineConfig(micro_batch_size=4), "attention": AttentionConfig(kernel="reference")},
            ["attention.kernel=auto", "engine.micro_batch_size=1 engine.train_batch_size=4", RECOMPUTE],
        ),
        (
            {"engine": EngineConfig(micro_batch_size=4, gradient_accumulation_steps=2)},
            [
                "engine.micro_batch_size=1 engine.train_batch_size=8 engine.gradient_accumulation_steps=1",
                RECOMPUTE,
                "engine.zero_stage=3",
            ],
        ),
        (
            {"parallelism": ParallelismConfig(data_degree=2)},
            [f"{RING_8} engine.train_batch_size=2", RECOMPUTE, "engine.zero_stage=3"],
        ),
        (
            {"attention": AttentionConfig("local")},
            [
                "parallelism.data_degree=1 attention=ring engine.train_batch_size=8",
                RECOMPUTE,
                "engine.zero_stage=3",
            ],
        ),
        ({"attention": AttentionConfig("all_gather")}, ["attention=ring", RECOMPUTE, "engine.zero_stage=3"]),
        (
            {
                "attention": AttentionConfig("hybrid"),
                "parallelism": ParallelismConfig(data_degree=2, ulysses_degree=2),
            },
            [
                "parallelism.data_degree=1 parallelism.ring_degree=4 parallelism.ulysses_degree=2 "
                "engine.train_batch_size=2",
                RECOMPUTE,
                "engine.zero_stage=3",
            ],
        ),
        (tensor_pipeline(), [ALLOCATOR, HALF, "model.num_layers=16"]),
        (
            {"num_ranks": 1, "device_type": "cpu", "recipe": "forward"},
            [HALF, "model.num_layers=16", "model.mlp_size=7168"],
        ),
    ],
)
def test_the_three_best_overrides_that_apply(fields, expected):
    assert [override.partition("  (")[0] for override in helpful_overrides(plan(**fields))] == expected


def test_overrides_that_are_set_are_not_suggested(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert not any("PYTORCH_ALLOC_CONF" in override for override in helpful_overrides(plan()))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert any(
        "PYTORCH_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True " in override
        for override in helpful_overrides(plan())
    )


def test_a_comparison_has_its_own_field_for_micro_batches():
    of = plan(engine=EngineConfig(micro_batch_size=4), compare=CompareConfig(entries={"ring": []}))
    assert helpful_overrides(of)[0].startswith("engine.micro_batch_size=1 ")
    overrides = helpful_overrides(of, compares=True)
    names(overrides[0], "compare.micro_batch_sizes=[1]", 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"engine": EngineConfig(micro_batch_size=4, train_batch_size=64)},
        {"parallelism": ParallelismConfig(data_degree=4), "engine": EngineConfig(gradient_accumulation_steps=3)},
    ],
)
def test_overrides_keep_the_batch_of_a_resolved_plan(fields):
    """A resolved configuration has the accumulation steps in place of the batch; only one of them may be typed."""
    resolved = plan(**fields)
    tokens = resolved.tokens_per_step
    resolved.resolve_config()
    typed = helpful_overrides(resolved)[0].partition("  (")[0].split()
    values = {name.partition(".")[2]: int(value) for name, _, value in (word.partition("=") for word in typed)}
    engine = {name: value for name, value in values.items() if name in EngineConfig.__dataclass_fields__}
    grid: dict[str, Any] = {name: value for name, value in values.items() if name not in engine}
    given = {name: value for name, value in vars(fields["engine"]).items() if name != "train_batch_size"}
    again = plan(engine=EngineConfig(**{**given, **engine}), parallelism=ParallelismConfig(**grid))
    assert again.tokens_per_step == tokens


def test_out_of_memory_errors_are_found_in_the_chain_of_causes():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert out_of_memory_cause(caught.value) is caught.value
    known = torch.OutOfMemoryError("CUDA out of memory.")
    behind = ValueError("during cleanup")
    behind.__context__ = known
    assert out_of_memory_cause(behind) is known
    assert out_of_memory_cause(RuntimeError("shapes do not match")) is None


def test_the_message_has_rank_error_plan_and_overrides(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    of = plan(data=DataConfig(sequence_length=4096))
    with pytest.raises(RunFailed) as caught, out_of_memory_explained(of, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore of it")
    where, error, *lines, recompute, zero, allocator = str(caught.value).splitlines()
    names(where, "rank 3", "out of memory")
    assert error == "CUDA out of memory. Tried to allocate 20.00 GiB."  # PyTorch's, without the rest
    assert "more of it" not in lines
    text = "\n".join(lines)
    names(text, "1 data x 8 ring", "4,096", "8,030.26 M", tmp_path)  # the plan
    names(text, "29.92 GiB", "peak", "the reduction of the head's gradient")  # the states and the peak of a step
    names(recompute, RECOMPUTE)
    names(zero, "engine.zero_stage=3", "8 ranks")
    names(allocator, ALLOCATOR)
    with pytest.raises(ValueError, match="other"), out_of_memory_explained(of, tmp_path):
        raise ValueError("other")


def message_lines(run_dir: Path) -> list[str]:
    with pytest.raises(RunFailed) as caught, out_of_memory_explained(plan(), run_dir):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return str(caught.value).splitlines()


def test_the_message_says_where_the_rank_was(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    (tmp_path / "logs").mkdir()
    heartbeat = Heartbeat(tmp_path, 3)
    for kind, text in (("step", "7"), ("part", "backward"), ("ring_step", "backward ring step 1")):
        heartbeat.update(kind, text)
    names(message_lines(tmp_path)[0], "rank 3", "out of memory", "step 7, backward, backward ring step 1")


def test_a_gpus_memory_snapshot_is_written_and_a_full_disk_hides_nothing_else(tmp_path, monkeypatch):
    def disk_is_full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"held"))
    path = tmp_path / "logs" / "memory_rank_3.pickle"
    path.parent.mkdir()
    names(message_lines(tmp_path)[2], path, "https://docs.pytorch.org/memory_viz")
    assert path.read_bytes() == b"held"
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", disk_is_full)
    lines = message_lines(tmp_path)
    names(lines[2], "memory snapshot", "No space left on device")
    names("\n".join(lines), RECOMPUTE)
