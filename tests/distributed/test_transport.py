"""A transfer whose neighbour is dead or stalls names the transfer, the ring rank and the neighbours."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from ring_attention import RingAttention
from ring_attention.transport import P2PMessage, P2PTransport, TransferError
from ring_attention.transport.collectives import group_timeout
from tests.errors import is_named, names
from tests.pool import RankError, WorkerPool, parallel_groups


def group() -> Any:
    return parallel_groups(data_degree=1, sequence_degree=3).get_sequence_parallel_group()


def transfer_with_a_dead_neighbour() -> str:
    transport = P2PTransport(group())
    rank = transport.ring_rank

    def post(purpose: str) -> None:
        send, receive = (
            P2PMessage((torch.zeros(4),), (rank + 1) % 3, ""),
            P2PMessage((torch.empty(4),), (rank - 1) % 3, ""),
        )
        transport.post(purpose, [send], [receive]).wait()

    post("the first transfer")  # connects
    if rank == 1:
        os._exit(1)
    with pytest.raises(TransferError) as raised:
        post("forward K,V after ring step 0")
    raise AssertionError(f"on rank {rank}: {raised.value}")


def test_a_dead_neighbour_is_named_with_the_transfer():
    own_pool = WorkerPool(timeout_s=20)  # one of its ranks dies
    with pytest.raises(RankError, match="rank 1:\ndied") as raised:
        own_pool.run(transfer_with_a_dead_neighbour, num_ranks=3)
    own_pool.close()
    [line] = [line for line in str(raised.value).splitlines() if line.startswith("AssertionError: on rank 2")]
    names(line, "forward K,V after ring step 0", "ring rank 2 of 3", "ring rank 1", "global rank 1")


def attention_beside_a_stalled_rank() -> str:
    """Rank 1 stalls. The others' error, and after how many seconds."""
    attention, q = RingAttention("auto", group()), torch.randn(1, 4, 2, 8)
    attention(q, q, q, 0)
    started = time.monotonic()
    if attention.sequence_rank == 1:
        time.sleep(12)
        return "stalled"
    try:
        attention(q, q, q, 0)
    except TransferError as error:
        return f"{time.monotonic() - started:.0f} s: {error}"
    return "unharmed"  # contiguous and causal: rank 0 waits only for rank 1 to take its keys


@pytest.mark.slow
def test_a_stalled_neighbour_ends_the_call_within_the_timeout_of_the_group():
    own_pool = WorkerPool(timeout_s=5)
    first, stalled, last = own_pool.run(attention_beside_a_stalled_rank, num_ranks=3)
    own_pool.close()
    assert stalled == "stalled"
    names(last, "forward K,V after ring step 0", "ring rank 2 of 3", "ring rank 1", "global rank 1")
    assert float(last.split()[0]) < 5 + 3
    assert first == "unharmed" or is_named(first, "global rank 1")


def timeouts() -> list[float]:
    groups = parallel_groups(data_degree=1, sequence_degree=2)
    return [
        group_timeout(one).total_seconds()
        for one in (groups.get_sequence_parallel_group(), groups.get_model_parallel_group())
    ]


def test_groups_inherit_the_timeout_of_the_run():
    """By default torch gives a new group half an hour, whatever the run's timeout is."""
    own_pool = WorkerPool(timeout_s=33)
    assert own_pool.run(timeouts, num_ranks=2) == [[33.0, 33.0]] * 2
    own_pool.close()
