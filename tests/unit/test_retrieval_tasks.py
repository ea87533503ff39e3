"""Retrieval tasks: lengths, depths, seeds, answers that a reader finds in the text, and tokenizers that cannot."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import ConfigError, DataConfig
from data.tokenizer import BYTES, PretrainedTokenizer, Tokenizer, open_tokenizer
from recipes.evaluation.tasks import TASKS, WITHOUT_DEPTH, Sample, make_samples, read_hay
from tests.errors import refused

HAY = [f"{'  ' * (row % 3)}It is line {row}: nothing is hidden here, and {row % 7} is small.\n" for row in range(900)]
WITH_DEPTH = [task for task in TASKS if task not in WITHOUT_DEPTH]
tasks = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return BYTES
    return open_tokenizer(DataConfig(tokenizer=str(request.getfixturevalue("tiny_llama"))))


def text_of(tokenizer: Tokenizer, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(np.array(tokens)).removeprefix("<|begin_of_text|>")


def solved(task: str, text: str) -> list[str]:
    """The answer, found by reading."""
    question = text.rsplit("\n", 1)[1]
    if task.startswith("niah"):
        found = re.findall(r"(?:The|A) magic number of (\S+) is (\d+)\.", text)
        if task == "niah_multivalue":
            [key] = re.findall(r"magic numbers of (\S+),", question)
            return [value for of_key, value in found if of_key == key]
        return [dict(found)[key] for key in re.findall(r"\w+-\w+", question)]
    if task == "variable_tracing":
        [value] = re.findall(r"\d+", question.split("value")[1])
        names: list[str] = []
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            names += [name] * (source in (value, *names))
        return names
    counts = Counter(re.findall(r"Item: (\w+)\.", text)).most_common(4)
    assert len({count for _, count in counts}) == 4  # one order is right
    return [word for word, _ in counts[:3]]


@tasks
@pytest.mark.parametrize("length", [768, 3000])
def test_a_reader_finds_the_answer(tokenizer, task, length):
    for sample in make_samples(task, tokenizer, HAY, length, None, 5, seed=3):
        answers = solved(task, text_of(tokenizer, sample.prompt))
        assert tuple(answers) == sample.answers
        assert text_of(tokenizer, sample.answer) == f" {', '.join(answers)}"


@tasks
@settings(max_examples=15, deadline=None)
@given(length=st.integers(700, 5000), seed=st.integers(0, 2**40), depth=st.none() | st.floats(0, 1))
def test_samples_fill_their_length_and_never_exceed_it(task, length, seed, depth):
    for sample in make_samples(task, BYTES, HAY, length, depth, 2, seed):
        assert 0 <= length - len(sample.prompt) - len(sample.answer) < 16  # bytes of the hay's longest word and newline


@tasks
def test_samples_of_a_tokenizer_fill_their_length(tiny_llama, task):
    tokenizer = open_tokenizer(DataConfig(tokenizer=str(tiny_llama)))
    for length in range(400, 460):
        [sample] = make_samples(task, tokenizer, HAY, length, None, 1, length)
        assert 0 <= length - len(sample.prompt) - len(sample.answer) < 8


@pytest.mark.parametrize("task", WITH_DEPTH)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_needle_lies_at_its_depth(tokenizer, task, depth):
    for sample in make_samples(task, tokenizer, HAY, 6000, depth, 3, 0):
        assert sample.depth == depth
        text = text_of(tokenizer, sample.prompt)
        first = text.rsplit("\n", 1)[1] if task != "niah_multivalue" else ""
        asked = re.search(r"\w+-\w+", first)
        wanted = f"of {asked[0]} is" if asked else ("A magic number" if task == "niah_multivalue" else "VAR ")
        shares = [
            len(tokenizer.encode([text[: match.start()]])[0]) / len(sample.prompt)
            for match in re.finditer(re.escape(wanted), text)
        ]
        assert min(abs(share - depth) for share in shares) < 0.02 + 0.02  # all needles and the question are 2 %


def test_equal_arguments_give_equal_samples_and_others_others(tokenizer):
    def samples(task="niah_single", length=600, depth: float | None = 0.5, count=2, seed=0) -> list[Sample]:
        return make_samples(task, tokenizer, HAY, length, depth, count, seed)

    first = samples()
    assert first == samples()
    assert first[0] != first[1]
    assert first == samples(count=3)[:2]
    for other in (samples(seed=1), samples(length=601), samples(depth=0.6), samples(depth=None)):
        assert {sample.answers for sample in other}.isdisjoint({sample.answers for sample in first})


@tasks
def test_bos_is_what_transformers_adds_and_the_rest_is_its_tokens(tiny_llama, task):
    tokenizer = open_tokenizer(DataConfig(tokenizer=str(tiny_llama)))
    reference = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    for sample in make_samples(task, tokenizer, HAY, 500, None, 3, 0):
        text = text_of(tokenizer, sample.prompt) + text_of(tokenizer, sample.answer)
        assert tuple(reference(text)["input_ids"]) == sample.prompt + sample.answer


def test_hay_begins_again_where_it_ends():
    [sample] = make_samples("niah_single", BYTES, ["", "  \n", "one two"], 400, 0.5, 1, 0)
    text = text_of(BYTES, sample.prompt)
    assert text.count("one two") > 20
    assert solved("niah_single", text) == list(sample.answers)


def test_the_hay_is_real_text():
    hay = read_hay(DataConfig())
    [sample] = make_samples("niah_single", BYTES, hay, 2000, 0.0, 1, 0)
    needle, found, *_ = text_of(BYTES, sample.prompt).split("\n", 2)[0], text_of(BYTES, sample.prompt)[200:400]
    assert needle.startswith("The magic number of ")
    assert any(found in text for text in hay)


@tasks
def test_a_length_that_cannot_hold_the_question_is_refused(tokenizer, task):
    with refused(ConfigError, task, "length=20"):
        make_samples(task, tokenizer, HAY, 20, 0.5, 1, 0)


def test_bad_arguments_are_refused():
    with refused(ConfigError, "task=niah", *TASKS):
        make_samples("niah", BYTES, HAY, 500, 0.5, 1, 0)
    with refused(ConfigError, "niah_single", "depth=1.5", 0, 1):
        make_samples("niah_single", BYTES, HAY, 500, 1.5, 1, 0)
    with refused(ConfigError, "niah_single", "data=stdlib"):
        make_samples("niah_single", BYTES, [" \n"], 500, 0.5, 1, 0)


@cache
def words_only(folder: Path) -> Tokenizer:
    """A tokenizer that knows few words and no number."""
    vocabulary = {"<unk>": 0, "</s>": 1, "The": 2, "magic": 3, "number": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    return PretrainedTokenizer("words", wrapped, 1)


@tasks
def test_a_tokenizer_that_loses_what_is_asked_is_refused(tmp_path, task):
    with refused(ConfigError, task, "words"):
        make_samples(task, words_only(tmp_path), HAY, 500, 0.5, 1, 0)
