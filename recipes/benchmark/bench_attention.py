"""Attention alone, without a model: our methods and the baselines on the same ranks, beside one device.

The ideal is a ring whose messages, merges and smaller tiles cost nothing. Every output is checked against the full
attention before anything is timed. A single rank instead simulates larger rings, without their messages.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from conf.schema import document_lengths
from recipes.benchmark.candidates import Candidate, make_candidates
from recipes.engine.base import extremes_over_ranks
from recipes.monitor.call_timer import CallSeconds, seconds_of_a_call
from recipes.monitor.metric_registry import PARTS
from recipes.monitor.reporter import Reporter
from recipes.monitor.trace_analysis import step_breakdown
from recipes.planning.plan import Plan
from recipes.planning.throughput import attention_flops_per_token
from recipes.run.run_dir import replace_file
from recipes.run.text_table import text_table
from ring_attention.transport import messages_stay_local

RESULT_FILE = "bench_attention.json"
TIMED_S = 0.1  # duration of the calls in each round, at least
KINDS = {"forward": 1, "forward_backward": 3}  # what is timed, and how many forward passes' FLOPs it has


def bench_attention(plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Time all candidates; returns TFLOP/s per rank of the first method, forward and backward.

    Every rank must call it; `reporter` is rank 0's, and None on all others. All ranks share each sequence, whatever
    degrees are configured.

    Raises:
        RuntimeError: if a candidate's output differs from that of full attention.
    """
    say = reporter.say if reporter else (lambda *lines: None)
    config, model, num_ranks = plan.config, plan.config.model, plan.num_ranks
    device = torch.device(plan.device_type)
    say(
        f"attention of {config.engine.micro_batch_size} x {config.data.sequence_length:,} tokens, {model.num_heads} "
        f"heads and {model.num_kv_heads} kv heads x {model.head_dim}, {config.engine.dtype}, causal"
        f"{_within_documents(plan)}; {num_ranks} rank{'s' if num_ranks > 1 else ''} on {plan.device_name}, "
        f"kernel {plan.kernel_choice()[0]}"
    )
    candidates = make_candidates(plan, device, say)
    say("timing ...")
    rows = _time(candidates, plan, device)
    say("", *_times_table(rows, num_ranks), "")
    if config.breakdown:
        say("profiling ...")
        for row, candidate in zip(rows, candidates, strict=True):
            with candidate.attention.context():
                times_s = step_breakdown(candidate.forward_backward)
            row["parts_ms"] = extremes_over_ranks({part: 1e3 * time_s for part, time_s in times_s.items()}, device)
        say("", *_parts_table(rows), "")
    say(
        "ms: one call, on the slowest rank. host: until the host has issued it; if the two are equal, the GPU may be",
        "waiting for the host. TFLOP/s: per device; causal counted once, within documents, backward as two forward",
        "passes. ideal: one device's time x each device's share. exposed: what the call takes longer than without",
        "messages between ranks.",
        *(["parts: one call with its backward pass, under the profiler."] if config.breakdown else []),
        *(["!!! ON THE CPU ranks share cores: these figures say nothing about GPUs"] if device.type == "cpu" else []),
    )
    if reporter:
        result = {"device": plan.device_name, "num_ranks": num_ranks, "config": asdict(config), "rows": rows}
        result["documents"] = document_lengths(config)
        replace_file(run_dir / RESULT_FILE, json.dumps(result, indent=1) + "\n")
        for row, kind in itertools.product(rows, KINDS):
            reporter.write_summary({f"{row['name']}/{kind}/{name}": value for name, value in row[kind].items()})
        say(f"all numbers: {run_dir / RESULT_FILE}", *reporter.wandb_hints())
    return rows[min(1, len(rows) - 1)]["forward_backward"]["tflops"]


def _within_documents(plan: Plan) -> str:
    """What the mask adds to causal, for people."""
    if plan.config.documents is None:
        return ""
    lengths = document_lengths(plan.config)
    shortest, longest = min(lengths), max(lengths)
    sizes = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return f" within {len(lengths):,} document{'s' if len(lengths) > 1 else ''} of {sizes} tokens"


def _time(candidates: list[Candidate], plan: Plan, device: torch.device) -> list[dict[str, Any]]:
    """A row of times in ms for each candidate. Every round times all of them, so that drift affects all alike."""
    samples: dict[tuple[str, str, bool], list[CallSeconds]] = collections.defaultdict(list)
    for number in range(1 + plan.config.compare.rounds):  # the first one warms up
        for candidate, kind in itertools.product(candidates, KINDS):
            for is_silent in (False, True) if candidate.attention.has_messages else (False,):
                with candidate.attention.context(), messages_stay_local() if is_silent else contextlib.nullcontext():
                    sample = seconds_of_a_call(getattr(candidate, kind), device, TIMED_S)
                if number:
                    samples[candidate.name, kind, is_silent].append(sample)
    median_s = {key: statistics.median(total_s for total_s, _ in own) for key, own in samples.items()}
    model, lengths = plan.config.model, document_lengths(plan.config)
    flops_of_row = sum(length * attention_flops_per_token(model, length) for length in lengths)
    flops = plan.config.engine.micro_batch_size * flops_of_row
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = {"name": candidate.name, "grid": candidate.attention.grid}
        if module := candidate.attention.module:
            row["transport"] = module.transport_used
        layout = candidate.attention.layout
        share = layout.local_length / layout.padded_length
        for kind, passes in KINDS.items():
            times_s, issued_s = zip(*samples[candidate.name, kind, False], strict=True)
            time_s, silent_s = median_s[candidate.name, kind, False], median_s.get((candidate.name, kind, True))
            row[kind] = {
                "ms": 1e3 * time_s,
                "min_ms": 1e3 * min(times_s),
                "max_ms": 1e3 * max(times_s),
                "host_ms": 1e3 * statistics.median(issued_s),
                "tflops": flops * share * passes / time_s / 1e12,
                "ideal_pct": 100 * median_s[candidates[0].name, kind, False] * share / time_s,
                "exposed_ms": None if silent_s is None else max(0.0, 1e3 * (time_s - silent_s)),
            }
        rows.append(row)
    return rows


def _times_table(rows: list[dict[str, Any]], num_ranks: int) -> list[str]:
    names = ["host", "TFLOP/s", "of ideal", *(["exposed ms"] if num_ranks > 1 else [])]
    cells = [["method", "grid", "forward ms (min - max)", *names, "forward + backward ms (min - max)", *names]]
    for row in rows:
        line = [row["name"], row["grid"]]
        for own in (row[kind] for kind in KINDS):
            line += [f"{own['ms']:.3f} ({own['min_ms']:.3f} - {own['max_ms']:.3f})", f"{own['host_ms']:.3f}"]
            line += [f"{own['tflops']:.3g}", f"{own['ideal_pct']:.1f} %"]
            if num_ranks > 1:
                line.append("n/a" if own["exposed_ms"] is None else f"{own['exposed_ms']:.3f}")
        cells.append(line)
    return text_table(cells)


def _parts_table(rows: list[dict[str, Any]]) -> list[str]:
    parts = [part for part in PARTS if any(row["parts_ms"][part][1] for row in rows)]
    cells = [["parts, ms (least - most of all ranks)", *parts]]
    for row in rows:
        cells.append([row["name"], *("{:.3f} - {:.3f}".format(*row["parts_ms"][part]) for part in parts)])
    return text_table(cells)
