"""Training states per rank, models that are refused, activation tiles, and what the banner says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.schema import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    Degrees,
    EngineConfig,
    LaunchConfig,
    ModelConfig,
    ParallelismConfig,
)
from recipes.planning.explain import banner, explanation
from recipes.planning.memory import (
    StateBytes,
    changed,
    loss_tiles,
    mlp_tile_tokens,
    num_parameters,
    state_bytes,
    tile_tokens,
)
from recipes.planning.plan import Plan
from tests.errors import names

GIB = 2**30
LARGE = ModelConfig("large", 32, 4096, 32, 8, 128, 14336, vocab_size=128256)
NUM_LARGE = 8_030_261_248
RECOMPUTE, OFFLOAD = "engine.recompute", "engine.offload_activations"


def tensor_pipeline(**degrees: Any) -> dict[str, Any]:
    return {
        "attention": AttentionConfig("local"),
        "parallelism": ParallelismConfig("tensor_pipeline", **degrees),
        "data": DataConfig(document_mask=False),
    }


def plan(memory_bytes: int | None = None, num_ranks: int = 8, device_type: str = "cuda", **fields: Any) -> Plan:
    name, capability = ("NVIDIA H100 80GB HBM3", (9, 0)) if device_type == "cuda" else ("CPU", None)
    config = Config(**{"model": LARGE, **fields})
    return Plan(config, num_ranks, device_type, name, capability, num_ranks, memory_bytes)


def rows(name: str, of: Plan) -> list[str]:
    """The banner's rows of this name."""
    found = (line.strip().partition("  ") for line in banner(of, Path("runs")))
    return [value for key, _, value in found if key == name]


def refusal(*arguments: Any, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(*arguments, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "stage", "per_parameter"),
    [
        ("bf16", 0, (2, 2, 12)),
        ("fp32", 0, (4, 4, 8)),
        ("fp32", 1, (4, 4, 8 / 8)),
        ("bf16", 1, (2, 4 / 8, 12 / 8)),  # in half precision stage 1 shards gradients too
        ("bf16", 2, (2, 4 / 8, 12 / 8)),
        ("bf16", 3, (2 / 8, 4 / 8, 12 / 8)),
        ("fp32", 3, (4 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_each_zero_stage_shards_one_more_of_the_states(dtype, stage, per_parameter):
    config = Config(model=LARGE, engine=EngineConfig(dtype=dtype, zero_stage=stage))
    expected = StateBytes(*(size * NUM_LARGE for size in per_parameter), built=4 * NUM_LARGE)
    assert state_bytes(config, Degrees(data=2, ring=4, ulysses=1)) == expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("engine", "gradient"),
    [
        ({}, 2),
        ({"train_batch_size": 1}, 2),
        ({"gradient_accumulation_steps": 2}, 4),
        ({"train_batch_size": 2}, 4),
        ({"offload_optimizer": True}, 0),
        ({"offload_optimizer": True, "gradient_accumulation_steps": 2}, 4),
    ],
)
def test_one_rank_has_fp32_sums_of_gradients_only_where_it_accumulates(stage, engine, gradient):
    config = Config(model=LARGE, engine=EngineConfig(zero_stage=stage, **engine))
    assert state_bytes(config, Degrees(1, 1, 1)).gradients == gradient * NUM_LARGE


@pytest.mark.parametrize(
    ("engine", "per_parameter"),
    [
        ({"zero_stage": 1, "offload_optimizer": True}, (2, 4 / 8, 0)),  # gradient sums stay on the device
        ({"zero_stage": 2, "offload_optimizer": True}, (2, 4 / 8, 0)),
        ({"zero_stage": 1, "offload_optimizer": True, "dtype": "fp32"}, (4, 0, 0)),
        ({"zero_stage": 3, "offload_optimizer": True}, (2 / 8, 0, 0)),
        ({"zero_stage": 3, "offload_parameters": True}, (0, 4 / 8, 12 / 8)),
    ],
)
def test_offloaded_states_free_a_gpus_memory_but_not_a_cpus(engine, per_parameter):
    config = Config(model=LARGE, engine=EngineConfig(**engine))
    degrees = Degrees(data=2, ring=4, ulysses=1)
    assert state_bytes(config, degrees)[:3] == tuple(size * NUM_LARGE for size in per_parameter)
    on_cpu = Plan(config, 8, "cpu", "CPU", None, ranks_per_host=8)
    on_device = {name: value for name, value in engine.items() if not name.startswith("offload")}
    stage_alone = Config(model=LARGE, engine=EngineConfig(**on_device))
    assert on_cpu.state == state_bytes(stage_alone, on_cpu.degrees)


@pytest.mark.parametrize(("stage", "weights"), [(0, 2), (1, 2), (2, 2), (3, 2 / 8)])
def test_a_forward_pass_needs_weights_alone(stage, weights):
    config = Config(model=LARGE, recipe="forward", engine=EngineConfig(zero_stage=stage))
    state = state_bytes(config, Degrees(1, 8, 1))
    assert state[:3] == (weights * NUM_LARGE, 0, 0)
    assert state.needed == state.built == 4 * NUM_LARGE


def test_tensor_and_pipeline_ranks_divide_layers_and_data_ranks_optimizer_states():
    embedding = LARGE.vocab_size * LARGE.hidden_size
    layers = NUM_LARGE - 2 * embedding - LARGE.hidden_size
    on_a_rank = layers / 4 + embedding + LARGE.hidden_size
    config = Config(model=LARGE, **tensor_pipeline())
    state = state_bytes(config, Degrees(2, 1, 1, tensor=2, pipeline=2))
    assert state[:3] == pytest.approx((2 * on_a_rank, 4 * on_a_rank, 6 * on_a_rank))
    forward = state_bytes(Config(model=LARGE, recipe="forward", **tensor_pipeline()), Degrees(2, 1, 1, 2, 2))
    assert forward[:3] == pytest.approx((2 * on_a_rank, 0, 0))
    alone = state_bytes(config, Degrees(8, 1, 1))  # embedding and head on the only stage
    assert alone.weights == 2 * NUM_LARGE


def test_a_tensor_ranks_parameters_are_counted_except_undivided_norms():
    from recipes.engine.tensor_parallel import TensorGroup, shard_layer_
    from recipes.model.transformer import make_layer
    from ring_attention import LocalAttention

    model = ModelConfig()
    layer = shard_layer_(make_layer(model, LocalAttention("auto"), 0, 0), TensorGroup(2, 0))
    embeddings = 2 * model.vocab_size * model.hidden_size
    counted = num_parameters(model) - embeddings - model.hidden_size
    norms = 2 * model.hidden_size
    assert sum(p.numel() for p in layer.parameters()) == counted / model.num_layers / 2 + norms / 2


def test_a_model_is_accepted_if_it_fits_or_the_memory_is_unknown():
    plan()
    plan(80 * GIB)
    names("\n".join(explanation(plan(80 * GIB), Path("runs"))), "29.92 GiB", "80.00 GiB")


def test_a_refusal_shows_the_arithmetic_and_suggests_zero_3():
    """2 bytes of weights, 4 / 2 of gradients and 12 / 2 of optimizer states per parameter."""
    problem, arithmetic, *remedies = refusal(70 * GIB, num_ranks=2).splitlines()
    names(problem, "large", "8,030.26 M", "engine.zero_stage=1", "2 ranks")
    names(arithmetic, "14.96", "14.96", "44.87", "74.79 GiB", "70.00 GiB")
    zero, smaller, insisting = remedies
    names(zero, "engine.zero_stage=3", "67.31 GiB")
    names(smaller, "model.num_layers=29", "68.69 GiB")
    names(insisting, "launch.check_memory=false")


@pytest.mark.parametrize("fields", [{}, {"model": ModelConfig(), "data": DataConfig(sequence_length=2**28)}])
def test_explain_shows_the_refusal_instead_of_raising_it(fields):
    refused = plan(28 * GIB, explain=True, **fields)
    text = "\n".join(explanation(refused, Path("runs")))
    assert text.endswith(f"a run is refused: {refusal(28 * GIB, **fields)}")
    assert "memory of a step, per rank: peak" in text
    assert not rows("!!!", refused)


def needed_and_typed(message: str) -> tuple[float, list[dict[str, Any]]]:
    """The GiB of a step, and the fields of each remedy."""
    assert "\n" not in message
    found = re.match(r"a step needs ([\d,.]+) GiB per rank by prediction, and there are 80\.00: use (.*)", message)
    assert found is not None, message
    *remedies, insisting = found[2].split(", or ")
    assert insisting.startswith("launch.check_memory=false")
    pairs = ([word.split("=") for word in remedy.split() if "=" in word] for remedy in remedies)
    values = ({name: yaml.safe_load(value) for name, value in remedy} for remedy in pairs)
    return float(found[1].replace(",", "")), list(values)


@pytest.mark.parametrize(
    ("num_ranks", "device_type", "length", "fields", "expected"),
    [
        (8, "cuda", 200_000, {}, [RECOMPUTE]),
        (8, "cuda", 3_300_000, {}, [RECOMPUTE, OFFLOAD, "engine.zero_stage"]),
        (8, "cuda", 8_000_000, {"zero_stage": 3}, [RECOMPUTE, OFFLOAD, "data.sequence_length"]),
        (8, "cuda", 250_000, {"zero_stage": 3, "micro_batch_size": 4}, [RECOMPUTE, "engine.micro_batch_size"]),
        (8, "cpu", 700_000, {}, [RECOMPUTE, "engine.zero_stage"]),
    ],
)
def test_a_step_that_should_not_fit_is_refused_with_settings_that_fit(num_ranks, device_type, length, fields, expected):
    settings: dict[str, Any] = {"engine": EngineConfig(**fields), "data": DataConfig(sequence_length=length)}
    needed, remedies = needed_and_typed(refusal(80 * GIB, num_ranks, device_type, **settings))
    explained = plan(80 * GIB, num_ranks, device_type, explain=True, **settings)
    assert needed == pytest.approx(explained.step_memory.peak.total / GIB, abs=0.01)
    assert [*remedies[0]] == expected
    for remedy in remedies:
        plan(80 * GIB, num_ranks, device_type, **vars(changed(Config(model=LARGE, **settings), **remedy)))
    # the longest that fits, or nearly: an eighth more is refused
    lengths = [remedy for remedy in remedies if "data.sequence_length" in remedy]
    longer = {**lengths[-1], "data.sequence_length": lengths[-1]["data.sequence_length"] * 9 // 8}
    refusal(80 * GIB, num_ranks, device_type, **vars(changed(Config(model=LARGE, **settings), **longer)))


@pytest.mark.parametrize(
    ("num_layers", "memory_gib", "advice"),
    [(8, 11, r"use engine\.recompute=\w+ .*model\.num_layers=\d \("), (1, 6, "use a smaller model or more GPUs")],
)
def test_a_step_that_fits_at_no_length_is_refused_with_a_smaller_model(num_layers, memory_gib, advice):
    model = ModelConfig(**{**vars(LARGE), "num_layers": num_layers})
    message = refusal(memory_gib * GIB, model=model, engine=EngineConfig(zero_stage=3))
    assert re.search(f"by prediction, .*{advice}", message), message
    assert "sequence_length" not in message


def test_a_batch_without_accumulation_is_predicted_too():
    engine = EngineConfig(micro_batch_size=4, train_batch_size=4)
    message = refusal(80 * GIB, engine=engine, data=DataConfig(sequence_length=250_000))
    assert "engine.recompute=selective" in message
    assert "engine.micro_batch_size" not in message  # it would need accumulation, which is not predicted
    engine = EngineConfig(micro_batch_size=4, train_batch_size=8)
    assert plan(80 * GIB, engine=engine, data=DataConfig(sequence_length=250_000)).step_memory.unsupported


@pytest.mark.parametrize(("memory_gib", "length"), [(28, 2048), (80, 1_000_000)])  # the model, and a step
def test_a_user_may_insist_and_is_warned(memory_gib, length):
    insists = {"data": DataConfig(sequence_length=length), "launch": LaunchConfig(check_memory=False)}
    insisted = plan(memory_gib * GIB, **insists)
    [warning] = rows("!!!", insisted)
    needed = max(insisted.state.needed, insisted.step_memory.peak.total) / GIB
    assert f"{needed:.2f} GiB" in warning
    assert f"{memory_gib}.00" in warning
    assert "a run is refused" not in "\n".join(
        explanation(plan(memory_gib * GIB, explain=True, **insists), Path("runs"))
    )
    assert not rows("!!!", plan(80 * GIB, data=DataConfig(sequence_length=1024)))


def test_a_refusal_suggests_more_ranks_and_optimizer_offload():
    more_ranks, offload, *_ = refusal(80 * GIB, num_ranks=1).splitlines()[2:]
    names(more_ranks, "2 ranks", "74.79 GiB")
    names(offload, "engine.offload_optimizer=true", "29.92")
    [more_ranks] = [line for line in refusal(70 * GIB, num_ranks=1).splitlines() if "2 ranks" in line]
    names(more_ranks, "engine.zero_stage=3", "67.31 GiB")
    accumulating = EngineConfig(gradient_accumulation_steps=2)  # whose sums stay on the device, but for stage 3
    text = refusal(32 * GIB, num_ranks=1, engine=accumulating)
    [offload] = [line for line in text.splitlines() if "offload" in line]
    names(offload, "engine.zero_stage=3 engine.offload_optimizer=true", "29.92")
    text = refusal(48 * GIB, num_ranks=2, device_type="cpu")
    names(text.splitlines()[2], "4 ranks", "2 hosts", "44.87")
    assert "offload" not in text  # a CPU rank's memory is the host's


def test_building_the_model_in_fp32_must_fit_too():
    names(refusal(20 * GIB, recipe="forward").splitlines()[1], "14.96 GiB", "fp32", "29.92 GiB", "20.00 GiB")


@pytest.mark.parametrize("fields", [{}, {"recipe": "forward"}, tensor_pipeline(data_degree=4)])
@pytest.mark.parametrize("memory_gib", [2, 6, 12, 24])
def test_every_remedy_of_a_refusal_fits(fields, memory_gib):
    text = refusal(memory_gib * GIB, **fields)
    for line in text.splitlines()[2:-1]:
        changes = dict(word.rstrip(":,").split("=") for word in line.split() if "=" in word)
        num_ranks = int(line.split()[1]) if "ranks with" in line else 8
        values = {name: yaml.safe_load(value) for name, value in changes.items()}
        unchecked = Config(**{"model": LARGE, **fields})
        state = Plan(changed(unchecked, **values), num_ranks, "cuda", "NVIDIA H100 80GB HBM3", (9, 0), 8).state
        if changes or num_ranks > 8:
            assert state.needed <= memory_gib * GIB


@pytest.mark.parametrize(
    ("vocab_size", "given", "local_tokens", "expected"),
    [
        (257, None, 2**19, 0),  # all at once
        (257, None, 2**21, 1044480),  # below 2^30 bytes / 4 / 257 = 1044495.5
        (128256, None, 2048, 0),
        (128256, None, 2049, 1280),  # at most half of them
        (2**21, None, 1000, 128),  # less than a multiple of 256
        (2**29, None, 1000, 1),  # one token's logits exceed the limit
        (257, 64, 65, 64),
        (257, 64, 64, 0),
        (128256, 0, 2**20, 0),
    ],
)
def test_logits_of_a_tile_fit_a_gib_or_follow_tile_tokens(vocab_size, given, local_tokens, expected):
    config = Config(model=ModelConfig(vocab_size=vocab_size), engine=EngineConfig(tile_tokens=given))
    assert tile_tokens(config, local_tokens) == expected


@pytest.mark.parametrize(
    ("recipe", "mlp", "engine", "local_tokens", "expected"),
    [
        ("pretrain", "swiglu", {"recompute": "selective"}, 12289, 6400),  # at most half of them
        ("pretrain", "swiglu", {"recompute": "selective"}, 30000, 12288),  # below 2^31 bytes / 2 / 6 / 14336 = 12483
        ("pretrain", "swiglu", {"recompute": "selective"}, 12288, 0),
        ("pretrain", "gelu", {"recompute": "full", "dtype": "fp32"}, 2**20, 9216),  # 2^31 / 4 / 4 / 14336 = 9362
        ("pretrain", "swiglu", {}, 2**20, 0),  # without recomputation tiles would add work
        ("forward", "swiglu", {}, 2**20, 12288),
        ("pretrain", "swiglu", {"tile_tokens": 64}, 65, 64),
        ("pretrain", "swiglu", {"tile_tokens": 0, "recompute": "full"}, 2**20, 0),
    ],
)
def test_mlps_use_tiles_where_that_adds_no_work_or_tile_tokens_is_set(recipe, mlp, engine, local_tokens, expected):
    config = Config(recipe=recipe, model=ModelConfig(mlp_size=14336, mlp=mlp), engine=EngineConfig(**engine))
    assert mlp_tile_tokens(config, local_tokens) == expected


def test_a_pipeline_has_no_tiles():
    config = Config(model=LARGE, recipe="forward", **tensor_pipeline())
    assert tile_tokens(config, 2**20) == mlp_tile_tokens(config, 2**20) == 0


def test_the_banner_shows_the_loss_tile_if_there_is_one():
    assert not rows("loss", plan())
    long = DataConfig(sequence_length=2**17)
    engine = EngineConfig(micro_batch_size=2)
    [row] = rows("loss", plan(data=long, engine=engine))
    names(row, "2,048", "32,768")
    assert not rows("loss", plan(data=long, recipe="bench_attention"))


def test_the_banner_shows_the_mlp_tile_and_the_reason():
    long = DataConfig(sequence_length=2**21)
    for engine, tile, reason in (  # all at once: 6 x 14,336 numbers of 2 bytes a token
        (
            EngineConfig(recompute="selective"),
            "12,288",
            "42.00 GiB",
        ),
        (EngineConfig(tile_tokens=512), "512", "engine.tile_tokens=512"),
    ):
        (row,) = rows("MLP", plan(data=long, engine=engine))
        names(row, tile, "262,144", reason)


@pytest.mark.parametrize(
    ("recompute", "per_token"),
    [
        ("selective", 2 * 128 + 2 * 128 + 4 * 4),  # layer inputs, attention outputs and log-sum-exps
        ("full", 2 * 128),  # layer inputs
    ],
)
def test_the_banner_shows_offloaded_activations(recompute: str, per_token: int):
    engine = EngineConfig(recompute=recompute, offload_activations=True)
    model = ModelConfig(num_layers=4, hidden_size=128, num_heads=4, head_dim=32)
    offloading = plan(model=model, engine=engine, data=DataConfig(sequence_length=2**23))
    [row] = rows("offload", offloading)
    names(row, f"{2 * per_token * 2**20 / 2**30:.3g} GiB", "host")  # of two of the four layers, 2**20 tokens a rank
    assert ("attention" in row) == (recompute == "selective")


def test_the_activations_of_two_layers_stay_on_the_device():
    engine = EngineConfig(recompute="full", offload_activations=True)
    [row] = rows("offload", plan(model=ModelConfig(num_layers=2), engine=engine))
    names(row, "0 GiB", "host")


def test_the_banner_shows_offloaded_states():
    engine = EngineConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    weights, optimizer = rows("offload", plan(engine=engine))
    names(weights, "weights", "host")
    names(optimizer, "optimizer", "host")


def test_the_last_tile_of_a_loss_is_half_as_long():
    assert loss_tiles(12, 4) == [(0, 4), (4, 8), (8, 10), (10, 12)]
    assert loss_tiles(11, 4) == [(0, 4), (4, 8), (8, 10), (10, 11)]
    assert loss_tiles(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert loss_tiles(3, 1) == [(0, 1), (1, 2), (2, 3)]


def test_training_on_the_validation_documents_is_warned_of_in_the_plan(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    file = str(tmp_path / "a.txt")
    data = DataConfig(source="text_files", files=file, validation_files=file, sequence_length=1024)
    [warning] = rows("!!!", plan(80 * GIB, data=data))
    names(warning, file, "data.files")
    assert not rows("!!!", plan(80 * GIB, data=data, recipe="forward"))  # it validates nothing
