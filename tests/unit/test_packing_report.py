"""What explain=true says about packing."""

from __future__ import annotations

import dataclasses

import numpy as np

import data.report
from conf.schema import DataConfig
from data.corpus import Corpus
from data.report import held_out_warning, packing_report
from data.store import TokenStore
from tests.errors import names, some_line_names


def store_of_lengths(
    lengths: list[int], name: str = "a", num_skipped: int = 0, trained: np.ndarray | None = None
) -> TokenStore:
    return TokenStore(name, np.zeros(sum(lengths), np.uint16), np.cumsum(lengths), trained, num_skipped)


VALIDATION = {"a": store_of_lengths([100]), "b": store_of_lengths([100])}


def report_of(lengths: list[int], **settings) -> list[str]:
    config = DataConfig(sequence_length=100, **settings)
    return packing_report(Corpus({"a": store_of_lengths(lengths)}, config, None, VALIDATION))


def test_documents_are_counted_by_length():
    lines = report_of([60, 64, 65, 256, 257], packing="best_fit")
    some_line_names(lines, "1 to 64", "2  ", "17.7%")
    some_line_names(lines, "65 to 256", "1      1")  # of 65 tokens whole, of 256 split
    some_line_names(lines, "257 to 1,024", "1")
    # 100 + 100 + 56, 100 + 100 + 57, and 60, 64 and 65, none of which fits with another
    some_line_names(lines, "padding", f"{1 - 702 / 900:.2%}")
    some_line_names(lines, "9 sequences", "702 tokens", "5 documents")
    some_line_names(lines, "validation", "1 sequence", "100 tokens")


def test_what_is_trained_is_counted():
    """Chats of 250 tokens, of which the last ten are trained: two of three sequences have none."""
    trained = np.tile(np.arange(250) >= 240, 4)
    chats = store_of_lengths([250] * 4, trained=trained)
    config = DataConfig(sequence_length=100, packing="none")
    validation = store_of_lengths([250], trained=trained[:250])
    lines = packing_report(Corpus({"a": chats}, config, None, {"a": validation}))
    some_line_names(lines, "4 sequences", "1,000 tokens", "num_steps=4")
    some_line_names(lines, "40 tokens are trained, 4.0%", "8 more sequences")
    some_line_names(lines, "padding 50.00%")
    assert not any("are trained" in line for line in report_of([60, 64]))


def test_dropped_documents_are_counted():
    lines = report_of([60, 64, 90, 256, 257], packing="best_fit", long_documents="drop")
    some_line_names(lines, "257 to 1,024", "-", "1")
    names(next(line for line in lines if line.lstrip().startswith("all")), 5, 3, 2)
    some_line_names(lines, "3 sequences", "214 tokens", "3 documents")


def test_documents_that_concatenation_cuts_are_counted():
    lines = report_of([50] * 10)
    names(next(line for line in lines if line.lstrip().startswith("all")), 10, "-")
    lines = report_of([80] * 10)  # cut at 100, 200, 300, 500, 600 and 700, not at 400
    assert next(line for line in lines if line.lstrip().startswith("all")).split() == [
        "all",
        "10",
        "100.0%",
        "4",
        "6",
        "-",
    ]
    some_line_names(lines, "padding", "0.00%")


def test_a_mixture_has_shares_and_repetitions_and_skipped_rows_are_named():
    config = DataConfig(sequence_length=100)
    stores = {"a": store_of_lengths([50] * 90), "b": store_of_lengths([50] * 10, "b", num_skipped=7)}
    lines = packing_report(Corpus(stores, config, {"a": 0.5, "b": 0.5}, VALIDATION))
    some_line_names(lines, "a", 90, "4,500", "50.0%", 0.556)
    some_line_names(lines, "b", 10, "500", "50.0%", 5)
    some_line_names(lines, "7 rows of b", "data.bad_rows=skip")


def test_a_huge_corpus_is_reported_by_its_first_windows(monkeypatch):
    monkeypatch.setattr(data.report, "MAX_DOCUMENTS", 45)
    config = DataConfig(sequence_length=100, packing="best_fit", shuffle_window=20)
    corpus = Corpus({"a": store_of_lengths([50] * 100)}, config, None, VALIDATION)
    lines = packing_report(corpus)
    some_line_names(lines, "first 40 of 100 documents")
    some_line_names(lines, "about 50 sequences", "5,000 tokens")
    corpus.config = dataclasses.replace(config, shuffle_window=1000)
    whole = packing_report(corpus)
    some_line_names(whole, "an epoch has 50 sequences")


def test_a_large_share_held_out_is_warned_of():
    for num_documents, is_much in ((50, True), (100, False)):  # 16 and 8 %
        config = DataConfig(sequence_length=100, validation_sequences=8)
        warning = held_out_warning(Corpus({"a": store_of_lengths([100] * num_documents)}, config))
        assert (warning is not None) == is_much
        if warning:
            names(warning, "800 tokens", "16%", "data.validation_sequences=8 times 100 tokens")
