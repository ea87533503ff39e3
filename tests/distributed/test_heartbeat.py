"""Who waits for whom in the ring, as the records of its ranks have it while one of them is late."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from recipes.run.heartbeat import read_rank_state
from tests.pool import WorkerPool, parallel_groups

LATE_S, LOOK_S = 1.0, 0.5


def attention_beside_a_late_rank(run_dir: Path) -> list[str]:
    """On each rank: where all are while rank 1 has not come to the second of two passes."""
    import deepspeed.comm as dist

    from recipes.run.heartbeat import Heartbeat, describe_ranks
    from ring_attention import RingAttention, trace

    rank, num_ranks, seen = dist.get_rank(), dist.get_world_size(), []
    attention = RingAttention("auto", parallel_groups(1, num_ranks).get_sequence_parallel_group())
    q = torch.randn(1, 8, 2, 8)
    attention(q, q, q, 0)
    record = Heartbeat(run_dir, rank)
    dist.barrier()
    trace.set_status_listener(record.tell)
    trace.report_status("step", "9")
    trace.report_status("part", "data")
    look = threading.Timer(LOOK_S, lambda: seen.extend(describe_ranks(run_dir, num_ranks, time.time())))
    look.start()
    if rank == 1:
        time.sleep(LATE_S)
    trace.report_status("part", "forward")
    attention(q, q, q, 0)
    look.join()
    trace.set_status_listener(None)
    dist.barrier()
    return seen


def test_the_ring_step_the_transfer_and_the_late_rank_are_named(pool: WorkerPool, tmp_path: Path):
    (tmp_path / "logs").mkdir()
    for seen in pool.run(attention_beside_a_late_rank, tmp_path, num_ranks=4):
        places = [line.split(": ", 1)[1].partition(", for ") for line in seen]
        assert places[1][0] == "step 9, data"
        assert places[1][2].endswith(" s <- behind")
        assert places[2][0] == (
            "step 9, forward, forward ring step 0, waiting in forward K,V after ring step 0: ring rank 2 of 4, "
            "receiving from ring rank 1 (global rank 1)"
        )
        # rank 1 owes rank 2 keys, which rank 3 gets from it later
        third = "step 9, forward, forward ring step 1, waiting in forward K,V after ring step 1: ring rank 3 of 4, "
        assert places[3][0].startswith(f"{third}receiving")
        assert not any("behind" in places[rank][2] for rank in (0, 2, 3))
    for rank in range(4):  # it is over
        assert str(read_rank_state(tmp_path, rank)) == "step 9, forward"
