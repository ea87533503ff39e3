"""Times on a cluster: by what was measured on it, else by data sheets and fitted shares."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from conf.schema import Config, ConfigError, DataConfig, Degrees, EngineConfig, ModelConfig
from recipes.planning.cluster import Cluster, calibration_refusal, cluster_of_ranks, parse_cluster
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.measured import AttentionSpeed, MeasuredSpeeds, ProductSpeed
from recipes.planning.speeds import Constants, kernel_tflops
from recipes.planning.step_time import StepTime
from recipes.planning.throughput import kind_of
from tests.errors import names, refused

ROUND = Constants(
    matmul_share=0.5, matmul_half_tokens=0, memory_share=0.5, link_share=0.5, call_ms=0.1, ring_step_ms=0.2
)
SHEET = Cluster("h200", 8, 2, 139.8, 200.0, 20.0, latency_us=10, host_memory_gib=2000)
MEASURED = MeasuredSpeeds(
    "a host",
    memory_gb_per_s=4000.0,
    host_copy_gb_per_s=25.0,
    all_gather_gb_per_s=400.0,
    all_to_all_gb_per_s=160.0,
    call_ms=0.3,
    ring_step_ms=0.6,
    backward_issue=3.0,
    products=(ProductSpeed(256, 200.0), ProductSpeed(4096, 600.0)),
    attention=(
        AttentionSpeed("ffpa", 512, 2048, 100.0, 50.0),
        AttentionSpeed("flash_attn_4", 128, 2048, 400.0, 300.0),
        AttentionSpeed("flash_attn_4", 128, 8192, 500.0, 400.0),
    ),
)


def speed(**measured: Any) -> ClusterSpeed:
    own = dataclasses.replace(MEASURED, **measured)
    return ClusterSpeed(dataclasses.replace(SHEET, measured=own), ROUND)


def test_without_measurements_data_sheets_and_shares_count():
    sheet = ClusterSpeed(SHEET, ROUND)
    assert sheet.memory_s(2.4e12) == pytest.approx(1)
    assert sheet.products_s(0.5 * 989.4e12, 100) == pytest.approx(1)
    assert sheet.host_copy_s(50e9) == pytest.approx(1)
    assert (sheet.call_ms, sheet.ring_step_ms, sheet.backward_issue) == (0.1, 0.2, 3.5)
    assert sheet.collective_s(100e9, 8) == pytest.approx(1 + 10e-6)
    # a collective between hosts leaves each by eight ports of 10 GB/s, a message by one
    assert sheet.collective_s(80e9, 16) == pytest.approx(1 + 10e-6)
    assert sheet.message_s(10e9, 16) == pytest.approx(1 + 10e-6)
    # of eight neighbours seven get an eighth each over links of 100 GB/s
    assert sheet.all_to_all_s(800e9, 8) == pytest.approx(7 + 10e-6)


def test_measurements_count_as_they_are():
    own = speed()
    assert own.memory_s(4e12) == pytest.approx(1)
    assert own.host_copy_s(25e9) == pytest.approx(1)
    assert (own.call_ms, own.ring_step_ms, own.backward_issue) == (0.3, 0.6, 3)
    assert own.collective_s(400e9, 8) == pytest.approx(1 + 10e-6)
    assert own.all_to_all_s(160e9, 8) == pytest.approx(7 / 8 + 10e-6)
    # between hosts nothing was measured: half of 20 GB/s for each of eight ports
    assert own.collective_s(80e9, 16) == pytest.approx(1 + 10e-6)
    assert own.all_to_all_s(160e9, 16) == pytest.approx(10 * (7 / 160 + 8 / 10) + 10e-6)


@pytest.mark.parametrize(("tokens", "tflops"), [(128, 100), (256, 200), (1024, 400), (4096, 600), (100_000, 600)])
def test_products_between_measured_tokens(tokens: int, tflops: float):
    """In the logarithm of the tokens; fewer than the fewest take as long as these."""
    assert speed().products_s(tflops * 1e12, tokens) == pytest.approx(1)


def test_kernels_that_were_measured_and_others():
    own = speed()
    assert own.kernel_tflops("flash_attn_4", 128, 4096, False, False) == pytest.approx(450)
    assert own.kernel_tflops("flash_attn_4", 128, 1e6, True, True) == 400
    assert own.kernel_tflops("ffpa", 512, 2048, True, True) == pytest.approx(1.33 * 50)  # full blocks are faster
    built_in = kernel_tflops("h200", "cudnn", 128, 4096, False)
    assert own.kernel_tflops("cudnn", 128, 4096, False, False) == built_in


def test_what_one_gpu_cannot_measure_stays():
    own = speed(host_copy_gb_per_s=None, all_gather_gb_per_s=None, all_to_all_gb_per_s=None, ring_step_ms=None)
    sheet = ClusterSpeed(SHEET, ROUND)
    assert own.host_copy_s(50e9) == pytest.approx(1)
    assert (own.call_ms, own.ring_step_ms) == (0.3, 0.2)
    assert own.collective_s(1e9, 8) == sheet.collective_s(1e9, 8)
    assert own.all_to_all_s(1e9, 8) == sheet.all_to_all_s(1e9, 8)


def test_a_step_takes_what_was_measured():
    """Products at 600 TFLOP/s on both passes of a layer, memory at 4,000 GB/s."""
    model = ModelConfig(num_layers=1, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_size=14_336)
    config = Config(recipe="forward", model=model, data=DataConfig(sequence_length=65_536))
    cluster = dataclasses.replace(SHEET, measured=MEASURED)
    parts = StepTime(config, Degrees(1, 1, 1), "local", "flash_attn_4", cluster, constants=ROUND).parts
    weights = 4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14_336
    assert parts.products == pytest.approx(2 * 65_536 * weights / 600e12)
    assert parts.attention == pytest.approx(2 * 4096 * 65_536 * 65_537 / 500e12)


@pytest.mark.parametrize(
    ("name", "memory_gib", "kind"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H200 NVL", 139.8, "h200_nvl"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100_40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100_80gb"),
        ("CPU", 4, "cpu"),
        ("NVIDIA H200 MIG 1g.18gb", 16, None),
        ("NVIDIA GeForce RTX 4090", 24, None),
    ],
)
def test_the_kind_of_a_device(name: str, memory_gib: float, kind: str | None):
    assert kind_of(name, memory_gib) == kind


def test_ranks_as_a_cluster():
    ranks = cluster_of_ranks("NVIDIA H200", 139.81, 12, 8)
    assert ranks == dataclasses.replace(parse_cluster("h200"), hosts=2)
    cpu = cluster_of_ranks("CPU", 3.0, 4, 4)
    assert (cpu.gpu, cpu.ranks_per_device, ranks.ranks_per_device) == ("cpu", 4, 1)


def test_what_calibrate_does_not_measure():
    assert calibration_refusal("NVIDIA H200", 8, 8) is None
    names(calibration_refusal("NVIDIA RTX 6000", 1, 1) or "", "NVIDIA RTX 6000", "throughput.py")
    names(calibration_refusal("NVIDIA H200", 16, 8) or "", "one host", 2, 16)


def test_speeds_are_measured_in_half_precision():
    with refused(ConfigError, "engine.dtype=fp32", "recipe=calibrate", "bf16"):
        Config(recipe="calibrate", engine=EngineConfig(dtype="fp32"))
