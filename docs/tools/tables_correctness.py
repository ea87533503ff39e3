"""Tables of exactness, faults, memory and masks for docs/tools/make_tables.py."""

from __future__ import annotations

import statistics
from typing import Any

from docs.tools.markdown import load, table
from docs.tools.tables_speed import final
from ring_attention import CAUSAL, FULL, Layout, Mask
from ring_attention.schedule import imbalance, ring_schedule, tokens_sent, work_per_rank
from tests.tools.long_step import had_other_gradients, predicted_again

COMPARED = ("loss", "grad_norm", "gradient", "parameter")
LIMITS = (
    "fp32: worst relative error against fp64 (limit 1e-5). bf16: worst error over that of bf16 in one process "
    "(limit 1.5)."
)


def _worst_fp32(cells: list[dict]) -> str:
    errors = [cell[key] for cell in cells if cell["dtype"] == "fp32" for key in COMPARED]
    return f"{max(errors):.1e}" if errors else "not run"


def _worst_bf16(cells: list[dict]) -> str:
    return max((f"{cell['half_ratio']:.2f}" for cell in cells if cell["dtype"] == "bf16"), default="not run")


def _num_failed(cells: list[dict]) -> int:
    return sum(not cell["passes"] for cell in cells)


def parity(name: str) -> str:
    """Ring attention: worst over gradient accumulation of 1 and 2 and lengths of 32 and 29."""
    cells = [cell for cell in load(name)["cells"] if cell["method"] == "ring"]
    worst = {"fp32": _worst_fp32, "bf16": _worst_bf16}
    columns = [(dtype, stage) for dtype in worst for stage in range(4)]
    rows = []
    for ring, data in sorted({(cell["ring_degree"], cell["data_degree"]) for cell in cells}):
        grid = [cell for cell in cells if (cell["ring_degree"], cell["data_degree"]) == (ring, data)]
        of = [[cell for cell in grid if (cell["dtype"], cell["zero_stage"]) == column] for column in columns]
        rows.append([f"{ring} x {data}", *(worst[dtype](here) for (dtype, _), here in zip(columns, of, strict=True))])
    header = " | ".join(["ring x data", *(f"{dtype} ZeRO {stage}" for dtype, stage in columns)])
    return f"{table(header, rows)}\n\n{len(cells)} cells, {_num_failed(cells)} failed. {LIMITS}"


def parity_of_methods(name: str) -> str:
    """The other methods: worst over ZeRO stages, data degrees, models, accumulation and lengths."""

    def grid(cell: dict) -> tuple[str, str]:
        kinds = ("ring", "ulysses", "tensor", "pipeline")
        degrees = [f"{cell[f'{kind}_degree']} {kind}" for kind in kinds if cell.get(f"{kind}_degree", 1) > 1]
        degrees += [] if cell.get("sequence_sharded_norms", True) else ["unsharded norms"]
        return cell["method"], " x ".join(degrees) or "data only"

    cells = [cell for cell in load(name)["cells"] if cell["method"] != "ring"]
    rows = []
    for key in dict.fromkeys(map(grid, cells)):
        here = [cell for cell in cells if grid(cell) == key]
        rows.append([*key, _worst_fp32(here), _worst_bf16(here), f"{len(here)}, {_num_failed(here)}"])
    return table("method | grid | fp32, worst relative error | bf16, worst ratio | cells, failed", rows)


def parity_summary(machines: dict[str, str]) -> str:
    rows = []
    for machine, name in machines.items():
        cells = load(name)["cells"]
        for label in ("ring", "all others"):
            here = [cell for cell in cells if (cell["method"] == "ring") == (label == "ring")]
            rows.append([machine, label, len(here), _num_failed(here), _worst_fp32(here), _worst_bf16(here)])
    header = "machine | method | cells | failed | fp32: worst relative error | bf16: worst ratio to one process"
    return table(header, rows)


# words of a refusal, and what they are about
REFUSALS = {
    "linear_attention": "linear attention or state spaces",
    "state-space layers": "layers without one attention each, such as state spaces, or with cross-attention",
    "chunked_attention": "chunked attention",
    "indexed_attention": "sparse attention that picks its keys",
    "compressed_sparse_attention": "sparse attention that picks its keys",
    "are conv": "short convolutions",
    "Conv1d": "short convolutions",
    "are hybrid": "layers of a kind of their own",
    "both directions": "images or sounds, which attend in both directions",
    "bidirectional": "attention in both directions",
    "not causal": "encoders",
    "no causal head": "no class that ends in ForCausalLM or LMHeadModel",
    "does not look attn_implementation up": "code with its own attention only",
    "read the keys of others": "layers that read the keys of others",
    "dropout": "dropout by default: set it to 0",
    "router_jitter_noise": "jitter of routers by default: set it to 0",
}


def hf_families() -> str:
    """One row per family that is tested, refused or untested; families with equal outcomes share a row."""
    data = load("hf_families_cpu.json")
    rows, more, refused, untested = [], {}, {}, []
    for name, row in data["families"].items():
        if "bf16_ratio" in row:
            rows.append([name, "tested", f"{max(row['fp32'].values()):.1e}", f"{row['bf16_ratio']:.2f}"])
        elif "fp32" in row:
            more[name] = max(row["fp32"].values())
        elif "refused" in row:
            reason = next((text for words, text in REFUSALS.items() if words in row["refused"]), row["refused"])
            refused.setdefault(reason, []).append(name)
        else:
            untested.append(name)
    rows.append([", ".join(more), "tested on two ranks", f"{max(more.values()):.1e} at most", "not run"])
    rows += [[", ".join(names), f"refused: {reason}", "", ""] for reason, names in sorted(refused.items())]
    rows.append([", ".join(untested), "untested", "", ""])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return (
        f"{table('family (model_type) | outcome | fp32 error | bf16 error', rows)}\n\n{versions}. Random weights, CPU. "
        "fp32: the worst relative error of logits, loss and any gradient against eager attention in one process "
        "(limit 1e-5): ring of 1 to 4 ranks, zigzag and contiguous, with and without packed documents. bf16: the error "
        "against fp64 over that of one process (limit 1.5), two ranks. Refused: its defaults, before a start."
    )


def sparsity() -> str:
    """What 8 ranks compute and send: pure arithmetic of the schedule. Tests check it against the transport."""
    length, degree, mib_per_token = 65536, 8, 2 * 8 * 128 * 2 / 2**20  # K and V of 8 heads x 128 in bf16
    documents = list(range(0, length + 1, 2048))
    masks = {
        "causal": CAUSAL,
        "full": FULL,
        "window of 4096": Mask(left=4095),
        "window of 256": Mask(left=255),
        "32 documents of 2048": CAUSAL.packed(documents),
        "window of 256 in those": Mask(left=255).packed(documents),
    }
    rows = []
    for label, mask in masks.items():
        for name in ("zigzag", "contiguous"):
            layout = Layout(name, degree, length)
            tiles = [sum(len(step.tiles) for step in ring_schedule(layout, mask, rank)) for rank in range(degree)]
            sent = zip(*(tokens_sent(layout, mask, rank) for rank in range(degree)), strict=True)
            keys, gradients = ([mib_per_token * tokens for tokens in kind] for kind in sent)
            pairs = sum(map(sum, work_per_rank(layout, mask))) / (length * (length + 1) // 2)
            cells = [label, name, f"{100 * pairs:.1f} %", f"{min(tiles)} to {max(tiles)}"]
            cells += [f"{imbalance(layout, mask):.2f}"]
            rows.append([*cells, *(f"{sum(of) / degree:.1f}, {max(of):.1f}" for of in (keys, gradients))])
    return table(
        "mask | layout | query-key pairs, of causal | attention tiles per rank | imbalance "
        "| K,V sent forward, MiB per rank: mean, max | dK,dV sent backward, MiB",
        rows,
    )


def precision(name: str) -> str:
    curve = load(name)
    quantities = list(dict.fromkeys(row["quantity"] for row in curve["rows"]))
    rows = [
        [degree]
        + [
            f"{row['error']:.2e} ({row['min']:.2e} - {row['max']:.2e}), {row['ratio']:.2f}x"
            for row in curve["rows"]
            if row["ring_degree"] == degree
        ]
        for degree in dict.fromkeys(row["ring_degree"] for row in curve["rows"])
    ]
    machine = f"{curve['device']}, torch {curve['torch']}, L = {curve['length']:,}, {curve['seeds']} seeds."
    return f"{table(' | '.join(['ring degree', *quantities]), rows)}\n\n{machine}"


def ring_memory() -> str:
    """Attention alone, by number of ranks. What one layer works with depends on neither layers nor ranks."""
    measured = load("ring_memory_cpu.json")
    rows = []
    for one, four in zip(measured[::3], measured[2::3], strict=True):  # layers: 1, 2, 4
        beyond = " / ".join(f"{(row['peak'] - row['kept']) / 1024:,.0f}" for row in (one, four))
        saved = " / ".join(f"{row['kept'] / 1024:,.0f}" for row in (one, four))
        num_ranks, dtype = one["num_ranks"], one["dtype"].removeprefix("torch.")
        cells = [num_ranks, f"{num_ranks * one['local_length']:,}", dtype, saved]
        cells += [f"{(four['forward_peak'] - four['kept']) / 1024:,.0f}", beyond]
        rows.append([*cells, f"{four['keys_received'] / four['block']:.0f}"])
    return table(
        "ranks | L | dtype | saved for backward, 1 / 4 layers, KiB | beyond it, forward, KiB "
        "| and backward, 1 / 4 layers, KiB | received K,V alive, shards",
        rows,
    )


def fuzz() -> str:
    summary = load("fuzz_cpu.json")
    drawn = [
        [name, "; ".join(f"{key} {count}" for key, count in sorted(counts.items()))]
        for name, counts in summary["seen"].items()
    ]
    totals = f"{summary['cases']:,} cases, {summary['failed']} failed, {summary['seconds']} s (seed {summary['seed']})."
    return f"{totals}\n\n{table('drawn | how often', drawn)}"


def memory() -> str:
    """What tests.tools.memory counted, and what was predicted."""

    def cells(row: dict[str, Any]) -> list[str]:
        setting = [row["dtype"], f"ZeRO-{row['zero_stage']}", f"{row['num_ranks']} ranks, {row['method']}"]
        setting += [f"{row['local_length']:,} tokens x {row['micro_batch_size']}", f"recompute {row['recompute']}"]
        setting += [f"tiles of {row['tile_tokens']}"] if row["tile_tokens"] else []
        setting += [f"{name} {value}" for name, value in row["model"].items()]
        sizes = [f"{row[name] / 2**20:.2f}" for name in ("predicted", "counted")]
        return [", ".join(setting), row["moment"], *sizes, f"{row['error_pct']:+.2f} %"]

    return table("setting | peak at | predicted, MiB | counted, MiB | error", map(cells, load("memory_cpu.json")))


def memory_on_gpus(*names: str) -> str:
    """Peaks of steps on GPUs, as tests.tools.long_step measured them, beside what is predicted now.

    Without those that were measured while DeepSpeed held other sums of gradients.
    """
    rows = []
    for row in [row for name in names for row in load(name) if "error" not in row and not had_other_gradients(row)]:
        if now := predicted_again(row):
            sizes = (now["predicted_gib"], row["peak_gib"])
            error = f"{100 * (sizes[0] / sizes[1] - 1):+.2f} %"
            rows.append([f"`{final(row['setting'])}`", now["fullest_at"], *(f"{size:.2f}" for size in sizes), error])
    return table("setting | peak at | predicted, GiB | measured, GiB | error", rows)


def faults() -> str:
    """What tests.tools.faults did to runs."""

    def cells(row: dict[str, Any]) -> list[Any]:
        ends = row["end_s"]
        seconds = f"{statistics.median(ends):.2f}, {max(ends):.2f}" if ends else ""
        return [row["fault"], row["tried"], row["survived"], row["lost"], seconds]

    header = "fault | tried | survived | lost | seconds until all ranks were gone: median, longest"
    return table(header, map(cells, load("faults_cpu.json")["faults"]))


def elastic() -> str:
    """What tests.tools.elastic measured."""
    return table(
        "from | to | dtype | largest difference of the losses after it",
        (
            [
                *(row[key].replace("stage", "ZeRO") for key in ("before", "after")),
                row["dtype"],
                f"{row['difference']:.1e} of {row['loss']:.1f}",
            ]
            for row in load("elastic_cpu.json")
        ),
    )


def extension() -> str:
    """Accuracy of retrieval before and while a model learns a longer context."""
    result = load("extend_131072_2xH200.json")
    short, long = result["learn"]["length"], result["extend"]["length"]
    before = [[cell for cell in result["before"] if cell["length"] == length] for length in (short, long)]
    means = [statistics.fmean(cell["accuracy"] for cell in cells) for cells in before]
    num_samples = sum(cell["samples"] for cells in before for cell in cells)
    loss = statistics.fmean(cell["answer_loss"] for cells in before for cell in cells)
    body = [["0", f"{num_samples}", *(f"{mean:.0%}" for mean in means), f"{loss:.4f}"]]
    for row in result["while_training"]:
        accuracies = (row[f"accuracy_{length}"] for length in (short, long))
        body.append([row["step"], row["samples"], *(f"{each:.0%}" for each in accuracies), f"{row['answer_loss']:.4f}"])
    of_depths = ", ".join(f"{cell['accuracy']:.0%} at {cell['depth']:g}" for cell in before[1])
    header = f"step of the extension | samples | accuracy at {short:,} | accuracy at {long:,} | loss of an answer, nats"
    return f"{table(header, body)}\n\nBefore, by depth at {long:,} tokens: {of_depths}."


def key_sums() -> str:
    """A ring of two GPUs whose dK,dV travel as the kernel's sums: errors, and times beside those of rounded ones."""
    result = load("key_sums_2xH200.json")
    names = ("out", "dq", "dk", "dv")
    body = []
    for row in result["errors"]:
        heads = f"{row['heads']} and {row['kv_heads']} x {row['head_dim']}"
        cells = [f"{row['error'][name]:.1e}, {row['ratio'][name]:.2f}x" for name in names]
        has_sums = "sums" if row["kv_heads"] < row["heads"] else "rounded"
        body.append([row["transport"], f"{row['length']:,}", heads, has_sums, *cells])
    errors = table("transport | tokens | heads and kv heads | dk, dv travel | out | dq | dk | dv", body)
    times = result["forward_backward_ms"]
    speeds = [
        [f"{int(length):,}", f"{ms:.2f}", f"{times['summed'][length]:.2f}", f"{times['summed'][length] / ms - 1:+.1%}"]
        for length, ms in times["rounded"].items()
    ]
    text = "Forward and backward, 32 and 8 heads x 128, medians of five rounds in one run each:"
    return f"{errors}\n\n{text}\n\n{table('tokens | rounded, ms | sums, ms | change', speeds)}"
