"""recipe=max_length: the longest sequence that a configuration can train, predicted by arithmetic and then trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from conf.schema import Config, ConfigError
from recipes.benchmark.probe import train_probe
from recipes.launch import launcher
from recipes.launch.environment import ranks_are_started
from recipes.planning.explain import timeline_lines
from recipes.planning.memory import changed
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed
from recipes.run.run_dir import Row

RESULT_FILE = "max_length.json"
TOKENS_PER_RANK = 256  # a multiple of them is used: kernels work on tiles of 64 to 256 tokens
NUM_STEPS = 2  # the first allocates what later ones reuse
MARGIN = 0.1  # of a device: CUDA's context and NCCL's buffers take 1 to 2 GiB, fragmentation some more
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
    trained = dataclasses.replace(config, recipe="pretrain", explain=False, num_steps=NUM_STEPS)
    plan = launcher.make_plan(trained, launcher.count_ranks(trained))
    limit_gib = config.max_length.memory_gib
    if limit_gib is None:
        assert plan.memory_bytes is not None
        limit_gib = (1 - MARGIN) * plan.memory_bytes / 2**30 - (0 if plan.on_gpu else CPU_LIBRARIES_GIB)
    multiple = TOKENS_PER_RANK * plan.degrees.sequence
    plan = _at_longest(plan, limit_gib, multiple)
    length, predicted_s = plan.config.data.sequence_length, NUM_STEPS * plan.estimated_step_s
    lengths = sorted({max(multiple, length * eighths // 8 // multiple * multiple) for eighths in (1, 2, 4, 6, 8)})
    curve = {at: _peak_gib(_at_length(plan, at)) for at in lengths}
    print(
        *([] if plan.on_gpu else [f"!!! {CPU_WARNING}"]),
        f"{config.model.num_layers} layers on {plan.num_ranks} x {plan.device_name}; {limit_gib:.2f} GiB per rank",
        f"{'L':>12} {'GiB per rank':>13}",
        *(f"{at:12,} {peak_gib:13.3f}" for at, peak_gib in curve.items()),
        *timeline_lines(plan.step_memory),
        f"predicted: L = {length:,}; {NUM_STEPS} steps should take about {predicted_s:.0f} s",
        sep="\n",
        flush=True,
    )
    if config.explain:
        return float("nan")
    attempts: list[Row] = []
    confirmed = None
    if predicted_s > config.max_length.confirm_s:
        print(f"not confirmed: that is more than max_length.confirm_s={config.max_length.confirm_s:g}", flush=True)
    else:
        attempts, confirmed = _attempts(plan, limit_gib, multiple, run_dir)
    result = {
        "config": dataclasses.asdict(config), "num_ranks": plan.num_ranks, "device": plan.device_name,
        "limit_gib": limit_gib, "predicted_length": length, "predicted_peak_gib": curve[length],
        "curve": [{"length": at, "peak_gib": peak_gib} for at, peak_gib in curve.items()],
        "attempts": attempts, "confirmed": confirmed,
    }  # fmt: skip
    (run_dir / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"all numbers: {run_dir / RESULT_FILE}", flush=True)
    if attempts and not confirmed:
        raise RunFailed(
            f"no length is confirmed: L = {', '.join(format(row['length'], ',') for row in attempts)} do not fit "
            f"{limit_gib:.2f} GiB, against the prediction: set a smaller max_length.memory_gib"
        )
    return float(confirmed["length"] if confirmed else length)


def _at_longest(plan: Plan, limit_gib: float, multiple: int) -> Plan:
    """The plan at the longest length that should fit."""
    if unsupported := plan.step_memory.unsupported:
        raise ConfigError(f"recipe=max_length needs the memory of a step, which is {unsupported}")
    if length := plan.step_memory.longest_length(limit_gib * 2**30) // multiple * multiple:
        return _at_length(plan, length)
    raise ConfigError(
        f"no length of {multiple:,} tokens or more fits: {multiple:,} need {_peak_gib(_at_length(plan, multiple)):.3g} "
        f"GiB per rank by prediction, and there are {limit_gib:.3g}: use fewer layers (model.num_layers), more ranks, "
        "engine.recompute=selective or engine.zero_stage=3"
    )


def _attempts(plan: Plan, limit_gib: float, multiple: int, run_dir: Path) -> tuple[list[Row], Row | None]:
    """Train at the plan's length, and at shorter ones while that does not fit: a row for each, and that which fits."""
    rows: list[Row] = []
    while len(rows) < MAX_ATTEMPTS:
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
        print(f"L = {length:,} does not fit, it {found}: {100 * STEP_DOWN:g} % less is next", flush=True)
        plan = _at_length(plan, max(multiple, int((1 - STEP_DOWN) * length) // multiple * multiple))
    return rows, None


def _at_length(plan: Plan, length: int) -> Plan:
    return dataclasses.replace(plan, config=changed(plan.config, **{"data.sequence_length": length}))


def _peak_gib(plan: Plan) -> float:
    return plan.step_memory.peak.total / 2**30
