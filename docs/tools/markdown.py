"""Tables as Markdown, and where the raw results are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
RESULTS = DOCS / "results"


def load(name: str) -> Any:
    """One file of docs/results; of a .jsonl file, a list with one item per line."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """A table. The header's columns are separated by " | "."""
    lines = [f"| {header} |", "|---" * (header.count(" | ") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def spread(row: dict[str, Any], name: str, digits: int = 0) -> str:
    """Median (min - max) of one measured quantity."""
    median, least, most = (f"{row[key]:,.{digits}f}" for key in (name, f"{name}_min", f"{name}_max"))
    return f"{median} ({least} - {most})"


def optional(value: float | None, digits: int = 0) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
