"""A comparison's results on disk, and its next measurement, which follows from them alone, so that it can resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from conf.schema import Config, flatten
from recipes.run.run_dir import BOOKKEEPING, RESULTS_FILE, read_json_lines

CURRENT_FILE = "current_measurement.json"  # exists while a measurement runs
ROOFLINE = "roofline"  # the entry that compare.roofline=true adds
NOT_IN_SETTINGS = (*BOOKKEEPING, "launch.", "num_steps")


class Measurement(NamedTuple):
    """One entry with one micro-batch size, in a round from 1 on; round 0 tries the size."""

    entry: str
    micro_batch_size: int
    round: int


def next_measurement(sizes: dict[str, list[int]], rounds: int, results: list[dict[str, Any]]) -> Measurement | None:
    """The measurement that follows `results`; None if there is nothing left to do.

    First, every entry tries its micro-batch sizes up to the first that fails. Then every round measures each entry with
    its best size. If that fails, the entry repeats all rounds with the next best size.

    `sizes` has the ascending micro-batch sizes by entry. A single size is not tried.
    """
    has_failed: dict[Measurement, bool] = {}
    for row in results:
        if "parts" not in row:
            has_failed.setdefault(Measurement(*(row[name] for name in Measurement._fields)), "error" in row)
    for entry, candidates in sizes.items():
        for size in candidates if len(candidates) > 1 else ():
            if (trial := Measurement(entry, size, 0)) not in has_failed:
                return trial
            if has_failed[trial]:
                break
    for number in range(1, rounds + 1):
        for entry, candidates in sizes.items():
            size = best_size(candidates, entry, results)
            if size is not None and (measurement := Measurement(entry, size, number)) not in has_failed:
                return measurement
    return None


def best_size(candidates: list[int], entry: str, results: list[dict[str, Any]]) -> int | None:
    """The micro-batch size that was tried fastest and never failed; None if there is none.

    A measurement whose steps were timed has not failed, even if its breakdown did.
    """
    own = [row for row in results if row["entry"] == entry]
    speeds = {(row["micro_batch_size"], row["round"]): row["tokens_per_s"] for row in own if "tokens_per_s" in row}
    errors = [(row["micro_batch_size"], row["round"]) for row in own if "error" in row]
    failed = {size for size, number in errors if (size, number) not in speeds}
    tried = candidates if len(candidates) == 1 else [size for size in candidates if (size, 0) in speeds]
    working = [size for size in tried if size not in failed]
    return max(working, key=lambda size: speeds.get((size, 0), 0), default=None)


def settings_of(entry: Config) -> str:
    """A fingerprint of what an entry runs. Its results are only valid for entries with the same fingerprint."""
    settings = flatten(dataclasses.asdict(entry)).items()
    own = {name: value for name, value in settings if not name.startswith(NOT_IN_SETTINGS)}
    return hashlib.sha256(repr(own).encode()).hexdigest()[:16]


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """The measurements that are done, failed ones included. A line cut off by a crash is ignored."""
    path = run_dir / RESULTS_FILE
    return [row for _, row in read_json_lines(path) if row] if path.exists() else []


def append_result(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a line to the results; a line that was cut off before it stays separate."""
    path = run_dir / RESULTS_FILE
    is_cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * is_cut_off + json.dumps(row) + "\n")
