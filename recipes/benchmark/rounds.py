"""The order of a comparison's measurements, and the file of their results.

What comes next follows from the results alone, so a comparison resumes wherever it was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config, flatten
from recipes.run.run_dir import BOOKKEEPING, RESULTS_FILE

CURRENT_FILE = "current_measurement.json"  # exists while a measurement runs
ROOFLINE = "roofline"  # the entry that compare.roofline=true adds
NOT_IN_SETTINGS = (*BOOKKEEPING, "launch.", "num_steps")


@dataclass(frozen=True)
class Measurement:
    """One entry with one micro-batch size, in a round from 1 on; round 0 tries the size."""

    entry: str
    micro_batch_size: int
    round: int


def next_measurement(sizes: dict[str, list[int]], rounds: int, results: list[dict[str, Any]]) -> Measurement | None:
    """The measurement that follows `results`; None if there is nothing left to do.

    First, every entry tries its micro-batch sizes up to the first that fails. Then every round measures each entry with
    its best size. If that fails, the entry repeats all rounds with the next best size.

    Args:
        sizes: by entry, the micro-batch sizes to try, ascending. A single size is not tried.
    """

    def results_of(measurement: Measurement) -> list[dict[str, Any]]:
        key, names = dataclasses.astuple(measurement), ("entry", "micro_batch_size", "round")
        return [row for row in results if tuple(row[name] for name in names) == key and "parts" not in row]

    for entry, candidates in sizes.items():
        if len(candidates) > 1:
            for size in candidates:
                tried = results_of(trial := Measurement(entry, size, 0))
                if not tried:
                    return trial
                if "error" in tried[0]:
                    break
    for number in range(1, rounds + 1):
        for entry, candidates in sizes.items():
            size = best_size(candidates, entry, results)
            if size is not None and not results_of(measurement := Measurement(entry, size, number)):
                return measurement
    return None


def best_size(candidates: list[int], entry: str, results: list[dict[str, Any]]) -> int | None:
    """The micro-batch size that was tried fastest and never failed; None if there is none.

    A measurement whose steps were timed has not failed, even if its breakdown did.
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


def settings_of(entry: Config) -> str:
    """A fingerprint of what an entry runs. Its results are only valid for entries with the same fingerprint."""
    settings = flatten(dataclasses.asdict(entry)).items()
    own = {name: value for name, value in settings if not name.startswith(NOT_IN_SETTINGS)}
    return hashlib.sha256(repr(own).encode()).hexdigest()[:16]


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """The measurements that are done, failed ones included. A line cut off by a crash is ignored."""
    path, results = run_dir / RESULTS_FILE, []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            results.append(json.loads(line))
    return results


def append_result(run_dir: Path, row: dict[str, Any]) -> None:
    """Add a line to the results; a line that was cut off before it stays separate."""
    path = run_dir / RESULTS_FILE
    is_cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * is_cut_off + json.dumps(row) + "\n")
