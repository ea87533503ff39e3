"""Attention alone, without a model: methods and peers on the same ranks, beside one device's time over their number.

That ideal is what a ring comes to whose messages, merges and smaller blocks cost nothing. Before anything is timed,
each method's output is held against that of whole attention. On one rank nothing travels: instead, one rank of larger
rings is simulated, which shows what cutting attention into blocks and merging them costs.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch

from recipes.benchmark.baselines import BASELINES
from recipes.benchmark.candidates import (
    METHODS,
    SIMULATED_DEGREES,
    Candidate,
    draw,
    make_baseline,
    make_from_method,
    make_from_module,
    simulated,
)
from recipes.engine.deepspeed_engine import extremes_over_ranks, max_over_ranks
from recipes.monitor.device_metrics import StepClock, durations_s, mark
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.reporter import Reporter
from recipes.monitor.trace_analysis import step_breakdown
from recipes.planning.plan import Plan
from recipes.planning.throughput import attention_flops_per_token
from ring_attention import LocalAttention
from ring_attention.groups import ParallelGroups
from ring_attention.transport import messages_stay_local

RESULT_FILE = "bench_attention.json"
TIMED_S = 0.1  # of calls, at least, in each round
AT_LENGTH_S = 3.0  # of calls, for what they take of the energy that a GPU may use
MOST_ERROR = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}  # of an output, relative: several roundings


def bench_attention(plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Time all contenders in turns; returns TFLOP/s per rank of the first, forward and backward.

    Every rank must call it. All ranks share each sequence, whatever degrees are configured.

    Args:
        reporter: rank 0's; None on all others.

    Raises:
        RuntimeError: if a method's output is not that of whole attention.
    """
    say = reporter.say if reporter else (lambda *lines: None)
    model, length, num_ranks = plan.config.model, plan.config.data.sequence_length, plan.num_ranks
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    whole = draw(plan, device)
    say(
        f"attention of {plan.config.engine.micro_batch_size} x {length:,} tokens, {model.num_heads} heads and "
        f"{model.num_kv_heads} kv heads x {model.head_dim}, {plan.config.engine.dtype}, causal; "
        f"{num_ranks} rank{'s' if num_ranks > 1 else ''} on {plan.device_name}, block kernel {plan.kernel_choice()[0]}"
    )
    ideal = make_from_module(LocalAttention(plan.config.attention.kernel), whole, "one device", "whole sequences", 1.0)
    candidates = [ideal]
    if num_ranks == 1:
        candidates += [simulated(plan, whole, degree) for degree in SIMULATED_DEGREES if 2 * degree <= length]
    else:
        groups = ParallelGroups(1, num_ranks)
        makers = {method: partial(make_from_method, plan, method, plan.transport) for method in METHODS}
        if plan.transport != "p2p":
            makers |= {"ring, p2p": partial(make_from_method, plan, "ring", "p2p")}
        makers |= {name: partial(make_baseline, name, length) for name in BASELINES}
        expected = ideal.forward()
        for name, make in makers.items():
            try:
                candidate, error = make(groups, whole, expected, name)
            except ValueError as refusal:
                say(f"left out: {name}: {refusal}")
                continue
            error = max_over_ranks(error, device)
            if not error < MOST_ERROR[plan.config.engine.dtype]:
                raise RuntimeError(f"{name} does not compute what whole attention does: error {error:.1e}")
            candidates.append(candidate)
    say("timing ...")
    rows = _timed(candidates, plan, device)
    say("", *_table(rows, num_ranks), "")
    if plan.config.breakdown:
        say("profiling ...")
        for row, candidate in zip(rows, candidates, strict=True):
            row["parts_ms"] = _parts_ms(candidate, device)
        say("", *_parts_table(rows), "")
    if joules := _energy_counter(device):
        say("at length ...")
        for row, candidate in zip(rows, candidates, strict=True):
            row["at_length"] = _at_length(candidate, device, joules)
        say("", *_at_length_table(rows), "")
    say(
        "ms: of a call, the slowest rank's; host: of that, until its host has issued it: where they are equal the GPU",
        "may wait for the host. TFLOP/s: per device, causal counted once, backward as two forward passes.",
        "ideal: one device's time x the share that each computes. exposed: what a call takes longer than one whose",
        "messages stay on their rank.",
        *(["parts: of a call with its backward pass, under the profiler."] if plan.config.breakdown else []),
        *(
            [f"at length: calls for {AT_LENGTH_S:g} s, and what the GPUs take, the least and the most of them."]
            if joules
            else []
        ),
        *(["!!! ON THE CPU ranks share cores: these figures say nothing of GPUs"] if device.type == "cpu" else []),
    )
    if reporter:
        result = {"device": plan.device_name, "num_ranks": num_ranks, "config": asdict(plan.config), "rows": rows}
        (run_dir / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
        reporter.conclude(
            {
                f"{row['name']}/{kind}/{name}": value
                for row in rows
                for kind in ("forward", "forward_backward")
                for name, value in row[kind].items()
            }
        )
        say(f"all numbers: {run_dir / RESULT_FILE}", *reporter.how_to_look()[1:])
    first = rows[min(1, len(rows) - 1)]
    return first["forward_backward"]["tflops"]


def _timed(candidates: list[Candidate], plan: Plan, device: torch.device) -> list[dict[str, Any]]:
    """Each contender in each round, so that drift hits all alike: a row each, times in ms."""
    kinds = ("forward", "forward_backward")
    times_s: dict[tuple[str, str, bool], list[float]] = {}
    host_s: dict[tuple[str, str], list[float]] = {}
    for number in range(1 + plan.config.compare.rounds):  # the first warms up
        for candidate in candidates:
            for kind in kinds:
                for silent in (False, True) if candidate.sends else (False,):
                    with candidate.around(), messages_stay_local() if silent else contextlib.nullcontext():
                        seconds, until_issued = _seconds_of_a_call(getattr(candidate, kind), device)
                    if number:
                        times_s.setdefault((candidate.name, kind, silent), []).append(seconds)
                        if not silent:
                            host_s.setdefault((candidate.name, kind), []).append(until_issued)
    config = plan.config
    tokens = config.engine.micro_batch_size * config.data.sequence_length
    operations = tokens * attention_flops_per_token(config.model, config.data.sequence_length)
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = {"name": candidate.name, "grid": candidate.grid}
        for kind in kinds:
            own = times_s[candidate.name, kind, False]
            median = statistics.median(own)
            ideal = statistics.median(times_s[candidates[0].name, kind, False]) * candidate.share
            silent = times_s.get((candidate.name, kind, True))
            row[kind] = {
                "ms": 1e3 * median,
                "min_ms": 1e3 * min(own),
                "max_ms": 1e3 * max(own),
                "host_ms": 1e3 * statistics.median(host_s[candidate.name, kind]),
                "tflops": operations * candidate.share * (3 if kind == "forward_backward" else 1) / median / 1e12,
                "ideal_pct": 100 * ideal / median,
                "exposed_ms": None if silent is None else max(0.0, 1e3 * (median - statistics.median(silent))),
            }
        rows.append(row)
    return rows


def _seconds_of_a_call(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """The slowest rank's mean over as many calls as take TIMED_S, and the slowest host's until all were issued."""
    clock = StepClock()

    def seconds(number: int) -> tuple[float, float]:
        dist.barrier()
        clock.restart()
        started = time.perf_counter()
        for _ in range(number):
            call()
        until_issued = time.perf_counter() - started
        clock.tick()
        own = {"whole": clock.take()[0] / number, "issued": until_issued / number}
        slowest = extremes_over_ranks(own, device)
        return slowest["whole"][1], slowest["issued"][1]

    return seconds(max(1, round(TIMED_S / seconds(1)[0])))


def _parts_ms(candidate: Candidate, device: torch.device) -> dict[str, tuple[float, float]]:
    """Where a call goes with its backward pass, under the profiler: the least and the most of all ranks, in ms."""
    with candidate.around():
        breakdown = step_breakdown(candidate.forward_backward)
    parts = {part: 1e3 * share * breakdown.step_time_s for part, share in breakdown.shares.items()}
    return extremes_over_ranks(parts, device)


def _parts_table(rows: list[dict[str, Any]]) -> list[str]:
    parts = [part for part in PARTS if any(row["parts_ms"][part][1] for row in rows)]
    cells = [["parts, ms (least - most of all ranks)", *parts]]
    for row in rows:
        spans = [row["parts_ms"][part] for part in parts]
        cells.append([row["name"], *(f"{least:.3f} - {most:.3f}" for least, most in spans)])
    return _aligned(cells)


def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Joules that this rank's GPU took since its driver was loaded, renewed some times in a second; None where nothing
    counts them.
    """
    if device.type != "cuda" or not find_spec("pynvml"):
        return None
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3


def _at_length(candidate: Candidate, device: torch.device, joules: Callable[[], float]) -> dict[str, Any]:
    """Calls with their backward passes, one after the other for AT_LENGTH_S: `ms` of one, the slowest rank's; and the
    `watts` and the `joules` of one call, the least and the most of all ranks.
    """

    def measure(number: int) -> dict[str, float]:
        dist.barrier()
        before, started = joules(), mark()
        for _ in range(number):
            candidate.forward_backward()
        seconds = durations_s([(started, mark())])[0]
        spent = joules() - before
        return {"ms": 1e3 * seconds / number, "joules": spent / number, "watts": spent / seconds}

    with candidate.around():
        number = max(1, round(AT_LENGTH_S / (max_over_ranks(measure(2)["ms"], device) / 1e3)))
        own = measure(number)
    extremes = extremes_over_ranks(own, device)
    return {"calls": number, "ms": extremes["ms"][1], "joules": extremes["joules"], "watts": extremes["watts"]}


def _at_length_table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [["forward + backward, at length", "calls", "ms", "joules per call", "watts"]]
    for row in rows:
        own = row["at_length"]
        spans = [f"{own[name][0]:.1f} - {own[name][1]:.1f}" for name in ("joules", "watts")]
        cells.append([row["name"], f"{own['calls']}", f"{own['ms']:.3f}", *spans])
    return _aligned(cells)


def _table(rows: list[dict[str, Any]], num_ranks: int) -> list[str]:
    kinds = {"forward": "forward", "forward_backward": "forward + backward"}
    header = ["method", "grid"]
    for title in kinds.values():
        header += [f"{title} ms (min - max)", "host", "TFLOP/s", "of ideal", *(["exposed ms"] if num_ranks > 1 else [])]
    cells = [header]
    for row in rows:
        line = [row["name"], row["grid"]]
        for kind in kinds:
            own = row[kind]
            line += [f"{own['ms']:.3f} ({own['min_ms']:.3f} - {own['max_ms']:.3f})", f"{own['host_ms']:.3f}"]
            line += [f"{own['tflops']:.3g}", f"{own['ideal_pct']:.1f} %"]
            if num_ranks > 1:
                line.append("n/a" if own["exposed_ms"] is None else f"{own['exposed_ms']:.3f}")
        cells.append(line)
    return _aligned(cells)


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
