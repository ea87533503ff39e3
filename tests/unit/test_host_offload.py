"""What ranks offload to their host, hosts that are refused, and settings that fit them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml

from conf.schema import Config, DataConfig, Degrees, EngineConfig, LaunchConfig
from recipes.planning.host_offload import excess, host_bytes
from recipes.planning.memory import changed
from recipes.planning.plan import Plan
from tests.errors import names
from tests.unit.test_memory import GIB, LARGE, NUM_LARGE, OFFLOAD, RECOMPUTE, rows

LENGTH = "data.sequence_length"


def host_plan(host_gib: float, num_ranks: int = 2, length: int = 524288, **engine: Any) -> Plan:
    """Ranks that offload activations to one host."""
    engine = {"zero_stage": 3, "recompute": "selective", "offload_activations": True, **engine}
    settings = {"engine": EngineConfig(**engine), "data": DataConfig(sequence_length=length)}
    device = "cuda", "NVIDIA H200", (9, 0)
    config = Config(model=LARGE, explain=True, **settings)
    return Plan(config, num_ranks, *device, num_ranks, 140 * GIB, round(host_gib * GIB))


def typed_in(message: str) -> list[dict[str, Any]]:
    """The settings that a refusal gives, without what to type all the same."""
    remedies = re.findall(r"((?:[\w.]+=\w+ ?)+) \([\d.]+ GiB\)", message)
    return [{name: yaml.safe_load(value) for name, value in re.findall(r"([\w.]+)=(\w+)", r)} for r in remedies]


@pytest.mark.parametrize(
    ("host_gib", "fields", "offloaded", "expected"),
    [
        # 30 layers of 2 ranks x (input 2 GiB + attention's output 2 GiB + lse 1/32 GiB)
        (251, {}, "2 ranks x 120.94 = 241.88", [{RECOMPUTE: "full"}, {LENGTH: 262144}]),
        (251, {"length": 400_001}, "241.88", [{RECOMPUTE: "full"}, {LENGTH: 262144}]),  # pinned as powers of two
        (100, {"length": 200_000}, "120.94", [{RECOMPUTE: "full"}, {LENGTH: 131072}, {OFFLOAD: False}]),
        (60, {}, "241.88", [{RECOMPUTE: "full", LENGTH: 131072}, {LENGTH: 65536}]),
        (100, {"recompute": "full"}, "120.00", [{LENGTH: 262144}]),
        (
            200,
            {"length": 262144, "micro_batch_size": 4},
            "483.75",
            [{RECOMPUTE: "full", "engine.micro_batch_size": 1}, {LENGTH: 65536}],
        ),
    ],
)
def test_a_host_too_small_for_what_its_ranks_offload_is_refused(host_gib, fields, offloaded, expected):
    refused = host_plan(host_gib, **fields)
    names(refused.refusal or "", "offloading takes", "launch.check_memory=false", offloaded, f"{0.9 * host_gib:.2f}")
    assert typed_in(refused.refusal or "") == expected
    for changes in expected:
        assert dataclasses.replace(refused, config=changed(refused.config, **changes)).refusal is None
    assert host_plan(1000, **fields).refusal is None


def test_each_host_has_the_offloads_of_its_own_ranks():
    sixteen = host_plan(600, num_ranks=16, length=2**21)
    names(sixteen.refusal or "", "16 ranks x 60.47 = 967.50")
    assert dataclasses.replace(sixteen, ranks_per_host=8).refusal is None
    assert excess(1, 2 * GIB, GIB).startswith("offloading takes 2.00 GiB of a host > 1.00 GiB")


def test_what_the_optimizer_offloads():
    """fp32 weights and gradients, and weights in bf16, are pinned in powers of two; two moments are not."""
    decayed, others = NUM_LARGE - 128256 * 4096 - 65 * 4096, 128256 * 4096 + 65 * 4096
    engine = {"offload_activations": False, "offload_optimizer": True, "zero_stage": 1}
    of_rank = {"engine": EngineConfig(**engine), "data": DataConfig(sequence_length=1024)}
    size = host_bytes(Config(model=LARGE, **of_rank), Degrees(1, 2, 1), 512)
    pinned = 2 * 2**34 + 2**33 + 2 * 2**30 + 2**29  # of halves: 15.0, 7.5, 1.05 and 0.53e9 bytes
    assert size == 8 * (decayed + others) / 2 + pinned + 2**30  # ... and the largest parameter's gradient
    accumulating = changed(Config(model=LARGE, **of_rank), **{"engine.gradient_accumulation_steps": 2})
    each_layer = 2**26 + 2**25 + 2**28 + 2**27  # bf16 gradients of q, k and v; o; gate and up; down
    assert host_bytes(accumulating, Degrees(1, 2, 1), 512) - size == 32 * each_layer + 2 * 2**30
    on_zero_3 = changed(Config(model=LARGE, **of_rank), **{"engine.zero_stage": 3})
    assert host_bytes(on_zero_3, Degrees(1, 8, 1), 128) == pytest.approx(
        12 * NUM_LARGE / 8 + 2**32 + 2**28 + 2**32, rel=1e-4
    )


def test_offloads_of_all_stages_are_kept():
    stages = [[1, 131072], [10, 262144], [20, 524288]]
    config = host_plan(1000).config
    staged = changed(config, **{"data.stages": stages})
    of_last, of_all = (host_bytes(each, Degrees(1, 2, 1), 262144) for each in (config, staged))
    assert of_all == of_last * (1 + 1 / 2 + 1 / 4)


def test_a_host_is_asked_for_training_alone():
    forward = dataclasses.replace(host_plan(251).config, recipe="forward")
    assert dataclasses.replace(host_plan(251), config=forward).refusal is None
    assert dataclasses.replace(host_plan(251), host_memory_bytes=None).refusal is None


def test_a_user_may_insist_on_a_host_and_is_warned():
    insisted = host_plan(251)
    launch = LaunchConfig(check_memory=False)
    insisted = dataclasses.replace(insisted, config=dataclasses.replace(insisted.config, launch=launch))
    [warning] = rows("!!!", insisted)
    names(warning, "the ranks of a host offload 241.88 GiB", "251.00", "launch.check_memory=false")
