"""The import contract of docs/architecture.md."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PRODUCT = ("ring_attention", "recipes", "data", "conf")


def imported(path: Path) -> set[str]:
    """Every module name that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_downward_only():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_only_the_transports_call_torch_distributed():
    users = {
        str(path.relative_to(ROOT))
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    others = {user for user in users if Path(user).parent != Path("ring_attention/transport")}
    # where PyTorch is what is called, and where ranks may not be connected yet
    assert others == {"recipes/benchmark/baselines.py", "recipes/launch/refusals.py"}


def test_nothing_imports_train():
    for folder in PRODUCT:
        for path in (ROOT / folder).rglob("*.py"):
            assert "train" not in imported(path), path


@pytest.mark.slow
def test_the_launchers_parent_does_not_import_deepspeed():
    code = "import sys, recipes.launch.launcher; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="what it needs came with PyTorch 2.13")
def test_importing_deepspeed_does_not_import_inductor():
    code = """
import sys, torch
from recipes.launch.startup import import_deepspeed
import_deepspeed()
assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compiler.get_default_backend() == "inductor"
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
