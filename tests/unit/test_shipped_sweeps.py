"""Every combination that a file of conf/sweep or wandb_sweeps offers runs on the default ranks of a CPU.

Except for kernels and transports that need GPUs: +sweep=kernels lists them with that reason.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from conf.compose import as_hydra_types_it, to_config
from conf.schema import Config, ConfigError
from recipes.launch import launcher

ConfigStore.instance().store(name="schema", node=Config)
ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = r"attention\.(kernel|transport)=.* needs (GPUs|a cuda device)"


def combinations(values_by_field: dict[str, Iterable[Any]]) -> Iterator[list[str]]:
    fields = [[f"{name}={value}" for value in values] for name, values in values_by_field.items()]
    yield from map(list, itertools.product(*fields))


def of_hydra(path: Path) -> Iterator[list[str]]:
    """The overrides of each trial, with the command of the file's second line; of an interval its ends."""
    (typed,) = re.findall(r"python train\.py -m (.*?): ", path.read_text())
    swept = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    values: dict[str, Iterable[Any]] = {}
    for override in OverridesParser.create().parse_overrides([f"{name}={value}" for name, value in swept.items()]):
        value = override.value()
        is_interval = isinstance(value, IntervalSweep)
        values[override.key_or_group] = (value.start, value.end) if is_interval else override.sweep_string_iterator()
    for chosen in combinations(values):
        yield [*shlex.split(typed), *chosen]


def of_wandb(path: Path) -> Iterator[list[str]]:
    """The overrides that `wandb agent` passes; of a range its ends."""
    definition = yaml.safe_load(path.read_text())
    typed = [word for word in definition["command"] if not word.startswith("${")]
    swept = definition["parameters"].items()
    for chosen in combinations({name: own.get("values") or (own["min"], own["max"]) for name, own in swept}):
        yield [*typed, *map(as_hydra_types_it, chosen)]


SHIPPED = {
    **{f"conf/sweep/{name}.yaml": of_hydra for name in ("kernels", "lr_batch", "throughput")},
    **{f"wandb_sweeps/{name}.yaml": of_wandb for name in ("lr_batch", "throughput")},
}


def test_all_sweeps_are_tried():
    found = {
        str(path.relative_to(ROOT)) for folder in ("conf/sweep", "wandb_sweeps") for path in ROOT.glob(f"{folder}/*")
    }
    assert found - {"conf/sweep/search.yaml"} == set(SHIPPED)  # which leaves the fields to the user


@pytest.mark.parametrize("path", SHIPPED)
def test_all_that_a_sweep_offers_runs(path: str, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = []
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tried = list(SHIPPED[path](ROOT / path))
        for overrides in tried:
            try:
                launcher.count_ranks(to_config(hydra.compose("config", overrides)))
            except ConfigError as error:
                refused += [] if re.search(NEEDS_A_GPU, str(error)) else [(overrides, str(error))]
    assert len(tried) > 1
    assert refused == []
