"""Two runs at once, with +debug=deterministic; test_launchers.py runs the other presets."""

from __future__ import annotations

import pytest

from tests.cli.program import SMALL

pytestmark = pytest.mark.slow


def test_deterministic_runs_at_the_same_time_do_not_collide_and_give_the_same_losses(program):
    arguments = ["+experiment=ra_sp", "+debug=deterministic", *SMALL, "num_steps=4", "logging.every_n_steps=1"]
    with (
        program.started(*arguments, name="one", wandb=True) as one,
        program.started(*arguments, name="other", wandb=True) as other,
    ):
        results = [one.finish(), other.finish()]
    losses = [[line["train/loss"] for line in result.metrics] for result in results]
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    for result in results:
        assert len(list((result.run_dir / "wandb").glob("offline-run-*"))) == 1
        assert str(result.run_dir / "logs") in result.stdout
