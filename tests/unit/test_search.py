"""The search of recipe=plan: what is tried, what the user fixed, what fits, and what is printed to be typed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import subprocess
from pathlib import Path
from typing import Any

import hydra
import pytest
from matplotlib.figure import Figure

import train  # noqa: F401  registers the schema
from conf.compose import to_config
from conf.degrees import accumulation_steps, resolve_degrees
from conf.schema import Config, ConfigError, DataConfig, Degrees, ModelConfig
from recipes.planning.cluster import parse_cluster
from recipes.planning.forecast import Forecast
from recipes.planning.memory import changed, num_parameters, state_bytes
from recipes.planning.memory_timeline import StepMemory
from recipes.planning.plan_plots import _draw, scaled_cluster
from recipes.planning.plan_report import best_of_grids, gpu_hours, report, row, typed_lines
from recipes.planning.search import SearchResult, given_names, search, sequences_per_step
from ring_attention.layout import Layout
from tests.errors import names, refused, some_line_names

CONF = Path(__file__).parents[2] / "conf"
# two layers of Llama 3.1 8B's shape
MODEL = ModelConfig(
    "two_layers", num_layers=2, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_size=14336,
    vocab_size=128256,
)  # fmt: skip
H200S = dataclasses.replace(parse_cluster("4xh200"), memory_gib=40.0)  # small ones: 36 GiB for a step


def config(fields: dict[str, Any] | None = None, length: int = 65_536) -> Config:
    return changed(Config(model=MODEL, data=DataConfig(sequence_length=length)), **(fields or {}))


def grids(forecasts: list[Forecast]) -> set[tuple[str, Degrees]]:
    return {(one.method, one.degrees) for one in forecasts}


def setting(one: Forecast) -> str:
    return " ".join(one.overrides)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return search(config(), H200S)


def test_every_grid_of_every_method_is_tried(found: SearchResult):
    assert grids(found.ranked + found.refused) >= {
        ("local", Degrees(4, 1, 1)),
        ("ring", Degrees(2, 2, 1)),
        ("ring", Degrees(1, 4, 1)),
        ("ulysses", Degrees(2, 1, 2)),
        ("ulysses", Degrees(1, 1, 4)),
        ("hybrid", Degrees(1, 2, 2)),
    }
    # two layers are at most two pipeline stages
    tensor_pipeline = {degrees for _, degrees in grids(found.unpredicted + found.refused) if degrees[3:] != (1, 1)}
    assert tensor_pipeline == {
        Degrees(1, 1, 1, 4, 1), Degrees(1, 1, 1, 2, 2), Degrees(2, 1, 1, 2, 1), Degrees(2, 1, 1, 1, 2),
    }  # fmt: skip


def test_settings_of_the_engine_are_tried(found: SearchResult):
    engines = [one.config.engine for one in [*found.ranked, *found.unpredicted, *found.refused]]
    for name, values in {
        "zero_stage": {0, 1, 3},
        "recompute": {"none", "selective", "full"},
        "offload_activations": {False, True},
        "offload_optimizer": {False, True},
        "offload_parameters": {False, True},
        "micro_batch_size": {1, 2},  # of 65,536 tokens on four GPUs: at most 32,768 on one
    }.items():
        assert {getattr(engine, name) for engine in engines} == values, name
    settings = [setting(one) for one in [*found.ranked, *found.unpredicted, *found.refused]]
    assert len(settings) == len(set(settings)) > 100


def test_what_fits_is_ranked_by_tokens_per_second_and_has_as_many_tokens(found: SearchResult):
    speeds = [one.tokens_per_s for one in found.ranked]
    assert speeds == sorted(speeds, reverse=True)
    assert {one.step.tokens_per_step for one in found.ranked + found.unpredicted + found.refused} == {2**22}


def test_nothing_ranked_exceeds_the_memory(found: SearchResult):
    assert found.ranked
    for one in found.ranked:
        # the step's memory as a run's plan has it: a single micro-batch here, whatever the search has counted
        layout = Layout("zigzag", one.degrees.ring, 65_536, one.degrees.ulysses)
        alone = changed(one.config, **{"engine.train_batch_size": None})
        tokens = one.config.engine.micro_batch_size * layout.local_length
        peak = StepMemory(alone, one.degrees, one.method, tokens, on_gpu=True, ranks_per_host=8).peak.total
        assert max(peak, state_bytes(one.config, one.degrees).needed) <= one.needed_bytes <= 36 * 2**30
        assert one.refusal is None


def test_accumulated_sums_are_counted():
    # on ZeRO-1 a rank has 4 bytes of a sum for its share of the parameters, while the next micro-batch runs
    typed = ["engine.zero_stage=1", "engine.micro_batch_size=1"]
    one_step, accumulated = (
        search(config({"engine.train_batch_size": batch, "engine.zero_stage": 1}), H200S, typed) for batch in (1, 4)
    )
    of_ring = [
        next(one for one in best_of_grids(result.ranked) if one.degrees.ring == 4) for result in (one_step, accumulated)
    ]
    assert [one.micro_batches for one in of_ring] == [1, 4]
    assert setting(of_ring[0]) == setting(of_ring[1]).replace("train_batch_size=4", "train_batch_size=1")
    difference = of_ring[1].needed_bytes - of_ring[0].needed_bytes
    assert difference == pytest.approx(4 * num_parameters(MODEL) / 4)


def test_refusals_are_arithmetic(found: SearchResult):
    assert found.refused
    for one in found.refused:
        assert one.refusal is not None
        assert "\n" not in one.refusal
        names(one.refusal, "GiB >", "36.00 GiB")
        assert one.needed_bytes > 36 * 2**30
    needed = [one.needed_bytes for one in found.refused]
    assert needed == sorted(needed)


def test_more_memory_never_gives_fewer_candidates():
    fits: list[set[str]] = []
    for memory_gib in (20, 30, 40, 80):
        result = search(config(), dataclasses.replace(H200S, memory_gib=memory_gib))
        fits.append({setting(one) for one in result.ranked})
    assert all(fewer < more for fewer, more in itertools.pairwise(fits))


def test_the_hosts_memory_limits_offloading(found: SearchResult):
    small = search(config(), dataclasses.replace(H200S, host_memory_gib=1))
    # activations of two layers stay on the device
    for name in ("offload_optimizer", "offload_parameters"):
        assert any(name in setting(one) for one in found.ranked + found.unpredicted)
        assert not any(name in setting(one) for one in small.ranked + small.unpredicted)
    of_host = [one for one in small.refused if one.needed_bytes <= one.limit_bytes]
    # four ranks with 16 bytes for a quarter of the parameters
    offloaded = next(one for one in of_host if "offload_optimizer" in setting(one) and one.memory.unsupported is None)
    needed = offloaded.host_bytes / 2**30
    assert needed >= 16 * num_parameters(MODEL) / 2**30
    assert offloaded.refusal is not None
    names(offloaded.refusal, "4 ranks", f"{needed:,.2f} GiB", "0.9 GiB")


@pytest.mark.parametrize(
    ("typed", "fields", "expected"),
    [
        (["engine.zero_stage=1"], {}, {"engine.zero_stage": 1}),
        (["engine.recompute=none"], {}, {"engine.recompute": "none"}),
        (["engine.micro_batch_size=2"], {"engine.micro_batch_size": 2}, {"engine.micro_batch_size": 2}),
        (["engine.offload_optimizer=false"], {}, {"engine.offload_optimizer": False}),
        # an experiment's value, which differs from the default
        ([], {"engine.recompute": "full"}, {"engine.recompute": "full"}),
        ([], {"engine.zero_stage": 2}, {"engine.zero_stage": 2}),
    ],
)
def test_what_is_given_stays(typed: list[str], fields: dict[str, Any], expected: dict[str, Any]):
    result = search(config(fields), H200S, typed)
    tried = [one.config for one in result.ranked + result.unpredicted + result.refused]
    assert len(tried) > 10
    for name, value in expected.items():
        group, field = name.split(".")
        assert {getattr(getattr(one, group), field) for one in tried} == {value}


def test_a_given_method_and_degree_stay():
    ring = search(config(), H200S, ["attention=ring"])
    assert {degrees[2:] for _, degrees in grids(ring.ranked + ring.refused + ring.unpredicted)} == {(1, 1, 1)}
    two = search(config({"parallelism.ring_degree": 2}), H200S)
    assert grids(two.ranked) == {("ring", Degrees(2, 2, 1)), ("hybrid", Degrees(1, 2, 2))}
    anything = search(config({"attention.method": "auto"}), H200S, ["attention=auto"])
    assert grids(anything.ranked) == grids(search(config(), H200S).ranked)
    gathering = search(config({"attention.method": "all_gather"}), H200S, ["attention=all_gather"])
    assert {method for method, _ in grids(gathering.ranked)} == {"all_gather"}
    pipeline = search(
        config({"attention.method": "local", "parallelism.method": "tensor_pipeline", "data.document_mask": False}),
        H200S,
    )
    assert {degrees[:3] for _, degrees in grids(pipeline.unpredicted + pipeline.refused)} <= {(1, 1, 1), (2, 1, 1)}
    assert not pipeline.ranked


def test_given_names():
    assert given_names(Config(), ["attention=ring", "+documents=8x512", "model=tiny"]) >= {
        "attention.method", "documents",
    }  # fmt: skip
    assert "attention.method" not in given_names(changed(Config(), **{"attention.method": "auto"}), ["attention=auto"])
    assert given_names(Config(), []) == frozenset()


@pytest.mark.parametrize(
    ("length", "num_gpus", "sequences"),
    [
        (131_072, 8, 32),  # 4,194,304 tokens
        (100_000, 8, 32),  # of 41: four for each GPU
        (65_536, 24, 48),  # of 64: two for each GPU
        (1_048_576, 8, 4),  # two GPUs share one
        (1_048_576, 24, 4),
        (1_048_576, 18, 3),  # of four: a number that divides the GPUs
        (10_000_000, 64, 1),
    ],
)
def test_sequences_of_a_step(length: int, num_gpus: int, sequences: int):
    assert sequences_per_step(config(length=length), num_gpus, frozenset()) == sequences


def test_a_given_batch_stays():
    assert sequences_per_step(config({"engine.train_batch_size": 6}), 4, frozenset()) == 6
    accumulation = frozenset({"engine.gradient_accumulation_steps"})
    assert sequences_per_step(config(), 4, accumulation) is None
    # 21 micro-batches of three sequences are below 2^22 tokens: five for each GPU, rounded to four
    micro_batch = config({"engine.micro_batch_size": 3})
    assert sequences_per_step(micro_batch, 4, frozenset({"engine.micro_batch_size"})) == 3 * 16


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"parallelism.ring_degree": 3}, ["parallelism.ring_degree=3", "4", "1, 2"]),
        (
            {"parallelism.ring_degree": 4, "parallelism.data_degree": 2},
            ["parallelism.ring_degree=4", "parallelism.data_degree=2", "4"],
        ),
        (
            {"engine.train_batch_size": 3, "parallelism.data_degree": 2},
            ["engine.train_batch_size=3", "engine.train_batch_size=4"],
        ),
        ({"attention.kernel": "cpu_flash"}, ["attention.kernel=cpu_flash", "attention.kernel=auto"]),
    ],
)
def test_settings_that_no_grid_has_are_refused(fields: dict[str, Any], parts: list[str]):
    with refused(ConfigError, *parts):
        search(config(fields), H200S)


def test_packed_documents_are_faster_and_keep_their_flops():
    whole, short = search(config(), H200S), search(config(length=8_192), H200S)
    packed_config = config()
    packed_config.recipe, packed_config.cluster, packed_config.documents = "plan", "4xh200", "8x8192"
    packed = search(packed_config, H200S)
    assert packed.ranked[0].tokens_per_s > 1.2 * whole.ranked[0].tokens_per_s
    flops_per_token = [result.ranked[0].mfu_pct / result.ranked[0].tokens_per_s for result in (whole, short, packed)]
    assert flops_per_token[2] == pytest.approx(flops_per_token[1])
    assert flops_per_token[2] < flops_per_token[0]
    some_line_names(list(report(packed, packed_config, H200S)), "8 documents", "8 x 8,192 tokens")
    # tensor and pipeline ranks have no document masks
    assert {degrees[3:] for _, degrees in grids(packed.unpredicted + packed.refused)} <= {(1, 1)}


@pytest.mark.parametrize(
    ("typed", "cluster"),
    [
        (["model=llama_1b", "data.sequence_length=32768"], "8xh200"),
        (["workload=layers_8b", "engine.recompute=selective"], "2x4xh100"),
        (["model=llama_8b", "data.sequence_length=65536", "engine.train_batch_size=8", "attention=ring"], "2x8xh100"),
    ],
)
def test_printed_commands_compose_and_plan_the_same_memory(typed: list[str], cluster: str):
    gpus = parse_cluster(cluster)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        planned = [*typed, "recipe=plan", f"cluster={cluster}", "plan.tokens=1e9"]
        result = search(to_config(hydra.compose("config", planned)), gpus, planned)
        tensor_pipeline = [one for one in result.unpredicted if one.config.parallelism.method == "tensor_pipeline"]
        offloaded = [one for one in result.unpredicted if one.config.engine.offload_parameters]
        assert len(result.ranked) > 10
        for one in [*best_of_grids(result.ranked)[:4], result.ranked[-1], *tensor_pipeline[:1], *offloaded[:1]]:
            words = shlex.split(one.command)
            overrides = [word for word in words[words.index("train.py") + 1 :] if not word.startswith("hydra.")]
            run = to_config(hydra.compose("config", overrides))
            degrees = resolve_degrees(run, gpus.num_gpus, gpus.gpus_per_host)
            assert (run.recipe, degrees) == ("pretrain", one.degrees)
            assert accumulation_steps(run, degrees) == one.micro_batches
            assert state_bytes(run, degrees) == one.state
            assert run.engine == dataclasses.replace(one.config.engine)
            run.engine.train_batch_size, run.engine.gradient_accumulation_steps = None, 1
            step = StepMemory(run, degrees, one.method, one.local_tokens, on_gpu=True, ranks_per_host=8)
            assert step.peak == one.memory.peak


def test_hosts_change_the_launcher(found: SearchResult):
    assert shlex.split(found.ranked[0].command)[:2] == ["python", "train.py"]
    assert found.ranked[0].command.endswith("launch.num_ranks=4")
    hosts = search(config(), parse_cluster("2x4xh200")).ranked[0].command
    assert hosts.startswith("torchrun --nnodes=2 --node-rank=RANK --nproc-per-node=4 ")


def test_the_report(found: SearchResult):
    planned = dataclasses.replace(config(), recipe="plan", cluster="4xh200")
    planned.plan.tokens = 1e9
    lines = list(report(found, planned, H200S))
    best = found.ranked[0]
    hours = 1e9 / best.tokens_per_s / 3600 * 4
    assert gpu_hours(best, planned) == pytest.approx(hours)
    [header] = [line for line in lines if "tokens/s" in line and "MFU" in line]
    names(header, "products", "attention", "messages", "optimizer", "bubble", "GiB", "step")
    row_1 = lines[lines.index(header) + 1]
    names(row_1, "1", f"{best.tokens_per_s:,.0f}", f"{best.needed_bytes / 2**30:.1f}", f"{best.mfu_pct:.1f}%")
    some_line_names(lines, f"{hours:,.0f} GPU-hours")
    assert "\n".join(typed_lines(best.command)) in "\n".join(lines)
    some_line_names(lines, "tensor x pipeline", "at least")  # apart, because its memory is not predicted
    some_line_names(lines, "> 36.00 GiB")
    numbers = row(best, planned)
    assert sum(numbers["parts_s"].values()) == pytest.approx(numbers["step_time_s"])
    assert numbers["tokens_per_step"] / numbers["step_time_s"] == pytest.approx(numbers["tokens_per_s"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["num_steps=1"],
        [f"data.validation_sequences={number}" for number in range(60)],
        [f"model.path=/{'long/' * 50}model", "data.files='two words/*.txt'", "model.rope={rope_type: yarn, factor: 4}"],
    ],
    ids=["short", "many", "long and quoted"],
)
def test_a_command_on_several_lines_is_the_same_to_a_shell(overrides: list[str]):
    words = ["printf", "%s\\n", *overrides]
    lines = list(typed_lines(shlex.join(words)))
    printed = subprocess.run(["sh", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == overrides
    assert all(len(line) <= 120 or len(shlex.split(line.removesuffix(" \\"))) == 1 for line in lines)
    assert len(lines) <= 2 + sum(map(len, words)) // 70


@pytest.mark.parametrize("kind", ["b200", "a100_80gb", "h100"])
def test_the_report_says_what_was_not_measured(kind: str):
    cluster = parse_cluster(f"2x4x{kind}")
    lines = list(report(search(config(), cluster), dataclasses.replace(config(), recipe="plan", cluster="x"), cluster))
    assert ("speeds of such GPUs were not measured" in lines[0]) == (kind != "h100")
    some_line_names(lines, "several hosts")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"model.num_layers": 100}, ["model.path", "fp32"]),  # built on each rank
        ({"data.sequence_length": 2**33}, ["data.sequence_length", "saved activations"]),
        ({"model.num_layers": 40, "engine.zero_stage": 0}, ["ZeRO 0", "engine.zero_stage=3"]),
    ],
)
def test_what_fits_nowhere_is_one_line(fields: dict[str, Any], parts: list[str]):
    planned = dataclasses.replace(config(fields), recipe="plan", cluster="4xh200")
    with pytest.raises(ConfigError) as caught:
        list(report(search(planned, H200S), planned, H200S))
    names(str(caught.value), "cluster=4xh200", "36.00 GiB", *parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("factor", "hosts", "gpus_per_host"), [(0.25, 1, 4), (0.5, 1, 8), (1, 2, 8), (4, 8, 8), (0.01, None, None)]
)
def test_smaller_and_larger_clusters(factor: float, hosts: int | None, gpus_per_host: int | None):
    scaled = scaled_cluster(parse_cluster("2x8xh100"), factor)
    assert (scaled and scaled.hosts, scaled and scaled.gpus_per_host) == (hosts, gpus_per_host)


def test_three_hosts_have_no_half():
    assert scaled_cluster(parse_cluster("3x8xh100"), 0.5) is None


def test_a_plot_has_a_gap_where_a_method_does_not_fit(found: SearchResult, monkeypatch, tmp_path: Path):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    ring, ulysses = (next(one for one in found.ranked if one.method == method) for method in ("ring", "ulysses"))
    _draw({"1 x 2": [ring, ulysses], "1 x 4": [ulysses], "1 x 8": [ring]}, "GPUs", H200S, tmp_path / "plot.png")
    speed, mfu, memory = figures[0].axes
    for axes, height in ((speed, ring.tokens_per_s), (mfu, ring.mfu_pct), (memory, ring.needed_bytes / 2**30)):
        heights = next(line.get_ydata() for line in axes.get_lines() if line.get_label() == "ring")
        assert heights == pytest.approx([height, math.nan, height], nan_ok=True)
    limit = next(line for line in memory.get_lines() if line.get_label() == "90% of a GPU")
    assert limit.get_ydata() == pytest.approx([36.0, 36.0])
    assert mfu.get_ylim()[1] > 1.04 * max(ring.mfu_pct, ulysses.mfu_pct)
