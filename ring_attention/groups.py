"""The process groups of a data x sequence grid. The object is the `mpu` argument of `deepspeed.initialize`.

The ranks that share a sequence are neighbours, counted host by host. The part of the sequence that a rank holds is the
attention module's `sequence_rank`, which can differ from the rank's number in the group.

Of an mpu DeepSpeed needs the sequence-parallel group, the data-parallel group over which ZeRO shards and reduces
gradients (all ranks), and a model-parallel group (this rank alone). Measured with DeepSpeed 0.19.8: the mpu must NOT
have an attribute named `initialize_sequence_parallel`, or DeepSpeed takes it for its own module.
"""

from __future__ import annotations

import socket
from typing import Any

import deepspeed.comm as dist

from ring_attention.topology import ring_order
from ring_attention.transport.collectives import subgroup


class ParallelGroups:
    """Process groups of a data_degree x sequence_degree grid. Every rank must construct it, at the same point.

    `hosts` has the host of each rank of the sequence group, for the attention modules.

    Raises:
        ValueError: if there is no process group, or its size is not data_degree * sequence_degree.
    """

    def __init__(self, data_degree: int, sequence_degree: int) -> None:
        if not dist.is_initialized():
            raise ValueError("there is no process group yet: call deepspeed.init_distributed() before")
        world_size = dist.get_world_size()
        if data_degree * sequence_degree != world_size:
            raise ValueError(f"data_degree={data_degree} x sequence_degree={sequence_degree} is not {world_size} ranks")
        self.data_degree, self.sequence_degree = data_degree, sequence_degree
        all_hosts: list[Any] = [None] * world_size
        dist.all_gather_object(all_hosts, socket.gethostname())
        order = ring_order(all_hosts)
        self.data_rank = order.index(dist.get_rank()) // sequence_degree
        members = sorted(order[self.data_rank * sequence_degree :][:sequence_degree])
        self.hosts: list[str] = [all_hosts[rank] for rank in members]
        self._all_ranks_group = dist.get_world_group()
        self._sequence_group = subgroup(self._all_ranks_group, members)
        self._single_group = subgroup(self._all_ranks_group, [dist.get_rank()])

    def get_sequence_parallel_group(self) -> Any:
        return self._sequence_group

    def get_sequence_parallel_world_size(self) -> int:
        return self.sequence_degree

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence_group)

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.data_degree * self.sequence_degree

    def get_data_parallel_group(self) -> Any:
        """All ranks, because DeepSpeed shards optimizer states and reduces gradients over this group."""
        return self._all_ranks_group

    def get_data_parallel_world_size(self) -> int:
        """Data replicas only, because DeepSpeed derives the global batch size from this number."""
        return self.data_degree

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_model_parallel_group(self) -> Any:
        return self._single_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
