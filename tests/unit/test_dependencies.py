"""Versions that the code depends on exactly."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_deepspeed_is_pinned_to_the_version_whose_internals_were_read():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = [line for line in project["optional-dependencies"]["deepspeed"] if line.startswith("deepspeed")]
    assert pins == [
        line for line in (REPOSITORY / "constraints.txt").read_text().split() if line.startswith("deepspeed")
    ]
    assert pins == [f"deepspeed=={version('deepspeed')}"]
    notes = (REPOSITORY / "docs" / "upstream_notes.md").read_text()
    assert f"\n## DeepSpeed {version('deepspeed')}\n" in notes
