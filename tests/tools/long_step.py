"""Time and memory of single training steps on random tokens, measured and predicted.

    python -m tests.tools.long_step --json FILE "model=llama_8b model.num_layers=8 data.sequence_length=1048576" "..."

takes the overrides of one setting in each argument, and starts ranks for each. It runs one step unless num_steps is
set, and reports the fastest. It measures as recipe=max_length does.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import hydra
import torch

import train  # noqa: F401 - registers the schema
from conf.compose import to_config
from conf.schema import Config
from recipes.benchmark.max_length import train_probe
from recipes.launch import launcher
from recipes.launch.host_memory import usable_memory_bytes
from recipes.model.pretrained import resolve
from recipes.planning.memory import has_sharded_sums
from recipes.planning.plan import Plan

CONF = Path(__file__).parents[2] / "conf"


def composed(setting: str) -> Config:
    """The configuration of one setting's overrides, to be changed freely."""
    return copy.deepcopy(_composed(setting))


@functools.cache
def _composed(setting: str) -> Config:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(to_config(hydra.compose("config", ["num_steps=1", *shlex.split(setting)])))


def predicted(plan: Plan) -> dict[str, Any]:
    """`predicted_gib` and the point of the peak; nothing where it is not predicted."""
    memory = plan.step_memory
    return {} if memory.unsupported else {"predicted_gib": memory.peak.total / 2**30, "fullest_at": memory.peak.name}


def predicted_again(row: dict[str, Any]) -> dict[str, Any]:
    """The present prediction for a row measured on a GPU."""
    num_ranks = row["num_ranks"]
    return predicted(Plan(composed(row["setting"]), num_ranks, "cuda", row["device"], None, num_ranks))


def had_other_gradients(row: dict[str, Any]) -> bool:
    """Whether the row was measured while DeepSpeed kept fp32 sums of all gradients on every rank, or on one alone."""
    return not row.get("sharded_sums") and has_sharded_sums(composed(row["setting"]))


def step(config: Config) -> dict[str, Any]:
    """What one setting took, or `error` if it ran out of memory; `predicted_gib` where there is a prediction."""
    num_ranks = launcher.count_ranks(config)
    row: dict[str, Any] = {"num_ranks": num_ranks, "sharded_sums": has_sharded_sums(config)}
    row["host_memory_gib"] = usable_memory_bytes() / 2**30
    row |= predicted(launcher.make_plan(config, num_ranks))
    with tempfile.TemporaryDirectory() as folder:
        return {**row, **train_probe(config, num_ranks, Path(folder))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of single training steps.")
    parser.add_argument("settings", nargs="+", help="overrides of train.py, one setting each")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    rows = []
    for setting in options.settings:
        rows.append({"setting": setting, "torch": torch.__version__, **step(composed(setting))})
        found = "out of memory"
        if "error" not in rows[-1]:
            found = "peak {peak_gib:.2f} GiB, step {step_time_s:.2f} s, {tokens_per_s:,.0f} tokens/s".format(**rows[-1])
        predicted = "{predicted_gib:.2f} GiB predicted".format(**rows[-1]) if "predicted_gib" in rows[-1] else ""
        print(f"{setting}: {found}; {predicted}", flush=True)
        if options.json:  # after each row, so that a crash loses nothing
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
