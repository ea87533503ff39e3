"""The process groups of a data x ring grid, built once; the object is the `mpu` given to `deepspeed.initialize`.

Global rank = data_rank * ring_degree + ring_rank: the ranks of one ring are neighbours. DeepSpeed asks an mpu for
three things here: the sequence-parallel group (one ring), the sequence x data group over which ZeRO shards and
gradients are reduced (all ranks), and a model-parallel group (this rank alone). Measured with DeepSpeed 0.19.8: it
must NOT have an attribute named `initialize_sequence_parallel`, which makes DeepSpeed take it for its own module.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist


class ParallelGroups:
    """Process groups of a data_degree x ring_degree grid over all ranks. Every rank must construct it, in one order.

    Raises:
        ValueError: if there is no process group, or data_degree * ring_degree is not its size.
    """

    def __init__(self, data_degree: int, ring_degree: int) -> None:
        if not dist.is_initialized():
            raise ValueError("there is no process group yet: call deepspeed.init_distributed() before")
        world_size = dist.get_world_size()
        if data_degree * ring_degree != world_size:
            raise ValueError(
                f"data_degree={data_degree} x ring_degree={ring_degree} is not the {world_size} ranks: "
                f"use ring_degree={world_size // data_degree} or another number of ranks"
            )
        self.data_degree, self.ring_degree = data_degree, ring_degree
        self.data_rank, self.ring_rank = divmod(dist.get_rank(), ring_degree)
        # new_group is collective over the world: every rank creates every group
        rings = [dist.new_group(range(d * ring_degree, (d + 1) * ring_degree)) for d in range(data_degree)]
        singles = [dist.new_group([rank]) for rank in range(world_size)]
        self._ring_group = rings[self.data_rank]
        self._single_group = singles[dist.get_rank()]
        self._all_ranks_group = dist.get_world_group()

    def get_sequence_parallel_group(self) -> Any:
        return self._ring_group

    def get_sequence_parallel_world_size(self) -> int:
        return self.ring_degree

    def get_sequence_parallel_rank(self) -> int:
        return self.ring_rank

    def get_sequence_data_parallel_group(self) -> Any:
        return self._all_ranks_group

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.data_degree * self.ring_degree

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_group(self) -> Any:
        """All ranks: DeepSpeed shards optimizer state over it."""
        return self._all_ranks_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(dist.get_world_size()))

    def get_data_parallel_world_size(self) -> int:
        """Data replicas only: DeepSpeed derives the global batch size from it."""
        return self.data_degree

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_model_parallel_group(self) -> Any:
        return self._single_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
