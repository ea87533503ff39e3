"""Compares several configurations on the same hardware: measures all in rounds, and reports one table.

Ranks build an entry's model, warm it up, time some steps and free everything; then the next entry follows. If an entry
ends its ranks, for example because it runs out of memory, its failure is recorded and new ranks continue.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from conf.schema import Config, ConfigError
from data.corpus import open_corpus
from data.source import is_local
from data.store import check_without_download
from recipes.benchmark import comparison_report, rounds
from recipes.benchmark.entries import Entry, choose_entries, roofline_entry
from recipes.benchmark.rounds import Measurement
from recipes.launch import launcher
from recipes.launch.environment import ranks_are_started
from recipes.launch.memory_errors import out_of_memory_explained
from recipes.planning.explain import banner, refusal_lines, state_lines
from recipes.planning.plan import Plan
from recipes.planning.throughput import Work
from recipes.run.errors import Preempted, RunFailed
from recipes.run.run_dir import Row, replace_file


@dataclass(frozen=True)
class ComparisonTask:
    """The measurements of all entries of one number of ranks, as a `Task`. `config` is the comparison's own."""

    config: Config
    entries: dict[str, Entry]

    def next(self, results: list[Row]) -> Measurement | None:
        sizes = {name: entry.micro_batch_sizes for name, entry in self.entries.items()}
        return rounds.next_measurement(sizes, self.config.compare.rounds, results)

    def progress(self, results: list[Row]) -> tuple[int, int]:
        """The number of the next measurement, from 1, and how many there are if none fails."""
        sizes = [entry.micro_batch_sizes for entry in self.entries.values()]
        trials = sum(len(tried) for tried in sizes if len(tried) > 1)
        number = 1 + sum(row["entry"] in self.entries and "parts" not in row for row in results)
        return number, max(number, trials + len(self.entries) * self.config.compare.rounds)

    def run(self, run_dir: Path, console: TextIO) -> float:
        """Measure until nothing is left to do. Every rank must call it; rank 0 chooses, writes and prints."""
        import deepspeed.comm as dist

        is_first = dist.get_rank() == 0
        if is_first:  # under a launcher; failures of our own ranks are recorded at once
            _record_failure(run_dir, "its ranks ended, and only their launcher can start them again: see its logs")
        while True:
            chosen = [self.next(rounds.read_results(run_dir)) if is_first else None]
            dist.broadcast_object_list(chosen, src=0)
            if chosen[0] is None:
                return float("nan")
            self._measure(chosen[0], run_dir, console if is_first else None)

    def _measure(self, measurement: Measurement, run_dir: Path, console: TextIO | None) -> None:
        config = copy.deepcopy(self.entries[measurement.entry].config)
        header = {**measurement._asdict(), "settings": rounds.settings_of(config)}
        config.engine.micro_batch_size = measurement.micro_batch_size

        def record(result: Row) -> None:
            if console:
                rounds.append_result(run_dir, {**header, **result})
                if "parts" not in result:
                    print(comparison_report.measurement_line(result), file=console, flush=True)

        if console:
            replace_file(run_dir / rounds.CURRENT_FILE, json.dumps(header))
            number, total = self.progress(rounds.read_results(run_dir))
            begins = comparison_report.measurement_header(header, number, total, self.config.compare.rounds)
            print(begins, end="", file=console, flush=True)
        try:
            plan = launcher.shared_plan(config)
        except ConfigError as error:  # on all ranks alike
            record({"error": str(error)})
        else:
            is_roofline = measurement.entry == rounds.ROOFLINE
            with out_of_memory_explained(plan, run_dir, compares=True):
                for result in _roofline(plan) if is_roofline else self._timed(measurement, plan, console):
                    record(result)
        if console:
            (run_dir / rounds.CURRENT_FILE).unlink()

    def _timed(self, measurement: Measurement, plan: Plan, console: TextIO | None) -> Iterator[Row]:
        """Some steps and, in the last round, their breakdown."""
        from recipes.engine.base import transport_over_ranks
        from recipes.engine.build import build_engine, build_feed
        from recipes.monitor import device_metrics
        from recipes.monitor.time_breakdown import breakdown_too_long, measure_time_breakdown

        torch.compiler.reset()  # shapes of other entries would count as dynamic, and compile to slower kernels
        compare, is_sequence = self.config.compare, plan.config.parallelism.method == "sequence"
        groups = _groups(plan.degrees.data, plan.degrees.sequence) if is_sequence else None
        engine = build_engine(plan, groups)
        device_metrics.reset_peak_memory()  # building takes more than steps do: weights are made in fp32
        corpus = open_corpus(plan.config.data, plan.config.model.vocab_size)
        feed = build_feed(plan, engine, corpus)
        steps = feed.steps()
        clock, losses, work = device_metrics.StepClock(), [], []
        for step in range(1 + (compare.steps_per_round if measurement.round else 1)):
            batch = next(steps)
            micro_batches = batch.micro_batches
            losses.append(engine.train_step(micro_batches).loss if plan.trains else engine.mean_loss(micro_batches))
            clock.tick()
            work.append(plan.work(batch.lengths))
            if step == 0:
                clock.take()  # warm-up: kernels are chosen and compiled, and communicators connect
                clock.restart()
        times_s, peak_gib = clock.take(), engine.max_over_ranks(device_metrics.peak_memory_gib())
        transport, reason = transport_over_ranks(engine.attention) if engine.attention else (None, "")
        yield {
            **_numbers(plan, times_s, work[1:]),
            # on the CPU it is the process's, which all entries share
            "peak_memory_gib": peak_gib if plan.on_gpu else None,
            "losses": [loss.item() if loss.isfinite() else None for loss in losses],  # JSON has no NaN
            "degrees": plan.degrees._asdict(),
            "transport": transport,
            "transport_reason": reason,
        }
        if self.config.breakdown and measurement.round == compare.rounds:
            too_long = breakdown_too_long(plan, engine, times_s * compare.rounds)
            if console:
                doing = "no" if too_long else "measuring the"
                details = f": {too_long}" if too_long else " ..."
                print(f"{doing} time breakdown of {measurement.entry}{details}", file=console, flush=True)
            if not too_long:
                yield {"parts": measure_time_breakdown(plan, engine, feed.steps)}
        engine.close()
        del engine
        device_metrics.reset_peak_memory()  # frees the memory before the next model is built


@functools.cache  # process groups are never freed, so measurements share them
def _groups(data_degree: int, sequence_degree: int) -> Any:
    from ring_attention.groups import ParallelGroups

    return ParallelGroups(data_degree, sequence_degree)


def _numbers(plan: Plan, step_times_s: list[float], work: list[Work] | None = None) -> Row:
    """What all measurements have. `work` is that of each step; None: full sequences."""
    return {
        "step_times_s": step_times_s,
        **plan.throughput(step_times_s, work)._asdict(),
        "tokens_per_step": plan.tokens_per_step,
        "sequence_length": plan.config.data.sequence_length,
        "sequences_per_step": plan.sequences_per_step,
        "kernel": plan.kernel_choice()[0],
        "device": plan.device_name,
        "num_ranks": plan.num_ranks,
    }


def _roofline(plan: Plan) -> Iterator[Row]:
    """A measurement without a model: all ranks compute a layer's kernels at once, each alone; the slowest counts."""
    from recipes.benchmark.roofline import seconds_of_a_sequence
    from recipes.engine.base import max_over_ranks

    sequence_s = max_over_ranks(seconds_of_a_sequence(plan), torch.device(plan.device_type))
    step_time_s = plan.sequences_per_step * sequence_s / plan.num_ranks
    yield {**_numbers(plan, [step_time_s]), "peak_memory_gib": None, "losses": [None], "degrees": {}}


def compare(config: Config, composed: dict[str, Config], run_dir: Path) -> None:
    """Measure the `composed` entries, print the table and write RUN_DIR/comparison.{json,png,svg}.

    Raises:
        ConfigError: if no entry fits this machine, or one that compare.only names does not; if the run dir has results
            of another comparison.
        RunFailed: if ranks of a launcher failed, or ours before their first measurement.
        Preempted: on SIGTERM or SIGUSR1. As after Ctrl-C, the same command resumes.
    """
    is_started, is_first = ranks_are_started(), os.environ.get("RANK", "0") == "0"
    entries, notes = choose_entries(config, composed)
    if config.explain and is_first:
        print(*notes, sep="\n")
        for name, entry in entries.items():
            plan = launcher.make_plan(*entry)
            lines = [*banner(plan, run_dir)[:-1], "", *state_lines(plan), *refusal_lines(plan)]
            print(f"\n{name}", *lines, sep="\n", flush=True)
    # the data is opened only now: which entries run, and how long their sequences are, depends on the machine
    configs = [entry.config for entry in entries.values()]
    for one in {repr((one.data, one.model.vocab_size)): one for one in configs}.values():
        if config.explain and not is_local(one.data):
            check_without_download(one.data, one.model.vocab_size)
        else:
            open_corpus(one.data, one.model.vocab_size)
    if config.compare.roofline:
        entries[rounds.ROOFLINE] = roofline_entry(entries)
    results = rounds.read_results(run_dir)
    for row in results:
        if row["entry"] not in entries or row["settings"] != rounds.settings_of(entries[row["entry"]].config):
            raise ConfigError(
                f"{run_dir} has results of another comparison, of {row['entry']}: use another hydra.run.dir"
            )
    if config.explain:
        return
    if is_first:
        num_done = sum("parts" not in row for row in results)
        print(*notes, *([f"resuming: {num_done} measurements are done"] if num_done else []), sep="\n", flush=True)
    failure = None
    for num_ranks in dict.fromkeys(entry.num_ranks for entry in entries.values()):
        task = ComparisonTask(config, {name: own for name, own in entries.items() if own.num_ranks == num_ranks})
        if is_started:
            launcher.start(task, num_ranks, run_dir)
        else:
            failure = _start_until_done(task, num_ranks, run_dir) or failure
    if is_first and (results := rounds.read_results(run_dir)):
        comparison_report.report(config, {name: own for name, (own, _) in entries.items()}, notes, results, run_dir)
    if failure is not None:
        raise failure


def _start_until_done(task: ComparisonTask, num_ranks: int, run_dir: Path) -> RunFailed | None:
    """Start new ranks after each failed measurement; the failure of ranks that ended without a measurement."""
    (run_dir / rounds.CURRENT_FILE).unlink(missing_ok=True)
    while task.next(results := rounds.read_results(run_dir)) is not None:
        try:
            launcher.start(task, num_ranks, run_dir)
        except RunFailed as error:
            if _record_failure(run_dir, str(error)):
                print(comparison_report.measurement_line({"error": str(error)}), flush=True)
            elif len(rounds.read_results(run_dir)) == len(results):
                return error
        except (KeyboardInterrupt, Preempted):
            print(f"\nto resume, run the same command with hydra.run.dir={run_dir}", flush=True)
            raise
    return None


def _record_failure(run_dir: Path, error: str) -> bool:
    """Add a failed row for the measurement that was running; False if there was none."""
    current = run_dir / rounds.CURRENT_FILE
    if was_running := current.exists():
        rounds.append_result(run_dir, {**json.loads(current.read_text()), "error": error})
        current.unlink()
    return was_running
