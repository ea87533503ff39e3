"""What becomes of a step whose loss or gradients are not finite: `engine.on_bad_step`.

DeepSpeed applies no such gradients, in no precision (`engine.StepResult`); in fp16 that is how it finds its loss scale,
so there a finite loss makes a step good. Between the engine and the training loop.
"""

from __future__ import annotations

import math
from pathlib import Path

from recipes.checkpoint.manager import TrainingData
from recipes.checkpoint.manifest import resume_hint
from recipes.engine.base import Engine, StepResult
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed

MOST_IN_A_ROW = 10  # then it is not the batch


class BadSteps:
    """Every rank must make one, and call `check` after each step."""

    def __init__(self, plan: Plan, engine: Engine, run_dir: Path) -> None:
        self._plan, self._engine, self._run_dir, self._in_a_row = plan, engine, run_dir, 0

    def check(self, step: int, result: StepResult, data: TrainingData) -> str | None:
        """What to tell people of a step that was skipped; None if it was good. Waits for the device if there is doubt.

        Args:
            data: which has just given the step's last sequence.

        Raises:
            RunFailed: on every rank, if the run is to stop.
        """
        loss = float("nan") if result.applied else result.loss.item()
        config = self._plan.config
        if result.applied or (config.engine.dtype == "fp16" and math.isfinite(loss)):
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            what = f"the gradients of a loss of {loss:.4f} are not finite"
        if ranks := self._engine.ranks_with_nonfinite_loss():
            what += f", that of the tokens of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        tokens = self._plan.data_tokens_per_step
        first = 0 if config.data.overfit_one_batch else (step - 1) * tokens
        text = (
            f"step {step}: {what}; its batch: training tokens {first:,} to {first + tokens - 1:,}, the last sequence "
            f"with SHA-256 {data.last_sha256}"
        )
        print(text, flush=True)  # the rank's log
        if config.engine.on_bad_step == "stop":
            raise RunFailed(
                f"{text}\nnothing of it was applied; {resume_hint(self._run_dir)}: engine.on_bad_step=skip leaves "
                "such batches out",
                of_all_ranks=True,
            )
        if self._in_a_row == MOST_IN_A_ROW:
            raise RunFailed(
                f"{text}\n{MOST_IN_A_ROW} steps in a row were skipped, so it is not the batch: +debug=anomaly names "
                "the operation that makes the first NaN, and a run with a smaller optimizer.lr, and a hydra.run.dir of "
                f"its own, may make none\n{resume_hint(self._run_dir)}",
                of_all_ranks=True,
            )
        return f"{text}: skipped"
