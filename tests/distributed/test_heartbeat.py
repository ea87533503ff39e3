"""Which rank waits for which in the ring, as the heartbeats say while one rank is late."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from recipes.run.heartbeat import read_rank_state
from tests.errors import names
from tests.pool import WorkerPool, parallel_groups

LATE_S, LOOK_S = 1.0, 0.5


def attention_beside_a_late_rank(run_dir: Path) -> list[str]:
    """On each rank: the states of all ranks while rank 1 has not started the second of two passes."""
    import deepspeed.comm as dist

    from recipes.run.heartbeat import Heartbeat, describe_ranks
    from ring_attention import RingAttention, trace

    rank, num_ranks, lines = dist.get_rank(), dist.get_world_size(), []
    attention = RingAttention("auto", parallel_groups(1, num_ranks).get_sequence_parallel_group())
    q = torch.randn(1, 8, 2, 8)
    attention(q, q, q, 0)
    heartbeat = Heartbeat(run_dir, rank)
    dist.barrier()
    trace.set_status_listener(heartbeat.update)
    trace.report_status("step", "9")
    trace.report_status("part", "data")
    look = threading.Timer(LOOK_S, lambda: lines.extend(describe_ranks(run_dir, num_ranks, time.time())))
    look.start()
    if rank == 1:
        time.sleep(LATE_S)
    trace.report_status("part", "forward")
    attention(q, q, q, 0)
    look.join()
    trace.set_status_listener(None)
    dist.barrier()
    return lines


def test_the_ring_step_the_transfer_and_the_late_rank_are_named(pool: WorkerPool, tmp_path: Path):
    (tmp_path / "logs").mkdir()
    for lines in pool.run(attention_beside_a_late_rank, tmp_path, num_ranks=4):
        names(lines[1], "rank 1", "step 9, data", "<- behind")
        transfer = "forward K,V after ring step 0"
        names(lines[2], "rank 2", "step 9, forward, forward ring step 0", transfer, "2 of 4", "global rank 1")
        # rank 1 owes rank 2 keys that rank 3 gets from rank 2 later
        transfer = "forward K,V after ring step 1"
        names(lines[3], "rank 3", "step 9, forward, forward ring step 1", transfer, "3 of 4", "global rank 2")
        assert not any("behind" in lines[rank] for rank in (0, 2, 3))
    for rank in range(4):  # afterwards
        assert str(read_rank_state(tmp_path, rank)) == "step 9, forward"
