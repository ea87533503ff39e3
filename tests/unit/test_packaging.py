"""What `pip install` brings: the library alone needs torch and NumPy, and the README's commands everything."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.unit.test_imports import imported

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEEPSPEED = {"attention.py", "groups.py", "trainer.py"}  # process groups, Ulysses and the hybrid


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}


def extra(name: str) -> set[str]:
    """The packages of an extra, with those of the extras that it names."""
    found = set(PROJECT["dependencies"])
    for requirement in PROJECT["optional-dependencies"][name]:
        if match := re.fullmatch(re.escape(PROJECT["name"]) + r"\[(.*)\]", requirement):
            found |= set().union(*map(extra, match[1].split(",")))
        else:
            found.add(requirement)
    return names(sorted(found))


def test_the_library_needs_torch_and_numpy_only():
    assert names(PROJECT["dependencies"]) == {"torch", "numpy"}
    for path in (ROOT / "ring_attention").rglob("*.py"):
        uses_deepspeed = any(name.split(".")[0] == "deepspeed" for name in imported(path))
        assert uses_deepspeed <= (path.name in DEEPSPEED), path


@pytest.mark.slow
def test_the_library_is_imported_without_what_the_recipes_need():
    blocked = sorted(extra("recipes") - names(PROJECT["dependencies"]))
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*blocked, "hydra"]!r}))  # to import one is an error
import torch, ring_attention
q = torch.zeros(1, 4, 2, 8)
assert ring_attention.LocalAttention("auto")(q, q, q, 0).shape == q.shape
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_train_without_the_recipes_packages_says_what_to_type():
    code = "import sys; sys.modules['hydra'] = None; import train"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert 'pip install -e ".[recipes]" -c constraints.txt' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["recipes", "dashboard", "sweep", "test"])
def test_extras_for_commands_bring_all_that_the_recipes_import(name: str):
    wanted = {"torch", "numpy", "deepspeed", "datasets", "safetensors", "wandb", "matplotlib", "hydra-core", "tqdm"}
    assert extra(name) >= wanted


def test_commands_that_start_training_install_the_recipes():
    for page in ("README.md", "docs/performance.md", ".ci/run", "CONTRIBUTING.md"):
        for line in (ROOT / page).read_text().splitlines():
            if "pip install" in line and re.search(r"train\.py|pytest|-e \S*test", line):
                (extras,) = re.findall(r'-e "\.\[(.*?)\]"', line)
                assert extras in ("recipes", "test"), line
