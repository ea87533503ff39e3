"""Other libraries' attention, which `bench_attention` times, refuses what it cannot run before it is called."""

import pytest
import torch

from conf.schema import ConfigError
from recipes.benchmark.baselines import BASELINES
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec


class TwoRanks(ParallelGroups):
    sequence_degree = 2

    def __init__(self) -> None:
        """No process group: a baseline refuses before it needs one."""


@pytest.mark.parametrize("name", BASELINES)
def test_a_head_dim_above_cudnns_limit_is_refused(name: str):
    spec = KernelSpec("cuda", (9, 0), torch.float16, num_heads=16, num_kv_heads=16, head_dim=512)
    with pytest.raises(ConfigError, match=r"cuDNN's, needs a head_dim that is a multiple of 8 from 8 to 128, not 512"):
        BASELINES[name](TwoRanks(), 1024, spec)
