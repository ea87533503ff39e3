"""Every Python example of the documentation runs, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pool import WorkerPool

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    (f"{path.name}-{number}", code)
    for path in (ROOT / "docs" / "api.md", ROOT / "README.md")
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


def run_example(code: str) -> None:
    exec(compile(code, "example.py", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_an_example_runs(pool: WorkerPool, code: str):
    pool.run(run_example, code, num_ranks=2)


def test_the_documentation_has_an_example_of_everything_public():
    import ring_attention

    text = "\n".join(code for _, code in EXAMPLES)
    assert [name for name in ring_attention.__all__ if name not in text] == []
