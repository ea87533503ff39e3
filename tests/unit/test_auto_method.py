"""attention=auto: an estimate whose numbers can be checked by hand."""

from dataclasses import replace
from typing import Any

import pytest

from conf.schema import AttentionConfig, Config, ConfigError, DataConfig, EngineConfig, ModelConfig, ParallelismConfig
from recipes.planning.explain import explanation
from recipes.planning.plan import Plan
from ring_attention.auto_method import Links, Workload, rank_methods
from tests.errors import names, refused

NVLINK = Links(ranks_per_host=8, intra_host_gb_per_s=280, inter_host_gb_per_s=45)


def workload(length: int, num_heads: int = 32, num_kv_heads: int = 8) -> Workload:
    return Workload(num_heads, num_kv_heads, 128, length, batch=1, bytes_per_number=2, attained_tflops=600)


def test_the_ring_by_hand():
    """L = 131072 on 8 ranks: 2 * 32 * 128 * L^2 / 8 = 17.6 TFLOP. Transfer: 2 * 8 heads * 16384 tokens * 256 bytes."""
    ring = next(c for c in rank_methods(workload(131072), NVLINK, 8) if c.ring_degree == 8)
    assert ring.compute_ms == pytest.approx(29.32, rel=1e-3)
    assert ring.transfer_ms == pytest.approx(0.05 + 67.1e6 / 280e6, rel=1e-3)
    assert ring.exposed_ms == pytest.approx(7 * 0.05)  # transfers are hidden but for their latency


def test_ulysses_by_hand():
    """Each of 8 ranks has 2048 tokens of 80 heads in all, and sends 1/8 of them to each peer."""
    ulysses = next(c for c in rank_methods(workload(16384), NVLINK, 8) if c.ulysses_degree == 8)
    assert ulysses.all_to_all_ms == pytest.approx(7 * 80 * 2048 / 8 * 256 / 280e6 + 4 * 0.05, rel=1e-3)
    assert ulysses.method == "ulysses"


@pytest.mark.parametrize(
    ("length", "num_ranks", "links", "kv_heads", "method", "split"),
    [
        (131072, 8, NVLINK, 8, "ring", (8, 1)),  # transfers hide behind compute
        (4096, 8, NVLINK, 8, "ulysses", (1, 8)),  # too short to hide a ring's transfers
        (32768, 16, Links(8, 280, 5), 8, "hybrid", (2, 8)),  # slow links: Ulysses inside, one transfer across
        (1024, 2, NVLINK, 8, "ring", (2, 1)),  # one transfer costs less than four all-to-alls
        (4096, 8, NVLINK, 1, "ring", (8, 1)),  # one key-value head cannot be split
        (4096, 1, NVLINK, 8, "local", (1, 1)),
    ],
)
def test_the_choice(length, num_ranks, links, kv_heads, method, split):
    best = rank_methods(workload(length, num_kv_heads=kv_heads), links, num_ranks)[0]
    assert (best.method, (best.ring_degree, best.ulysses_degree)) == (method, split), best


def test_a_contiguous_ring_waits_for_its_busiest_rank():
    """The last of 8 ranks has 15/8 of the mean rank's causal work."""
    contiguous = rank_methods(replace(workload(131072), layout="contiguous"), NVLINK, 8)
    assert contiguous[0].method == "ulysses"
    ring = next(c for c in contiguous if c.ring_degree == 8)
    assert ring.compute_ms == pytest.approx(29.32 * 15 / 8, rel=0.01)


def plan(**parallelism: Any) -> Plan:
    config = Config(
        model=ModelConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        attention=AttentionConfig(method="auto", layout="zigzag"),
        parallelism=ParallelismConfig(**parallelism),
        data=DataConfig(sequence_length=131072),
    )
    return Plan(config, 8, "cuda", "NVIDIA H200", (9, 0), ranks_per_host=8)


def test_the_plan_takes_the_fastest_and_explains_every_candidate(tmp_path):
    assert (plan().method, plan().degrees) == ("ring", (1, 8, 1, 1, 1))
    assert plan(data_degree=4).degrees == (4, 2, 1, 1, 1)
    text = "\n".join(explanation(plan(), tmp_path))
    names(text, "attention=auto", "32 heads", "8 kv heads", "131,072", "593.64 TFLOP/s", "280 GB/s", "45 GB/s")
    for candidate in ("ring 8 x ulysses 1", "ring 4 x ulysses 2", "ring 2 x ulysses 4", "ring 1 x ulysses 8"):
        assert text.count(candidate) == 1


def test_the_rate_of_kernels_without_a_known_peak_depends_on_the_dtype():
    def rate(dtype: str, name: str = "NVIDIA RTX 6000", device: str = "cuda") -> float:
        return Plan(Config(engine=EngineConfig(dtype=dtype)), 1, device, name, (9, 0), ranks_per_host=1).attained_tflops

    assert rate("bf16") == rate("fp16") == 200
    assert rate("fp32") == rate("fp32", "NVIDIA H200") == 30  # no tensor cores
    assert rate("bf16", "NVIDIA H200") > 500
    assert rate("fp32", "CPU", "cpu") == rate("bf16", "CPU", "cpu") < 1


def test_auto_refuses_degrees():
    with refused(ConfigError, "attention=auto", "parallelism.ring_degree=4"):
        plan(ring_degree=4)
