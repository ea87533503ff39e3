"""Other libraries' attention, beside ours in `bench_attention`, says why it cannot run before it is called."""

import pytest
import torch

from conf.schema import ConfigError
from recipes.benchmark.baselines import BASELINES
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec


class TwoRanks(ParallelGroups):
    sequence_degree = 2

    def __init__(self) -> None:
        """No process group: a peer that is refused needs none."""


@pytest.mark.parametrize("name", BASELINES)
def test_heads_too_large_for_cudnn_are_refused(name: str):
    spec = KernelSpec("cuda", (9, 0), torch.float16, num_heads=16, num_kv_heads=16, head_dim=512)
    with pytest.raises(ConfigError, match=r"cuDNN's, needs a head_dim that is a multiple of 8 up to 128, not 512"):
        BASELINES[name](TwoRanks(), 1024, spec)
