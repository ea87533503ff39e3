"""A corpus that is read from a stream while training."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import DataConfig
from data.corpus import IGNORED_LABEL, Cursor, Pack
from data.report import left_out
from data.source import BadRow, CorpusError
from data.stream import StreamCorpus, open_stream
from data.tokenizer import BYTES
from tests.corpora import store_of
from tests.errors import names, refused


class Opened:
    """A stream of documents whose tokens are all different, and how often it was opened and read."""

    def __init__(self, lengths: list[int]) -> None:
        self.documents = np.split(np.arange(sum(lengths), dtype=np.int32) + 1, np.cumsum(lengths)[:-1])
        self.num_opened = self.num_read = 0

    def __call__(self):
        self.num_opened += 1
        for document in self.documents:
            self.num_read += 1
            yield document


def epoch_of(corpus: StreamCorpus, epoch: int = 0) -> list[Pack]:
    packs = []
    for pack in corpus.training(Cursor(epoch, 0)):
        packs.append(pack)
        if pack.cursor.epoch > epoch:
            return packs
    raise AssertionError


def contents(packs) -> list[tuple[list[int], list[int], Cursor]]:
    return [(*(array.tolist() for array in pack.read(0, pack.length)), pack.cursor) for pack in packs]


def inputs_of(packs) -> list[int]:
    return [token for pack in packs for token in pack.read(0, pack.num_tokens)[0].tolist()]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=12, max_size=40),
    length=st.integers(1, 14),
    validation_sequences=st.integers(1, 2),
    window=st.integers(1, 50),
    packing=st.sampled_from(["concatenate", "best_fit", "none"]),
    long_documents=st.sampled_from(["split", "drop"]),
    resumed=st.integers(0, 60),
)
def test_every_token_trains_once_an_epoch_or_is_held_out(
    lengths, length, validation_sequences, window, packing, long_documents, resumed
):
    config = DataConfig(
        sequence_length=length,
        validation_sequences=validation_sequences,
        shuffle_window=window,
        packing=packing,
        long_documents=long_documents,
    )
    stream = Opened(lengths)
    documents = [d.tolist() for d in stream.documents if long_documents == "split" or len(d) <= length]
    everything = [token for document in documents for token in document]
    corpus = StreamCorpus(stream, config)
    if len(everything) < (validation_sequences + 1) * length:
        with pytest.raises(CorpusError):
            corpus.validation()
        with pytest.raises(CorpusError):
            next(corpus.training())
        return
    validation = corpus.validation()["hub"]
    packs = epoch_of(corpus)
    assert stream.num_opened == 1
    inputs = inputs_of(packs)
    num_held_out = len(everything) - len(inputs)
    assert validation_sequences * length <= num_held_out < (validation_sequences + 1) * length
    assert Counter(inputs) == Counter(everything[num_held_out:])
    assert len(validation) == validation_sequences
    assert set(inputs_of(validation)) <= set(everything[:num_held_out])
    labels = [label for pack in packs for label in pack.read(0, length)[1].tolist() if label != IGNORED_LABEL]
    firsts = {document[0] for document in documents if document} | {everything[num_held_out]}
    assert sorted(labels) == sorted(set(inputs) - firsts)
    if packing == "concatenate":
        assert all(pack.num_tokens == length for pack in packs[:-1])

    start = min(resumed, len(packs) - 1)
    expected = [*packs, *epoch_of(corpus, 1)][start:]
    restarted = StreamCorpus(stream, config).training(Cursor(0, start))
    assert contents(itertools.islice(restarted, len(expected))) == contents(expected)


def test_the_next_window_is_read_while_one_trains_and_not_more():
    stream = Opened([5] * 1000)
    corpus = StreamCorpus(stream, DataConfig(sequence_length=5, validation_sequences=2, shuffle_window=10))
    assert len(corpus.validation()["hub"]) == 2
    packs = corpus.training()
    next(packs)
    time.sleep(0.5)
    assert stream.num_read == 2 + 2 * 10 + 1  # one more waits for its place
    del packs
    time.sleep(0.5)
    assert not any(thread.name == "read ahead" for thread in threading.enumerate())


def test_documents_of_a_window_are_in_an_order_of_the_epoch():
    corpus = StreamCorpus(Opened([4] * 50), DataConfig(sequence_length=4, validation_sequences=1))
    first, second = inputs_of(epoch_of(corpus, 0)), inputs_of(epoch_of(corpus, 1))
    assert sorted(first) == sorted(second) == list(range(5, 201))
    assert first != second != sorted(first)


def test_documents_to_validate_on_may_be_stored():
    corpus = StreamCorpus(Opened([4] * 10), DataConfig(sequence_length=4), validation_store=store_of([[900] * 6] * 2))
    assert inputs_of(corpus.validation()["hub"]) == [900] * 12
    assert sorted(inputs_of(epoch_of(corpus))) == list(range(1, 41))


def test_dropping_every_document_is_refused():
    corpus = StreamCorpus(Opened([9, 7]), DataConfig(sequence_length=4, long_documents="drop"))
    with refused(CorpusError, "data.long_documents=drop", "hub", 7, "data.sequence_length=4"):
        next(corpus.training())


def write_rows(folder: Path, texts: Sequence[object]) -> None:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


def test_rows_that_are_left_out_are_counted_once():
    rows = [np.arange(1, 6), BadRow("cut off"), np.zeros(0, np.int64), np.arange(1, 22)]
    config = DataConfig(sequence_length=8, validation_sequences=1, long_documents="drop", bad_rows="skip")
    corpus = StreamCorpus(lambda: [*rows * 10, *rows[:1]], config)
    assert left_out("hub", corpus.counts) == []
    corpus.validation()
    assert corpus.counts == {"documents": 4, "skipped": 3, "empty": 3, "dropped": 3}  # a sequence is held out, of two
    for epoch in (0, 1, 0):
        epoch_of(corpus, epoch)
        assert corpus.counts == {"documents": 11, "skipped": 10, "empty": 10, "dropped": 10}
    [line] = left_out("hub", corpus.counts)
    names(line, "hub", "41 rows", "10 skipped (data.bad_rows=skip)", "10 empty", "10 dropped")
    assert left_out("hub", Counter(documents=3)) == []


@pytest.mark.parametrize(("row", "kind"), [("", "empty"), (None, "empty"), (7, "skipped")])
def test_a_configured_stream_gives_the_rows_that_it_leaves_out(tmp_path, row, kind):
    write_rows(tmp_path, [row] * 5)
    config = DataConfig("hub", name=str(tmp_path), stream=True, sequence_length=8, bad_rows="skip")
    corpus = open_stream(config)
    with pytest.raises(CorpusError):
        corpus.validation()
    assert corpus.counts == {kind: 5}


def test_a_configured_stream_has_the_documents_of_its_data_set(tmp_path):
    texts = [f"ring {number}" for number in range(40)]
    write_rows(tmp_path, texts)
    settings = {"sequence_length": 16, "validation_sequences": 1, "packing": "none"}
    config = DataConfig("hub", name=str(tmp_path), stream=True, **settings)
    corpus = open_stream(config, vocab_size=257)
    assert len(corpus.validation()["hub"]) == 1
    trained = BYTES.decode(np.array(inputs_of(epoch_of(corpus)))).split("<end>")[:-1]
    assert sorted(trained) == sorted(texts[3:])  # two sequences of 16 tokens are three documents
    with refused(CorpusError, "model.vocab_size=100"):
        open_stream(config, vocab_size=100)
