"""`recipe=max_length` as people type it, on the CPU."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.program import PYTHON
from tests.errors import names, some_line_names

pytestmark = pytest.mark.slow

TINY = [
    "recipe=max_length", "+experiment=ra_sp", "launch.num_ranks=1", "engine.micro_batch_size=8", "model.num_layers=12",
]  # fmt: skip


def test_the_longest_length_is_predicted_and_trained(program):
    # a fork's peak would count all that its server has imported
    run = program.run(*TINY, "max_length.memory_gib=0.56", "max_length.confirm_s=120", launcher=PYTHON)
    assert (run.exit_code, run.stderr) == (0, "")
    found = json.loads((run.run_dir / "max_length.json").read_text())
    length = found["predicted_length"]
    assert length % 256 == 0
    assert found["predicted_peak_gib"] <= found["limit_gib"] == 0.56
    first, last = found["attempts"][0], found["attempts"][-1]
    assert first["length"] == found["curve"][-1]["length"] == length
    # a process adds some of its own to its tensors (25 MiB on one kind of CPU, 38 on another, with the same packages)
    assert 0.015 < first["peak_gib"] - found["predicted_peak_gib"] < 0.048
    assert found["confirmed"] == last
    some_line_names(run.stdout.splitlines(), "!!!", "CPU", "GPUs")
    [confirmed] = [line for line in run.stdout.splitlines() if "confirmed" in line]
    names(confirmed, f"{last['length']:,}", f"{last['peak_gib']:.3f} GiB")
    assert re.search(r" [\d,]+ tok/s", confirmed)


def test_ranks_of_a_launcher_are_refused(program):
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = program.run(*TINY, **ranks)
    assert run.exit_code == 1
    [error] = run.stderr.splitlines()
    names(error, "error", "recipe=max_length", "python train.py")
