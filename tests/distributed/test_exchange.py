"""A hop whose neighbour is gone says which hop it was and who the neighbours are."""

from __future__ import annotations

import os

import pytest
import torch

from ring_attention.exchange import HopError, P2PExchange
from tests.pool import RankError, WorkerPool, parallel_groups


def hop_with_a_dead_neighbour() -> str:
    groups = parallel_groups(data_degree=1, ring_degree=2)
    exchange = P2PExchange(groups.get_sequence_parallel_group())
    exchange.post(torch.zeros(4), "the first hop").wait()  # connects
    if groups.ring_rank == 1:
        os._exit(1)
    with pytest.raises(HopError) as raised:
        exchange.post(torch.zeros(4), "forward K,V after stage 0").wait()
    raise AssertionError(f"as wanted: {raised.value}")


def test_a_dead_neighbour_is_named_with_the_hop():
    own_pool = WorkerPool()  # one of its ranks dies
    with pytest.raises(RankError, match="rank 1:\ndied") as raised:
        own_pool.run(hop_with_a_dead_neighbour, num_ranks=2)
    own_pool.close()
    assert (
        "as wanted: forward K,V after stage 0: ring rank 0 of 2, sending to global rank 1, "
        "receiving from global rank 1: " in str(raised.value)
    )
