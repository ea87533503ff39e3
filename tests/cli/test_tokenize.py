"""python -m recipes.tokenize as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from recipes.tokenize import main
from tests.cli.program import REPOSITORY, TIMEOUT_S, clean_environment
from tests.errors import names


def tokenize(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.tokenize", *arguments]
    environment = clean_environment(home, XDG_CACHE_HOME=str(home / "cache"))
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_each_source_and_its_validation_is_one_line(tmp_path: Path, tiny_llama: Path, monkeypatch, capsys):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"text of {name}"}) + "\n{}\n")
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    sources = (
        f"data.sources={{x: {{source: jsonl, files: '{a}', validation_files: '{b}', weight: 0.5}}, "
        f"y: {{source: jsonl, files: '{b}', weight: 0.5}}}}"
    )
    settings = ("data=mixture", sources, "data.bad_rows=skip", f"data.tokenizer={tiny_llama}")
    result = tokenize(tmp_path, *settings)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["x", "y", "x, validation"]
    folder = tmp_path / "cache" / "ring_attention" / "tokens"
    for line in lines:
        names(line, "1 documents", "1 rows skipped", "tokenizer")
        assert str(folder) in line
    assert len(list(folder.glob("*/store.json"))) == 2  # the validation of x is y

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main([*settings])
    assert capsys.readouterr().out.count("was there") == 3


def test_a_mistake_is_one_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    for arguments, parts in (
        (["data=jsonl", f"data.files={tmp_path}/a.jsonl"], ["a.jsonl, row 1", "data.text_field"]),
        (["data=jsonl"], ["data.files"]),
        (["data=hub", f"data.name={tmp_path}", "data.stream=true"], ["data.stream=true"]),
        (["--fast"], ["--fast", "train.py"]),
        (["data=nosuch"], ["data"]),
    ):
        result = tokenize(tmp_path, *arguments)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1 or arguments == ["data=nosuch"]  # Hydra lists the choices
        names(result.stderr, *parts)
