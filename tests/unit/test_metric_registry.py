"""The metric registry, docs/metrics.md and the wandb workspace have the same metrics."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from conf.schema import ConfigError
from recipes.dashboard.workspace import create, define
from recipes.monitor.metric_registry import METRICS, SECTIONS, SUMMARY_METRICS
from tests.errors import refused

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
NAMES = [name for metric in (*METRICS, *SUMMARY_METRICS) for name in metric.logged_names]


def test_the_page_explains_every_metric_once_and_nothing_else():
    rows = re.findall(r"^\| (`.*?`) \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    explained = Counter(name for cell, _, _ in rows for name in re.findall(r"`(.+?)`", cell))
    assert explained == Counter(NAMES)


def test_the_page_says_which_metrics_are_not_always_logged():
    page = PAGE.read_text()
    for metric in (*METRICS, *SUMMARY_METRICS):
        [row] = re.findall(rf"^\| `{metric.logged_names[0]}`.*\| (.+?) \|$", page, re.MULTILINE)
        if "validation" not in metric.prefixes:
            assert (row == "always") == (not metric.requires), metric


def test_the_workspace_has_all_sections_and_their_metrics():
    workspace = define("someone", "something")
    assert (
        tuple(section.name for section in workspace.sections)
        == SECTIONS
        == tuple({metric.section: None for metric in METRICS if metric.section})
    )
    view = workspace._to_model().model_dump(by_alias=True)
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    for section in sections:
        shown = [name for panel in section["panels"] for name in panel["config"]["metrics"]]
        expected = [
            name
            for metric in (*METRICS, *SUMMARY_METRICS)
            if metric.section == section["name"]
            for name in metric.logged_names
        ]
        assert sorted(shown) == sorted(expected)
    lines = [panel for section in sections for panel in section["panels"] if "xAxis" in panel["config"]]
    assert {panel["config"]["xAxis"] for panel in lines} == {"step"}
    assert len(lines) == len([metric for metric in METRICS if metric.section])


@pytest.mark.parametrize("path", ["project", "a/b/c", "/b", "a/", "a b/c"])
def test_a_workspace_needs_entity_and_project(path):
    with refused(ConfigError, path, "--wandb ENTITY/PROJECT"):
        create(path)
