"""scripts/make_tiny_llama.py: what it makes, and that it writes all of it or nothing."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from scripts import make_tiny_llama
from tests.errors import names

SCRIPT = Path(make_tiny_llama.__file__)


def run(*arguments: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


def test_transformers_loads_the_model_and_the_tokenizer(tiny_llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 2048
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert special == [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id] == [0, 1, 2]
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    logits = model(**tokenizer("import os", return_tensors="pt", return_token_type_ids=False), use_cache=False).logits
    assert logits.isfinite().all()


def test_the_chat_template_marks_what_the_assistant_says(tiny_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    chat = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": "An answer"}]
    tokens = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == f"An answer{make_tiny_llama.END_OF_TURN}"
    ends = transformers.GenerationConfig.from_pretrained(tiny_llama).eos_token_id
    assert ends == [tokenizer.eos_token_id, marked[-1]]


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for arguments in ([tmp_path], [tmp_path / "mine.txt"], []):
        result = run(*arguments)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        names(result.stderr, "folder", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(folder: Path, *_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(make_tiny_llama, "write_tokenizer", lambda folder, _: (folder / "tokenizer.json").touch())
    monkeypatch.setattr(make_tiny_llama, "write_model", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_tiny_llama.make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_runs_write_the_same_files_also_into_an_empty_folder(tiny_llama, tmp_path):
    assert run(tmp_path).returncode == 0
    files = sorted(path.name for path in tiny_llama.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert filecmp.cmpfiles(tiny_llama, tmp_path, files, shallow=False) == (files, [], [])
