"""Writes the tables of docs/performance.md, docs/results/*.md and others from the raw results in docs/results.

python -m docs.tools.make_tables            rewrites what stands between the markers <!-- NAME --> and <!-- end NAME -->
python -m docs.tools.make_tables --check    only says whether the pages are up to date
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from functools import partial

from docs.tools import tables_correctness as correctness
from docs.tools import tables_forecast as forecast
from docs.tools import tables_scaling as scaling
from docs.tools import tables_speed as speed
from docs.tools.forecast_paper import paper_causes, paper_table
from docs.tools.markdown import DOCS, RESULTS

OWN = ("performance.md", "forecast.md", "huggingface.md", "data.md", "extend.md", "long_context.md")
PAGES = [*(DOCS / name for name in OWN), *sorted(RESULTS.glob("*.md"))]
PLACE = r"<!-- (?!end )(.+?) -->\n.*?<!-- end \1 -->"  # of a table
GPU_PARTS = ("one device", "ring", "ulysses", "ring, p2p")
SIMULATED_PARTS = ("one device", *(f"ring of {degree}" for degree in (2, 4, 8, 16, 32, 64)))


def _attention_files(num_gpus: int, *lengths: int) -> dict[str, str]:
    return {f"{length:,}": f"attention_{length}_{num_gpus}xH200.json" for length in lengths}


TWO = _attention_files(2, 16384, 65536, 131072)
FOUR = _attention_files(4, 32768, 65536, 131072)
GQA = {f"{n:,}": f"attention_{n}_gqa_2xH200.json" for n in (4096, 8192, 16384, 32768, 65536, 131072)}
PACKED = {
    mix: f"packed_{name}_65536_2xH200.json"
    for mix, name in {
        "8 of 8,192": "8x8192",
        "log-normal": "lognormal",
        "32 of 2,048": "32x2048",
        "256 of 256": "256x256",
    }.items()
}
LONG = ("million_H200.json", "long_steps_2xH200.json", "half_million_H100.json")
PARITY = {
    "cpu": ("CPU, up to 8 ranks", "parity_cpu.json"),
    "gpu": ("2 H200s", "parity_2xH200.json"),
    "four": ("4 H200s", "parity_4xH200.json"),
}
TABLES: dict[str, Callable[[], str]] = {
    "main job": speed.main_job,
    "paper table summary": partial(
        speed.comparison_summary,
        {
            "2 H200s, paper_10k, forward": "baselines_10k_forward_2xH200.json",
            "2 H200s, paper_100k, forward": "baselines_100k_forward_2xH200.json",
            "2 H200s, paper_10k, training": "baselines_10k_pretrain_2xH200.json",
            "2 H200s, paper_100k, training": "baselines_100k_pretrain_2xH200.jsonl",
            "4 H200s, paper_10k, forward": "wide_10k_forward_4xH200.json",
            "4 H200s, paper_100k, forward": "wide_100k_forward_4xH200.json",
            "4 H100s, paper_10k, training": "wide_10k_pretrain_4xH100.json",
            "4 H100s, paper_100k, training": "wide_100k_pretrain_4xH100.json",
        },
    ),
    "attention summary": partial(
        speed.attention_summary, {f"2, {n}": f for n, f in TWO.items()} | {f"4, {n}": f for n, f in FOUR.items()}
    ),
    "parity summary": partial(correctness.parity_summary, dict(PARITY.values())),
    **{f"parity {label}": partial(correctness.parity, name) for label, (_, name) in PARITY.items()},
    **{f"parity methods {label}": partial(correctness.parity_of_methods, name) for label, (_, name) in PARITY.items()},
    "hf families": correctness.hf_families,
    "packed": speed.packed,
    "packed links": partial(speed.packed_links, PACKED),
    "sparsity": correctness.sparsity,
    "precision cpu": partial(correctness.precision, "precision_cpu.json"),
    "precision gpu": partial(correctness.precision, "precision_H200.json"),
    "fuzz": correctness.fuzz,
    "extension": correctness.extension,
    "key sums": correctness.key_sums,
    "memory": correctness.memory,
    "memory gpu": partial(
        correctness.memory_on_gpus,
        "memory_H200.json",
        *LONG,
        "whole_8b_2xH200.json",
        "flat_4xH100.json",
        "tools_H100.json",
    ),
    "ring memory": correctness.ring_memory,
    "faults": correctness.faults,
    "elastic": correctness.elastic,
    "baselines 10k forward": partial(speed.comparison, "baselines_10k_forward_2xH200.json"),
    "baselines 100k forward": partial(speed.comparison, "baselines_100k_forward_2xH200.json"),
    "baselines 10k training": partial(speed.comparison, "baselines_10k_pretrain_2xH200.json"),
    "baselines 100k training": partial(speed.comparison, "baselines_100k_pretrain_2xH200.jsonl"),
    "p2p 10k forward": partial(speed.comparison, "paper_10k_forward_2xH200.json"),
    "p2p 100k forward": partial(speed.comparison, "paper_100k_forward_2xH200.json"),
    "p2p 10k training": partial(speed.comparison, "paper_10k_pretrain_2xH200.json"),
    "p2p 100k training": partial(speed.comparison, "paper_100k_pretrain_2xH200.json"),
    "transports 10k": partial(speed.comparison, "transports_10k_forward_2xH200.json"),
    "transports 100k": partial(speed.comparison, "transports_100k_forward_2xH200.jsonl"),
    "four 10k forward": partial(speed.comparison, "wide_10k_forward_4xH200.json"),
    "four 100k forward": partial(speed.comparison, "wide_100k_forward_4xH200.json"),
    "four 10k training": partial(speed.comparison, "wide_10k_pretrain_4xH100.json"),
    "four 100k training": partial(speed.comparison, "wide_100k_pretrain_4xH100.json"),
    "strong scaling": partial(speed.comparison, "strong_scaling_4xH100.json"),
    "weak scaling": partial(speed.comparison, "weak_scaling_4xH100.json"),
    "roofline": partial(speed.roofline, "ceilings_paper_10k_H200.json", "ceilings_paper_100k_H200.json"),
    "attention two": partial(speed.attention, TWO),
    "attention gqa": partial(speed.attention, GQA, with_host=True),
    "attention four": partial(speed.attention, FOUR),
    "attention parts two": partial(speed.attention_parts, TWO, GPU_PARTS[:3]),
    "attention parts four": partial(speed.attention_parts, FOUR, GPU_PARTS),
    "attention energy two": partial(speed.attention_energy, "attention_65536_gqa_2xH100.json"),
    "attention energy four": partial(speed.attention_energy, "attention_131072_at_length_4xH200.json"),
    "attention splits": partial(
        speed.attention,
        {
            "10,000, split by queries": "attention_10000_heads_512_halved_2xH200.json",
            "10,000, not split": "attention_10000_heads_512_whole_2xH200.json",
            "10,000, split by rows": "attention_10000_heads_512_rows_2xH200.json",
        },
    ),
    "heads 512": partial(speed.attention, {"32,768": "attention_32768_heads_512_2xH200.json"}),
    "short": partial(speed.attention, _attention_files(2, 2048, 4096, 8192), with_host=True),
    "ring kernel calls": speed.ring_kernel_calls,
    "simulated": partial(speed.attention, {"65,536": "simulated_65536_H200.json"}, with_host=True),
    "simulated parts": partial(speed.attention_parts, {"65,536": "simulated_65536_H200.json"}, SIMULATED_PARTS),
    "before after": speed.before_after,
    "ring host": speed.ring_host,
    "graphs simulated": speed.graphs_of_simulated_rings,
    "graphs links": speed.graphs_on_links,
    "auto": speed.auto_method,
    "kernel speeds": speed.kernel_speeds,
    "steps": partial(speed.steps_beside_roofline, "layers_8b_131072_pretrain_2xH200.json"),
    "million": partial(speed.long_steps, *LONG),
    "memory tools": partial(speed.memory_tools, "tools_H100.json"),
    "forecast errors": forecast.forecast_errors,
    "forecast wrong pairs": forecast.forecast_wrong_pairs,
    "forecast steps": forecast.forecast_steps,
    "forecast tried": forecast.forecast_tried,
    "forecast attention": forecast.forecast_attention,
    "forecast packed": partial(forecast.forecast_packed, PACKED),
    "whole 8b": forecast.whole_8b,
    "forecast graphs": forecast.forecast_graphs,
    "forecast simulated": forecast.forecast_simulated,
    "forecast paper 10k": partial(paper_table, "paper_10k"),
    "forecast paper 100k": partial(paper_table, "paper_100k"),
    "forecast causes 10k": partial(paper_causes, "paper_10k"),
    "forecast causes 100k": partial(paper_causes, "paper_100k"),
    "forecast strong": partial(scaling.scaling, "strong"),
    "forecast weak batches": partial(scaling.scaling, "weak_batches"),
    "forecast weak lengths": partial(scaling.scaling, "weak_lengths"),
    "forecast map": scaling.method_map,
    "forecast host map": scaling.host_map,
    "forecast link map": scaling.link_map,
    "forecast rings": scaling.rings_measured,
    "forecast links": scaling.links,
    "forecast stragglers": scaling.stragglers,
    "llama 1b": partial(
        speed.throughput, {"L = 32,768": "llama_1b_32768_2xH200.jsonl", "L = 65,536": "llama_1b_65536_2xH200.jsonl"}
    ),
}


@functools.cache
def _table(name: str) -> str:
    return TABLES[name]()


def fresh(text: str) -> str:
    """A page whose tables are made again."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{_table(match[1])}\n<!-- end {match[1]} -->"

    return re.sub(PLACE, made, text, flags=re.DOTALL)


def main() -> None:
    outdated, missing = [], set(TABLES)
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        missing -= set(re.findall(PLACE, old, flags=re.DOTALL))
        if (new := fresh(old)) != old:
            outdated.append(str(path.relative_to(DOCS.parent)))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if missing:
        sys.exit(f"no page has a place for the tables {', '.join(sorted(missing))}")
    if "--check" in sys.argv and outdated:
        sys.exit(f"{', '.join(outdated)}: not what docs/results give; run python -m docs.tools.make_tables")


if __name__ == "__main__":
    main()
