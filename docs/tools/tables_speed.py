"""Tables of times and speeds, from the raw results in docs/results, for docs/tools/make_tables.py."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig
from recipes.benchmark.comparison_report import summarize
from recipes.planning.throughput import attention_flops_per_token, forward_flops_per_token, peak_tflops
from ring_attention.auto_method import Links, Workload, rank_methods

RESULTS = Path(__file__).parents[1] / "results"


def comparison_table(*names: str) -> str:
    """What recipe=compare measured, how the micro-batch was chosen, and where the time went.

    Of several files, the baseline is the first's: the others have entries that want another batch.
    """
    comparisons = [json.loads((RESULTS / name).read_text()) for name in names]
    rows = [row for comparison in comparisons for row in comparison["rows"] if "error" not in row]
    baseline = comparisons[0]["baseline"]
    base = next(row["tokens_per_s"] for row in rows if row["entry"] == baseline)
    lines = [
        f"| method | grid | batch | micro-batch | TPS, median (min - max) | TPS per GPU | TPOT ms | vs {baseline} "
        "| TFLOP/s per GPU | MFU | peak GiB | exposed ms of step ms |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        exposed = row["exposed_communication_ms"]
        lines.append(
            f"| {row['entry']} | {row['grid']} | {row['sequences_per_step']} | {row['micro_batch_size']} "
            f"| {row['tokens_per_s']:,.0f} ({row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f}) "
            f"| {row['tokens_per_s_per_rank']:,.0f} | {row['tpot_ms']:.4f} "
            f"| {100 * (row['tokens_per_s'] / base - 1):+.1f} % | {row['model_tflops_per_rank']:.0f} "
            f"| {row['mfu_pct']:.1f} % | {row['peak_memory_gib']:.1f} "
            f"| {'n/a' if exposed is None else f'{exposed:.0f}'} of {row['step_time_ms']:,.0f} |"
        )
    if sizes := sorted({int(size) for row in rows for size in row["tried"]}):
        lines += ["", "| TPS per GPU by micro-batch | " + " | ".join(map(str, sizes)) + " |"]
        lines.append("|---" * (1 + len(sizes)) + "|")
        for row in rows:
            tried = [row["tried"].get(str(size)) for size in sizes]
            cells = ["n/a" if speed is None else f"{speed / row['num_ranks']:,.0f}" for speed in tried]
            lines.append(f"| {row['entry']} | " + " | ".join(cells) + " |")
    if profiled := [row for row in rows if row["shares_pct"]]:
        parts = list(profiled[0]["shares_pct"])
        lines += ["", "| time of a step, % | " + " | ".join(parts) + " |", "|---" * (1 + len(parts)) + "|"]
        lines += [
            f"| {row['entry']} | " + " | ".join(f"{row['shares_pct'][part]:.1f}" for part in parts) + " |"
            for row in profiled
        ]
    return "\n".join(lines)


def turns_table(name: str, entries: list[str], baseline: str) -> str:
    """Of a comparison that was cut off, from its turns."""
    turns = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
    rows = summarize(turns, entries, baseline)
    lines = [
        f"| method | micro-batch | TPS, median (min - max) | TPS per GPU | vs {baseline} | TFLOP/s per GPU | peak GiB |"
    ]
    lines.append("|---" * 7 + "|")
    for row in rows:
        lines.append(
            f"| {row['entry']} | {row['micro_batch_size']} "
            f"| {row['tokens_per_s']:,.0f} ({row['tokens_per_s_min']:,.0f} - {row['tokens_per_s_max']:,.0f}) "
            f"| {row['tokens_per_s_per_rank']:,.0f} | {row['change_pct']:+.1f} % "
            f"| {row['model_tflops_per_rank']:.0f} | {row['peak_memory_gib']:.1f} |"
        )
    return "\n".join(lines)


def attention_table(names: dict[str, str]) -> str:
    """What recipe=bench_attention measured."""
    lines = [
        "| L | contender | forward: ms (min - max) | TFLOP/s per GPU | of ideal | exposed ms "
        "| with backward: ms (min - max) | TFLOP/s per GPU | of ideal | exposed ms |",
        "|---" * 10 + "|",
    ]
    for length, name in names.items():
        for row in json.loads((RESULTS / name).read_text())["rows"]:
            cells = [length, row["name"]]
            for kind in ("forward", "forward_backward"):
                at = row[kind]
                exposed = "n/a" if at["exposed_ms"] is None else f"{at['exposed_ms']:.2f}"
                cells.append(f"{at['ms']:.2f} ({at['min_ms']:.2f} - {at['max_ms']:.2f})")
                cells += [f"{at['tflops']:.0f}", f"{at['ideal_pct']:.1f} %", exposed]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shared_out(row: dict[str, Any], num_ranks: int) -> tuple[str, int]:
    """The label of a contender of recipe=bench_attention, and what its call is divided by: that of one device is."""
    return (
        (f"one device / {num_ranks}", num_ranks) if row["name"] == "one device" and num_ranks > 1 else (row["name"], 1)
    )


def parts_table(names: dict[str, str], candidates: tuple[str, ...]) -> str:
    """Where a call goes with its backward pass, as recipe=bench_attention's profiles have it: least - most of ranks."""
    parts = ("attention", "merge", "exchange", "other", "idle")
    lines = ["| L | contender | " + ", ms | ".join(parts) + ", ms |", "|---" * (2 + len(parts)) + "|"]
    for length, name in names.items():
        result = json.loads((RESULTS / name).read_text())
        for row in result["rows"]:
            if row["name"] not in candidates:
                continue
            label, of = _shared_out(row, result["num_ranks"])
            spans = [[f"{ms / of:.2f}" for ms in row["parts_ms"][part]] for part in parts]
            cells = [span[0] if span[0] == span[1] else " - ".join(span) for span in spans]
            lines.append("| " + " | ".join([length, label, *cells]) + " |")
    return "\n".join(lines)


def at_length_table(name: str) -> str:
    """What recipe=bench_attention measured in calls for seconds: time, and energy and power of the GPUs."""
    result = json.loads((RESULTS / name).read_text())
    alone = result["rows"][0]["at_length"]["ms"] / result["num_ranks"]
    lines = ["| contender | calls | ms | of ideal | joules per call and GPU | watts |", "|---" * 6 + "|"]
    for row in result["rows"]:
        own, (label, of) = row["at_length"], _shared_out(row, result["num_ranks"])
        cells = [label, f"{own['calls']}", f"{own['ms'] / of:.1f}"]
        cells += [f"{100 * alone / own['ms'] * of:.1f} %", f"{own['joules'][0] / of:.1f} - {own['joules'][1] / of:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{own['watts'][0]:.0f} - {own['watts'][1]:.0f}"]) + " |")
    return "\n".join(lines)


def host_table(names: dict[str, str]) -> str:
    """What recipe=bench_attention measured, and how much of it until the host had issued the calls."""
    lines = [
        "| L | contender | forward: ms (min - max) | host ms | of ideal | with backward: ms (min - max) | host ms "
        "| of ideal |",
        "|---" * 8 + "|",
    ]
    for length, name in names.items():
        for row in json.loads((RESULTS / name).read_text())["rows"]:
            cells = [length, row["name"]]
            for kind in ("forward", "forward_backward"):
                at = row[kind]
                cells.append(f"{at['ms']:.2f} ({at['min_ms']:.2f} - {at['max_ms']:.2f})")
                cells += [f"{at['host_ms']:.2f}", f"{at['ideal_pct']:.1f} %"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ring_blocks_table() -> str:
    """What tests.tools.ring_kernels measured of a ring of two: the busier rank's calls, and half of one call for the whole.

    Both ranks have the causal calls of the local block; of the full ones each has one.
    """
    lines = [
        "| L | forward: calls, ms | half of the whole, ms | of ideal | backward: calls, ms | half of the whole, ms "
        "| of ideal | both: of ideal |",
        "|---" * 8 + "|",
    ]
    for length in (16384, 65536, 131072):
        rows = json.loads((RESULTS / f"ring_blocks_{length}_H200.json").read_text())["rows"]
        cells, calls_ms, ideal_ms = [f"{length:,}"], [], []
        for kind in ("forward", "backward"):
            whole, *calls = [(row["upper"], statistics.median(row["ms"])) for row in rows if row["kind"] == kind]
            local = sum(ms for upper, ms in calls if upper is not None)
            calls_ms.append(local + max(ms for upper, ms in calls if upper is None))
            ideal_ms.append(whole[1] / 2)
            cells += [f"{calls_ms[-1]:.2f}", f"{ideal_ms[-1]:.2f}", f"{100 * ideal_ms[-1] / calls_ms[-1]:.1f} %"]
        lines.append("| " + " | ".join([*cells, f"{100 * sum(ideal_ms) / sum(calls_ms):.1f} %"]) + " |")
    return "\n".join(lines)


def final(setting: str) -> str:
    """Of overrides the later ones, which count."""
    overrides = dict(word.split("=") for word in setting.split())
    return " ".join(f"{name}={value}" for name, value in overrides.items())


def long_steps_table(*names: str) -> str:
    """What tests.tools.long_step measured, in bf16."""
    lines = [
        "| setting | step s | tokens/s | model TFLOP/s per GPU | MFU | peak GiB | reserved by PyTorch, GiB |",
        "|---" * 7 + "|",
    ]
    for row in [row for name in names for row in json.loads((RESULTS / name).read_text())]:
        tflops = row["flops"] / row["step_time_s"] / row["num_ranks"] / 1e12
        mfu_pct = 100 * tflops / peak_tflops(row["device"], "bf16")
        lines.append(
            f"| `{final(row['setting'])}` | {row['step_time_s']:.0f} | {row['tokens_per_s']:,.0f} | {tflops:.0f} "
            f"| {mfu_pct:.1f} % | {row['peak_gib']:.1f} | {row['peak_reserved_gib']:.1f} |"
        )
    return "\n".join(lines)


def tools_table(name: str) -> str:
    """What tests.tools.long_step measured of one model and length, by the overrides in which settings differ."""
    rows = json.loads((RESULTS / name).read_text())
    shared = set.intersection(*(set(row["setting"].split()) for row in rows))
    lines = ["| setting | step s | tokens/s | MFU | peak GiB | reserved by PyTorch, GiB |", "|---" * 6 + "|"]
    for row in rows:
        own = " ".join(word for word in row["setting"].split() if word not in shared)
        cells = [f"`{own}`" if own else "none"]
        if "error" in row:
            cells += ["out of memory", "", "", "", ""]
        else:
            tflops = row["flops"] / row["step_time_s"] / row["num_ranks"] / 1e12
            cells += [f"{row['step_time_s']:.2f}", f"{row['tokens_per_s']:,.0f}"]
            cells += [f"{100 * tflops / peak_tflops(row['device'], 'bf16'):.1f} %"]
            cells += [f"{row['peak_gib']:.1f}", f"{row['peak_reserved_gib']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block_speeds_table() -> str:
    """What tests.tools.kernel_speeds measured: TFLOP/s forward / backward."""
    rows = json.loads((RESULTS / "block_speeds_H200.json").read_text())["rows"]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = ["| head size | tokens | " + " | ".join(kernels) + " |", "|---" * (2 + len(kernels)) + "|"]
    for head_dim, length in dict.fromkeys((row["head_dim"], row["length"]) for row in rows):
        speeds = {
            row["kernel"]: f"{row['forward']['tflops']:.0f} / {row['backward']['tflops']:.0f}"
            for row in rows
            if (row["head_dim"], row["length"]) == (head_dim, length)
        }
        lines.append(
            f"| {head_dim} | {length:,} | " + " | ".join(speeds.get(name, "refuses") for name in kernels) + " |"
        )
    return "\n".join(lines)


def auto_table() -> str:
    """What attention=auto expects of one layer's forward attention on hosts of 8 H200s, and what it takes."""
    shapes = {"16 x 512": (16, 16, 512), "32 x 128": (32, 32, 128), "32 x 128, 8 kv": (32, 8, 128)}
    lines = ["| heads | L | ranks | block, ms | a hop, ms | ring, ms | taken | ms |", "|---" * 8 + "|"]
    for (heads, shape), length, ranks in itertools.product(shapes.items(), (10_000, 32_768, 131_072), (8, 16)):
        # as recipes.planning.plan: 0.6 of the data sheet's peak; GB/s within and between hosts
        candidates = rank_methods(Workload(*shape, length, 1, 2, 0.6 * 989), Links(8, 280.0, 45.0), ranks)
        ring, taken = next(one for one in candidates if one.ulysses_degree == 1), candidates[0]
        grid = f"ring {taken.ring_degree} x Ulysses {taken.ulysses_degree}"
        times = (ring.compute_ms / ranks, ring.transfer_ms, ring.total_ms)
        cells = [heads, f"{length:,}", f"{ranks}", *(f"{time:.2f}" for time in times)]
        lines.append("| " + " | ".join([*cells, grid, f"{taken.total_ms:.2f}"]) + " |")
    return "\n".join(lines)


def steps_table(name: str) -> str:
    """What +experiment=bench_step measured, also with causal attention counted in full."""
    comparison = json.loads((RESULTS / name).read_text())
    lines = [
        "| method | TPS, median (min - max) | of its parts | TFLOP/s per GPU, causal once | causal in full | MFU "
        "| peak GiB | exposed ms of step ms |",
        "|---" * 8 + "|",
    ]
    rows = comparison["rows"]
    config = comparison["configs"][rows[0]["entry"]]
    model = ModelConfig(**config["model"])
    once = forward_flops_per_token(model, rows[0]["sequence_length"])
    attention = model.num_layers * attention_flops_per_token(model, rows[0]["sequence_length"])
    for row in rows:
        tflops, exposed = row["model_tflops_per_rank"], row["exposed_communication_ms"]
        lines.append(
            f"| {row['entry']} | {row['tokens_per_s']:,.0f} ({row['tokens_per_s_min']:,.0f} - "
            f"{row['tokens_per_s_max']:,.0f}) | {row['of_parts_pct']:.1f} % | {tflops:.0f} "
            f"| {tflops * (once + attention) / once:.0f} | {row['mfu_pct']:.1f} % "
            f"| {'n/a' if row['peak_memory_gib'] is None else format(row['peak_memory_gib'], '.1f')} "
            f"| {'n/a' if exposed is None else format(exposed, '.0f')} of {row['step_time_ms']:,.0f} |"
        )
    parts = list(rows[0]["shares_pct"])
    lines += ["", "| time of a step, % | " + " | ".join(parts) + " |", "|---" * (1 + len(parts)) + "|"]
    lines += [
        f"| {row['entry']} | " + " | ".join(f"{row['shares_pct'][part]:.1f}" for part in parts) + " |"
        for row in rows
        if row["shares_pct"]
    ]
    return "\n".join(lines)


def ceilings_table(*names: str) -> str:
    """What a layer's matrix products and attention reach alone, and the tokens per second that they allow."""
    measured = [json.loads((RESULTS / name).read_text()) for name in names]
    lines = ["| workload | pass | matrix products, TFLOP/s | attention, TFLOP/s | tokens/s that these allow |"]
    lines.append("|---" * 5 + "|")
    for result in measured:
        for kind in ("forward", "training"):
            rows = result[kind]["parts"]
            products = [row["tflops"] for row in rows if not row["part"].startswith("attention")]
            attention = [f"{row['tflops']:.0f}" for row in rows if row["part"].startswith("attention")]
            lines.append(
                f"| {result['model']}, {result['dtype']}, L = {result['length']:,} | {kind} "
                f"| {min(products):.0f} to {max(products):.0f} | {' forward, '.join(attention)}"
                f"{' backward' if len(attention) > 1 else ''} | {result[kind]['tokens_per_s']:,.0f} |"
            )
    return "\n".join(lines)


def throughput_table(runs: dict[str, str]) -> str:
    lines = [
        "| run | tok/s, median (min - max) | tok/s per GPU | step s | TPOT ms | MFU | peak GiB per GPU |",
        "|---" * 7 + "|",
    ]
    for label, name in runs.items():
        rows = [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
        rows = [row for row in rows if row["step"] >= 8 and "train/tokens_per_s" in row]  # the first steps warm up

        def median(key: str, rows: list[dict] = rows) -> float:
            return statistics.median(row[f"train/{key}"] for row in rows)

        speeds = [row["train/tokens_per_s"] for row in rows]
        lines.append(
            f"| {label} | {median('tokens_per_s'):,.0f} ({min(speeds):,.0f} - {max(speeds):,.0f}) "
            f"| {median('tokens_per_s_per_rank'):,.0f} | {median('step_time_p50_s'):.3f} | {median('tpot_ms'):.4f} "
            f"| {median('mfu_pct'):.1f} % | {median('peak_memory_gib'):.1f} |"
        )
    return "\n".join(lines)
