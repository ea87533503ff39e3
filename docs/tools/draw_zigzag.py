"""`python -m docs.tools.draw_zigzag`: draws docs/images/zigzag_ring.svg, causal ring attention on four ranks.

On the left the chunks of the sequence that each rank holds; on the right who computes what in each ring step, as the
schedule of the library says.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from ring_attention import CAUSAL, Layout
from ring_attention.schedule import ring_schedule

TARGET = Path(__file__).parents[1] / "images" / "zigzag_ring.svg"
NUM_RANKS = 4
LAYOUT = Layout("zigzag", NUM_RANKS, 2 * NUM_RANKS)  # one token per chunk
COLORS = ("#3b76d6", "#e07b28", "#2f9e62", "#a251c4")  # by rank
BACKGROUND, INK, FAINT, GRID = "#ffffff", "#1f2933", "#e3e7ec", "#c3cad3"  # a card of its own, for dark pages too


def cells(rank: int, number: int) -> list[tuple[int, int]]:
    """The chunks of queries and of keys that meet on a rank in a ring step."""
    step = ring_schedule(LAYOUT, CAUSAL, rank)[number]
    queries, keys = LAYOUT.chunks(rank), LAYOUT.chunks(step.source)
    return [
        (query, key)
        for tile in step.tiles
        for query in queries[tile.block.q_start : tile.block.q_stop]
        for key in keys[tile.block.k_start : tile.block.k_stop]
        if key <= query
    ]


def draw_chunks(axes: Axes) -> None:
    num_chunks = LAYOUT.num_chunks
    for rank in range(NUM_RANKS):
        axes.text(-0.35, rank + 0.5, f"rank {rank}", ha="right", va="center", color=COLORS[rank], weight="bold")
        for chunk in range(num_chunks):
            is_held = chunk in LAYOUT.chunks(rank)
            color = COLORS[rank] if is_held else FAINT
            axes.add_patch(Rectangle((chunk + 0.04, rank + 0.12), 0.92, 0.76, facecolor=color, linewidth=0))
            if is_held:
                axes.text(chunk + 0.5, rank + 0.52, str(chunk), ha="center", va="center", color="white", weight="bold")
    axes.text(num_chunks / 2, NUM_RANKS + 0.5, "chunks of the sequence", ha="center", va="center", color=INK)
    axes.set_xlim(-2.1, num_chunks)
    axes.set_ylim(NUM_RANKS + 1, 0)


def draw_step(axes: Axes, number: int) -> None:
    """Queries (rows) against keys (columns): this step's in the color of their rank, those of earlier steps in gray."""
    num_chunks = LAYOUT.num_chunks
    for earlier in range(number + 1):
        for rank in range(NUM_RANKS):
            color = COLORS[rank] if earlier == number else FAINT
            for query, key in cells(rank, earlier):
                corners = [(key, query), (key, query + 1), (key + 1, query + 1), (key + 1, query)]
                shape = corners[:3] if query == key else corners
                axes.add_patch(Polygon(shape, facecolor=color, edgecolor=BACKGROUND, linewidth=0.6))
    axes.add_patch(Rectangle((0, 0), num_chunks, num_chunks, fill=False, edgecolor=GRID, linewidth=0.8))
    axes.set_title(f"ring step {number}", color=INK, fontsize=9, pad=4)
    for chunk in range(num_chunks):
        color = COLORS[min(chunk, num_chunks - 1 - chunk)]
        if number == 0:
            axes.text(-0.3, chunk + 0.52, str(chunk), ha="right", va="center", fontsize=7, color=color)
        axes.text(chunk + 0.5, num_chunks + 0.25, str(chunk), ha="center", va="top", fontsize=7, color=color)
    axes.set_xlim(-0.05, num_chunks + 0.05)
    axes.set_ylim(num_chunks + 0.05, -0.05)
    axes.set_aspect("equal")


def draw(target: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "zigzag", "font.family": "DejaVu Sans", "font.size": 8.5})
    figure = plt.figure(figsize=(8, 2.35))
    card = FancyBboxPatch(
        (0.004, 0.012), 0.992, 0.976, boxstyle="round,pad=0,rounding_size=0.02", transform=figure.transFigure,
        facecolor=BACKGROUND, edgecolor=GRID, linewidth=0.8, mutation_aspect=8 / 2.35, zorder=-1,
    )  # fmt: skip
    figure.patches.append(card)
    label = partial(figure.text, ha="center", va="center", color=INK)
    chunks = figure.add_axes((0.02, 0.13, 0.275, 0.66))
    draw_chunks(chunks)
    label(0.172, 0.905, "Each rank holds an early and a late chunk")
    width, left, gap = 0.152, 0.348, 0.011
    steps = [figure.add_axes((left + number * (width + gap), 0.15, width, 0.56)) for number in range(NUM_RANKS)]
    for number, axes in enumerate(steps):
        draw_step(axes, number)
    for axes in (chunks, *steps):
        axes.axis("off")
    label(0.665, 0.905, "In each ring step all ranks compute the same amount")
    label(0.327, 0.43, "queries", rotation=90)
    label(0.665, 0.065, "keys, which travel around the ring (gray: earlier steps)")
    figure.savefig(target, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(TARGET)
