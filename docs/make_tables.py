"""Writes the tables of docs/performance.md from the raw results in docs/results.

python docs/make_tables.py            rewrites what stands between the markers <!-- NAME --> and <!-- end NAME -->
python docs/make_tables.py --check    only says whether the file is up to date
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"


def parity_table(name: str) -> str:
    """Worst over accumulation 1 and 2, L = 32 and 29, of what the gate compares."""
    cells = json.loads((RESULTS / name).read_text())["cells"]
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


def main_job_table() -> str:
    rows = json.loads((RESULTS / "main_job_cpu.json").read_text())["measured"]
    lines = ["| what | goal | measured |", "|---|---|---|"]
    return "\n".join(lines + [f"| {row['what']} | {row['goal']} | {row['measured']} |" for row in rows])


TABLES: dict[str, Callable[[], str]] = {
    "main job": main_job_table,
    "parity cpu": lambda: parity_table("parity_cpu.json"),
    "parity gpu": lambda: parity_table("parity_2xH200.json"),
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
            "docs/performance.md is not what docs/results give: run python docs/make_tables.py" if new != old else 0
        )
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
