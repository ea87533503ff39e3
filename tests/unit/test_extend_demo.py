"""scripts/extend_demo.py: the rows that it joins, the commands that it runs, and its table."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable

import hydra
import pytest
import transformers

import train  # noqa: F401  registers the schema
from conf.compose import to_config
from conf.schema import Config
from scripts import extend_demo
from scripts.make_tiny_llama import BOS

ROWS = [
    {"prompt": f"{BOS}text {number}\n\nThe magic number of key-{number} is", "completion": f" 10{number}"}
    for number in range(4)
]


def test_a_joined_row_has_all_texts_then_all_questions_each_with_its_answer():
    row = extend_demo.joined(ROWS, random.Random(0))
    text = row["prompt"] + row["completion"]
    assert text.count(BOS) == 1
    assert text.startswith(f"{BOS}text 0\n\ntext 1\n\ntext 2\n\ntext 3\n")
    questions = [line.removesuffix(".") for line in text.splitlines() if line.startswith("The magic")]
    expected = [(row["prompt"] + row["completion"]).splitlines()[-1] for row in ROWS]
    assert sorted(questions) == expected
    assert questions[0] == expected[-1]
    assert row["prompt"].splitlines()[-1] + row["completion"].split(".")[0] == questions[0]


def test_a_row_of_one_text_stays_as_it_is():
    assert extend_demo.joined(ROWS[:1], random.Random(0)) == ROWS[0]


def test_rows_are_drawn_until_the_next_is_too_many():
    lengths = [40, 30, 20]
    chosen = extend_demo.some(lengths, 100, random.Random(0))
    total = sum(lengths[index] for index in chosen)
    assert 100 - max(lengths) < total <= 100


def test_joined_rows_fit_the_sequence(tiny_llama, tmp_path):
    (tmp_path / "short.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    extend_demo.write_joined(tmp_path, tiny_llama, {"dense": ("short", 20, 90, 100)})
    rows = [json.loads(line) for line in (tmp_path / "dense.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    texts = [row["prompt"] + row["completion"] for row in rows]
    lengths = [len(tokens) + 1 for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]]  # with EOS
    assert len(rows) == 20
    assert max(lengths) <= 100
    assert min(lengths) > 50


@pytest.fixture
def demonstrate(tmp_path, monkeypatch) -> Callable[[int], list[list[str]]]:
    """What a demonstration would run, all of it, without running it. Each evaluation finds a result."""

    def commands(length: int) -> list[list[str]]:
        run: list[list[str]] = []
        size = extend_demo.SIZES[length]
        for name in ("short", "ring", "alone"):
            folder = tmp_path / f"{name}_evaluation"
            folder.mkdir()
            (folder / "evaluation.json").write_text(json.dumps({"cells": []}))
        for name in ("copies", *size.rows, *size.joined):
            (tmp_path / f"{name}.jsonl").touch()
        for name in ("write_base", "write_joined", "write_copies"):
            monkeypatch.setattr(extend_demo, name, lambda *_: None)
        monkeypatch.setattr(extend_demo, "run", lambda command: run.append(shlex.split(command)))
        extend_demo.demonstrate(tmp_path, size)
        return run

    return commands


def overrides_of(words: list[str]) -> list[str]:
    return [word for word in words[1:] if not word.startswith("hydra.")]


def composed(commands: list[list[str]]) -> list[Config]:
    with hydra.initialize_config_dir(str(extend_demo.CHECKOUT / "conf"), version_base="1.3"):
        return [to_config(hydra.compose("config", overrides_of(words))) for words in commands if words[0] == "train.py"]


def test_its_commands_compose(demonstrate):
    configs = composed(demonstrate(4096))
    found = [(config.recipe, config.attention.method, config.data.sequence_length) for config in configs]
    assert found[:3] == [("pretrain", "ring", 512), ("pretrain", "ring", 4096), ("pretrain", "local", 1024)]
    assert [(recipe, method) for recipe, method, _ in found[3:]] == [("evaluate", "ring")] * 3
    assert [config.evaluate.context for config in configs[3:]] == [None, None, 1024]
    assert all(config.launch.num_ranks == 4 for config in configs[1:])
    assert configs[1].model.rope == {"rope_type": "yarn", "factor": 8}


def test_the_longer_demonstration_evaluates_one_model_with_and_without_the_ring(demonstrate):
    configs = composed(demonstrate(131072))
    found = [(config.recipe, config.data.sequence_length, config.evaluate.context) for config in configs]
    assert found[:2] == [("pretrain", 8192, None), ("pretrain", 131072, None)]
    assert [(recipe, context) for recipe, _, context in found[2:]] == [("evaluate", None), ("evaluate", 65536)]
    assert all(config.launch.num_ranks == 2 for config in configs)
    assert configs[1].model.rope == {"rope_type": "yarn", "factor": 16}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["folder", "1000"], ["folder", "4096", "more"]])
def test_other_arguments_are_refused_with_what_to_type(arguments):
    with pytest.raises(SystemExit, match=r"4096 and 131072: type python scripts/extend_demo.py FOLDER"):
        extend_demo.main(arguments)


def test_its_table_has_a_row_for_each_model_and_a_column_for_each_cell():
    cells = {(512, 0.0): 1.0, (4096, 0.5): 0.25}
    _, head, *lines = extend_demo.table({"one model": cells, "another": dict.fromkeys(cells, 0.0)})
    assert head.split() == ["512@0.00", "4096@0.50"]
    assert [line.split() for line in lines] == [["one", "model", "100%", "25%"], ["another", "0%", "0%"]]
