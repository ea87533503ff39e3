"""attention=auto: the split of a sequence's ranks whose step is fastest by forecast."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from conf.schema import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    LaunchConfig,
    ModelConfig,
    ParallelismConfig,
)
from recipes.planning.cluster import cluster_text, parse_cluster
from recipes.planning.explain import explanation
from recipes.planning.measured import MeasuredSpeeds
from recipes.planning.plan import Plan
from recipes.planning.step_time import StepTime
from tests.errors import names, refused


def plan(
    length: int = 131_072,
    num_ranks: int = 8,
    kv_heads: int = 8,
    name: str = "NVIDIA H200",
    recipe: str = "forward",
    dtype: str = "bf16",
    attention: dict[str, Any] | None = None,
    cluster: str | None = None,
    **parallelism: Any,
) -> Plan:
    config = Config(
        recipe=recipe,
        model=ModelConfig(hidden_size=4096, num_heads=32, num_kv_heads=kv_heads, head_dim=128, mlp_size=14_336),
        attention=AttentionConfig(**{"method": "auto", "kernel": "cudnn", **(attention or {})}),
        parallelism=ParallelismConfig(**parallelism),
        engine=EngineConfig(dtype=dtype),
        data=DataConfig(sequence_length=length),
        cluster=cluster,
    )
    return Plan(config, num_ranks, "cuda", name, (9, 0), ranks_per_host=8, memory_bytes=2**37)


SLOW = {"inter_host_gb_per_s": 5.0}


@pytest.mark.parametrize(
    ("length", "num_ranks", "attention", "kv_heads", "method", "split"),
    [
        (524_288, 8, {}, 8, "ring", (8, 1)),  # transfers hide behind compute, and all-to-alls do not
        (4096, 8, {}, 8, "ulysses", (1, 8)),  # too short to hide a ring's transfers and its host
        (32_768, 16, SLOW, 8, "hybrid", (2, 8)),  # slow links: Ulysses inside, one transfer across
        (4096, 8, {}, 1, "ring", (8, 1)),  # one key-value head cannot be split
        (4096, 1, {}, 8, "local", (1, 1)),
        (131_072, 8, {"layout": "contiguous"}, 8, "ulysses", (1, 8)),  # a contiguous ring waits for its busiest rank
    ],
)
def test_the_choice(length, num_ranks, attention, kv_heads, method, split):
    chosen = plan(length, num_ranks, kv_heads, attention=attention)
    assert (chosen.method, (chosen.degrees.ring, chosen.degrees.ulysses)) == (method, split)


def test_candidates_are_the_forecasts_of_every_split_fastest_first():
    candidates = plan(recipe="pretrain").candidates
    splits = [(step.degrees.ring, step.degrees.ulysses, step.method) for step in candidates]
    assert sorted(splits) == [(1, 8, "ulysses"), (2, 4, "hybrid"), (4, 2, "hybrid"), (8, 1, "ring")]
    totals = [step.parts.total for step in candidates]
    assert totals == sorted(totals)
    first = candidates[0]
    assert totals[0] == StepTime(first.config, first.degrees, first.method, "cudnn", first.cluster).parts.total


def test_the_plan_takes_the_fastest_and_explains_every_candidate(tmp_path):
    long = plan(524_288)
    assert long.degrees == (1, 8, 1, 1, 1)
    assert plan(524_288, data_degree=4).degrees == (4, 2, 1, 1, 1)
    lines = explanation(long, tmp_path)
    names("\n".join(lines), "attention=auto", "280 GB/s", "45 between hosts", "8 x NVIDIA H200")
    shown = [line for line in lines if line.startswith("  ") and " ring " in line and "ulysses" in line]
    for line, step in zip(shown, long.candidates, strict=True):
        grid = f"ring {step.degrees.ring} x ulysses {step.degrees.ulysses}"
        names(line, step.method, grid, f"{1e3 * step.parts.total:.3f} ms", f"{1e3 * step.parts.attention:.3f}")


def test_a_step_is_explained_by_its_parts(tmp_path):
    own = plan(recipe="pretrain", num_ranks=4, attention={"method": "ring"})
    lines = explanation(own, tmp_path)
    assert own.step_time.degrees == (1, 4, 1, 1, 1)
    names("\n".join(lines), f"{own.step_time.parts.total:.4g} s", f"{own.step_time.tokens_per_s:,.0f} tokens/s")
    for part, seconds in own.step_time.parts:
        assert any(f"{1e3 * seconds:,.3f} ms" in line and line.endswith(f"  {part}") for line in lines) == (seconds > 0)


def test_a_gpu_that_is_not_known_is_explained_as_what_it_counts_as(tmp_path):
    text = "\n".join(explanation(plan(name="NVIDIA RTX 6000"), tmp_path))
    names(text, "8 x NVIDIA A100", "NVIDIA RTX 6000, not known, counts as")


def test_links_that_were_typed_take_the_place_of_the_kinds():
    cluster = plan(num_ranks=16, attention={"intra_host_gb_per_s": 100.0, "inter_host_gb_per_s": 7.0}).cluster
    assert (cluster.link_within_gb_per_s, cluster.link_between_gb_per_s) == (100.0, 7.0)
    assert (cluster.hosts, cluster.gpus_per_host, cluster.memory_gib) == (2, 8, 128)


@pytest.mark.parametrize(
    ("name", "kind", "links", "is_measured"),
    [
        ("NVIDIA H200", "h200", (280, 45), True),
        ("NVIDIA B200", "b200", (560, 45), False),
        ("NVIDIA H100 NVL", "h100_nvl", (280, 45), False),  # no file of its own
        ("NVIDIA RTX 6000", "a100_80gb", (190, 22), False),  # not known
        ("NVIDIA H200 MIG 1g.18gb", "a100_80gb", (190, 22), False),
    ],
)
def test_the_kind_of_gpu_has_its_links(name, kind, links, is_measured):
    cluster = plan(name=name).cluster
    assert cluster.gpu == kind
    assert (cluster.link_within_gb_per_s, cluster.link_between_gb_per_s) == links
    assert cluster.is_measured == is_measured


def test_a_clusters_file_takes_the_place_of_the_kinds(tmp_path):
    """A host whose all-to-alls were measured to be slow prefers a ring."""
    path = tmp_path / "mine.yaml"
    measured = MeasuredSpeeds("mine", 4000.0, 50.0, 250.0, 1.0, 0.1, 0.01, 2.0, (), ())
    path.write_text(cluster_text(dataclasses.replace(parse_cluster("h200"), gpus_per_host=4, measured=measured), ""))
    usual, own = plan(4096), plan(4096, cluster=str(path))
    assert (usual.method, own.method) == ("ulysses", "ring")
    assert (own.cluster.gpus_per_host, own.cluster.measured) == (8, measured)
    own.resolve_config()
    resolved = dataclasses.replace(own.config)  # checked again
    assert (resolved.attention.method, resolved.cluster, resolved.parallelism.ring_degree) == ("ring", None, 8)
    with refused(ConfigError, f"cluster={path}", "gpu=h200", "NVIDIA B200"):
        plan(name="NVIDIA B200", cluster=str(path))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["cluster=8xh200", "attention=auto", "explain=true", "recipe=plan"]),
        ({"explain": True, "explain_gpu": "h200", "launch": LaunchConfig(8)}, ["cluster=8xh200", "explain_gpu=h200"]),
    ],
)
def test_a_cluster_without_effect_is_refused(settings, parts):
    with refused(ConfigError, *parts):
        Config(cluster="8xh200", **settings)


def test_fp32_does_without_tensor_cores():
    half, full = (plan(num_ranks=1, attention={"kernel": "mem_efficient"}, dtype=dtype) for dtype in ("bf16", "fp32"))
    assert full.step_time.parts.products == pytest.approx(16 * half.step_time.parts.products)
    assert full.step_time.parts.attention == pytest.approx(16 * half.step_time.parts.attention)


def test_the_ranks_of_a_cpu_share_its_cores():
    """Twice the ranks with half of the tokens each take as long, but for what few tokens cost."""
    config = Config(recipe="forward", data=DataConfig(sequence_length=32_768))
    times = [Plan(config, ranks, "cpu", "CPU", None, ranks).step_time.parts.products for ranks in (1, 2)]
    assert times[1] == pytest.approx(times[0], rel=0.01)


def test_auto_refuses_degrees():
    with refused(ConfigError, "attention=auto", "parallelism.ring_degree=4"):
        plan(ring_degree=4)
