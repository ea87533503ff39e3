"""Several configurations on the same hardware, in turns, and one table: who is faster, and by how much.

Ranks build an entry's model, warm it up, time some steps and give everything back, again and again: each entry has its
turn in every round, so that drift hits all alike. Before that each tries its micro-batch sizes and keeps the fastest.
Every turn's result is a line of RUN_DIR/results.jsonl as soon as it is there. Where an entry ends its ranks, by running
out of memory say, its failure is noted and new ranks go on with the rest; the same command with hydra.run.dir of an
earlier comparison does what that one lacks.

Above `launch`, whose task this is; `comparison` makes the table, the figure and the wandb run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from conf.degrees import resolve_degrees
from conf.schema import Config, ConfigError, Degrees
from data.pack import open_corpus
from data.source import is_local
from recipes.benchmark import comparison_report, downscale
from recipes.benchmark.rounds import (
    CURRENT_FILE,
    ROOFLINE,
    Measurement,
    append_result,
    next_measurement,
    read_results,
    settings_of,
)
from recipes.launch import launcher
from recipes.launch.environment import ranks_are_started
from recipes.launch.memory_errors import out_of_memory_explained
from recipes.planning.plan import Plan
from recipes.run.errors import Preempted, RunFailed
from ring_attention.transport import choose_transport


@dataclass(frozen=True)
class ComparisonTask:
    """The entries of one number of ranks, as the task of these ranks.

    Args:
        entries: their configurations, by name.
        sizes: see `next_measurement`.
    """

    config: Config
    entries: dict[str, Config]
    sizes: dict[str, list[int]]

    def run(self, run_dir: Path, console: TextIO) -> float:
        """Take turns until none is left. Every rank must call it; rank 0 chooses, writes and speaks."""
        import deepspeed.comm as dist

        groups: dict[tuple[int, int], Any] = {}
        is_first = dist.get_rank() == 0
        while True:
            turns = [
                next_measurement(self.sizes, self.config.compare.rounds, read_results(run_dir)) if is_first else None
            ]
            dist.broadcast_object_list(turns, src=0)
            turn = turns[0]
            if turn is None:
                return float("nan")
            head = {**dataclasses.asdict(turn), "settings": settings_of(self.entries[turn.entry])}

            def keep(result: dict[str, Any], head: dict[str, Any] = head) -> None:
                if is_first:
                    append_result(run_dir, {**head, **result})
                    if "parts" not in result:
                        print(comparison_report.measurement_line(result), file=console, flush=True)

            if is_first:
                (run_dir / CURRENT_FILE).write_text(json.dumps(head))
                number, num_turns = self.progress(read_results(run_dir))
                begins = comparison_report.measurement_header(head, number, num_turns, self.config.compare.rounds)
                print(begins, end="", file=console, flush=True)
            config = copy.deepcopy(self.entries[turn.entry])
            config.engine.micro_batch_size = turn.micro_batch_size
            try:
                plan = launcher.shared_plan(config)
            except ConfigError as error:  # of all ranks alike
                keep({"error": str(error)})
            else:
                with out_of_memory_explained(plan, run_dir, compares=True):
                    if turn.entry == ROOFLINE:
                        keep(_roofline(plan))
                    else:
                        self._measure(turn, plan, groups, keep, console)
            if is_first:
                (run_dir / CURRENT_FILE).unlink()

    def progress(self, results: list[dict[str, Any]]) -> tuple[int, int]:
        """The number of the next turn, from 1, and how many there are if none fails."""
        tries = sum(len(candidates) for candidates in self.sizes.values() if len(candidates) > 1)
        done = sum(row["entry"] in self.entries and "parts" not in row for row in results)
        return done + 1, max(done + 1, tries + len(self.entries) * self.config.compare.rounds)

    def _measure(
        self,
        turn: Measurement,
        plan: Plan,
        groups: dict[tuple[int, int], Any],
        keep: Callable[[dict[str, Any]], None],
        console: TextIO,
    ) -> None:
        import deepspeed.comm as dist

        from recipes.engine.build import build_engine, build_sharder
        from recipes.monitor import device_metrics
        from recipes.monitor.time_breakdown import measure_time_breakdown
        from ring_attention.groups import ParallelGroups

        torch.compiler.reset()  # shapes of other entries would count as ones that change, which are slower
        config, compare = plan.config, self.config.compare
        degrees = (plan.degrees.data, plan.degrees.sequence)
        if config.parallelism.method == "sequence" and degrees not in groups:
            groups[degrees] = ParallelGroups(*degrees)
        engine = build_engine(plan, groups.get(degrees), forward_only=not plan.trains)
        device_metrics.reset_peak_memory()  # building took more: weights are made in fp32
        corpus = open_corpus(config.data)
        sharder = build_sharder(plan, engine)
        steps = sharder.steps(corpus.training(cursor=0), plan.accumulation_steps)
        clock, losses = device_metrics.StepClock(), []
        for step in range(1 + (compare.steps_per_round if turn.round else 1)):
            micro_batches = next(steps)
            losses.append(engine.train_step(micro_batches).loss if plan.trains else engine.mean_loss(micro_batches))
            clock.tick()
            if step == 0:
                clock.take()  # warms up: kernels are chosen and compiled, and communicators connect
                clock.restart()
        times_s = clock.take()
        peak_gib = engine.max_over_ranks(device_metrics.peak_memory_gib())
        result = {
            **_result(plan, times_s),
            # on the CPU, of the process: entries share it
            "peak_memory_gib": peak_gib if torch.cuda.is_available() else None,
            "losses": [loss.item() if loss.isfinite() else None for loss in losses],  # JSON has no nan
            "degrees": plan.degrees._asdict(),
        }
        keep(result)
        if self.config.breakdown and turn.round == compare.rounds:
            if dist.get_rank() == 0:
                print(f"measuring where the time of {turn.entry} goes ...", file=console, flush=True)
            parts = measure_time_breakdown(plan, engine, functools.partial(sharder.steps, corpus.training(cursor=0)))
            keep({"parts": parts.metrics})
        engine.close()
        del engine
        device_metrics.reset_peak_memory()  # the next turn builds its model before it does this


def _result(plan: Plan, step_times_s: list[float]) -> dict[str, Any]:
    """What all turns have."""
    return {
        "step_times_s": step_times_s,
        **plan.throughput(statistics.median(step_times_s)).numbers,
        "tokens_per_step": plan.tokens_per_step,
        "sequence_length": plan.config.data.sequence_length,
        "sequences_per_step": plan.sequences_per_step,
        "kernel": plan.kernel_choice()[0],
        "device": plan.device_name,
        "num_ranks": plan.num_ranks,
    }


def _roofline(plan: Plan) -> dict[str, Any]:
    """A turn without a model: each rank by itself computes a layer's parts, all at once; the slowest counts."""
    from recipes.benchmark.roofline import seconds_of_a_sequence
    from recipes.engine.base import max_over_ranks

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    sequence_s = max_over_ranks(seconds_of_a_sequence(plan, str(device.type)), device)
    step_time_s = plan.sequences_per_step * sequence_s / plan.num_ranks
    return {**_result(plan, [step_time_s]), "peak_memory_gib": None, "losses": [None], "degrees": {}}


def compare(config: Config, entries: dict[str, Config], run_dir: Path) -> None:
    """Measure the entries, then print the table and write RUN_DIR/comparison.{json,png,svg}.

    Args:
        entries: their configurations as composed, by name.

    Raises:
        ConfigError: if no entry fits this machine, or one that compare.only names does not; for a run dir with results
            of another comparison.
        RunFailed: if ranks that a launcher has started failed, or ours before the first turn.
        Preempted: if SIGTERM or SIGUSR1 told it to end; as on Ctrl-C, the same command goes on.
    """
    started = ranks_are_started()
    is_first = os.environ.get("RANK", "0") == "0"
    chosen, notes = choose(config, entries)
    # no sooner: which entries there are, and how long their sequences, depends on the GPUs
    corpora = {repr(entry.data): entry.data for entry, _ in chosen.values()}.values()
    if config.explain and is_first:
        print(*notes, sep="\n")
        for name, (entry, num_ranks) in chosen.items():
            plan = launcher.make_plan(entry, num_ranks)
            print(f"\n{name}", *plan.banner(run_dir)[:-1], "", *plan.memory_lines(), sep="\n", flush=True)
    for data in corpora:
        if not config.explain or is_local(data):
            open_corpus(data).check()
    if config.explain:
        return
    if config.compare.roofline:
        chosen[ROOFLINE] = roofline_entry(chosen)
    results = read_results(run_dir)
    for row in results:
        if row["entry"] not in chosen or row["settings"] != settings_of(chosen[row["entry"]][0]):
            raise ConfigError(
                f"{run_dir} has results of another comparison, of {row['entry']}: use another hydra.run.dir"
            )
    if is_first:
        num_done = sum("parts" not in row for row in results)
        print(*notes, *([f"going on: {num_done} turns are done"] if num_done else []), sep="\n", flush=True)
    if is_first and started:  # ours that failed are noted at once; what else was under way was interrupted
        _note_failure(run_dir, "its ranks ended, and those of a launcher cannot be started again from here: see logs")
    failure: RunFailed | None = None
    for num_ranks in dict.fromkeys(ranks for _, ranks in chosen.values()):
        own = {name: entry for name, (entry, ranks) in chosen.items() if ranks == num_ranks}
        turns = ComparisonTask(config, own, {name: _sizes(entry, num_ranks) for name, entry in own.items()})
        if started:
            launcher.start(turns, num_ranks, run_dir)
            continue
        try:
            failure = _take_turns(turns, num_ranks, run_dir) or failure
        except (KeyboardInterrupt, Preempted):
            print(f"\nthe same command with hydra.run.dir={run_dir} goes on from there", flush=True)
            raise
    if is_first and read_results(run_dir):
        shown = {name: entry for name, (entry, _) in chosen.items()}
        comparison_report.report(config, shown, notes, read_results(run_dir), run_dir)
    if failure is not None:
        raise failure


def _take_turns(turns: ComparisonTask, num_ranks: int, run_dir: Path) -> RunFailed | None:
    """Start ranks again where a turn has ended them, until none is left; the failure, if they end without a turn."""
    (run_dir / CURRENT_FILE).unlink(missing_ok=True)
    while next_measurement(turns.sizes, turns.config.compare.rounds, results := read_results(run_dir)) is not None:
        try:
            launcher.start(turns, num_ranks, run_dir)
        except RunFailed as error:
            row = _note_failure(run_dir, str(error))
            if row is not None:
                print(comparison_report.measurement_line(row), flush=True)
            elif len(read_results(run_dir)) == len(results):
                return error
    return None


def _note_failure(run_dir: Path, error: str) -> dict[str, Any] | None:
    """Make a row of the turn that was under way, if there is one."""
    turn_file = run_dir / CURRENT_FILE
    if not turn_file.exists():
        return None
    row = {**json.loads(turn_file.read_text()), "error": error}
    append_result(run_dir, row)
    turn_file.unlink()
    return row


def roofline_entry(chosen: dict[str, tuple[Config, int]]) -> tuple[Config, int]:
    """What `_roofline` needs to know.

    Raises:
        ConfigError: if entries differ in what it stands beside.
    """
    kinds = {(repr(entry.model), entry.data.sequence_length, ranks) for entry, ranks in chosen.values()}
    if len(kinds) > 1:
        raise ConfigError(
            "compare.roofline=true stands beside entries of one model, one length and one number of ranks, which "
            "these are not: leave it out, or name such entries in compare.only"
        )
    first, num_ranks = next(iter(chosen.values()))
    entry = copy.deepcopy(first)
    entry.compare.micro_batch_sizes = [entry.engine.micro_batch_size]
    return entry, num_ranks


def _sizes(entry: Config, num_ranks: int) -> list[int]:
    """The micro-batch sizes that divide the entry's batch."""
    data_degree = resolve_degrees(entry, num_ranks).data
    batch = entry.engine.train_batch_size
    sizes = sorted(set(entry.compare.micro_batch_sizes))
    return [size for size in sizes if batch is None or batch % (data_degree * size) == 0] or [1]


def choose(config: Config, entries: dict[str, Config]) -> tuple[dict[str, tuple[Config, int]], list[str]]:
    """The entries that fit this machine, cut to it where compare.downscale says so, with their numbers of ranks; and notes.

    Raises:
        ConfigError: if none fits, or one that compare.only names does not.
    """
    on_gpu = torch.cuda.device_count() > 0
    available = int(os.environ["WORLD_SIZE"]) if ranks_are_started() else torch.cuda.device_count()
    fitting: dict[str, tuple[Config, int, Degrees]] = {}
    seen: dict[str, str] = {}
    notes = [] if on_gpu else [f"!!! {comparison_report.CPU_WARNING}"]
    most = None if ranks_are_started() else config.launch.num_ranks  # entries may have their own
    compared = {name: entry for name, entry in entries.items() if not most or (entry.launch.num_ranks or 0) <= most}
    left_out = [
        f"{name}: its launch.num_ranks={entry.launch.num_ranks} is more than launch.num_ranks={most}"
        for name, entry in entries.items()
        if name not in compared
    ]
    longest = max((entry.data.sequence_length for entry in compared.values()), default=0)
    for name, composed in compared.items():
        entry = copy.deepcopy(composed)
        if config.compare.downscale:
            entry.engine.train_batch_size = None  # comes below
            if not on_gpu:
                downscale.downscale_to_cpu(entry, longest)
        wanted = entry.launch.num_ranks
        if wanted is not None and available and wanted != available and (wanted > available or ranks_are_started()):
            left_out.append(f"{name}: launch.num_ranks={wanted}, but there are {available}")
            continue
        try:
            num_ranks = launcher.count_ranks(entry)
        except ConfigError as error:
            left_out.append(f"{name}: {error}")
            continue
        degrees = resolve_degrees(entry, num_ranks)
        same = _what_runs(entry, degrees)
        if same in seen:
            left_out.append(f"{name}: on {num_ranks} ranks the same as {seen[same]}")
            continue
        seen[same] = name
        fitting[name] = entry, num_ranks, degrees
    for name, (entry, num_ranks, _) in fitting.items():
        alike = [
            (other, degrees)
            for other, ranks, degrees in fitting.values()
            if (ranks, other.data.sequence_length) == (num_ranks, entry.data.sequence_length)
        ]
        if config.compare.downscale:
            entry.engine.train_batch_size = downscale.common_batch(alike, entries[name].engine.train_batch_size, on_gpu)
        elif entry.engine.train_batch_size is None:
            entry.engine.train_batch_size = (
                downscale.smallest_batch(alike, on_gpu) * entry.engine.gradient_accumulation_steps
            )
            entry.engine.gradient_accumulation_steps = 1
    cuts = {name: downscale.changes(entries[name], entry) for name, (entry, _, _) in fitting.items()}
    chosen = {name: (entry, num_ranks) for name, (entry, num_ranks, _) in fitting.items()}
    if not chosen:
        raise ConfigError("none of the entries fits:\n" + "\n".join(left_out))
    if missing := [name for name in config.compare.only if name not in chosen]:
        raise ConfigError(
            f"compare.only has {', '.join(missing)}, which cannot run here: take it out, or use other ranks:\n"
            + "\n".join(left_out)
        )
    for cut in dict.fromkeys(line for lines in cuts.values() for line in lines):
        of = [name for name, lines in cuts.items() if cut in lines]
        notes.append(f"changed: {cut}" + ("" if len(of) == len(cuts) else f" ({', '.join(of)})"))
    if config.compare.downscale and any(cuts.values()):
        notes.append("compare.downscale=false cuts nothing: sizes stay as typed, or as the workload has them")
    notes += [f"left out: {line}" for line in left_out]
    if config.compare.baseline and config.compare.baseline not in chosen:
        notes.append(f"baseline: {next(iter(chosen))}, for {config.compare.baseline} is not there")
    if not on_gpu:
        plans = [launcher.make_plan(entry, num_ranks) for entry, num_ranks in chosen.values()]
        notes += list(dict.fromkeys(f"!!! {plan.slowness}" for plan in plans if plan.slowness))
    return chosen, notes


def _what_runs(entry: Config, degrees: Degrees) -> str:
    """Equal for entries that run the same: their settings, with the method and the degrees as they come out."""
    settings = dataclasses.asdict(entry)
    if entry.attention.transport == "auto":
        settings["attention"]["transport"] = choose_transport("cuda" if torch.cuda.device_count() else "cpu")
    del settings["attention"]["method"], settings["launch"]
    settings["parallelism"] = (_kind(entry, degrees), degrees)
    return repr(settings)


def _kind(entry: Config, degrees: Degrees) -> str:
    """Entries of equal kind and degrees compute alike: a hybrid with one of its degrees 1 is the other method."""
    if entry.parallelism.method == "tensor_pipeline":
        return "tensor_pipeline"
    if degrees.sequence == 1:
        return "local"
    if entry.attention.method == "hybrid":
        return "ring" if degrees.ulysses == 1 else "ulysses" if degrees.ring == 1 else "hybrid"
    return entry.attention.method
