"""Tables of docs/forecast.md: scaling and maps from `forecast_scaling.json`; links and stragglers, simulated."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from conf.schema import Degrees
from docs.tools.check_forecast import DISTINCT, attention_of
from docs.tools.forecast_scaling import (
    FILE,
    GPUS,
    KV_HEADS,
    LINKS,
    LINKS_WITHIN,
    LONG,
    MAP_LENGTHS,
    MODELS,
    cluster_of,
    one_sequence,
)
from docs.tools.markdown import load, table
from recipes.planning.speeds import FITTED
from recipes.planning.step_time import StepTime

STRAGGLERS = (1.0, 1.02, 1.1, 1.5)
SHORTER = 131_072


def scaling(name: str) -> str:
    """Each model and length over GPUs: tokens/s per GPU, MFU, and data x ring x Ulysses ranks."""
    rows = load(FILE)[name]
    body = []
    for model in MODELS:
        lengths = dict.fromkeys(row["length"] for row in rows if row["model"] == model)
        for length in ["grows"] if name == "weak_lengths" else lengths:
            of_gpus = {row["gpus"]: row for row in rows if row["model"] == model and length in ("grows", row["length"])}
            shown = length if length == "grows" else f"{length:,}"
            body.append([model, shown, *(_scaled(of_gpus.get(num_gpus)) for num_gpus in GPUS)])
    return table(" | ".join(["model", "tokens", *(f"{num_gpus:,} GPUs" for num_gpus in GPUS)]), body)


def _scaled(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["fits"]:
        return "does not fit"
    grid = "x".join(str(row["degrees"].get(name, 1)) for name in ("data", "ring", "ulysses"))
    return f"{row['tokens_per_s'] / row['gpus']:,.0f}, {row['mfu_pct']:.0f} %, {grid}"


class Winner(NamedTuple):
    """Of a cell of a map.

    Args:
        method: the fastest, or "level" if a ring and the fastest other differ by less than forecasts can tell.
        grid: ring x Ulysses ranks of a hybrid.
        lead: of the fastest other method over a ring, or of the ring over that, as text.
    """

    method: str
    grid: str = ""
    lead: str = ""


def winner(cell: dict[str, Any]) -> Winner:
    """The method to take."""
    speeds = dict(cell["tokens_per_s"])
    of_ring = speeds.pop("ring")
    if not speeds:  # the only one that the heads allow
        return Winner("ring")
    other = max(speeds, key=lambda name: speeds[name])
    ratio, ring_degree = speeds[other] / of_ring, cell["ring_degree"][other]
    if 1 / DISTINCT < ratio < DISTINCT:
        return Winner("level")
    if ratio < 1:
        return Winner("ring", lead=f"{100 * (1 / ratio - 1):+.0f} %")
    grid = f"{ring_degree} x {cell['gpus'] // ring_degree}" if other == "hybrid" else ""
    return Winner(other, grid, f"{100 * (ratio - 1):+.0f} %")


def _won(cell: dict[str, Any]) -> str:
    return " ".join(filter(None, winner(cell)))


def method_map() -> str:
    """The fastest method for one sequence of each length on each number of GPUs."""
    cells = {(cell["length"], cell["gpus"]): cell for cell in load(FILE)["map"]}
    body = [[f"{length:,}", *(_won(cells[length, gpus]) for gpus in GPUS)] for length in MAP_LENGTHS]
    return table(" | ".join(["tokens", *(f"{num_gpus:,} GPUs" for num_gpus in GPUS)]), body)


def link_map() -> str:
    """The same over key-value heads and links between hosts."""
    cells = {(cell["kv_heads"], cell["link"]): cell for cell in load(FILE)["link_map"]}
    body = [[heads, *(_won(cells[heads, link]) for link in LINKS)] for heads in KV_HEADS]
    return table(" | ".join(["key-value heads", *(f"{link:g} GB/s" for link in LINKS)]), body)


def host_map() -> str:
    """One host: over lengths and its links."""
    cells = {(cell["length"], cell["link"]): cell for cell in load(FILE)["host_map"]}
    body = [[f"{length:,}", *(_won(cells[length, link]) for link in LINKS_WITHIN)] for length in MAP_LENGTHS]
    return table(" | ".join(["tokens", *(f"{link:g} GB/s" for link in LINKS_WITHIN)]), body)


def rings_measured() -> str:
    """The simulated schedule beside rings that were measured: one layer's attention without a model."""
    body = []
    for length in (65_536, 131_072):
        for name in (f"attention_{length}_2xH200.json", f"attention_{length}_4xH200.json"):
            result = load(name)
            rows = {row["name"]: row for row in result["rows"]}
            for candidate, method, num_gpus in (("one device", "local", 1), ("ring", "ring", result["num_ranks"])):
                if num_gpus == 1 and "4x" in name:
                    continue  # the same as beside two GPUs
                attention = attention_of(result, method, FITTED)
                forward, backward = (attention.pass_seconds(is_backward) for is_backward in (False, True))
                measured = rows[candidate]["forward_backward"]
                ms = 1e3 * (forward.total + backward.total)
                exposed = 1e3 * (forward.messages + backward.messages)
                waited = "" if num_gpus == 1 else f"{measured['exposed_ms']:.2f}"
                cells = [f"{length:,}", num_gpus, f"{measured['ms']:.2f}", f"{ms:.2f}"]
                body.append([*cells, f"{ms / measured['ms'] - 1:+.1%}", waited, f"{exposed:.2f}"])
    return table(
        "tokens | GPUs | measured, ms | simulated, ms | error | measured exposed, ms | simulated exposed, ms", body
    )


def _ring_of_16(length: int, link: float = 45.0, slowest: float = 1.0) -> StepTime:
    """A training step of llama_8b over 2 hosts of 8 H100s."""
    cluster = dataclasses.replace(cluster_of(16), link_between_gb_per_s=link)
    step = one_sequence(length, cluster, Degrees(1, 16, 1))
    assert step is not None
    return dataclasses.replace(step, slowdown=(slowest, *[1.0] * 15))


def links() -> str:
    """A ring over two hosts with slower and faster links between them."""
    body = []
    for length in (SHORTER, LONG):
        steps = [_ring_of_16(length, link) for link in LINKS]
        shares = [f"{step.parts.total:.2f} s, {100 * step.parts.messages / step.parts.total:.1f} %" for step in steps]
        body.append([f"{length:,}", *shares])
    return table(" | ".join(["tokens", *(f"{link:g} GB/s" for link in LINKS)]), body)


def stragglers() -> str:
    """One rank of the ring whose attention kernels are slower than the others'."""
    body = []
    for length in (SHORTER, LONG):
        steps = [_ring_of_16(length, slowest=factor) for factor in STRAGGLERS]
        cells = [
            f"{step.parts.total:.2f} s, {100 * (step.parts.total / steps[0].parts.total - 1):+.1f} %" for step in steps
        ]
        body.append([f"{length:,}", *cells])
    return table(" | ".join(["tokens", *(f"{factor:g} times" for factor in STRAGGLERS)]), body)
