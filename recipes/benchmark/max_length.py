"""recipe=max_length: the longest sequence that a configuration can train, predicted by arithmetic and then trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from conf.schema import Config, ConfigError
from data.corpus import START, Pack
from data.packing import Piece
from data.store import TokenStore
from recipes.launch import launcher
from recipes.launch.environment import ranks_are_started
from recipes.launch.memory_errors import out_of_memory_cause
from recipes.planning.explain import timeline_lines
from recipes.planning.host_offload import host_refusal, longest_offloaded
from recipes.planning.memory import MARGIN, changed
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed
from recipes.run.run_dir import Row, replace_file

RESULT_FILE, PROBE_FILE, NO_MEMORY = "max_length.json", "probe.json", "no_memory_rank_"
TOKENS_PER_RANK = 256  # a multiple of them is used: kernels work on tiles of 64 to 256 tokens
NUM_STEPS = 2  # the first allocates what later ones reuse
CPU_LIBRARIES_GIB = 1.0  # per process; no prediction counts them
STEP_DOWN = 0.05  # after an attempt that does not fit
MAX_ATTEMPTS = 4
CPU_WARNING = "ON THE CPU memory is what training adds to a process: these figures say nothing of GPUs"


def max_length(config: Config, run_dir: Path) -> float:
    """Find the longest sequence, print it and write RUN_DIR/max_length.json. data.sequence_length is not used.

    Raises:
        ConfigError: if the memory of this configuration is not predicted, or if no length fits.
        RunFailed: if an attempt fails for another reason than memory, or if none fits.
    """
    if ranks_are_started():
        raise ConfigError("recipe=max_length starts its own ranks: type python train.py, without a launcher")
    unchecked = dataclasses.replace(config.launch, check_memory=False)  # the length that fits is what is searched for
    trained = dataclasses.replace(config, recipe="pretrain", num_steps=NUM_STEPS, launch=unchecked)
    plan = launcher.make_plan(trained, launcher.count_ranks(trained))
    available_gib = (1 - MARGIN) * (plan.memory_bytes or 0) / 2**30 - (0 if plan.on_gpu else CPU_LIBRARIES_GIB)
    limit_gib = config.max_length.memory_gib or available_gib
    multiple = TOKENS_PER_RANK * plan.degrees.sequence
    plan = _at_longest(plan, limit_gib, multiple)
    length, predicted_s = plan.config.data.sequence_length, NUM_STEPS * plan.step_time.parts.total
    lengths = sorted({max(multiple, length * eighths // 8 // multiple * multiple) for eighths in (1, 2, 4, 6, 8)})
    curve = [{"length": at, "peak_gib": _peak_gib(_at_length(plan, at))} for at in lengths]
    print(
        *([] if plan.on_gpu else [f"!!! {CPU_WARNING}"]),
        f"{config.model.num_layers} layers on {plan.num_ranks} x {plan.device_name}; {limit_gib:.2f} GiB per rank",
        f"{'L':>12} {'GiB per rank':>13}",
        *(f"{point['length']:12,} {point['peak_gib']:13.3f}" for point in curve),
        *timeline_lines(plan.step_memory),
        f"predicted: L = {length:,}; {NUM_STEPS} steps should take about {duration(predicted_s)}",
        sep="\n",
        flush=True,
    )
    if config.explain:
        return float("nan")
    attempts, confirmed, confirm_s = [], None, config.max_length.confirm_s
    if predicted_s <= confirm_s:
        attempts, confirmed = _attempts(plan, limit_gib, multiple, run_dir)
    else:
        print(f"not confirmed: {'more than ' if confirm_s else ''}max_length.confirm_s={confirm_s:g}", flush=True)
    result = {
        "config": dataclasses.asdict(config), "num_ranks": plan.num_ranks, "device": plan.device_name,
        "limit_gib": limit_gib, "predicted_length": length, "predicted_peak_gib": curve[-1]["peak_gib"],
        "curve": curve, "attempts": attempts, "confirmed": confirmed,
    }  # fmt: skip
    replace_file(run_dir / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    print(f"all numbers: {run_dir / RESULT_FILE}", flush=True)
    if attempts and not confirmed:
        raise RunFailed(
            f"no length is confirmed: L = {', '.join(format(row['length'], ',') for row in attempts)} do not fit "
            f"{limit_gib:.2f} GiB, against the prediction: set a smaller max_length.memory_gib"
        )
    return float(confirmed["length"] if confirmed else length)


def _at_longest(plan: Plan, limit_gib: float, multiple: int) -> Plan:
    """The plan at the longest length that should fit. Raises ConfigError if it is not predicted, or none fits."""
    if unsupported := plan.step_memory.unsupported:
        raise ConfigError(f"recipe=max_length needs the memory of a step, which is {unsupported}")
    longest, host_memory = plan.step_memory.longest_length(limit_gib * 2**30), plan.host_memory_bytes
    if host_memory is not None and (on_host := longest_offloaded(plan.step_memory, host_memory, {})) < longest:
        if on_host < multiple:
            raise ConfigError(host_refusal(_at_length(plan, multiple).step_memory, plan.memory_bytes or 0, host_memory))
        print(f"limited by {(1 - MARGIN) * host_memory / 2**30:.2f} GiB of the host's memory for what is offloaded")
        longest = on_host
    if length := longest // multiple * multiple:
        return _at_length(plan, length)
    raise ConfigError(
        f"no length of {multiple:,} tokens or more fits: {multiple:,} need {_peak_gib(_at_length(plan, multiple)):.3g} "
        f"GiB per rank by prediction, and there are {limit_gib:.3g}: use fewer layers (model.num_layers), more ranks, "
        "engine.recompute=selective or engine.zero_stage=3"
    )


def _attempts(plan: Plan, limit_gib: float, multiple: int, run_dir: Path) -> tuple[list[Row], Row | None]:
    """Train at the plan's length, and at shorter ones while that does not fit: a row for each, and that which fits."""
    rows: list[Row] = []
    for _ in range(MAX_ATTEMPTS):
        length, predicted_gib = plan.config.data.sequence_length, _peak_gib(plan)
        print(f"trying L = {length:,}", flush=True)
        row = {"length": length, **train_probe(plan.config, plan.num_ranks, run_dir / "attempts" / f"length_{length}")}
        rows.append(row)
        if "error" not in row and row["peak_gib"] <= limit_gib:
            print(
                f"confirmed: L = {length:,} trains, {row['tokens_per_s']:,.0f} tok/s, peak {row['peak_gib']:.3f} GiB; "
                f"predicted {predicted_gib:.3f}, {100 * (predicted_gib / row['peak_gib'] - 1):+.1f} %",
                flush=True,
            )
            return rows, row
        found = "runs out of memory" if "error" in row else f"needs {row['peak_gib']:.3f} GiB"
        print(f"L = {length:,} does not fit: it {found}", flush=True)
        plan = _at_length(plan, max(multiple, int((1 - STEP_DOWN) * length) // multiple * multiple))
    return rows, None


def _at_length(plan: Plan, length: int) -> Plan:
    return dataclasses.replace(plan, config=changed(plan.config, **{"data.sequence_length": length}))


def _peak_gib(plan: Plan) -> float:
    return plan.step_memory.peak.total / 2**30


def duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 2:
        return f"{seconds:.0f} s"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"


@dataclasses.dataclass(frozen=True)
class Probe:
    """Train the configured number of steps on random tokens; rank 0 writes time and peak memory to PROBE_FILE.

    The peak is the largest of all ranks: on a GPU without the allocator's cache, on the CPU what the process grows by.
    A rank that runs out of memory writes the error to a file of its own.
    """

    config: Config

    def run(self, run_dir: Path, console: TextIO) -> float:
        try:
            self._measure(run_dir)
        except Exception as error:
            if cause := out_of_memory_cause(error):
                (run_dir / f"{NO_MEMORY}{os.environ['RANK']}").write_text(str(cause), encoding="utf-8")
            raise
        return float("nan")

    def _measure(self, run_dir: Path) -> None:
        import deepspeed.comm as dist

        from recipes.engine.build import build_engine, build_sharder
        from recipes.monitor import device_metrics

        plan = launcher.shared_plan(self.config)
        libraries_gib = 0.0 if plan.on_gpu else device_metrics.peak_memory_gib()
        engine = build_engine(plan)
        device_metrics.reset_peak_memory()  # building the fp32 weights may have needed more
        batches = build_sharder(plan, engine).steps(_random_sequences(plan.config), plan.accumulation_steps)
        clock = device_metrics.StepClock()
        for batch in itertools.islice(batches, plan.config.num_steps):
            clock.restart()
            engine.train_step(batch.micro_batches)
            clock.tick()
        step_time_s = engine.max_over_ranks(min(clock.take()))
        result = {
            "peak_gib": engine.max_over_ranks(device_metrics.peak_memory_gib(in_use=True) - libraries_gib),
            "peak_reserved_gib": engine.max_over_ranks(device_metrics.peak_memory_gib()) if plan.on_gpu else None,
            "step_time_s": step_time_s,
            "flops": plan.flops * plan.tokens_per_step,
            "tokens_per_s": plan.throughput([step_time_s]).tokens_per_s,
            "device": plan.device_name,
        }
        if dist.get_rank() == 0:
            replace_file(run_dir / PROBE_FILE, json.dumps(result))


def _random_sequences(config: Config) -> Iterator[Pack]:
    """Endless, all the same: one document of random tokens."""
    length = config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, length + 1, np.int32)
    store = TokenStore("random", tokens, np.array([length + 1]))
    return itertools.repeat(Pack((Piece(0, 0, length, True),), length, START, START, (store,)))


def train_probe(config: Config, num_ranks: int, folder: Path) -> Row:
    """Run a `Probe` in fresh ranks; what it measured, or `error` alone if it ran out of memory.

    Raises:
        RunFailed: if it fails for another reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROBE_FILE
    for old in (*folder.glob(PROBE_FILE), *folder.glob(f"{NO_MEMORY}*")):  # of an earlier run
        old.unlink()
    if not torch.cuda.device_count():  # glibc then returns freed tensors at once, so that the peak is that of tensors
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    try:
        launcher.start(Probe(config), num_ranks, folder)
    except RunFailed:
        if not (errors := sorted(folder.glob(f"{NO_MEMORY}*"))):
            raise
        return {"error": errors[0].read_text(encoding="utf-8")}
    return json.loads(path.read_text(encoding="utf-8"))
