"""Sequences that grow while training: a killed run goes on as an uninterrupted one, with its metrics."""

from __future__ import annotations

import re
import signal

import pytest

from tests.cli.program import ENDS_WITHIN_S, Finished, Program
from tests.errors import some_line_names

JOB = [
    "+experiment=ra_sp",
    "launch.num_ranks=2",
    "data.sequence_length=384",
    "data.stages=[[1,128],[9,256],[30,384]]",
    "data.validation_sequences=2",
    "engine.train_batch_size=2",
    "engine.dtype=fp32",
    "num_steps=36",
    "logging.every_n_steps=4",
    "checkpoint.every_n_steps=5",
    "breakdown=false",
]
COMPUTED = ("loss", "grad_norm", "learning_rate", "data_epoch", "data_sequence", "tokens_seen", "padding_pct")


def computed(finished: Finished) -> list[tuple[float, ...]]:
    return [(row["step"], *(row[f"train/{name}"] for name in COMPUTED)) for row in finished.metrics]


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_second_stage_is_bit_identical(program: Program):
    with program.started(*JOB, name="killed") as running:
        running.until(lambda: re.search(r"step +16/", running.stdout))
        running.family()
        running.process.send_signal(signal.SIGKILL)
        running.finish(ENDS_WITHIN_S)
        running.assert_nothing_is_left()
    resumed = program.run(*JOB, name="killed")
    assert resumed.exit_code == 0, resumed.stderr
    reference = program.run(*JOB, name="reference")
    assert reference.exit_code == 0, reference.stderr
    some_line_names(resumed.stdout.splitlines(), "resuming")
    for step, length in ((9, 256), (30, 384)):
        some_line_names(reference.stdout.splitlines(), f"step {step}", f"sequences of {length} tokens")
    assert computed(resumed) == computed(reference)
    assert resumed.summary["validation_loss"] == reference.summary["validation_loss"]
    seen = {row["step"]: row["train/tokens_seen"] for row in reference.metrics}
    assert (seen[8], seen[12], seen[36]) == (2 * 8 * 128, 2 * (8 * 128 + 4 * 256), 2 * (8 * 128 + 21 * 256 + 7 * 384))
    for row in reference.metrics:
        tokens_per_step = 2 * {8: 128, 28: 256, 36: 384}.get(row["step"], 0)
        if tokens_per_step:  # an interval within one stage, without padding
            assert row["train/tokens_per_s"] == pytest.approx(tokens_per_step / row["train/step_time_p50_s"])
            assert row["train/tpot_ms"] == pytest.approx(1e3 * row["train/step_time_p50_s"] / (tokens_per_step / 2))
