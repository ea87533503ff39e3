"""Other libraries' attention, which `bench_attention` times, refuses what it cannot run before it is called."""

import pytest
import torch

from conf.schema import ConfigError
from recipes.benchmark.baselines import BASELINES
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
