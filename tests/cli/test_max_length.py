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
    *probes, tried = found["probes"]
    assert {row["num_layers"] for row in probes} == {1, 2}
    assert (tried["num_layers"], tried["length"]) == (3, length)
    assert tried["peak_gib"] == pytest.approx(found["predicted_peak_gib"], rel=0.02)
    assert found["confirmed"] == tried
    assert found["longest_by_layers"]["3"] == found["curve"][-1]["length"] == length
    assert "say nothing of GPUs" in run.stdout
    assert re.search(
        rf"confirmed: L = {length:,} trains, [\d,]+ tok/s, peak 0\.\d+ GiB; predicted 0\.\d+, [+-]", run.stdout
    )


def test_in_ranks_of_a_launcher_it_says_what_to_type(program):
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = program.run(*TINY, **ranks)
    assert run.exit_code == 1
    assert run.stderr == (
        "error: recipe=max_length starts ranks anew for each probe: type python train.py, without a launcher\n"
    )
