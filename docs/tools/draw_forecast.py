"""Draws the plots of docs/forecast.md from docs/results/forecast_scaling.json.

python -m docs.tools.draw_forecast        writes docs/images/forecast_scaling.png and forecast_map.png
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from docs.tools.forecast_scaling import FILE, GPUS, KV_HEADS, LINK_MAP, LINKS, LINKS_WITHIN, MAP_LENGTHS, MODELS
from docs.tools.markdown import DOCS, load
from docs.tools.tables_scaling import winner

COLOURS = {"ring": "#2b6cb0", "ulysses": "#dd6b20", "hybrid": "#4a5568", "level": "#8f9aa6"}
LINES = ("#2b6cb0", "#dd6b20", "#4a5568")


def lengths_of(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Rows that fit, by the length of their sequences."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["fits"]:
            found.setdefault(row["length"], []).append(row)
    return found


def draw_strong(axis: Axes, model: str, rows: list[dict[str, Any]]) -> None:
    """Tokens per second of all GPUs, beside what as fast GPUs as the first ones would reach."""
    for colour, (length, of_length) in zip(LINES, lengths_of(rows).items(), strict=True):
        gpus, speeds = ([row[name] for row in of_length] for name in ("gpus", "tokens_per_s"))
        axis.plot(gpus, speeds, "o-", color=colour, label=f"{length:,} tokens")
        axis.plot(gpus, [speeds[0] * count / gpus[0] for count in gpus], ":", color=colour)
    axis.set(yscale="log", title=f"{model}, the same batch on more GPUs", ylabel="tokens/s of all GPUs")


def draw_weak(axis: Axes, model: str, of_lengths: list[dict[str, Any]], of_batches: list[dict[str, Any]]) -> None:
    """Model FLOPs utilisation."""
    lines = {f"{length:,} tokens, more sequences": rows for length, rows in lengths_of(of_batches).items()}
    lines["one sequence, 16,384 tokens per GPU"] = [row for row in of_lengths if row["fits"]]
    for colour, (label, rows) in zip(LINES, lines.items(), strict=True):
        axis.plot([row["gpus"] for row in rows], [row["mfu_pct"] for row in rows], "o-", color=colour, label=label)
    axis.set(ylim=(0, 60), title=f"{model}, more work on more GPUs", ylabel="MFU, %")


def draw_scaling(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, model in enumerate(MODELS):
        rows = {
            name: [row for row in result[name] if row["model"] == model]
            for name in ("strong", "weak_lengths", "weak_batches")
        }
        draw_strong(axes[0, column], model, rows["strong"])
        draw_weak(axes[1, column], model, rows["weak_lengths"], rows["weak_batches"])
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set(xticks=GPUS, xticklabels=GPUS, xlabel="H100s")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def draw_winners(axis: Axes, cells: list[list[dict[str, Any]]], xlabels: list[str], ylabels: list[str]) -> None:
    """A field for each cell, with its fastest method, and how far that is ahead of a ring."""
    names = list(COLOURS)
    numbers = np.array([[names.index(winner(cell).method) for cell in row] for row in cells])
    axis.imshow(numbers, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=len(names) - 1, aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            text = "\n".join(filter(None, winner(cell)[1:]))
            axis.text(x, y, text, ha="center", va="center", color="white", fontsize=8)
    axis.set(xticks=range(len(xlabels)), xticklabels=xlabels, yticks=range(len(ylabels)), yticklabels=ylabels)


def draw_map(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.5), layout="constrained", width_ratios=(8, 5, 5))
    lengths = {(cell["length"], cell["gpus"]): cell for cell in result["map"]}
    cells = [[lengths[length, gpus] for gpus in GPUS] for length in reversed(MAP_LENGTHS)]
    ylabels = [f"{length:,}" for length in reversed(MAP_LENGTHS)]
    draw_winners(axes[0], cells, [str(gpus) for gpus in GPUS], ylabels)
    axes[0].set(xlabel="H100s", ylabel="tokens of the sequence", title="llama_8b, 8 key-value heads")
    of_host = {(cell["length"], cell["link"]): cell for cell in result["host_map"]}
    cells = [[of_host[length, link] for link in LINKS_WITHIN] for length in reversed(MAP_LENGTHS)]
    draw_winners(axes[1], cells, [f"{link:g}" for link in LINKS_WITHIN], ylabels)
    axes[1].set(xlabel="GB/s of a GPU within its host", title="llama_8b on one host of 8")
    heads = {(cell["kv_heads"], cell["link"]): cell for cell in result["link_map"]}
    cells = [[heads[count, link] for link in LINKS] for count in reversed(KV_HEADS)]
    draw_winners(axes[2], cells, [f"{link:g}" for link in LINKS], [str(count) for count in reversed(KV_HEADS)])
    title = f"{LINK_MAP[1]:,} tokens on {LINK_MAP[0]} H100s"
    axes[2].set(xlabel="GB/s of a GPU between hosts", ylabel="key-value heads", title=title)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def main() -> None:
    result = load(FILE)
    for name, draw in (("forecast_scaling", draw_scaling), ("forecast_map", draw_map)):
        draw(result).savefig(DOCS / "images" / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
