"""A sweep: many runs, called trials, with settings that Optuna chooses.

Optuna's journal in the sweep's folder records every trial from its start, so the same command with hydra.sweep.dir of
that folder runs what is missing. A trial succeeds if its RUN_DIR/summary.json has the objective. Any other end is a
failure of that trial, not of the sweep.
"""

from __future__ import annotations

import itertools
import json
import math
import queue
import re
import shlex
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from conf.compose import describe_error
from conf.schema import OBJECTIVES, ConfigError, SweepConfig, flatten
from recipes.run.errors import RunFailed
from recipes.run.lock import locked
from recipes.run.run_dir import SUMMARY_FILE
from recipes.run.text_table import text_table
from recipes.sweep import report
from recipes.sweep.search_space import SearchSpace, format_value, read_space

JOURNAL_FILE = "sweep.journal"
# prefixes of fields that change no trial's result: they may differ when a sweep is resumed
RESUME_SAFE = (
    "logging.",
    "checkpoint.",
    "launch.timeout_s",
    "launch.check_memory",
    "sweep.num_",
    "breakdown",
    "explain",
    "compare.",
)
EXPECTED_ERRORS = (ConfigError, RunFailed, CompactHydraException)  # their messages are complete without a traceback

RunTrial = Callable[[list[str], int], JobReturn]
Check = Callable[[list[str]], None]


def run_sweep(
    composed: DictConfig, settings: SweepConfig, overrides: list[Override], check: Check, run_trial: RunTrial
) -> None:
    """Run all trials that the sweep's folder lacks, then print the table and write the files of `report`.

    Args:
        composed: Hydra's composition without the swept fields.
        overrides: the swept fields, and those that all trials have in common. The last override of a field counts.
        check: raises if a trial's overrides name unknown fields or options.
        run_trial: runs a trial with these overrides and this number, from 1.

    Raises:
        ConfigError: before any trial, for a sweep that cannot run or a folder that holds another sweep.
        RunFailed: if all trials failed.
    """
    space = read_space(overrides, settings.sampler)
    check(space.overrides(next(space.grid())))
    direction, recipes = OBJECTIVES[settings.objective]
    if "recipe" not in space.swept and composed.recipe not in recipes:
        others = [name for name, (_, own) in OBJECTIVES.items() if composed.recipe in own]
        advice = f"sweep.objective={others[0]}" if others else f"recipe={recipes[0]}"
        raise ConfigError(
            f"recipe={composed.recipe} has no sweep.objective={settings.objective} to optimize: use {advice}"
        )
    folder = Path(composed.hydra.sweep.dir).absolute()
    is_exhaustive = settings.sampler == "grid" or space.num_combinations <= settings.num_trials
    num_trials = int(space.num_combinations) if is_exhaustive else settings.num_trials
    print(
        f"sweep of {num_trials} trials, {'all combinations' if is_exhaustive else 'chosen by Optuna'}, "
        f"to {direction} {settings.objective}",
        *(f"  {line}" for line in text_table([[name, text] for name, text in space.texts.items()])),
        sep="\n",
        flush=True,
    )
    if composed.explain:
        if (folder / JOURNAL_FILE).exists():
            _check_same_sweep(optuna.load_study(study_name="sweep", storage=_journal(folder)), composed, space, folder)
        return
    print(f"to resume, repeat the command with hydra.sweep.dir={shlex.quote(str(folder))}", flush=True)
    with locked(folder, "hydra.sweep.dir"):  # two sweeps would take each other's trials for interrupted
        study = _open_study(composed, settings, space, folder, is_exhaustive)
        _Sweep(study, settings, space, num_trials, folder, run_trial).run()
        report.report(study, settings.objective, space, folder)
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        reasons = {trial.user_attrs["error"] for trial in study.trials}
        raise RunFailed(f"all {num_trials} trials failed" + (f": {reasons.pop()}" if len(reasons) == 1 else ""))


def _open_study(
    composed: DictConfig, settings: SweepConfig, space: SearchSpace, folder: Path, is_exhaustive: bool
) -> optuna.Study:
    """The folder's study, new or resumed, with all combinations in its queue if exhaustive. Refuses other settings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction, _ = OBJECTIVES[settings.objective]
    storage = _journal(folder)
    study = optuna.create_study(study_name="sweep", storage=storage, direction=direction, load_if_exists=True)
    study.set_user_attr("settings", _check_same_sweep(study, composed, space, folder))
    study.sampler = optuna.samplers.TPESampler(
        seed=int(composed.seed) + len(study.trials),  # a resumed sweep must not repeat its first trials
        constant_liar=settings.num_parallel > 1,  # keeps parallel trials apart
    )
    if is_exhaustive:
        for point in space.grid():
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def _journal(folder: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))


def _check_same_sweep(study: optuna.Study, composed: DictConfig, space: SearchSpace, folder: Path) -> dict[str, Any]:
    """The settings of all trials. Raises ConfigError if the study has others."""
    fields: Any = OmegaConf.to_container(composed, resolve=False)
    del fields["hydra"]
    now = flatten(fields) | space.texts
    before = study.user_attrs.get("settings", now)
    differing = [
        f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and not name.startswith(RESUME_SAFE)
    ]
    if differing:
        raise ConfigError(f"{folder} holds another sweep: {'; '.join(differing)}: use another hydra.sweep.dir")
    return now


@dataclass
class _Sweep:
    """Runs the trials of a study and records their results."""

    study: optuna.Study
    settings: SweepConfig
    space: SearchSpace
    num_trials: int
    folder: Path
    run_trial: RunTrial
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Run the trials that are missing, `num_parallel` at a time. An error of any thread ends the sweep."""
        pending = self._pending()
        ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                while True:
                    with self._lock:
                        trial = next(pending, None)
                    if trial is None:
                        break
                    self._run(trial)
                ends.put(None)
            except BaseException as error:
                ends.put(error)

        num_parallel = self.settings.num_parallel
        if num_parallel == 1:
            work()  # a job in this process needs its main thread
        else:  # threads wait for remote jobs; nobody waits for them after an error or Ctrl-C
            for _ in range(num_parallel):
                threading.Thread(target=work, daemon=True).start()
        for _ in range(num_parallel):
            if error := ends.get():
                with self._lock:
                    pending.close()  # no thread starts another trial
                raise error

    def _pending(self) -> Generator[Trial]:
        """The trials to run, interrupted ones first. If a job succeeded after its sweep was killed, it gets its result.

        A new trial is created only when it can start, to learn from all results so far.
        """
        interrupted = []
        for frozen in self.study.get_trials(states=[TrialState.RUNNING]):
            trial = Trial(self.study, frozen._trial_id)  # continues with the settings that the journal has
            if self._read_summary(trial).get(self.settings.objective) is not None:
                self._record(trial, None)
            else:
                interrupted.append(trial)
        if interrupted:
            print(f"resuming interrupted trials: {', '.join(str(t.number + 1) for t in interrupted)}", flush=True)
        yield from interrupted
        while sum(trial.state != TrialState.WAITING for trial in self.study.trials) < self.num_trials:
            yield self.study.ask()

    def _run(self, trial: Trial) -> None:
        """Run a trial, record its result, and print a line before and after."""
        values = {name: trial._suggest(name, distribution) for name, distribution in self.space.swept.items()}
        run_dir = self._run_dir(trial)
        if run_dir.exists():  # of an interrupted attempt: a run would append to its files
            names = (Path(f"{run_dir}.interrupted-{number}") for number in itertools.count(1))
            run_dir.rename(next(name for name in names if not name.exists()))
        number, keys = trial.number + 1, self.space.keys
        typed = " ".join(f"{keys[name]}={format_value(value)}" for name, value in values.items())
        print(f"trial {number}/{self.num_trials} starts | {typed}", flush=True)
        started = time.monotonic()
        error: Any = None
        try:
            result = self.run_trial([*self.space.overrides(values), f"hydra.sweep.subdir={number}"], number)
            if result.status == JobStatus.FAILED:
                error = result._return_value  # return_value would raise it, after writing to stderr
        except Exception as raised:  # the configuration does not compose, or the job was lost
            error = raised
        if error is not None and not isinstance(error, EXPECTED_ERRORS):
            traceback.print_exception(error)
        with self._lock:
            trial.set_user_attr("duration_s", round(time.monotonic() - started, 1))
            print(*self._progress(self._record(trial, error)), sep=" | ", flush=True)

    def _record(self, trial: Trial, error: Exception | None) -> FrozenTrial:
        """Write the result of a trial to the journal and to the files of `report`."""
        summary = self._read_summary(trial)
        for name, value in summary.items():
            trial.set_user_attr(name, value)
        objective = self.settings.objective
        value = summary.get(objective)
        succeeded = value is not None and math.isfinite(value)
        if error is None and not succeeded:
            error = RunFailed(f"{objective} is not {'a finite number' if objective in summary else 'measured'}")
        if error is not None:  # also of a run that failed after it had measured the objective
            trial.set_user_attr("error", one_line(error))
        if "\n" in str(error):  # such as the memory plan of a run out of memory
            trial.set_user_attr("error_in_full", str(error))
        result = self.study.tell(trial, value if succeeded else None, state=None if succeeded else TrialState.FAIL)
        report.write_files(self.study, objective, self.space, self.folder)
        return result

    def _progress(self, result: FrozenTrial) -> list[str]:
        """The parts of the line that a finished trial prints."""
        head = f"trial {result.number + 1}/{self.num_trials}"
        measured, objective = result.user_attrs, self.settings.objective
        duration_s = measured["duration_s"]
        if result.state == TrialState.COMPLETE:
            parts = [f"{head} done in {duration_s:.0f} s", f"{objective} {result.value:.6g}"]
            if "tokens_per_s" in measured and objective != "tokens_per_s":
                parts.append(f"{measured['tokens_per_s']:,.0f} tok/s")
        else:
            parts = [f"{head} FAILED after {duration_s:.0f} s", measured["error"]]
        finished = self.study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL])
        complete = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        best = f"best {self.study.best_value:.6g} (trial {self.study.best_trial.number + 1})" if complete else "no best"
        mean_s = statistics.mean(trial.user_attrs.get("duration_s", duration_s) for trial in complete or finished)
        num_rounds = math.ceil((self.num_trials - len(finished)) / self.settings.num_parallel)
        eta = tqdm.format_interval(num_rounds * mean_s)
        return [*parts, best, f"{len(finished)} of {self.num_trials} done, ETA {eta}"]

    def _run_dir(self, trial: Trial) -> Path:
        return self.folder / str(trial.number + 1)

    def _read_summary(self, trial: Trial) -> dict[str, float]:
        """The summary of a trial's run without the parts of its step. Empty if the run has not ended."""
        path = self._run_dir(trial) / SUMMARY_FILE
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        numbers = {name: value for name, value in summary.items() if not name.startswith("parts/")}
        return {name: math.nan if value is None else value for name, value in numbers.items()}


def one_line(error: Exception) -> str:
    """The reason of a failure in one line. From a message with a traceback: its first line and the last exception."""
    lines = [line.strip() for line in describe_error(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if (start := next((n for n, line in enumerate(lines) if line.startswith("Traceback")), None)) is None:
        return lines[0] if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: {lines[0]}"
    exceptions = [line for line in lines[start:] if re.match(r"[\w.]+(Error|Exception|Failed|OutOfMemory)\b", line)]
    return " ".join([*lines[:start][:1], *(exceptions[-1:] or lines[-1:])])
