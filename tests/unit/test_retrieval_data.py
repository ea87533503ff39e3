"""Rows of retrieval tasks: what data=chat trains on is the sample's answer, and what cannot be made is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers

from conf.schema import ConfigError, DataConfig
from data.store import open_counted
from data.tokenizer import PretrainedTokenizer
from recipes.evaluation.tasks import TASKS
from recipes.retrieval_data import main, rows
from tests.errors import names, refused

EOS = 1


def written(folder: Path, tokenizer: Path, *arguments: str) -> list[dict[str, str]]:
    main(["--output", str(folder / "a.jsonl"), "--tokenizer", str(tokenizer), *arguments])
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def test_data_chat_trains_on_the_answers(tiny_llama, tmp_path, capsys):
    made = written(tmp_path, tiny_llama, "--length", "400", "--min-length", "350", "--count", "12")
    names(capsys.readouterr().out, tmp_path / "a.jsonl", 12, *TASKS, 350, 400)
    config = DataConfig(source="chat", files=str(tmp_path / "a.jsonl"), tokenizer=str(tiny_llama))
    store = open_counted(config, "chat", print).store
    reference = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    documents = np.split(store.tokens, np.flatnonzero(np.asarray(store.tokens) == EOS) + 1)[:-1]
    lengths = {len(document) - 1 for document in documents}  # without EOS
    assert min(lengths) >= 350 - 100  # less than a word, and some of the standard library's are long
    assert max(lengths) <= 400
    assert len(lengths) > 3
    for row, document in zip(made, documents, strict=True):
        assert document.tolist() == [
            *reference(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"],
            EOS,
        ]
    assert store.trained is not None
    trained = np.asarray(store.tokens)[np.asarray(store.trained)]
    assert reference.decode(trained).split("<|end_of_text|>")[:-1] == [row["completion"] for row in made]


def test_rows_are_of_the_tasks_named_and_equal_for_equal_arguments(tiny_llama, tmp_path):
    arguments = ["--length", "300", "--count", "4", "--tasks", "niah_single,variable_tracing"]
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first = written(folders[0], tiny_llama, *arguments)
    assert ["VAR " in row["prompt"] for row in first] == [False, True, False, True]
    assert first == written(folders[1], tiny_llama, *arguments)
    other = written(folders[2], tiny_llama, *arguments, "--seed", "1")
    assert {row["completion"] for row in first}.isdisjoint({row["completion"] for row in other})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--length", "20", "--count", "1", "--tasks", "niah_single"], ["niah_single", "length=20"]),
        (["--length", "300", "--count", "1", "--tasks", "niah"], ["task=niah", *TASKS]),
        (["--length", "300", "--count", "0"], ["--count", 0, 1]),
        (["--length", "300", "--min-length", "301", "--count", "1"], ["--min-length", 301, "--length", 300]),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(tiny_llama, tmp_path, arguments, named):
    with pytest.raises(SystemExit) as caught:
        written(tmp_path, tiny_llama, *arguments)
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    names(message, *named)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tiny_llama, tmp_path):
    with pytest.raises(SystemExit) as caught:
        written(tmp_path / "gone", tiny_llama, "--length", "300", "--count", "1", "--tasks", "niah_single")
    names(str(caught.value), "--output", tmp_path / "gone" / "a.jsonl")


def test_a_file_that_is_there_is_kept(tiny_llama, tmp_path):
    (tmp_path / "a.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit) as caught:
        written(tmp_path, tiny_llama, "--length", "300", "--count", "1", "--tasks", "niah_single")
    names(str(caught.value), "--output", tmp_path / "a.jsonl", "delete it")
    assert (tmp_path / "a.jsonl").read_text() == "mine\n"


def spaced(*decoder: Any) -> PretrainedTokenizer:
    """A tokenizer that puts a space before each text, as Llama 2's does."""
    alphabet = sorted({chr(code) for code in range(33, 127)} | {"▁", "\n"})
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: number for number, letter in enumerate(alphabet, 2)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *decoder])
    return PretrainedTokenizer("spaced", transformers.PreTrainedTokenizerFast(tokenizer_object=model), 1)


def test_rows_are_the_samples_tokens_where_a_space_comes_before_each_text():
    tokenizer = spaced(decoders.Strip(" ", 1, 0))
    for row in rows(["niah_single"], tokenizer, ["some words "], (400, 400), 3, 0):
        prompt, completion = (tokenizer.tokens([row[part]])[0] for part in ("prompt", "completion"))
        [digits] = re.findall(r"magic number of \S+ is (\d+)\.", row["prompt"])
        assert tokenizer.wrapped.convert_ids_to_tokens(completion) == ["▁", *digits]
        assert prompt + completion == tokenizer.tokens([f"{row['prompt']} {digits}"])[0]


def test_a_tokenizer_that_makes_other_tokens_of_the_answer_alone_is_refused():
    with refused(ConfigError, "niah_single", "spaced"):
        next(rows(["niah_single"], spaced(), ["some words "], (400, 400), 1, 0))
