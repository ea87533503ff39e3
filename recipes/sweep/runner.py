"""A sweep: many runs, called trials, of which Optuna chooses the settings, and what became of each.

Optuna's journal in the sweep's folder is the memory: a trial is in it from its start. The same command with
hydra.sweep.dir of an earlier sweep runs what that one lacks: trials that were interrupted, again, and those that never
began. A trial has ended well if its RUN_DIR/summary.json has the objective; any other end is a failure of that trial.

Above it is `hydra_plugins.trials`, which launches a trial's job; `search_space` reads what is typed, `trial_report`
makes the table, the files and the figure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shlex
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from conf.compose import describe_error
from conf.schema import OBJECTIVES, ConfigError, SweepConfig
from recipes.monitor.metric_registry import minutes
from recipes.run.errors import RunFailed
from recipes.run.run_dir import SUMMARY_FILE
from recipes.sweep import report
from recipes.sweep.search_space import SearchSpace, read_space, suggest

JOURNAL_FILE, LOCK_FILE = "sweep.journal", "sweep.lock"
# fields that may differ when a sweep goes on: they change no trial's result
FREE = ("logging.", "checkpoint.", "launch.timeout_s", "sweep.num_trials", "sweep.num_parallel", "breakdown")

RunTrial = Callable[[list[str], int], JobReturn]


@dataclass(frozen=True)
class Ended:
    """A trial whose job is over, and the error of that job, if it had one."""

    trial: Trial
    duration_s: float
    error: BaseException | None


def run_sweep(
    master: DictConfig,
    settings: SweepConfig,
    overrides: list[Override],
    check: Callable[[list[str]], None],
    run_trial: RunTrial,
) -> None:
    """Run all trials that the sweep's folder lacks, then print the table and write RUN_DIR/sweep.{json,csv,png,svg}.

    Args:
        master: Hydra's composition without what is swept.
        overrides: what is swept, and what all trials have in common; the last of a field counts.
        check: raises if a trial's overrides name what there is not.
        run_trial: runs one with these overrides and this number, from 1.

    Raises:
        ConfigError: before any trial, for a sweep that cannot run, or a folder that holds another one.
        RunFailed: if all trials failed.
    """
    space = read_space(overrides, settings.sampler)
    check(space.first_overrides())
    recipes = OBJECTIVES[settings.objective][1]
    if "recipe" not in space.swept and master.recipe not in recipes:
        others = [name for name, (_, own) in OBJECTIVES.items() if master.recipe in own]
        advice = f"sweep.objective={others[0]}" if others else f"recipe={recipes[0]}"
        raise ConfigError(f"recipe={master.recipe} has no {settings.objective} for a sweep to look for: use {advice}")
    folder = Path(master.hydra.sweep.dir).absolute()
    combinations = space.num_combinations
    takes_all = combinations is not None and (settings.sampler == "grid" or combinations <= settings.num_trials)
    num_trials = combinations if takes_all and combinations else settings.num_trials
    print(*_banner(settings, space, num_trials, takes_all), sep="\n", flush=True)
    if master.explain:
        return
    goes_on = f"the same command with hydra.sweep.dir={shlex.quote(str(folder))} runs what is missing"
    print(f"folder: {folder}\nshould it be interrupted: {goes_on}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one_here(folder):
        study = _open_study(master, settings, space, folder, takes_all)
        sweep = _Sweep(study, settings, space, num_trials, folder, run_trial)
        try:
            sweep.run()
        except (KeyboardInterrupt, SystemExit):
            print(f"\ninterrupted: {goes_on}", flush=True)
            raise
        report.report(study, settings.objective, space, folder)
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        reasons = {trial.user_attrs["error"] for trial in study.trials}
        raise RunFailed(f"all {num_trials} trials failed" + (f": {reasons.pop()}" if len(reasons) == 1 else ""))


@contextlib.contextmanager
def _only_one_here(folder: Path) -> Iterator[None]:
    """Raises ConfigError if a sweep that still runs has the folder: each would take the other's trials for dead."""
    try:
        with FileLock(folder / LOCK_FILE, blocking=False):
            yield
    except Timeout:
        raise ConfigError(f"a sweep is running in {folder}: wait for it, or use another hydra.sweep.dir") from None


def _open_study(
    master: DictConfig, settings: SweepConfig, space: SearchSpace, folder: Path, takes_all: bool
) -> optuna.Study:
    """The study in the folder, new or as it was left; with every combination in its queue if it `takes_all`.

    Raises:
        ConfigError: if it was made with other settings; says which.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))
    study = optuna.create_study(
        study_name="sweep", storage=storage, direction=OBJECTIVES[settings.objective][0], load_if_exists=True
    )
    now = _settings(master, space)
    before = study.user_attrs.get("settings", now)
    differing = [
        f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise ConfigError(f"{folder} holds another sweep: {'; '.join(differing)}: use another hydra.sweep.dir")
    study.set_user_attr("settings", now)
    # a seed of its own for each start: the first trials after an interruption would repeat those before it
    # trials that run side by side are kept apart
    apart = settings.num_parallel > 1
    study.sampler = optuna.samplers.TPESampler(seed=int(master.seed) + len(study.trials), constant_liar=apart)
    if takes_all:
        for point in space.grid():
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def _settings(master: DictConfig, space: SearchSpace) -> dict[str, Any]:
    """What makes a trial's result: each field by name, with its value or the values that it is swept over."""

    def fields(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from fields(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    composed = OmegaConf.to_container(master, resolve=False)
    assert isinstance(composed, dict)
    common = fields({str(name): node for name, node in composed.items() if name != "hydra"})
    return {name: value for name, value in common if not name.startswith(FREE)} | space.texts


def _banner(settings: SweepConfig, space: SearchSpace, num_trials: int, takes_all: bool) -> list[str]:
    wanted = {"minimize": "lowest", "maximize": "highest"}[OBJECTIVES[settings.objective][0]]
    how = "every combination" if takes_all else "chosen by Optuna"
    width = max(len(name) for name in space.texts)
    return [
        f"sweep of {num_trials} trials, {how}; the {wanted} {settings.objective} is the best",
        *(f"  {name:<{width}}  {text}" for name, text in space.texts.items()),
    ]


class _Sweep:
    """The trials of a study, started and told; `run` is all there is to call."""

    def __init__(
        self,
        study: optuna.Study,
        settings: SweepConfig,
        space: SearchSpace,
        num_trials: int,
        folder: Path,
        run_trial: RunTrial,
    ) -> None:
        self._study, self._settings, self._space = study, settings, space
        self._num_trials, self._folder, self._run_trial = num_trials, folder, run_trial

    def run(self) -> None:
        """Start trials, `num_parallel` at a time, and note the end of each, until none is missing."""
        if interrupted := self._interrupted():
            print(f"going on: {', '.join(str(t.number + 1) for t in interrupted)} interrupted", flush=True)
        pending = self._pending(interrupted)
        ended: SimpleQueue[Ended] = SimpleQueue()
        num_running = 0
        while True:
            while num_running < self._settings.num_parallel and (trial := next(pending, None)) is not None:
                self._start(trial, ended)
                num_running += 1
            if not num_running:
                return
            self._note(ended.get())
            num_running -= 1

    def _interrupted(self) -> list[FrozenTrial]:
        """Trials that began and have not ended; those whose job ended well while nobody watched are noted."""
        left = []
        for frozen in self._study.get_trials(states=[TrialState.RUNNING]):
            numbers = self._read_summary(frozen.number)
            if numbers.get(self._settings.objective) is not None:
                self._tell(self._trial(frozen), numbers, None)
            else:
                left.append(frozen)
        return left

    def _pending(self, interrupted: list[FrozenTrial]) -> Iterator[Trial]:
        """What is to run; a new trial's settings are chosen only when its turn comes, from the results so far."""
        yield from (self._trial(frozen) for frozen in interrupted)
        while sum(trial.state != TrialState.WAITING for trial in self._study.trials) < self._num_trials:
            yield self._study.ask()

    def _trial(self, frozen: FrozenTrial) -> Trial:
        """A trial of the journal, to go on with: what it was given stays, what it lacks is drawn."""
        return Trial(self._study, frozen._trial_id)

    def _start(self, trial: Trial, ended: SimpleQueue[Ended]) -> None:
        values = {name: suggest(trial, name, swept) for name, swept in self._space.swept.items()}
        self._put_aside(trial.number)
        number = trial.number + 1
        print(f"trial {number}/{self._num_trials} starts | {self._space.describe(values)}", flush=True)
        overrides = [*self._space.overrides(values), f"hydra.sweep.subdir={number}"]

        def job() -> None:
            started = time.monotonic()
            error: BaseException | None = None
            try:
                result = self._run_trial(overrides, number)
                if result.status == JobStatus.FAILED:
                    error = result._return_value  # return_value raises it, after writing to stderr
            except Exception as raised:  # of composing it, or its job is lost: becomes the trial's reason
                error = raised
            ended.put(Ended(trial, time.monotonic() - started, error))

        if self._settings.num_parallel == 1:
            job()  # ranks of our own are started from the main thread, which gets the signals
        else:
            threading.Thread(target=job, daemon=True).start()  # waits for a job elsewhere; Ctrl-C does not wait for it

    def _put_aside(self, index: int) -> None:
        """A folder that an interrupted try has left: a run adds to the files that it finds."""
        run_dir = self._run_dir(index)
        if run_dir.exists():
            tries = itertools.count(1)
            run_dir.rename(next(p for n in tries if not (p := Path(f"{run_dir}.interrupted-{n}")).exists()))

    def _note(self, ended: Ended) -> None:
        trial, error = ended.trial, ended.error
        trial.set_user_attr("duration_s", round(ended.duration_s, 1))
        numbers = self._read_summary(trial.number)
        self._tell(trial, numbers, error)
        unexpected = not isinstance(error, (ConfigError, RunFailed, CompactHydraException, type(None)))
        if unexpected:
            traceback.print_exception(error)
        told = next(frozen for frozen in self._study.trials if frozen.number == trial.number)
        print(*self._progress(told), sep=" | ", flush=True)

    def _tell(self, trial: Trial, numbers: dict[str, float], error: BaseException | None) -> None:
        """The trial's end to the journal, and all there is to the files that people read."""
        for name, value in numbers.items():
            trial.set_user_attr(name, value)
        objective = self._settings.objective
        value = numbers.get(objective)
        ended_well = value is not None and math.isfinite(value)
        if error is None and not ended_well:
            error = RunFailed(f"{objective} is not {'a finite number' if objective in numbers else 'measured'}")
        if error is not None:  # of a run that ended well, too: something fell over afterwards
            trial.set_user_attr("error", one_line(error))
        if "\n" in str(error):  # the plan of a run out of memory, say, and what to type
            trial.set_user_attr("error_in_full", str(error))
        self._study.tell(trial, value if ended_well else None, state=None if ended_well else TrialState.FAIL)
        report.write_files(self._study, objective, self._space, self._folder)

    def _progress(self, told: FrozenTrial) -> list[str]:
        """The parts of the line of a trial that has ended."""
        head = f"trial {told.number + 1}/{self._num_trials}"
        finished = self._study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL])
        complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        durations_s = [
            trial.user_attrs["duration_s"] for trial in complete or finished if "duration_s" in trial.user_attrs
        ]
        left = math.ceil((self._num_trials - len(finished)) / self._settings.num_parallel)
        left_s = left * statistics.mean(durations_s or [told.user_attrs["duration_s"]])
        best = (
            f"best {self._study.best_value:.6g} (trial {self._study.best_trial.number + 1})" if complete else "no best"
        )
        took = f"{told.user_attrs['duration_s']:.0f} s"
        if told.state == TrialState.COMPLETE:
            result = f"{head} done in {took} | {self._settings.objective} {told.value:.6g}"
            if "tokens_per_s" in told.user_attrs and self._settings.objective != "tokens_per_s":
                result += f" | {told.user_attrs['tokens_per_s']:,.0f} tok/s"
        else:
            result = f"{head} FAILED after {took} | {told.user_attrs['error']}"
        return [result, best, f"{len(finished)} of {self._num_trials} done, ETA {minutes(left_s)}"]

    def _run_dir(self, index: int) -> Path:
        return self._folder / str(index + 1)

    def _read_summary(self, index: int) -> dict[str, float]:
        """The numbers of a run as a whole, the parts of its step left out; empty if it has not ended."""
        path = self._run_dir(index) / SUMMARY_FILE
        numbers = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {
            name: math.nan if value is None else value
            for name, value in numbers.items()
            if not name.startswith("parts/")
        }


def one_line(error: BaseException) -> str:
    """What went wrong, in one line: of a traceback in the message, its last line, after what stands before it."""
    text = describe_error(error) if isinstance(error, Exception) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if (start := next((n for n, line in enumerate(lines) if line.startswith("Traceback")), None)) is None:
        known = isinstance(error, (ConfigError, RunFailed, CompactHydraException))
        return lines[0] if known else f"{type(error).__name__}: {lines[0]}"
    causes = [line for line in lines[start:] if re.match(r"[\w.]+(Error|Exception|Failed|OutOfMemory)\b", line)]
    return " ".join([*lines[:start][:1], *(causes[-1:] or lines[-1:])])
