"""The predicted memory of a step against peaks measured on GPUs. tests/distributed has the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, Degrees, EngineConfig, ModelConfig
from recipes.planning import engine_memory
from recipes.planning.engine_memory import adam_sub_groups
from recipes.planning.memory import num_parameters
from recipes.planning.memory_timeline import StepMemory
from recipes.planning.plan import Plan
from tests.errors import is_named
from tests.tools.long_step import composed, had_other_gradients, predicted_again

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MEASURED_IN = [
    "memory_H200.json",
    "million_H200.json",
    "half_million_H100.json",
    "long_steps_2xH200.json",
    "whole_8b_2xH200.json",
    "flat_4xH100.json",
    "tools_H100.json",
]
# a row of one rank with sums of all gradients whose peak lies in the last layer's backward pass, not at the end of the
# step, nor in the loss, where the gradient of a tile's logits was beside them
PEAK_BEFORE_REDUCTION = (
    "model=llama_1b model.num_layers=4 data.sequence_length=131072 launch.num_ranks=1 engine.recompute=selective"
)
MEASURED = [
    row
    for name in MEASURED_IN
    for row in json.loads((RESULTS / name).read_text())
    if "error" not in row and "offload_parameters" not in row["setting"]  # not predicted
]


def rows(which: Callable[[dict[str, Any]], bool]) -> list[Any]:
    return [pytest.param(row, id=f"{row['device']}: {row['setting']}") for row in MEASURED if which(row)]


@pytest.mark.parametrize("row", rows(lambda row: not had_other_gradients(row)))
def test_the_measured_peak_is_predicted(row):  # the goal is 10 %
    assert predicted_again(row)["predicted_gib"] == pytest.approx(row["peak_gib"], rel=0.01)


@pytest.mark.parametrize("row", rows(lambda row: row["setting"].strip() == PEAK_BEFORE_REDUCTION))
def test_a_peak_measured_with_fp32_sums_of_all_gradients_is_predicted_without_them(row):
    """One rank's gradients were and are untouched until all are there; the sums, 4 bytes a parameter, are gone."""
    sums_gib = 4 * num_parameters(composed(row["setting"]).model) / 2**30
    assert predicted_again(row)["predicted_gib"] == pytest.approx(row["peak_gib"] - sums_gib, rel=0.01)


@pytest.mark.parametrize(
    ("engine", "on_gpu", "reason"),
    [
        ({"offload_optimizer": True}, True, None),
        ({"offload_optimizer": True}, False, "engine.offload_optimizer=true"),
        ({"offload_optimizer": True, "dtype": "fp32"}, True, "engine.offload_optimizer=true"),
        ({"offload_optimizer": True, "zero_stage": 3}, True, "engine.offload_optimizer=true"),
        ({"offload_parameters": True, "zero_stage": 3}, True, "engine.offload_parameters=true"),
    ],
)
def test_offloaded_states_are_predicted_where_they_were_measured(engine, on_gpu, reason):
    found = StepMemory(Config(engine=EngineConfig(**engine)), Degrees(1, 1, 1), "local", 8, on_gpu, 1).unsupported
    assert found is None if reason is None else found is not None and is_named(found, reason)
    if reason == "engine.offload_optimizer=true":  # where it is predicted
        assert found is not None
        assert is_named(found, "GPUs")
        assert is_named(found, "bf16")


def parts(name: str, setting: str) -> dict[str, float]:
    """Of one point of a step of 8B's shape on two H100s, in GiB."""
    plan = Plan(composed(f"model=llama_8b model.num_layers=4 {setting}"), 2, "cuda", "NVIDIA H100", None, 2)
    (point,) = (point for point in plan.step_memory.timeline if point.name == name)
    return {part: size / 2**30 for part, size in point.parts.items()}


def test_zero_3_keeps_gathered_parameters_only_after_a_first_step():
    """8B's shape with four layers: its head, 0.98 GiB, is larger than a layer, and all matrices are 1.9e9 numbers."""
    setting = "data.sequence_length=65536 engine.recompute=selective engine.zero_stage=3"
    first, later = (parts("the loss, backward", f"{setting} num_steps={steps}") for steps in (1, 2))
    assert first["gathered parameters"] == pytest.approx(2 * 128_256 * 4096 / 2**30)
    assert later["gathered parameters"] == pytest.approx(2 * 1e9 / 2**30)


def test_cublas_workspaces_are_a_part_on_gpus():
    plan = Plan(composed("model=llama_8b model.num_layers=4"), 1, "cuda", "NVIDIA H100", None, 1)
    assert all(point.parts["cuBLAS workspaces"] == 2**26 for point in plan.step_memory.timeline)


GRADIENTS = "gradients and backward temporaries"
LAST_MLP = "the last layer's MLP, backward"


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "sums_gib"),
    [
        ("bf16", 128_256, 2.6036),  # the head fills a bucket: half of the sums of Adam's group of matrices
        ("bf16", 120_000, 0.0),  # less than a bucket: the MLP's gradients fill it only after all tiles
        ("fp32", 128_256, 3.5821),  # half of those of all parameters
    ],
)
def test_gradient_sums_are_allocated_once_a_bucket_was_reduced(dtype, vocab_size, sums_gib):
    setting = (
        f"engine.dtype={dtype} model.vocab_size={vocab_size} data.sequence_length=65536 engine.recompute=selective"
    )
    summed = parts(LAST_MLP, f"{setting} engine.zero_stage=2")[GRADIENTS]
    not_summed = parts(LAST_MLP, f"{setting} engine.zero_stage=0")[GRADIENTS]
    head_gib = (4 if dtype == "fp32" else 2) * (vocab_size + 1) * 4096 / 2**30
    assert summed - (not_summed - head_gib) == pytest.approx(sums_gib, abs=1e-4)


def test_adam_updates_sub_groups_on_zero_3(monkeypatch):
    """A layer's matrices have 48, 16, 64 and 32 numbers, embedding and head 1,200 each, and the norms 12."""
    model = ModelConfig("tiny", 1, 4, 1, 1, 4, 8, vocab_size=300)
    monkeypatch.setattr(engine_memory, "SUB_GROUP", 40)
    assert adam_sub_groups(model, 1) == [48, 16 + 64, 32 + 1200, 1200]
    assert adam_sub_groups(model, 2) == [24 + 8 + 32, 16 + 600, 600]
    for num_steps, expected in ((1, 4 * 1200), (2, 4 * 1232)):  # in the first step the last group has no moments before
        monkeypatch.setattr(engine_memory, "_reductions", lambda *_: [(0, 0)])  # in tiny models buckets are larger
        config = Config(model=model, num_steps=num_steps, engine=EngineConfig(zero_stage=3))
        assert engine_memory.on_gpu(config, 1).step_end == expected
    assert engine_memory.on_cpu(config, 1).step_end == 3 * 4 * 1232  # temporaries of PyTorch's Adam


def test_large_shards_fit_because_adam_updates_sub_groups():
    """8B on two GPUs of 79.2 GiB: at once its step would need 83."""
    setting = "model=llama_8b engine.zero_stage=3 engine.recompute=selective data.sequence_length=8192 num_steps=2"
    memory = Plan(composed(setting), 2, "cuda", "NVIDIA H100", None, 2).step_memory
    assert memory.peak.total < 79.2 * 2**30


def test_symmetric_buffers_stand_at_the_end_of_a_step():
    setting = "model=llama_8b model.num_layers=2 data.sequence_length=1048576 engine.recompute=full"
    memory = Plan(composed(setting), 2, "cuda", "NVIDIA H100", None, 2).step_memory
    buffers = [point.parts["the ring's symmetric buffers"] for point in memory.timeline]
    assert set(buffers) == {2 * (2 + 4) * 1024 * 2**19}  # K and V in bf16, and their gradients in fp32


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_packed_documents_may_take_one_exchange(num_ranks):
    def attention_bytes(setting: str) -> float:
        config = composed(f"model=llama_8b model.num_layers=4 data.sequence_length=65536 {setting}")
        memory = Plan(config, num_ranks, "cuda", "NVIDIA H100", None, num_ranks).step_memory
        (point,) = (point for point in memory.timeline if point.name == "the last layer's attention, backward")
        return point.total

    packed = attention_bytes("attention.layout=balanced")
    assert attention_bytes("attention.layout=balanced data.document_mask=false") < packed
    # dout and dq, in fp32 too; keys of as many shards as are copied and the own one, with gradients in bf16 and fp32
    most_copies = min(3, num_ranks / 2)
    assert packed >= 65536 / num_ranks * (8 * 4096 + (1 + most_copies) * 16 * 1024)
