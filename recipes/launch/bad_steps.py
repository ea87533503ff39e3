"""Stops or skips on steps whose loss or gradients are not finite, as `engine.on_bad_step` says.

DeepSpeed never applies such gradients (`StepResult`). In fp16 it skips steps to find its loss scale, so there a step is
bad only if its loss is not finite.
"""

from __future__ import annotations

import math
from pathlib import Path

from recipes.checkpoint.manager import TrainingData
from recipes.checkpoint.manifest import resume_hint
from recipes.engine.base import Engine, StepResult
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed

MAX_BAD_STEPS = 10  # in a row; then the batch is not the cause


class BadSteps:
    """Checks each step. Every rank must make one and call `check` after each step."""

    def __init__(self, plan: Plan, engine: Engine, run_dir: Path) -> None:
        self._plan, self._engine, self._run_dir, self._num_in_a_row = plan, engine, run_dir, 0

    def check(self, step: int, result: StepResult, data: TrainingData) -> str | None:
        """A line about a step that was skipped; None if the step is good. Waits for the device only if it may be bad.

        Args:
            data: has just yielded the step's last sequence.

        Raises:
            RunFailed: on every rank, if the run must stop.
        """
        loss = float("nan") if result.applied else result.loss.item()
        config = self._plan.config
        if result.applied or (config.engine.dtype == "fp16" and math.isfinite(loss)):
            self._num_in_a_row = 0
            return None
        self._num_in_a_row += 1
        what = f"the gradients of loss {loss:.4f} are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        if ranks := self._engine.ranks_with_nonfinite_loss():
            what += f" on the tokens of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        tokens = self._plan.data_tokens_per_step
        first = 0 if config.data.overfit_one_batch else (step - 1) * tokens
        text = (
            f"step {step}: {what}; batch: training tokens {first:,} to {first + tokens - 1:,}, last sequence SHA-256 "
            f"{data.last_sha256}"
        )
        print(text, flush=True)  # to the rank's log
        if config.engine.on_bad_step == "stop":
            raise RunFailed(
                f"{text}\nthe step was not applied; {resume_hint(self._run_dir)}: engine.on_bad_step=skip skips such "
                "batches",
                of_all_ranks=True,
            )
        if self._num_in_a_row == MAX_BAD_STEPS:
            raise RunFailed(
                f"{text}\n{MAX_BAD_STEPS} steps in a row were skipped, so the batch is not the cause: +debug=anomaly "
                "names the operation that produces the first NaN; a smaller optimizer.lr, with its own hydra.run.dir, "
                f"may avoid it\n{resume_hint(self._run_dir)}",
                of_all_ranks=True,
            )
        return f"{text}: skipped"
