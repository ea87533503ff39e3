"""Sequences as text."""

from __future__ import annotations

import numpy as np

from conf.schema import DataConfig
from data.corpus import Corpus
from data.preview import preview
from data.tokenizer import BYTES, open_tokenizer
from tests.corpora import byte_corpus, store_of
from tests.errors import some_line_names


def test_what_is_not_trained_is_in_brackets():
    question, answer = b"<user>hi<bot>", b"hello"
    chat = [*question, *answer, 256]
    trained = np.array(([False] * len(question) + [True] * (len(answer) + 1)) * 7)
    store = store_of([chat] * 7, trained=trained)
    corpus = Corpus({"chats": store}, DataConfig(sequence_length=40, validation_sequences=1, packing="best_fit"))
    lines = preview(corpus, BYTES, 2)
    assert lines.count("[-<user>hi<bot>-]hello<end>") == 4
    assert sum(line.startswith("===") for line in lines) == 2
    some_line_names(lines, "sequence 1", "38 tokens", "2 documents", "12 trained", "2 of padding")
    some_line_names(lines, "document 2", "19 tokens")


def test_a_text_has_no_brackets_and_its_end_in_another_sequence_is_named():
    lines = preview(byte_corpus(["attention"] * 30, 25, packing="concatenate"), BYTES, 1)
    assert lines.count("attention<end>") == 2
    some_line_names(lines, "document 3", "5 tokens")
    assert "goes on" in next(line for line in lines if "document 3" in line)
    assert not any("[-" in line for line in lines[1:])


def test_long_runs_are_shortened():
    lines = preview(byte_corpus(["ring " * 1000] * 4, 2000), BYTES, 1)
    some_line_names(lines, "1,600 tokens")
    assert sum(map(len, lines)) < 1000


def test_sources_of_a_mixture_are_named():
    stores = {name: store_of(BYTES.encode([name * 9] * 9), name) for name in ("code", "prose")}
    corpus = Corpus(stores, DataConfig(sequence_length=100, validation_sequences=1), {"code": 0.5, "prose": 0.5})
    lines = preview(corpus, BYTES, 2)
    some_line_names(lines, "of code")
    some_line_names(lines, "of prose")


def test_tokens_that_are_no_bytes_are_numbers():
    corpus = Corpus(
        {"megatron": store_of([[70, 5000, 3, 256]] * 9)}, DataConfig(sequence_length=8, validation_sequences=1)
    )
    assert preview(corpus, BYTES, 1).count("70 5000 3 256") == 2


def test_tokenizers_show_separators(tiny_llama):
    assert BYTES.decode(np.concatenate(BYTES.encode(["aé", "", "b"]))) == "aé<end><end>b<end>"
    tokenizer = open_tokenizer(DataConfig("text_files", files=[str(tiny_llama / "*")], tokenizer=str(tiny_llama)))
    assert tokenizer.decode(tokenizer.encode(["def ring(x):"])[0]) == "def ring(x):<|end_of_text|>"
