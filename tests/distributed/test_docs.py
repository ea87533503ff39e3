"""Every Python example of the documentation runs on two ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pool import WorkerPool

ROOT = Path(__file__).parents[2]


def python_examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


LIBRARY = python_examples(ROOT / "docs" / "library.md")
README = python_examples(ROOT / "README.md")


def run_example(code: str) -> None:
    exec(compile(code, "example.py", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code", LIBRARY, ids=range(len(LIBRARY)))
def test_library_example_runs(pool: WorkerPool, code: str):
    pool.run(run_example, code, num_ranks=2)


@pytest.mark.slow
def test_readme_example_runs_as_printed_and_needs_neither_deepspeed_nor_a_compiler(tmp_path):
    (code,) = README
    path = tmp_path / "my_model.py"
    path.write_text(f"{code}\nimport sys\nassert 'deepspeed' not in sys.modules\n", encoding="utf-8")
    assert f"# {path.name}: torchrun --nproc-per-node=2 {path.name}" in code
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(path)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"^rank (\d): \d+ tokens", result.stdout, re.M)) == ["0", "1"]


def test_everything_public_has_an_example():
    import ring_attention

    text = "\n".join([*LIBRARY, *README])
    assert [name for name in ring_attention.__all__ if name not in text] == []
