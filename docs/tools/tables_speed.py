"""Tables of times and speeds for docs/tools/make_tables.py."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import Any

from conf.schema import Config, DataConfig, ModelConfig
from docs.tools.markdown import load, optional, spread, table
from recipes.benchmark.comparison_report import summarize
from recipes.planning.auto_method import rank_methods
from recipes.planning.cluster import parse_cluster
from recipes.planning.step_time import StepParts
from recipes.planning.throughput import attention_flops_per_token, forward_flops_per_token, peak_tflops

ATTENTION_PASSES = ("forward", "forward_backward")
INTERRUPTED = {  # entries and baseline of comparisons that were cut off
    "baselines_100k_pretrain_2xH200.jsonl": (["tp_pp", "pp", "ra_sp", "dp"], "tp_pp"),
    "transports_100k_forward_2xH200.jsonl": (["ra_sp", "ra_copies", "dp"], "dp"),
}


def main_job() -> str:
    measured = load("main_job_cpu.json")["measured"]
    return table("what | goal | measured", ([row["what"], row["goal"], row["measured"]] for row in measured))


def packed() -> str:
    """Of varlen's speed: a ring of one, and an eighth of it per rank of a simulated ring of 8."""
    cells = []
    for length, name in ((65536, "packed_65536_H200.json"), (524288, "packed_524288_H200.json")):
        for row in load(name):
            mark = " (beside another job)" if row.get("other_jobs") else ""
            line = [f"{length:,}", f"{row['mix']}{mark}"]
            passes = "forward", "with backward"
            line.append(" / ".join(f"{row[each]['varlen_ms']:.2f}" for each in passes))
            for degree, ours in ((1, row), (8, row["ring of 8, zigzag"]), (8, row["ring of 8, balanced"])):
                speeds = [100 * ours[each]["varlen_ms"] / degree / ours[each]["ours_ms"] for each in passes]
                line.append(" / ".join(f"{speed:.0f} %" for speed in speeds))
            cells.append(line)
    header = "tokens | documents | varlen, ms | ring of 1 | ring of 8, zigzag | ring of 8, balanced"
    return table(header, cells)


def packed_links(names: dict[str, str]) -> str:
    """TFLOP/s per GPU over the mask's area, forward / with backward, of all methods on several GPUs."""
    results = {mix: load(name)["rows"] for mix, name in names.items()}
    methods = dict.fromkeys(row["name"] for rows in results.values() for row in rows)
    body = []
    for method in methods:
        line = [method]
        for rows in results.values():
            (row,) = (row for row in rows if row["name"] == method)
            line.append(" / ".join(f"{row[each]['tflops']:.0f}" for each in ATTENTION_PASSES))
        body.append(line)
    return table(" | ".join(["method", *names]), body)


def ring_host() -> str:
    """Simulated rings before and after the host's work was cut."""
    rows = load("ring_host_H200.json")["rows"]
    cells = []
    for row in rows:
        degree, line = row["ring_degree"], [f"{row['ring_degree']}"]
        for commit in ("before", "after"):
            times = row[commit]
            line += [f"{times['forward_ms']:.2f} ({times['forward_host_ms']:.2f})"]
            line += [f"{times['both_ms']:.2f} ({times['both_host_ms']:.2f})"]
            line += [f"{100 * rows[0][commit]['both_ms'] / degree / times['both_ms']:.0f} %"]
        cells.append(line)
    each = "forward | with backward | of ideal"
    return table(f"ring of | before: {each} | after: {each}", cells)


def graphs_of_simulated_rings() -> str:
    """Simulated rings with and without a graph of each pass."""
    rows = load("pass_graphs_2xH200.json")["simulated"]
    cells = []
    for row in rows:
        line = [f"{row['ring_degree']}"]
        for kind in ("eager", "graph"):
            times = row[kind]
            line += [f"{times[f'{part}_ms']:.2f} ({times[f'{part}_host_ms']:.2f})" for part in ("forward", "both")]
            line += [f"{100 * rows[0][kind]['both_ms'] / row['ring_degree'] / times['both_ms']:.0f} %"]
        cells.append(line)
    each = "forward | with backward | of ideal"
    return table(f"ring of | eager: {each} | graphs: {each}", cells)


def graphs_on_links() -> str:
    """A ring of two with and without a graph of each pass."""
    cells = []
    for row in load("pass_graphs_2xH200.json")["links"]:
        line = [f"{row['length']:,}"]
        for part in ("fwd", "both"):
            for kind in ("eager", "graph"):
                times = row["ms"][f"{part} {kind}"]
                line.append(f"{statistics.median(times):.2f} ({min(times):.2f} - {max(times):.2f})")
        cells.append(line)
    return table("L | forward, eager, ms | forward, graph | with backward, eager | with backward, graph", cells)


def before_after() -> str:
    """Simulated rings and training at two commits, whose processes took turns."""
    measured = load("before_after_H200.json")
    cells = []
    for row in measured["rows"]:
        line = [f"ring of {row['degree']}", row["mode"].replace("both", "forward + backward")]
        for commit in ("old", "new"):
            times_ms = row["ms"][commit] + row["ms"][f"{commit}2"]
            line.append(f"{statistics.median(times_ms):.2f} ({min(times_ms):.2f} - {max(times_ms):.2f})")
        cells.append(line)
    speeds = [
        f"{name[:3]} {statistics.median(each):,.0f} ({min(each):,.0f} - {max(each):,.0f})"
        for name, each in measured["training"]["tokens_per_s"].items()
    ]
    ms = table(f"ring | passes | {measured['old']}, ms | {measured['new']}, ms", cells)
    return f"{ms}\n\nTraining, tokens/s, one run after the other: {'; '.join(speeds)}. {measured['machine']}."


def _shares(rows: list[dict[str, Any]]) -> str:
    """Where the time of a step went, for the rows that were profiled."""
    profiled = [row for row in rows if row["shares_pct"]]
    if not profiled:
        return ""
    parts = list(profiled[0]["shares_pct"])
    body = ([row["entry"], *(f"{row['shares_pct'][part]:.1f}" for part in parts)] for row in profiled)
    return "\n\n" + table(" | ".join(["time of a step, %", *parts]), body)


def _compared(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a comparison that did not fail, and its baseline."""
    result = load(name)
    if name in INTERRUPTED:
        entries, baseline = INTERRUPTED[name]
        return summarize(result, entries, baseline), baseline
    return [row for row in result["rows"] if "error" not in row], result["baseline"]


def comparison(name: str) -> str:
    """What recipe=compare measured, how the micro-batch was chosen, and where the time went."""
    rows, baseline = _compared(name)
    base = next(row["tokens_per_s"] for row in rows if row["entry"] == baseline)
    text = table(
        f"method | grid | batch | micro-batch | TPS, median (min - max) | TPS per GPU | TPOT ms | vs {baseline} "
        "| TFLOP/s per GPU | MFU | peak GiB | exposed ms of step ms",
        (
            [
                *(row[key] for key in ("entry", "grid", "sequences_per_step", "micro_batch_size")),
                spread(row, "tokens_per_s"),
                f"{row['tokens_per_s_per_rank']:,.0f}",
                f"{row['tpot_ms']:.4f}",
                f"{100 * (row['tokens_per_s'] / base - 1):+.1f} %",
                f"{row['model_tflops_per_rank']:.0f}",
                f"{row['mfu_pct']:.1f} %",
                f"{row['peak_memory_gib']:.1f}",
                f"{optional(row['exposed_communication_ms'])} of {row['step_time_ms']:,.0f}",
            ]
            for row in rows
        ),
    )
    if sizes := sorted({int(size) for row in rows for size in row["tried"]}):
        body = []
        for row in rows:
            tried = [row["tried"].get(str(size), row["tried"].get(size)) for size in sizes]
            speeds = ["n/a" if speed is None else f"{speed / row['num_ranks']:,.0f}" for speed in tried]
            body.append([row["entry"], *speeds])
        text += "\n\n" + table(" | ".join(["TPS per GPU by micro-batch", *map(str, sizes)]), body)
    return text + _shares(rows)


def comparison_summary(files: dict[str, str]) -> str:
    """Ring attention's throughput against every other entry of the same run."""
    others = ("tp_pp", "tp", "pp", "ulysses", "hybrid", "all_gather")
    body = []
    for label, name in files.items():
        rows, _ = _compared(name)
        speeds = {row["entry"]: row["tokens_per_s"] for row in rows}
        ours = next(row for row in rows if row["entry"] == "ra_sp")
        cells = [label, f"{ours['tokens_per_s_per_rank']:,.0f}"]
        cells += [f"{100 * (speeds['ra_sp'] / speeds[o] - 1):+.1f} %" if o in speeds else "" for o in others]
        body.append([*cells, f"{100 * speeds['ra_sp'] / speeds['dp']:.1f} %"])
    header = " | ".join(["workload, pass", "TPS per GPU", *(f"vs {other}" for other in others), "of dp"])
    return table(header, body)


def attention(names: dict[str, str], with_host: bool = False) -> str:
    """What recipe=bench_attention measured; `with_host` the time until the host had issued the calls."""

    def cells(at: dict[str, Any]) -> list[str]:
        spread_ms, of_ideal = f"{at['ms']:.2f} ({at['min_ms']:.2f} - {at['max_ms']:.2f})", f"{at['ideal_pct']:.1f} %"
        if with_host:
            return [spread_ms, f"{at['host_ms']:.2f}", of_ideal]
        return [spread_ms, f"{at['tflops']:.0f}", of_ideal, optional(at["exposed_ms"], 2)]

    measures = "host ms | of ideal" if with_host else "TFLOP/s per GPU | of ideal | exposed ms"
    return table(
        f"L | method | forward: ms (min - max) | {measures} | with backward: ms (min - max) | {measures}",
        (
            [length, row["name"], *(cell for kind in ATTENTION_PASSES for cell in cells(row[kind]))]
            for length, name in names.items()
            for row in load(name)["rows"]
        ),
    )


def attention_summary(files: dict[str, str]) -> str:
    """Per cent of ideal, forward / with backward."""
    body, names = [], []
    for label, name in files.items():
        rows = [row for row in load(name)["rows"] if row["name"] != "one device"]
        names = [row["name"] for row in rows]
        of_ideal = [" / ".join(f"{row[kind]['ideal_pct']:.1f}" for kind in ATTENTION_PASSES) for row in rows]
        body.append([label, *of_ideal])
    return table(" | ".join(["GPUs, L", *names]), body)


def _shared_out(row: dict[str, Any], num_ranks: int) -> tuple[str, int]:
    """The label of a candidate, and what its call is divided by: one device's call, by the ranks."""
    divided = row["name"] == "one device" and num_ranks > 1
    return (f"one device / {num_ranks}", num_ranks) if divided else (row["name"], 1)


def attention_parts(names: dict[str, str], candidates: tuple[str, ...]) -> str:
    """Where a call with its backward pass goes, by recipe=bench_attention's profiles: least - most of the ranks."""
    parts = ("attention", "merge", "exchange", "other", "idle")
    body = []
    for length, name in names.items():
        result = load(name)
        for row in (row for row in result["rows"] if row["name"] in candidates):
            label, of = _shared_out(row, result["num_ranks"])
            spans = [[f"{ms / of:.2f}" for ms in row["parts_ms"][part]] for part in parts]
            body.append([length, label, *(a if a == b else f"{a} - {b}" for a, b in spans)])
    return table(" | ".join(["L", "method", *(f"{part}, ms" for part in parts)]), body)


def attention_energy(name: str) -> str:
    """Calls for seconds: time, and energy and power of the GPUs."""
    result = load(name)
    alone = result["rows"][0]["at_length"]["ms"] / result["num_ranks"]
    body = []
    for row in result["rows"]:
        own, (label, of) = row["at_length"], _shared_out(row, result["num_ranks"])
        joules = " - ".join(f"{value / of:.1f}" for value in own["joules"])
        watts = " - ".join(f"{value:.0f}" for value in own["watts"])
        ideal = f"{100 * alone / own['ms'] * of:.1f} %"
        body.append([label, own["calls"], f"{own['ms'] / of:.1f}", ideal, joules, watts])
    return table("method | calls | ms | of ideal | joules per call and GPU | watts", body)


def ring_kernel_calls() -> str:
    """The busier rank's kernel calls in a ring of two, beside half of one call for the full sequence.

    Both ranks make the causal calls of the local shard; each makes one of the full calls.
    """
    body = []
    for length in (16384, 65536, 131072):
        rows = load(f"ring_blocks_{length}_H200.json")["rows"]
        cells, calls_ms, ideal_ms = [f"{length:,}"], [], []
        for kind in ("forward", "backward"):
            full, *calls = [(row["upper"], statistics.median(row["ms"])) for row in rows if row["kind"] == kind]
            local = sum(ms for upper, ms in calls if upper is not None)
            calls_ms.append(local + max(ms for upper, ms in calls if upper is None))
            ideal_ms.append(full[1] / 2)
            cells += [f"{calls_ms[-1]:.2f}", f"{ideal_ms[-1]:.2f}", f"{100 * ideal_ms[-1] / calls_ms[-1]:.1f} %"]
        body.append([*cells, f"{100 * sum(ideal_ms) / sum(calls_ms):.1f} %"])
    return table(
        "L | forward: calls, ms | half of one device, ms | of ideal | backward: calls, ms | half of one device, ms "
        "| of ideal | both: of ideal",
        body,
    )


def final(setting: str) -> str:
    """The overrides that count: of several for one field, the last."""
    overrides = dict(word.split("=") for word in setting.split())
    return " ".join(f"{name}={value}" for name, value in overrides.items())


def cells_of_step(row: dict[str, Any], digits: int = 0) -> list[str]:
    """step s, tokens/s, model TFLOP/s per GPU, MFU, peaks in GiB of one row of tests.tools.long_step, in bf16."""
    tflops = row["flops"] / row["step_time_s"] / row["num_ranks"] / 1e12
    cells = [f"{row['step_time_s']:.{digits}f}", f"{row['tokens_per_s']:,.0f}", f"{tflops:.0f}"]
    cells.append(f"{100 * tflops / peak_tflops(row['device'], 'bf16'):.1f} %")
    return [*cells, f"{row['peak_gib']:.1f}", f"{row['peak_reserved_gib']:.1f}"]


STEP_COLUMNS = "step s | tokens/s | model TFLOP/s per GPU | MFU | peak GiB | reserved by PyTorch, GiB"


def long_steps(*names: str) -> str:
    """What tests.tools.long_step measured, in bf16."""
    rows = [row for name in names for row in load(name)]
    return table(f"setting | {STEP_COLUMNS}", ([f"`{final(row['setting'])}`", *cells_of_step(row)] for row in rows))


def memory_tools(name: str) -> str:
    """What tests.tools.long_step measured of one model and length, by the overrides in which settings differ."""
    rows = load(name)
    shared = set.intersection(*(set(row["setting"].split()) for row in rows))
    body = []
    for row in rows:
        own = " ".join(word for word in row["setting"].split() if word not in shared)
        body.append([f"`{own}`" if own else "none", *cells_of_step(row, digits=2)])
    return table(f"setting | {STEP_COLUMNS}", body)


def kernel_speeds() -> str:
    """What tests.tools.kernel_speeds measured: TFLOP/s forward / backward."""
    rows = load("block_speeds_H200.json")["rows"]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    body = []
    for shape in dict.fromkeys((row["head_dim"], row["length"]) for row in rows):
        speeds = {
            row["kernel"]: f"{row['forward']['tflops']:.0f} / {row['backward']['tflops']:.0f}"
            for row in rows
            if (row["head_dim"], row["length"]) == shape
        }
        body.append([shape[0], f"{shape[1]:,}", *(speeds.get(name, "refuses") for name in kernels)])
    return table(" | ".join(["head size", "tokens", *kernels]), body)


def auto_method() -> str:
    """What attention=auto expects of one layer's forward attention on hosts of 8 H200s, and what it chooses."""
    shapes = {"16 x 512": (16, 16, 512, "ffpa"), "32 x 128": (32, 32, 128, "flash_attn_4")}
    shapes["32 x 128, 8 kv"] = (32, 8, 128, "flash_attn_4")
    body = []
    for (name, shape), length, ranks in itertools.product(shapes.items(), (10_000, 32_768, 131_072), (8, 16)):
        heads, kv_heads, head_dim, kernel = shape
        model = ModelConfig(num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        config = Config(recipe="forward", model=model, data=DataConfig(sequence_length=length))
        hosts = dataclasses.replace(parse_cluster("h200"), hosts=ranks // 8)
        candidates = rank_methods(config, ranks, 1, kernel, hosts)
        ring, chosen = next(one for one in candidates if one.degrees.ulysses == 1), candidates[0]
        grid = f"ring {chosen.degrees.ring} x Ulysses {chosen.degrees.ulysses}"
        times = [f"{1e3 * seconds:.2f}" for step in (ring, chosen) for seconds in _attention_s(step.parts)]
        body.append([name, f"{length:,}", ranks, *times[:3], grid, *times[3:]])
    columns = "ms | exposed messages | host"
    return table(f"heads | L | ranks | ring: kernels, {columns} | chosen | kernels, {columns}", body)


def _attention_s(parts: StepParts) -> tuple[float, float, float]:
    return parts.attention, parts.messages, parts.host


def steps_beside_roofline(name: str) -> str:
    """What +experiment=bench_step measured, also with causal attention counted in full."""
    result = load(name)
    rows = [{"roofline_pct": row.get("of_parts_pct"), **row} for row in result["rows"]]  # its name in older results
    model = ModelConfig(**result["configs"][rows[0]["entry"]]["model"])
    once = forward_flops_per_token(model, rows[0]["sequence_length"])
    twice = once + model.num_layers * attention_flops_per_token(model, rows[0]["sequence_length"])
    return table(
        "method | TPS, median (min - max) | of roofline | TFLOP/s per GPU, causal once | causal in full | MFU "
        "| peak GiB | exposed ms of step ms",
        (
            [
                "roofline" if row["roofline_pct"] == 100 else row["entry"],
                spread(row, "tokens_per_s"),
                f"{row['roofline_pct']:.1f} %",
                f"{row['model_tflops_per_rank']:.0f}",
                f"{row['model_tflops_per_rank'] * twice / once:.0f}",
                f"{row['mfu_pct']:.1f} %",
                optional(row["peak_memory_gib"], 1),
                f"{optional(row['exposed_communication_ms'])} of {row['step_time_ms']:,.0f}",
            ]
            for row in rows
        ),
    ) + _shares(rows)


def roofline(*names: str) -> str:
    """What a layer's matrix products and attention reach alone, and the tokens per second that they allow."""
    body = []
    for result, kind in itertools.product(map(load, names), ("forward", "training")):
        parts = result[kind]["parts"]
        products = [row["tflops"] for row in parts if not row["part"].startswith("attention")]
        kernels = [f"{row['tflops']:.0f}" for row in parts if row["part"].startswith("attention")]
        cells = [f"{result['model']}, {result['dtype']}, L = {result['length']:,}", kind]
        cells.append(f"{min(products):.0f} to {max(products):.0f}")
        cells.append(" forward, ".join(kernels) + (" backward" if len(kernels) > 1 else ""))
        body.append([*cells, f"{result[kind]['tokens_per_s']:,.0f}"])
    header = "workload | pass | matrix products, TFLOP/s | attention, TFLOP/s | tokens/s that these allow"
    return table(header, body)


def throughput(runs: dict[str, str]) -> str:
    digits = {"tokens_per_s": 0, "tokens_per_s_per_rank": 0, "step_time_p50_s": 3, "tpot_ms": 4}
    digits |= {"mfu_pct": 1, "peak_memory_gib": 1}
    body = []
    for label, name in runs.items():
        rows = [row for row in load(name) if row["step"] >= 8 and "train/tokens_per_s" in row]  # after warm-up
        values = {key: [row[f"train/{key}"] for row in rows if f"train/{key}" in row] for key in digits}
        medians = [f"{statistics.median(values[key]):,.{count}f}" for key, count in digits.items()]
        speeds, (total, *rest) = values["tokens_per_s"], medians
        body.append([label, f"{total} ({min(speeds):,.0f} - {max(speeds):,.0f})", *rest])
    return table("run | tok/s, median (min - max) | tok/s per GPU | step s | TPOT ms | MFU % | peak GiB per GPU", body)
