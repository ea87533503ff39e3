"""The cells of an evaluation as tables for the console, and as numbers for summary.json and wandb."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from conf.schema import LOSS_TASK
from recipes.run.run_dir import Row
from recipes.run.text_table import text_table

Table = list[list[str]]


def tables(cells: list[Row]) -> list[str]:
    """Accuracy by task and length and by depth and length, and the loss by position, as far as they were measured."""
    asked = retrieval(cells)
    with_depth = [row for row in asked if "depth" in row]
    depth_of, lines = "{:.2f}".format, []
    if asked:
        lines += ["", "accuracy in %, mean over depths", *text_table(_crossed(asked, "task", str))]
    if with_depth:
        title = "accuracy in %, mean over tasks with a depth"
        lines += ["", title, *text_table(_crossed(with_depth, "depth", depth_of))]
    if cut := [row for row in with_depth if row.get("accuracy_of_context") is not None]:
        title = f"accuracy in %, prompts cut after every {cut[0]['context']:,} tokens, mean over tasks with a depth"
        lines += ["", title, *text_table(_crossed(cut, "depth", depth_of, of="accuracy_of_context"))]
    for row in cells:
        if row["task"] == LOSS_TASK:
            title = f"loss by position, data={row['source']}, sequences of {row['length']:,} tokens"
            lines += ["", title, *text_table(_loss_table(row))]
    return lines


def retrieval(cells: Iterable[Row]) -> list[Row]:
    """The cells that have an accuracy."""
    return [row for row in cells if row["task"] != LOSS_TASK]


def accuracy_by(cells: Iterable[Row], *names: str, of: str = "accuracy") -> dict[tuple[Any, ...], float]:
    """The mean accuracy of the cells that are equal in these, by their values; `of` is the number that is meant."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in cells:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row[of])
    return {key: statistics.fmean(values) for key, values in groups.items()}


def summary(cells: list[Row]) -> dict[str, float | None]:
    """accuracy/TASK/LENGTH, the mean over depths, and loss/SOURCE/LENGTH in nats."""
    accuracies = accuracy_by(retrieval(cells), "task", "length").items()
    losses = {f"loss/{row['source']}/{row['length']}": row["loss"] for row in cells if row["task"] == LOSS_TASK}
    return {f"accuracy/{task}/{length}": value for (task, length), value in accuracies} | losses


def training_metrics(cells: list[Row], weights: Mapping[str, float]) -> dict[str, float | None]:
    """As metrics.jsonl and wandb have them, of an evaluation while training.

    Args:
        weights: each source's share of the tokens.
    """
    metrics: dict[str, float | None] = {}
    if asked := retrieval(cells):
        accuracies = {f"evaluation/{name}": value for name, value in summary(asked).items()}
        metrics["evaluation/accuracy"] = statistics.fmean(value for value in accuracies.values() if value is not None)
        metrics["evaluation/answer_loss"] = statistics.fmean(row["answer_loss"] for row in asked)
        metrics |= accuracies
    if losses := {row["source"]: row["loss"] for row in cells if row["task"] == LOSS_TASK}:
        metrics["evaluation/loss"] = sum(weights[source] * loss for source, loss in losses.items())
        if len(losses) > 1:
            metrics |= {f"evaluation/loss/{source}": loss for source, loss in losses.items()}
    return metrics


def _crossed(cells: list[Row], name: str, text_of: Callable[[Any], str], of: str = "accuracy") -> Table:
    """A row for each value of a name, a column for each length."""
    means = accuracy_by(cells, name, "length", of=of)
    lengths = sorted({row["length"] for row in cells})
    values = (
        sorted({row[name] for row in cells}) if name == "depth" else list(dict.fromkeys(row[name] for row in cells))
    )
    table = [[name, *(format(length, ",") for length in lengths)]]
    for value in values:
        known = (means.get((value, length)) for length in lengths)
        table.append([text_of(value), *("" if mean is None else f"{100 * mean:.1f}" for mean in known)])
    return table


def _loss_table(row: Row) -> Table:
    has_context = row["context"] is not None
    of_context = [f"documents cut after {row['context']:,}", "difference"] if has_context else []
    table = [["position", "tokens", "loss", *of_context]]
    for bucket in row["buckets"]:
        loss, of_cut = bucket["loss"], bucket["loss_of_context"]
        # adding 0 makes -0.0 positive
        cut = [f"{of_cut:.4f}", f"{round(loss - of_cut, 4) + 0.0:+.4f}"] if has_context else []
        table.append([f"{bucket['start']:,} - {bucket['stop']:,}", f"{bucket['tokens']:,}", f"{loss:.4f}", *cut])
    return table
