"""`recipe=max_length` as people type it, on the CPU."""

from __future__ import annotations

import json
import re

import pytest

TINY = [
    "recipe=max_length", "+experiment=ra_sp", "launch.num_ranks=1", "engine.micro_batch_size=2", "model.num_layers=3",
]  # fmt: skip


def test_it_finds_the_longest_length_and_trains_it(program):
    # glibc gives back what is freed, so that the process's peak follows its tensors', not the order of its allocations
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = program.run(*TINY, "max_length.memory_gib=0.5", "max_length.confirm_s=120", **given_back)
    assert (run.exit_code, run.stderr) == (0, "")
    found = json.loads((run.run_dir / "max_length.json").read_text())
    length = found["predicted_length"]
    assert length % 256 == 0
    assert found["predicted_peak_gib"] <= found["limit_gib"] == 0.5
    tries = [row for row in found["probes"] if row["num_layers"] == 3]
    assert {row["num_layers"] for row in found["probes"][: -len(tries)]} == {1, 2}
    assert tries[0]["length"] == length
    assert tries[0]["peak_gib"] == pytest.approx(found["predicted_peak_gib"], rel=0.02)
    assert found["confirmed"] == tries[-1]  # a second one, 5 % shorter, where the prediction leaves less than its error
    assert found["longest_by_layers"]["3"] == found["curve"][-1]["length"] == length
    assert "say nothing of GPUs" in run.stdout
    confirmed = rf"confirmed: L = {tries[-1]['length']:,} trains, [\d,]+ tok/s, peak 0\.\d+ GiB; predicted 0\.\d+, [+-]"
    assert re.search(confirmed, run.stdout)


def test_in_ranks_of_a_launcher_it_says_what_to_type(program):
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = program.run(*TINY, **ranks)
    assert run.exit_code == 1
    assert run.stderr == (
        "error: recipe=max_length starts ranks anew for each probe: type python train.py, without a launcher\n"
    )
