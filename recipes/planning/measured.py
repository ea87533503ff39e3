"""Speeds that were measured on a host: the part of a cluster's file that recipe=calibrate writes and forecasts read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from conf.schema import ConfigError
from recipes.planning.speeds import KernelSpeed

ADVICE = "type python train.py recipe=calibrate calibrate.output=MINE.yaml to measure it, or leave it out"


NUMBERS = "memory_gb_per_s", "call_ms", "backward_issue"
OPTIONAL = "host_copy_gb_per_s", "all_gather_gb_per_s", "all_to_all_gb_per_s", "ring_step_ms"


class ProductSpeed(NamedTuple):
    """TFLOP/s of matrix products over so many tokens."""

    tokens: int
    tflops: float


class AttentionSpeed(NamedTuple):
    """TFLOP/s of an attention kernel by itself; `size` as in `KernelSpeed`."""

    kernel: str
    head_dim: int
    size: float
    forward: float
    backward: float


TABLES = {"products": ProductSpeed, "attention": AttentionSpeed}


@dataclass(frozen=True)
class MeasuredSpeeds:
    """What forecasts take in place of the built-in tables. What is None was not measured.

    Speeds are of one GPU while all GPUs of its host do the same.

    Args:
        about: device, versions, dtype and date, for people.
        memory_gb_per_s: reading and writing the device's memory, in 1e9 bytes per second.
        host_copy_gb_per_s: between the device and its host's memory, in one direction.
        all_gather_gb_per_s: what a rank sends in an all-gather within a host.
        all_to_all_gb_per_s: the same in an all-to-all.
        call_ms: of the host for a forward call of attention.
        ring_step_ms: the same for each ring step.
        backward_issue: the host's time for a backward pass, of that for a forward pass.
        products: by tokens, fewest first.
        attention: by kernel, head size and size, smallest first.
    """

    about: str
    memory_gb_per_s: float
    host_copy_gb_per_s: float | None
    all_gather_gb_per_s: float | None
    all_to_all_gb_per_s: float | None
    call_ms: float
    ring_step_ms: float | None
    backward_issue: float
    products: tuple[ProductSpeed, ...]
    attention: tuple[AttentionSpeed, ...]

    def table(self, kernel: str, head_dim: int) -> tuple[KernelSpeed, ...]:
        """The speeds of a kernel by size; empty if it was not measured."""
        rows = [row for row in self.attention if (row.kernel, row.head_dim) == (kernel, head_dim)]
        return tuple(KernelSpeed(row.size, row.forward, row.backward) for row in rows)


def parse_measured(fields: Any, typed: str) -> MeasuredSpeeds:
    """From the field `measured` of a cluster's file.

    Args:
        typed: what names the file in errors.

    Raises:
        ConfigError: for a field that is missing or unknown, or a number that cannot be.
    """
    names = [spec.name for spec in dataclasses.fields(MeasuredSpeeds)]
    if not isinstance(fields, dict):
        raise ConfigError(f"cluster={typed} has measured={fields}, no mapping: use {', '.join(names)}; {ADVICE}")
    if wrong := [*(name for name in names if name not in fields), *(name for name in fields if name not in names)]:
        what = "lacks" if wrong[0] in names else "has"
        raise ConfigError(f"cluster={typed} {what} measured.{wrong[0]}: use {', '.join(names)}; {ADVICE}")
    for name in (*NUMBERS, *OPTIONAL):
        if not (is_positive(fields[name]) or (name in OPTIONAL and fields[name] is None)):
            raise ConfigError(f"cluster={typed} has measured.{name}={fields[name]}, not a number above 0: {ADVICE}")
    tables = {name: _rows(fields, name, kind, typed) for name, kind in TABLES.items()}
    return MeasuredSpeeds(**{**fields, **tables})


def _rows(fields: dict[str, Any], name: str, kind: Any, typed: str) -> tuple[Any, ...]:
    """A table's rows in ascending order: numbers above 0, and a kernel's name."""
    columns = kind._fields
    if not isinstance(fields[name], list):
        raise ConfigError(f"cluster={typed} has measured.{name}={fields[name]}, not a list of rows: {ADVICE}")
    for row in fields[name]:
        cells = row if isinstance(row, list) and len(row) == len(columns) else [None] * len(columns)
        if not all(
            isinstance(c, str) if n == "kernel" else is_positive(c) for n, c in zip(columns, cells, strict=True)
        ):
            raise ConfigError(
                f"cluster={typed} has measured.{name} with {row}, not numbers above 0 of {', '.join(columns)}: {ADVICE}"
            )
    return tuple(sorted(kind(*row) for row in fields[name]))


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
