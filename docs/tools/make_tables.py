"""Writes the tables of docs/performance.md from the raw results in docs/results.

python -m docs.tools.make_tables            rewrites what stands between the markers <!-- NAME --> and <!-- end NAME -->
python -m docs.tools.make_tables --check    only says whether the file is up to date
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from docs.tools.tables_speed import (
    RESULTS,
    at_length_table,
    attention_table,
    auto_table,
    block_speeds_table,
    ceilings_table,
    comparison_table,
    final,
    host_table,
    long_steps_table,
    parts_table,
    ring_blocks_table,
    steps_table,
    throughput_table,
    tools_table,
    turns_table,
)
from ring_attention import CAUSAL, FULL, Layout, Mask
from ring_attention.schedule import imbalance, ring_schedule, tokens_sent, work_per_rank
from tests.tools.long_step import predicted_again

DOCS = Path(__file__).parents[1]


def parity_table(name: str) -> str:
    """Worst over accumulation 1 and 2, L = 32 and 29, of what the gate compares."""
    cells = [cell for cell in json.loads((RESULTS / name).read_text())["cells"] if cell["method"] == "ring"]
    lines = [
        "| ring x data | "
        + " | ".join(f"{dtype} ZeRO {stage}" for dtype in ("fp32", "bf16") for stage in range(4))
        + " |"
    ]
    lines.append("|---" * 9 + "|")
    for ring, data in sorted({(cell["ring_degree"], cell["data_degree"]) for cell in cells}):
        row = [f"{ring} x {data}"]
        for dtype in ("fp32", "bf16"):
            for stage in range(4):
                here = [
                    cell
                    for cell in cells
                    if (cell["ring_degree"], cell["data_degree"], cell["dtype"], cell["zero_stage"])
                    == (ring, data, dtype, stage)
                ]
                if dtype == "fp32":
                    keys = ("loss", "grad_norm", "gradient", "parameter")
                    row.append(f"{max(cell[key] for cell in here for key in keys):.1e}")
                else:
                    row.append(f"{max(cell['half_ratio'] for cell in here):.2f}")
        lines.append("| " + " | ".join(row) + " |")
    failed = sum(not cell["passes"] for cell in cells)
    lines.append(f"\n{len(cells)} cells, {failed} failed. fp32: worst relative error against fp64 (limit 1e-5). ")
    lines[-1] += "bf16: worst error over that of bf16 in one process (limit 1.5)."
    return "\n".join(lines)


def methods_table(name: str) -> str:
    """The other methods: worst over ZeRO stages, data degrees, models, accumulation and lengths."""
    cells = [cell for cell in json.loads((RESULTS / name).read_text())["cells"] if cell["method"] != "ring"]
    kinds = ("ring", "ulysses", "tensor", "pipeline")
    lines = ["| method | grid | fp32, worst relative error | bf16, worst ratio | cells, failed |", "|---" * 5 + "|"]

    def grid(cell: dict) -> tuple[str, str]:
        degrees = [f"{cell[f'{kind}_degree']} {kind}" for kind in kinds if cell.get(f"{kind}_degree", 1) > 1]
        degrees += [] if cell.get("sequence_sharded_norms", True) else ["whole norms"]
        return cell["method"], " x ".join(degrees) or "whole sequences"

    for method, degrees in dict.fromkeys(grid(cell) for cell in cells):
        here = [cell for cell in cells if grid(cell) == (method, degrees)]
        keys = ("loss", "grad_norm", "gradient", "parameter")
        fp32 = max(cell[key] for cell in here if cell["dtype"] == "fp32" for key in keys)
        bf16 = max((f"{cell['half_ratio']:.2f}" for cell in here if cell["dtype"] == "bf16"), default="not run")
        failed = sum(not cell["passes"] for cell in here)
        lines.append(f"| {method} | {degrees} | {fp32:.1e} | {bf16} | {len(here)}, {failed} |")
    return "\n".join(lines)


def main_job_table() -> str:
    rows = json.loads((RESULTS / "main_job_cpu.json").read_text())["measured"]
    lines = ["| what | goal | measured |", "|---|---|---|"]
    return "\n".join(lines + [f"| {row['what']} | {row['goal']} | {row['measured']} |" for row in rows])


def sparsity_table() -> str:
    """What 8 ranks compute and move; pure arithmetic of the schedule, checked against the exchange by the tests."""
    length, degree, bytes_per_token = 65536, 8, 2 * 8 * 128 * 2  # K and V of 8 heads x 128 in bf16
    documents = list(range(0, length + 1, 2048))
    masks = {
        "causal": CAUSAL,
        "full": FULL,
        "window of 4096": Mask(left=4095),
        "window of 256": Mask(left=255),
        "32 documents of 2048": CAUSAL.packed(documents),
        "window of 256 in those": Mask(left=255).packed(documents),
    }
    lines = [
        "| mask | layout | query-key pairs, of causal | blocks per rank | imbalance "
        "| K,V sent forward, MiB per rank: mean, max | dK,dV sent backward, MiB |",
        "|---" * 7 + "|",
    ]
    all_pairs = length * (length + 1) // 2
    for label, mask in masks.items():
        for name in ("zigzag", "contiguous"):
            layout = Layout(name, degree, length)
            schedules = [ring_schedule(layout, mask, rank) for rank in range(degree)]
            blocks = [sum(len(stage.tiles) for stage in stages) for stages in schedules]
            sent = [tokens_sent(layout, mask, rank) for rank in range(degree)]
            keys, gradients = ([tokens[index] for tokens in sent] for index in (0, 1))
            pairs = sum(map(sum, work_per_rank(layout, mask))) / all_pairs
            mib = bytes_per_token / 2**20
            lines.append(
                f"| {label} | {name} | {100 * pairs:.1f} % | {min(blocks)} to {max(blocks)} "
                f"| {imbalance(layout, mask):.2f} | {sum(keys) / degree * mib:.1f}, {max(keys) * mib:.1f} "
                f"| {sum(gradients) / degree * mib:.1f}, {max(gradients) * mib:.1f} |"
            )
    return "\n".join(lines)


def precision_table(name: str) -> str:
    curve = json.loads((RESULTS / name).read_text())
    quantities = list(dict.fromkeys(row["quantity"] for row in curve["rows"]))
    lines = ["| ring degree | " + " | ".join(quantities) + " |", "|---" * (1 + len(quantities)) + "|"]
    for degree in dict.fromkeys(row["ring_degree"] for row in curve["rows"]):
        cells = [
            f"{row['error']:.2e} ({row['min']:.2e} - {row['max']:.2e}), {row['ratio']:.2f}x"
            for row in curve["rows"]
            if row["ring_degree"] == degree
        ]
        lines.append(f"| {degree} | " + " | ".join(cells) + " |")
    lines.append(f"\n{curve['device']}, torch {curve['torch']}, L = {curve['length']:,}, {curve['seeds']} seeds.")
    return "\n".join(lines)


def ring_memory_table() -> str:
    """Of attention alone, by the number of ranks; layers and ranks leave what one layer works with as it is."""
    rows = json.loads((RESULTS / "ring_memory_cpu.json").read_text())
    lines = [
        "| ranks | L | dtype | kept, 1 / 4 layers, KiB | beyond it, forward, KiB | and backward, 1 / 4 layers, KiB | "
        "received K,V alive, blocks |",
        "|---" * 7 + "|",
    ]
    for one, four in zip(rows[::3], rows[2::3], strict=True):  # layers: 1, 2, 4
        beyond = [(row["peak"] - row["kept"]) / 1024 for row in (one, four)]
        num_ranks, dtype = one["num_ranks"], one["dtype"].removeprefix("torch.")
        lines.append(
            f"| {num_ranks} | {num_ranks * one['local_length']:,} | {dtype} | "
            f"{one['kept'] / 1024:,.0f} / {four['kept'] / 1024:,.0f} | "
            f"{(four['forward_peak'] - four['kept']) / 1024:,.0f} | {beyond[0]:,.0f} / {beyond[1]:,.0f} | "
            f"{four['keys_received'] / four['block']:.0f} |"
        )
    return "\n".join(lines)


def fuzz_table() -> str:
    summary = json.loads((RESULTS / "fuzz_cpu.json").read_text())
    lines = [
        f"{summary['cases']:,} cases, {summary['failed']} failed, {summary['seconds']} s (seed {summary['seed']}).",
        "",
    ]
    lines += ["| drawn | how often |", "|---|---|"]
    for name, counts in summary["seen"].items():
        lines.append(f"| {name} | " + "; ".join(f"{key} {count}" for key, count in sorted(counts.items())) + " |")
    return "\n".join(lines)


def memory_table() -> str:
    """What tests.tools.memory counted, and what was predicted."""
    rows = json.loads((RESULTS / "memory_cpu.json").read_text())
    lines = ["| setting | fullest at | predicted, MiB | counted, MiB | error |", "|---" * 5 + "|"]
    for row in rows:
        setting = [row["dtype"], f"ZeRO-{row['zero_stage']}", f"{row['num_ranks']} ranks, {row['method']}"]
        setting += [f"{row['local_length']:,} tokens x {row['micro_batch_size']}", f"recompute {row['recompute']}"]
        setting += [f"tiles of {row['tile_tokens']}"] if row["tile_tokens"] else []
        setting += [f"{name} {value}" for name, value in row["model"].items()]
        sizes = [f"{row[name] / 2**20:.2f}" for name in ("predicted", "counted")]
        cells = [", ".join(setting), row["moment"], *sizes, f"{row['error_pct']:+.2f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_memory_table(*names: str) -> str:
    """What a step took at most on a GPU, as tests.tools.long_step measured it, and what is predicted now."""
    lines = ["| setting | fullest at | predicted, GiB | measured, GiB | error |", "|---" * 5 + "|"]
    for row in [row for name in names for row in json.loads((RESULTS / name).read_text())]:
        now = {} if "error" in row else predicted_again(row)
        if not now:
            continue
        peak_gib = row["peak_gib"]
        error = f"{100 * (now['predicted_gib'] / peak_gib - 1):+.2f} %"
        sizes = [f"{size:.2f}" for size in (now["predicted_gib"], peak_gib)]
        cells = [f"`{final(row['setting'])}`", now["fullest_at"], *sizes, error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def faults_table() -> str:
    """What tests.tools.faults did to runs."""
    summary = json.loads((RESULTS / "faults_cpu.json").read_text())
    lines = [
        "| fault | tried | survived | lost | seconds until all ranks were gone: median, longest |",
        "|---" * 5 + "|",
    ]
    for row in summary["faults"]:
        ends = row["end_s"]
        seconds = f"{statistics.median(ends):.2f}, {max(ends):.2f}" if ends else ""
        lines.append(f"| {row['fault']} | {row['tried']} | {row['survived']} | {row['lost']} | {seconds} |")
    return "\n".join(lines)


def elastic_table() -> str:
    """What tests.tools.elastic measured."""
    lines = [
        "| from | to | dtype | largest difference of the losses after it |",
        "|---" * 4 + "|",
    ]
    for row in json.loads((RESULTS / "elastic_cpu.json").read_text()):
        lines.append(
            f"| {row['before']} | {row['after']} | {row['dtype']} | {row['difference']:.1e} of {row['loss']:.1f} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "main job": main_job_table,
    "parity cpu": lambda: parity_table("parity_cpu.json"),
    "parity gpu": lambda: parity_table("parity_2xH200.json"),
    "parity methods cpu": lambda: methods_table("parity_cpu.json"),
    "parity methods gpu": lambda: methods_table("parity_2xH200.json"),
    "parity four": lambda: parity_table("parity_4xH200.json"),
    "parity methods four": lambda: methods_table("parity_4xH200.json"),
    "sparsity": sparsity_table,
    "precision cpu": lambda: precision_table("precision_cpu.json"),
    "precision gpu": lambda: precision_table("precision_H100.json"),
    "fuzz": fuzz_table,
    "memory": memory_table,
    "memory gpu": lambda: gpu_memory_table(
        "memory_H200.json",
        "million_H200.json",
        "long_steps_2xH200.json",
        "half_million_H100.json",
        "flat_4xH100.json",
        "tools_H100.json",
    ),
    "faults": faults_table,
    "elastic": elastic_table,
    "ring memory": ring_memory_table,
    "paper 10k forward": lambda: comparison_table("paper_10k_forward_2xH200.json"),
    "paper 100k forward": lambda: comparison_table("paper_100k_forward_2xH200.json"),
    "paper 10k pretrain": lambda: comparison_table("paper_10k_pretrain_2xH200.json"),
    "paper 100k pretrain": lambda: comparison_table("paper_100k_pretrain_2xH200.json"),
    "attention": lambda: attention_table(
        {
            "16,384": "attention_16384_2xH200.json",
            "65,536": "attention_65536_2xH200.json",
            "131,072": "attention_131072_2xH200.json",
        }
    ),
    "ring blocks": ring_blocks_table,
    "attention four": lambda: attention_table({f"{n:,}": f"attention_{n}_4xH200.json" for n in (32768, 65536, 131072)}),
    "parts four": lambda: parts_table(
        {f"{n:,}": f"attention_{n}_4xH200.json" for n in (32768, 65536, 131072)},
        ("one device", "ring", "ulysses", "ring, p2p"),
    ),
    "parts two": lambda: parts_table(
        {f"{n:,}": f"attention_{n}_2xH200.json" for n in (16384, 65536, 131072)}, ("one device", "ring", "ulysses")
    ),
    "parts simulated": lambda: parts_table(
        {"65,536": "simulated_65536_H200.json"},
        ("one device", *(f"ring of {n}" for n in (2, 4, 8, 16, 32, 64))),
    ),
    "at length two": lambda: at_length_table("attention_65536_gqa_2xH100.json"),
    "at length four": lambda: at_length_table("attention_131072_at_length_4xH200.json"),
    "transports 10k": lambda: comparison_table("transports_10k_forward_2xH200.json"),
    "transports 100k": lambda: turns_table(
        "transports_100k_forward_2xH200.jsonl", ["ra_sp", "ra_copies", "dp"], baseline="dp"
    ),
    "wide 10k forward": lambda: comparison_table("wide_10k_forward_4xH200.json"),
    "wide 100k forward": lambda: comparison_table("wide_100k_forward_4xH200.json"),
    "wide 10k pretrain": lambda: comparison_table("wide_10k_pretrain_4xH100.json"),
    "wide 100k pretrain": lambda: comparison_table("wide_100k_pretrain_4xH100.json"),
    "strong scaling": lambda: comparison_table("strong_scaling_4xH100.json"),
    "weak scaling": lambda: comparison_table("weak_scaling_4xH100.json"),
    "rivals 10k forward": lambda: comparison_table("rivals_10k_forward_2xH200.json"),
    "rivals 100k forward": lambda: comparison_table("rivals_100k_forward_2xH200.json"),
    "rivals 10k pretrain": lambda: comparison_table("rivals_10k_pretrain_2xH200.json"),
    "rivals 100k pretrain": lambda: turns_table(
        "rivals_100k_pretrain_2xH200.jsonl", ["tp_pp", "pp", "ra_sp", "dp"], baseline="tp_pp"
    ),
    "halves": lambda: attention_table(
        {
            "10,000, cut by queries": "attention_10000_heads_512_halved_2xH200.json",
            "10,000, whole": "attention_10000_heads_512_whole_2xH200.json",
            "10,000, half of the rows last": "attention_10000_heads_512_rows_2xH200.json",
        }
    ),
    "heads 512": lambda: attention_table({"32,768": "attention_32768_heads_512_2xH200.json"}),
    "short": lambda: host_table({f"{n:,}": f"attention_{n}_2xH200.json" for n in (2048, 4096, 8192)}),
    "simulated": lambda: host_table({"65,536": "simulated_65536_H200.json"}),
    "auto": auto_table,
    "block speeds": block_speeds_table,
    "steps": lambda: steps_table("layers_8b_131072_pretrain_2xH200.json"),
    "ceilings": lambda: ceilings_table("ceilings_paper_10k_H200.json", "ceilings_paper_100k_H200.json"),
    "million": lambda: long_steps_table("million_H200.json", "long_steps_2xH200.json", "half_million_H100.json"),
    "tools": lambda: tools_table("tools_H100.json"),
    "llama 1b": lambda: throughput_table(
        {"L = 32,768": "llama_1b_32768_2xH200.jsonl", "L = 65,536": "llama_1b_65536_2xH200.jsonl"}
    ),
}


def main() -> None:
    path = DOCS / "performance.md"
    old = path.read_text(encoding="utf-8")
    new = old
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        text = table()
        new, count = re.subn(pattern, rf"\g<1>{text}\n\g<2>", new, flags=re.DOTALL)
        assert count == 1, f"performance.md has no place for the table {name}"
    if "--check" in sys.argv:
        sys.exit(
            "docs/performance.md is not what docs/results give: run python -m docs.tools.make_tables"
            if new != old
            else 0
        )
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
