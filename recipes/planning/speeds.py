"""Measured speeds that forecasts are built from: attention kernels by size, and constants that were fitted.

The tables are rounded from docs/results: `ring_blocks_*` and `block_speeds_*` on an H200, each kernel by itself. A GPU
without a table of its own gets the H200's in proportion to its peak, and a kernel without one a share of the peak.
What recipe=calibrate measured (`measured`) takes the place of these tables.
`python -m docs.tools.check_forecast` compares forecasts with every step that was measured; with `--fit` it fits the
constants again, on half of these steps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from recipes.planning.throughput import DEVICES

MEASURED_ON = "h200"
FP32_SHARE = 1 / 16  # of the peak: fp32 products do not use tensor cores
HOST_GB_PER_S = 50.0  # between a GPU and its host's memory: PCIe 5, 16 lanes, as attained
UNMEASURED_SHARE = 0.55, 0.45  # of the peak, forward and backward: kernels that no table has, on large tiles
# of the device's memory, from data sheets, in 1e9 bytes per second
MEMORY_GB_PER_S = {
    "h200": 4800.0,
    "h200_nvl": 4800.0,
    "h100": 3350.0,
    "h100_nvl": 3900.0,
    "h100_pcie": 2000.0,
    "a100_80gb": 2000.0,
    "a100_40gb": 1555.0,
    "l40s": 864.0,
    "b200": 8000.0,
    "cpu": 24.0,
}


class KernelSpeed(NamedTuple):
    """TFLOP/s of a call as large as a causal square of `size` tokens with 4,096 numbers in all heads.

    Several rows of a batch, or more heads, occupy a GPU as a longer sequence does.
    """

    size: float
    forward: float
    backward: float


HEAD_NUMBERS = 4096
# by kernel and head size
KERNEL_SPEEDS: dict[tuple[str, int], tuple[KernelSpeed, ...]] = {
    ("flash_attn_4", 128): (
        # backward by itself 205, at 0.42 ms, which the host needs for a call; graphs of rings do not wait for it
        KernelSpeed(2_048, 500, 469),
        KernelSpeed(4_096, 585, 469),
        KernelSpeed(8_192, 626, 575),
        KernelSpeed(16_384, 645, 600),
        KernelSpeed(32_768, 656, 609),
        KernelSpeed(65_536, 650, 623),
        KernelSpeed(131_072, 652, 621),
    ),
    ("flash_attn_4", 64): (KernelSpeed(2_048, 338, 166), KernelSpeed(8_192, 545, 492), KernelSpeed(32_768, 574, 545)),
    ("cudnn", 64): (KernelSpeed(2_048, 241, 144), KernelSpeed(8_192, 361, 333), KernelSpeed(32_768, 411, 398)),
    ("cudnn", 128): (KernelSpeed(2_048, 280, 190), KernelSpeed(8_192, 468, 399), KernelSpeed(32_768, 565, 501)),
    # at the clock of a long run: 574 and 611 forward in short ones
    ("ffpa", 512): (
        KernelSpeed(2_048, 213, 73),
        KernelSpeed(14_142, 430, 200),
        KernelSpeed(28_284, 475, 222),
        KernelSpeed(46_341, 500, 222),
    ),
}
# how much faster full blocks are than causal squares, forward and backward, from rings of two in
# attention_*_heads_512_*: causal kernels with large tiles compute much that they then mask
FULL_BLOCK_GAINS = {"ffpa": (1.2, 1.33)}


@dataclass(frozen=True)
class Constants:
    """What no table has. The defaults are where a fit starts, from data sheets and profiles.

    Args:
        matmul_share: of the peak, by a layer's matrix products.
        matmul_half_tokens: tokens at which products reach half of that.
        forward_share, backward_share: of a kernel's speed alone, where a long step's clock is lower.
        memory_share: of the data sheet's bandwidth, by norms, activations, copies and the optimizer.
        link_share: of a cluster's link, by collectives: all-to-all, all-gather, reduce-scatter.
        call_ms, ring_step_ms: of the host for a forward call of attention, and for each of its ring steps. No step of a
            model that was measured waits for its host, so these are from `ring_host_H200.json`.
        backward_issue: the host's time for a backward pass, of that for a forward pass.
        graph_ms: of the host for a pass that is a CUDA graph, beyond the call: copies of inputs and results, and the
            launch, in place of ring steps. It hardly grows with these. From rings of two in `pass_graphs_2xH200.json`;
            `docs.tools.check_forecast.graph_ms` has the formula.
        wait_share: of a layer's time, lost where ranks wait for each other in each layer.
        gradient_bytes: memory traffic per parameter and micro-batch for the sum of gradients.
        optimizer_bytes: memory traffic per updated parameter: norm, scaling and Adam.
        host_adam_ns: per parameter that the host updates.
        first_step_s: what the first step of a run takes longer, while kernels are compiled.
        pinned_s_per_gib: of host memory that the first step allocates for activations.
    """

    matmul_share: float = 0.70
    matmul_half_tokens: float = 200.0
    forward_share: float = 1.0
    backward_share: float = 1.0
    memory_share: float = 0.5
    link_share: float = 0.85
    call_ms: float = 0.2
    ring_step_ms: float = 0.1
    backward_issue: float = 3.5
    graph_ms: float = 0.15
    wait_share: float = 0.01
    gradient_bytes: float = 20.0
    optimizer_bytes: float = 40.0
    host_adam_ns: float = 1.0
    first_step_s: float = 10.0
    pinned_s_per_gib: float = 0.25


# `--fit` on even rows
FITTED = Constants(
    matmul_share=0.668,
    matmul_half_tokens=184.0,
    forward_share=1.005,
    backward_share=0.964,
    memory_share=0.850,
    link_share=1.04,
    wait_share=0.0111,
    gradient_bytes=18.1,
    optimizer_bytes=42.8,
    host_adam_ns=0.804,
    first_step_s=14.1,
    pinned_s_per_gib=0.222,
)


def kernel_tflops(gpu: str, kernel: str, head_dim: int, size: float, backward: bool, is_full: bool = False) -> float:
    """The speed of an attention kernel alone: interpolated in the logarithm of the size, constant beyond the table.

    Args:
        gpu: a name in `DEVICES`.
        size: as in `KernelSpeed`.
        is_full: whether the block has no mask.
    """
    table = KERNEL_SPEEDS.get((kernel, head_dim))
    if table is None:
        return UNMEASURED_SHARE[backward] * DEVICES[gpu].peak_tflops
    ratio = DEVICES[gpu].peak_tflops / DEVICES[MEASURED_ON].peak_tflops
    return ratio * table_tflops(table, kernel, size, backward, is_full)


def table_tflops(table: Sequence[KernelSpeed], kernel: str, size: float, backward: bool, is_full: bool) -> float:
    """As `kernel_tflops`, from a table of this GPU."""
    gain = FULL_BLOCK_GAINS[kernel][backward] if is_full and kernel in FULL_BLOCK_GAINS else 1.0
    return gain * interpolated([(row.size, row.backward if backward else row.forward) for row in table], size)


def interpolated(table: Sequence[tuple[float, float]], size: float) -> float:
    """The speed at `size` of (size, speed) in ascending order: linear in the size's logarithm, constant beyond."""
    upper = bisect.bisect_left([row for row, _ in table], size)
    if upper in (0, len(table)):
        return table[min(upper, len(table) - 1)][1]
    (low, slower), (high, faster) = table[upper - 1], table[upper]
    return slower + math.log(size / low) / math.log(high / low) * (faster - slower)
