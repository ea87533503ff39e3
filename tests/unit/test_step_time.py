"""The time of a step by its parts, with round constants so that each can be worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from conf.schema import AttentionConfig, Config, DataConfig, Degrees, EngineConfig, ModelConfig, ParallelismConfig
from recipes.planning.cluster import Cluster
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.engine_time import EngineTime
from recipes.planning.memory import num_parameters
from recipes.planning.speeds import KERNEL_SPEEDS, MEMORY_GB_PER_S, Constants, kernel_tflops
from recipes.planning.step_time import StepTime
from recipes.planning.throughput import DEVICES, GPUS
from ring_attention.mask import CAUSAL

# 12 * 1024^2 weights a layer: qkv 3, out 1, up 4, down 4
MODEL = ModelConfig(
    "small", num_layers=4, hidden_size=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_size=4096, mlp="gelu"
)
LENGTH = 65_536
H200S = Cluster("h200", 8, 8, 139.8, 200.0, 20.0, latency_us=0, host_memory_gib=2000, is_measured=True)
# products at half of 989.4 TFLOP/s, memory at half of 4,800 GB/s, collectives at the link's speed
ROUND = Constants(matmul_share=0.5, matmul_half_tokens=0, memory_share=0.5, link_share=1, wait_share=0)
LAYER_PRODUCTS_S = 2 * LENGTH * 12 * 1024**2 / (0.5 * 989.4e12)


ALONE = Degrees(1, 1, 1)


def step(degrees: Degrees = ALONE, recipe: str = "forward", method: str = "local", **engine: Any) -> StepTime:
    is_pipeline = degrees.tensor * degrees.pipeline > 1
    config = Config(
        recipe=recipe,
        model=MODEL,
        engine=EngineConfig(**engine),
        attention=AttentionConfig(method=method),
        parallelism=ParallelismConfig("tensor_pipeline" if is_pipeline else "sequence"),
        data=DataConfig(sequence_length=LENGTH, document_mask=False),
    )
    return StepTime(config, degrees, method, "flash_attn_4", H200S, constants=ROUND)


def ring(degree: int, recipe: str = "forward", **engine: Any) -> StepTime:
    return step(Degrees(1, degree, 1), recipe, "ring", **engine)


def test_one_forward_pass():
    parts = step().parts
    assert parts.products == pytest.approx(4 * LAYER_PRODUCTS_S)
    # 2 * H * D * L^2 FLOPs a layer; 1,024 numbers in all heads are as a quarter of 4,096: half the size
    flops = 4 * 2 * 1024 * LENGTH * (LENGTH + 1)
    assert parts.attention == pytest.approx(flops / 656e12, rel=1e-3)
    # norms and additions 10, rotary 2 * 2, GELU 2 * 4: times 1,024 numbers of 2 bytes
    assert parts.elementwise == pytest.approx(4 * 22 * 1024 * 2 * LENGTH / 2.4e12)
    assert parts.head == pytest.approx(LENGTH * 257 * (2 * 1024 / (0.5 * 989.4e12) + 12 / 2.4e12))
    others = {name for name, seconds in parts if not seconds}
    assert others == {"messages", "host", "gradients", "optimizer", "bubble", "offloading"}


def test_training_takes_three_products_and_recomputing_leaves_out_the_last():
    """Of 12 parts of a layer's weights recomputing needs all but the 4 of the down projection."""
    assert step(recipe="pretrain").parts.products == pytest.approx(3 * 4 * LAYER_PRODUCTS_S)
    recomputed = step(recipe="pretrain", recompute="selective")
    assert recomputed.parts.products == pytest.approx((3 + 8 / 12) * 4 * LAYER_PRODUCTS_S)
    tiled = step(recipe="pretrain", tile_tokens=4096)
    assert tiled.parts.products == pytest.approx((3 + 4 / 12) * 4 * LAYER_PRODUCTS_S)
    assert step(recipe="pretrain", recompute="full").parts.attention > recomputed.parts.attention


def test_tensor_ranks_gather_and_scatter():
    """Half of each of 4 messages a layer leaves a rank: L x 1,024 numbers of 2 bytes over 200 GB/s."""
    parts = step(Degrees(1, 1, 1, tensor=2)).parts
    assert parts.products == pytest.approx(4 * LAYER_PRODUCTS_S / 2)
    assert parts.messages == pytest.approx(4 * 4 * LENGTH * 1024 * 2 / 2 / 200e9)


def test_products_overlap_two_of_a_training_steps_eight_messages():
    parts = step(Degrees(1, 1, 1, tensor=2), recipe="pretrain").parts
    assert parts.messages == pytest.approx(4 * 6 * LENGTH * 1024 * 2 / 2 / 200e9)


def test_a_pipeline_waits_for_its_first_micro_batches():
    """Four stages and eight micro-batches: three more stage times, and 11 transfers."""
    pipeline = step(Degrees(1, 1, 1, pipeline=4), gradient_accumulation_steps=8)
    parts = pipeline.parts
    stage_s = (parts.total - parts.bubble) / 8
    assert parts.products == pytest.approx(8 * LAYER_PRODUCTS_S)
    assert parts.bubble == pytest.approx(3 * stage_s + 11 * LENGTH * 1024 * 2 / 200e9)
    assert pipeline.tokens_per_step == 8 * LENGTH


def test_ulysses_sends_half_of_four_tensors():
    """Two ranks: q, k, v and out of L / 2 tokens, of which half leave; written and read before and after."""
    parts = step(Degrees(1, 1, 2), method="ulysses").parts
    numbers = 4 * 1024 * LENGTH / 2
    assert parts.messages == pytest.approx(4 * 2 * numbers / 2 / 200e9)
    assert parts.elementwise == pytest.approx(4 * (22 * 1024 * 2 * LENGTH / 2 + 4 * 2 * numbers) / 2.4e12)


def test_all_gather_sends_all_keys():
    """Four ranks: K and V of L / 4 tokens to three others, one after the other around a ring of ranks."""
    parts = step(Degrees(1, 4, 1), method="all_gather").parts
    assert parts.messages == pytest.approx(4 * 3 * 2 * 1024 * LENGTH / 4 * 2 / 200e9)


def test_gathered_rows_are_copied_one_number_at_a_time():
    """6 times as long for each of several rows: 4 times as slowly, and half of the keys once more for the kernel."""
    one, two = (step(Degrees(1, 8, 1), "forward", "all_gather", micro_batch_size=size).parts for size in (1, 2))
    copied_s = 4 * 2 * 2 * 2 * 1024 * LENGTH / 2.4e12
    assert two.elementwise - 2 * one.elementwise == pytest.approx(2 * 5 * copied_s)


def test_a_collective_between_hosts_uses_the_ports_of_all_its_ranks():
    """8 GPUs a host, 200 GB/s within it, 20 between hosts."""
    speed = ClusterSpeed(H200S, ROUND)
    assert speed.collective_s(200e9, 8) == pytest.approx(1)
    assert speed.collective_s(160e9, 64) == pytest.approx(1)
    assert speed.collective_s(40e9, 16, stride=4) == pytest.approx(1)
    assert speed.collective_s(20e9, 8, stride=8) == pytest.approx(1)
    assert speed.message_s(200e9, 2, stride=4) == pytest.approx(1)
    assert speed.message_s(20e9, 4, stride=4) == pytest.approx(1)


def test_a_rings_messages_hide_behind_its_kernels_until_links_are_slow():
    assert ring(4).parts.messages == 0
    slow = dataclasses.replace(ring(4), cluster=dataclasses.replace(H200S, link_within_gb_per_s=1.0))
    # three transfers of K and V of a rank's tokens, less the kernels of three steps beside them
    sent_s = 3 * 2 * 1024 * LENGTH / 4 * 2 / 1e9
    assert 0.9 * 4 * sent_s < slow.parts.messages < 4 * sent_s
    two_hosts = dataclasses.replace(ring(16), cluster=dataclasses.replace(H200S, link_between_gb_per_s=0.1))
    assert two_hosts.parts.messages > 100 * ring(16).parts.messages


def test_a_straggler_costs_the_whole_step():
    slow = dataclasses.replace(ring(4), slowdown=(1.0, 1.5, 1.0, 1.0))
    assert slow.parts.attention == pytest.approx(1.5 * ring(4).parts.attention, rel=0.05)


def test_short_rings_wait_for_their_hosts():
    """256 ring steps of 0.1 ms and a call of 0.2, in each of 4 layers, are longer than what 256 tokens take."""
    parts = ring(256).parts
    device_s = parts.products + parts.attention + parts.elementwise + parts.messages
    assert parts.host + device_s == pytest.approx(4 * 25.8e-3, rel=1e-6)
    assert ring(2).parts.host == 0


def test_documents_and_windows_are_less_attention():
    whole = ring(4).parts.attention
    packed = dataclasses.replace(ring(4), mask=CAUSAL.packed(range(0, LENGTH + 1, LENGTH // 8)))
    assert packed.parts.attention < whole / 4
    windowed = ring(4)
    fields = {"num_window_layers": 2, "window": 1024}
    windowed.config.model = dataclasses.replace(MODEL)
    vars(windowed.config.model).update(fields)  # read from a Hugging Face folder, not typed
    assert whole / 2 < windowed.parts.attention < 0.7 * whole


def test_zero_reduces_each_micro_batch_and_gathers_once():
    """12.6 M weights a layer. Gradients travel in fp32: one bucket, so nothing overlaps; weights in bf16."""
    step_time = step(Degrees(4, 1, 1), recipe="pretrain", gradient_accumulation_steps=2)
    numbers = num_parameters(MODEL)
    parts = step_time.parts
    sums_s = 20 * numbers / 2.4e12
    assert parts.gradients == pytest.approx(2 * (sums_s + 4 * numbers * 3 / 4 / 200e9))
    assert parts.optimizer == pytest.approx(40 * numbers / 4 / 2.4e12 + 2 * numbers * 3 / 4 / 200e9)


@pytest.mark.parametrize(
    ("compute_s", "exposed_s"),
    [(0.0, 0.04), (0.015, 0.03), (1.0, 0.01)],
    ids=["nothing overlaps", "two thirds of the compute", "all but the last bucket"],
)
def test_backward_passes_overlap_reductions(compute_s, exposed_s):
    """2 billion parameters are 4 buckets of 500 million, and take 4 bytes * 3/4 / 150 GB/s: 40 ms."""
    config = step(recipe="pretrain").config
    config.model = dataclasses.replace(MODEL)
    vars(config.model).update(num_weights=2_000_000_000)
    speed = ClusterSpeed(dataclasses.replace(H200S, link_within_gb_per_s=150.0), ROUND)
    engine = EngineTime(config, Degrees(4, 1, 1), speed, 1, compute_s, 0.0)
    assert engine.reduction_s == pytest.approx(exposed_s)


def test_zero_3_gathers_weights_in_both_passes():
    """All but the first of 6 parts of the weights hide behind a second of compute; with none, nothing does."""
    config = step(recipe="pretrain", zero_stage=3).config
    gathered_s = 2 * num_parameters(MODEL) * 3 / 4 / 200e9
    for compute_s, share in ((1.0, 1 / 6), (0.0, 1.0)):
        engine = EngineTime(config, Degrees(4, 1, 1), ClusterSpeed(H200S, ROUND), 1, compute_s, 0.0)
        assert engine.gathered_weights_s == pytest.approx(2 * share * gathered_s)
        assert engine.optimizer_s == pytest.approx(40 * num_parameters(MODEL) / 4 / 2.4e12)


def test_offloading_costs_the_hosts_adam():
    alone = step(recipe="pretrain", recompute="selective", offload_activations=True, offload_optimizer=True)
    numbers = num_parameters(MODEL)
    assert alone.parts.optimizer == 0
    assert alone.parts.offloading == pytest.approx(numbers * (1e-9 + 6 / 50e9))
    assert alone.offloaded_bytes == 2 * LENGTH * (1024 + 1024) * 2  # of all layers but two


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("kernel", "head_dim"), KERNEL_SPEEDS)
def test_kernel_speeds_between_measured_sizes_are_between_their_speeds(kernel, head_dim, backward):
    table = KERNEL_SPEEDS[kernel, head_dim]
    for low, high in itertools.pairwise(table):
        speeds = [kernel_tflops("h200", kernel, head_dim, size, backward) for size in (low.size, high.size)]
        assert speeds == [row.backward if backward else row.forward for row in (low, high)]
        between = kernel_tflops("h200", kernel, head_dim, (low.size * high.size) ** 0.5, backward)
        assert between == pytest.approx(sum(speeds) / 2)
    assert kernel_tflops("h200", kernel, head_dim, 1e9, backward) == table[-1][1 + backward]


def test_other_gpus_have_the_h200s_speeds_in_proportion():
    ratio = GPUS["b200"].peak_tflops / GPUS["h200"].peak_tflops
    speeds = [kernel_tflops(gpu, "flash_attn_4", 128, 20_000, backward=False) for gpu in ("b200", "h200")]
    assert speeds[0] == pytest.approx(ratio * speeds[1])
    assert kernel_tflops("a100_80gb", "mem_efficient", 96, 20_000, backward=True) == pytest.approx(0.45 * 312)
    assert MEMORY_GB_PER_S.keys() == DEVICES.keys()
