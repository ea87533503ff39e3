"""RUN_DIR/evaluation.png: accuracy by length and depth, a map for each task."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from recipes.evaluation.report import retrieval
from recipes.run.run_dir import Row

HEAT_MAP_FILE = "evaluation.png"
MAX_COLUMNS = 3
MAX_NUMBERS = 16  # lengths or depths with the accuracy written in each cell
DEPTH_LABEL = "depth (0: the start)"
_CHARACTERS_PER_MAP = 44  # of a title that is as wide as a map


def draw(cells: list[Row], model: str, run_dir: Path) -> Path | None:
    """Write the figure of a model's cells and return its path; None if no retrieval was measured."""
    from matplotlib.figure import Figure  # takes a second
    from matplotlib.ticker import PercentFormatter

    asked = retrieval(cells)
    if not asked:
        return None
    tasks = list(dict.fromkeys(row["task"] for row in asked))
    num_columns = min(MAX_COLUMNS, len(tasks))
    num_rows = -(-len(tasks) // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 0.6 + 3.2 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    images = [
        _draw_task(axes, task, [row for row in asked if row["task"] == task])
        for axes, task in zip(grid, tasks, strict=False)
    ]
    figure.colorbar(images[0], ax=grid[: len(tasks)].tolist(), label="accuracy", format=PercentFormatter(1))
    # a path has no spaces at which matplotlib could wrap it
    lines = textwrap.wrap(model, _CHARACTERS_PER_MAP * num_columns, break_on_hyphens=False)
    figure.suptitle("\n".join(["accuracy by length and depth", *lines]), fontsize=11)
    path = run_dir / HEAT_MAP_FILE
    figure.savefig(path, dpi=120)
    return path


def grid_of(cells: list[Row]) -> tuple[list[int], list[float | None], list[list[float | None]]]:
    """Lengths, depths, and for each depth the accuracy at each length; None where it was not measured."""
    lengths = sorted({row["length"] for row in cells})
    found = {(row.get("depth"), row["length"]): row["accuracy"] for row in cells}
    depths = sorted({depth for depth, _ in found}, key=lambda depth: -1 if depth is None else depth)
    return lengths, depths, [[found.get((depth, length)) for length in lengths] for depth in depths]


def _draw_task(axes: Any, task: str, cells: list[Row]) -> Any:
    lengths, depths, accuracies = grid_of(cells)
    numbers = [[float("nan") if value is None else value for value in row] for row in accuracies]
    image = axes.imshow(numbers, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:.2f}" for depth in depths])
    axes.set(title=task, xlabel="tokens", ylabel=DEPTH_LABEL)
    if max(len(lengths), len(depths)) <= MAX_NUMBERS:
        size = min(10, 100 / len(lengths))  # three digits are narrower than a column
        for y, row in enumerate(accuracies):
            for x, value in enumerate(row):
                if value is not None:
                    color = "white" if value < 0.5 else "black"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=size)
    return image
