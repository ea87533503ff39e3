"""Whose turn it is in a comparison, from the results of those that are done alone; and the file of these results.

Below `compare`, whose ranks take the turns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from recipes.run.run_dir import RESULTS_FILE

CURRENT_FILE = "turn.json"  # the turn that is under way
ROOFLINE = "parts alone"  # not an entry that anybody configures: what `ceilings` measures


@dataclass(frozen=True)
class Measurement:
    """One entry's time on the ranks: a round from 1 on, or 0 to try a micro-batch size."""

    entry: str
    micro_batch_size: int
    round: int


def next_measurement(sizes: dict[str, list[int]], rounds: int, results: list[dict[str, Any]]) -> Measurement | None:
    """What to do after `results`; None if all is done.

    An entry that fails with a micro-batch size tries no larger one; one that fails in a round goes on, from the first
    round, with the size that was next fastest, if there is one.

    Args:
        sizes: by entry, the micro-batch sizes to try, ascending.
    """
    for entry, candidates in sizes.items():
        if len(candidates) > 1:
            for size in candidates:
                tried = _results_of(results, entry, 0, size)
                if not tried:
                    return Measurement(entry, size, 0)
                if "error" in tried[0]:
                    break
    for number in range(1, rounds + 1):
        for entry in sizes:
            size = best_size(sizes[entry], entry, results)
            if size is not None and not _results_of(results, entry, number, size):
                return Measurement(entry, size, number)
    return None


def best_size(candidates: list[int], entry: str, results: list[dict[str, Any]]) -> int | None:
    """The micro-batch size that was fastest of those that never failed; None if all did.

    A turn whose time was taken has not failed, whatever became of measuring its parts.
    """
    own = [row for row in results if row["entry"] == entry]
    timed = {(row["round"], row["micro_batch_size"]) for row in own if "tokens_per_s" in row}
    failed = {
        row["micro_batch_size"]
        for row in own
        if "error" in row and (row["round"], row["micro_batch_size"]) not in timed
    }
    working = [size for size in candidates if size not in failed]
    if len(candidates) == 1:
        return next(iter(working), None)
    speeds = {row["micro_batch_size"]: row["tokens_per_s"] for row in own if not row["round"] and "tokens_per_s" in row}
    return max((size for size in working if size in speeds), key=lambda size: speeds[size], default=None)


def _results_of(results: list[dict[str, Any]], entry: str, number: int, size: int) -> list[dict[str, Any]]:
    return [
        row
        for row in results
        if (row["entry"], row["round"], row["micro_batch_size"]) == (entry, number, size) and "parts" not in row
    ]


def settings_of(entry: Config) -> str:
    """A fingerprint of what an entry runs, kept with its results: no other configuration may take them for its own."""
    settings = dataclasses.asdict(entry)
    unlike = ("launch", "logging", "checkpoint", "compare", "max_length", "sweep", "explain", "breakdown")
    for name in (*unlike, "num_steps", "profile", "profile_steps", "memory_snapshot"):
        del settings[name]
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """The turns that are done, and those that failed."""
    path = run_dir / RESULTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_result(run_dir: Path, row: dict[str, Any]) -> None:
    with (run_dir / RESULTS_FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")
