"""Other libraries' attention, which `bench_attention` times, refuses what it cannot run before it is called."""

import pytest
import torch

from conf.schema import ConfigError
from recipes.benchmark.baselines import BASELINES
from recipes.benchmark.packed_baselines import PACKED_BASELINES, varlen
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec
from tests.errors import refused


class TwoRanks(ParallelGroups):
    sequence_degree = 2

    def __init__(self) -> None:
        """No process group: a baseline refuses before it needs one."""


@pytest.mark.parametrize("name", BASELINES)
def test_a_head_dim_above_cudnns_limit_is_refused(name: str):
    spec = KernelSpec("cuda", (9, 0), torch.float16, num_heads=16, num_kv_heads=16, head_dim=512)
    with refused(ConfigError, "head_dim", 8, 128, 512):
        BASELINES[name](TwoRanks(), 1024, spec)


CPU = KernelSpec("cpu", None, torch.float32, num_heads=4, num_kv_heads=3, head_dim=32)
ENDS = (0, 100, 256)


def test_the_cpu_has_no_varlen_kernel_and_no_backward_pass_of_flex_attention():
    with refused(ConfigError, "varlen", "flash_attn_4", "aten_flash", "cuda", "cpu"):
        varlen(ENDS, CPU)
    with refused(ConfigError, "flex_attention", "CPU"):
        PACKED_BASELINES["torch context_parallel, flex"](TwoRanks(), ENDS, CPU)


def test_documents_of_a_length_that_a_baseline_cannot_shard_are_refused():
    with refused(ConfigError, 255, 3, 2):
        PACKED_BASELINES["DeepSpeed Ulysses"](TwoRanks(), (0, 100, 255), CPU)
    spec = KernelSpec("cuda", (9, 0), torch.bfloat16, num_heads=4, num_kv_heads=4, head_dim=32)
    with refused(ConfigError, 384, 256, 128):
        PACKED_BASELINES["torch context_parallel, flex"](TwoRanks(), (0, 100, 384), spec)
