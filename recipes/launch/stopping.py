"""What stops training early: a signal to any rank, or a loss or gradients that are not finite."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import torch
from torch import Tensor

from data.shard import Step
from recipes.checkpoint.manifest import resume_hint
from recipes.engine.base import Engine, StepResult
from recipes.planning.plan import Plan
from recipes.run.errors import STOP_SIGNALS, RunFailed

MAX_BAD_STEPS = 10  # in a row; then the batch is not the cause


class StopRequest:
    """From its construction on, SIGTERM and SIGUSR1 ask the run to stop after a checkpoint; before, they end a rank.

    Schedulers signal one rank or all, at no common step. So the reduction of each step's loss also counts the ranks
    with a stop request, and every rank acts on the count of the step before. That count has already been copied to the
    host, so no host waits for the step that it has just enqueued.
    """

    def __init__(self) -> None:
        self.is_received = False
        self._previous: tuple[Tensor, torch.Event | None] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.is_received = True

    def is_agreed(self, num_stop_requests: Tensor) -> bool:
        """Whether to stop after this step, equal on all ranks, whose `StepResult` has `num_stop_requests`."""
        count = num_stop_requests.to("cpu", non_blocking=True)  # valid after the event
        copied = torch.cuda.current_stream().record_event() if num_stop_requests.is_cuda else None
        previous, self._previous = self._previous, (count, copied)
        if previous is None:
            return False
        count, copied = previous
        if copied is not None:
            copied.synchronize()
        return count.item() > 0

    def is_on_any_rank(self, engine: Engine) -> bool:
        """Whether any rank has a stop request, for after the last step. Every rank must call it; they wait for it."""
        return engine.max_over_ranks(float(self.is_received)) > 0


class BadSteps:
    """Stops the run or skips steps, as `engine.on_bad_step` says. Every rank must call `check` after each step.

    DeepSpeed never applies gradients that are not finite (`StepResult`). In fp16 it skips steps to find its loss scale,
    so there a step is bad only if its loss is not finite.
    """

    def __init__(self, plan: Plan, engine: Engine, run_dir: Path) -> None:
        self._plan, self._engine, self._run_dir, self._num_in_a_row = plan, engine, run_dir, 0

    def check(self, step: int, result: StepResult, batch: Step) -> str | None:
        """A line about a step that was skipped; None if the step is good. Waits for the device only if it may be bad.

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
        (epoch, number), num = batch.last.position, self._plan.sequences_per_step
        text = (
            f"step {step}: {what}; batch: {num} sequence{'s' if num > 1 else ''} up to number {number:,} of epoch "
            f"{epoch}, which has SHA-256 {batch.last.sha256()}"
        )
        print(text, flush=True)  # to the rank's log
        resume = resume_hint(self._run_dir)
        if config.engine.on_bad_step == "stop":
            advice = f"the step was not applied; {resume}: engine.on_bad_step=skip skips such batches"
        elif self._num_in_a_row == MAX_BAD_STEPS:
            advice = (
                f"{MAX_BAD_STEPS} steps in a row were skipped, so the batch is not the cause: +debug=anomaly names the "
                "operation that produces the first NaN; a smaller optimizer.lr, with its own hydra.run.dir, may avoid "
                f"it\n{resume}"
            )
        else:
            return f"{text}: skipped"
        raise RunFailed(f"{text}\n{advice}", of_all_ranks=True)
