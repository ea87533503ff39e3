"""A stopped rank on GPUs ends the run, and NCCL's flight recorder names the operations that wait for it."""

from __future__ import annotations

import pickle
import random
import re
import signal

import pytest
import torch

from tests.cli.program import PYTHON, Program
from tests.errors import names
from tests.tools.faults import JOB, LATE_S, STALL_S, Case

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_stopped_rank_is_named_and_the_flight_recorder_has_the_pending_operations(tmp_path):
    case = Case(random.Random(0), Program(tmp_path))
    job = [*JOB, "engine.dtype=bf16", "launch.num_ranks=2", "num_steps=100000", "attention.transport=p2p"]
    with case.program.started(*job, launcher=PYTHON, wandb=True, CUDA_VISIBLE_DEVICES="0,1") as running:
        ranks = running.until_it_trains()
        running.until(lambda: re.search(r"step +9/", running.stdout))
        ranks[1].send_signal(signal.SIGSTOP)
        finished = case.ends(running, STALL_S + 3)
    lines = case.failed(finished).splitlines()
    assert re.match(r"error: step \d+ .*[\d.]+ s", lines[0])
    names(lines[2], "rank 1", "stopped")
    assert case.seconds[0] < STALL_S + LATE_S
    logs = finished.run_dir / "logs"
    log = (logs / "rank_0.log").read_text()
    assert re.search(r"^pending: nccl:", log, re.MULTILINE)
    assert "in train_step" in log  # the stack of its main thread
    record = pickle.loads((logs / "flight_recorder_0").read_bytes())
    assert any(entry["profiling_name"].startswith("nccl:") for entry in record["entries"])
