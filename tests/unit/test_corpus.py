"""Corpora of literal documents: what is trained, what is held out, and resuming."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import DataConfig
from data.corpus import IGNORED_LABEL, START, Corpus, Cursor, LastRead, Pack
from data.feed import packs_after
from data.source import CorpusError
from data.tokenizer import BYTES, SEPARATOR
from tests.corpora import byte_corpus, store_of
from tests.errors import refused

PACKINGS = ("concatenate", "best_fit", "none")


def numbered_corpus(lengths: dict[str, list[int]], weights: dict[str, float] | None = None, **config) -> Corpus:
    """A corpus in which no token occurs twice: token t of source s is 10,000 s + t + 1."""
    stores = {}
    for number, (name, sizes) in enumerate(lengths.items()):
        tokens = np.arange(sum(sizes)) + 1 + 10_000 * number
        stores[name] = store_of(np.split(tokens, np.cumsum(sizes)[:-1]), name)
    return Corpus(stores, DataConfig(**config), weights)


def epoch_of(corpus: Corpus, epoch: int = 0) -> list[Pack]:
    """All packs of an epoch."""
    packs = []
    for pack in corpus.training(Cursor(epoch, 0)):
        packs.append(pack)
        if pack.cursor.epoch > epoch:
            assert pack.cursor == Cursor(epoch + 1, 0)
            return packs
        assert pack.cursor == Cursor(epoch, len(packs))
    raise AssertionError


def inputs_of(packs: Iterable[Pack]) -> list[int]:
    return [token for pack in packs for token in pack.read(0, pack.num_tokens)[0].tolist()]


def labels_of(packs: Iterable[Pack]) -> list[int]:
    labels = [label for pack in packs for label in pack.read(0, pack.length)[1].tolist()]
    return [label for label in labels if label != IGNORED_LABEL]


def test_tokens_are_utf8_bytes_and_a_separator():
    assert BYTES.encode(["aé"])[0].tolist() == [0x61, 0xC3, 0xA9, SEPARATOR]


def test_a_lone_surrogate_is_replaced():
    assert BYTES.encode(["a\ud800b"])[0].tolist() == [*b"a?b", SEPARATOR]


def test_a_pack_has_the_next_tokens_as_labels_and_ends_with_padding():
    corpus = numbered_corpus({"a": [12, 3, 2, 9]}, sequence_length=8, validation_sequences=1, packing="best_fit")
    packs = sorted(epoch_of(corpus), key=lambda pack: -pack.num_tokens)
    for pack in packs:
        tokens, labels = pack.read(0, 8)
        ends = {12, 15, 17, 26}
        assert labels.tolist() == [t + 1 if t and t not in ends else IGNORED_LABEL for t in tokens.tolist()]
        assert (tokens[pack.num_tokens :] == 0).all()
        assert (tokens.dtype, labels.dtype) == (np.int64, np.int64)
        assert pack.boundaries[0] == 0
        assert pack.boundaries[-1] == pack.num_tokens


def test_parts_of_a_pack_are_what_the_whole_has():
    corpus = numbered_corpus({"a": [5, 3, 20, 1, 9]}, sequence_length=8, packing="best_fit", validation_sequences=1)
    for pack in epoch_of(corpus):
        whole = pack.read(0, 12)  # a layout pads sequences: positions after the end are padding as well
        for start, stop in itertools.combinations(range(13), 2):
            parts = pack.read(start, stop)
            assert [part.tolist() for part in parts] == [array[start:stop].tolist() for array in whole]


def test_only_trained_tokens_are_labels():
    trained = np.array([False, False, True, True, False, True, True, False] * 2)
    store = store_of([range(8), range(8, 16)], trained=trained)
    corpus = Corpus({"texts": store}, DataConfig(sequence_length=8, validation_sequences=1, packing="none"))
    [pack] = epoch_of(corpus)
    tokens, labels = pack.read(0, 8)
    first = tokens[0]
    assert labels.tolist() == [-100, first + 2, first + 3, -100, first + 5, first + 6, -100, -100]
    assert [pack.read(i, i + 1)[1][0] for i in range(8)] == labels.tolist()


def test_hashes_differ_by_tokens_and_by_boundaries():
    def digest(documents: list[list[int]]) -> str:
        filler = [[9] * 4]
        config = DataConfig(sequence_length=4, validation_sequences=1)
        corpus = Corpus({"t": store_of(documents)}, config, validation_stores={"t": store_of(filler)})
        return epoch_of(corpus)[0].sha256()

    assert len({digest([[1, 1, 1, 1]]), digest([[1, 1], [1, 1]]), digest([[1, 1, 1, 2]])}) == 3
    assert digest([[1, 1, 1, 1]]) == digest([[1, 1, 1, 1]])


CORPORA = {
    "lengths": st.lists(st.integers(0, 30), min_size=12, max_size=40),
    "length": st.integers(1, 14),
    "validation_sequences": st.integers(1, 2),
    "window": st.integers(1, 50),
    "packing": st.sampled_from(PACKINGS),
    "long_documents": st.sampled_from(["split", "drop"]),
    "seed": st.integers(-3, 3),
}


@settings(max_examples=200, deadline=None)
@given(**CORPORA, epoch=st.integers(0, 3), resumed=st.integers(0, 60))
def test_every_token_trains_once_an_epoch_or_is_held_out(
    lengths, length, validation_sequences, window, packing, long_documents, seed, epoch, resumed
):
    starts = np.cumsum([0, *lengths])
    kept = [d for d, size in enumerate(lengths) if long_documents == "split" or size <= length]
    config = {
        "sequence_length": length,
        "validation_sequences": validation_sequences,
        "shuffle_window": window,
        "packing": packing,
        "long_documents": long_documents,
        "shuffle_seed": seed,
    }
    if sum(lengths[d] for d in kept) < (validation_sequences + 1) * length:
        with pytest.raises(CorpusError):
            numbered_corpus({"a": lengths}, **config)
        return
    corpus = numbered_corpus({"a": lengths}, **config)
    documents = [range(starts[d] + 1, starts[d + 1] + 1) for d in kept]
    packs = epoch_of(corpus, epoch)
    inputs, labels = inputs_of(packs), labels_of(packs)
    validation = corpus.validation()["a"]
    validated = inputs_of(validation)

    trained, everything = set(inputs), {token for document in documents for token in document}
    assert len(inputs) == len(trained) == corpus.tokens_per_epoch
    assert trained <= everything
    assert not trained & set(validated)
    assert not set(labels) & set(validated)
    assert not set(labels_of(validation)) & trained
    assert len(validated) == len(set(validated))
    assert len(validation) == validation_sequences
    held_out = everything - trained
    assert validation_sequences * length <= len(held_out) < (validation_sequences + 1) * length
    firsts = {
        next(token for token in document if token in trained) for document in documents if trained & set(document)
    }
    assert sorted(labels) == sorted(trained - firsts)

    # resuming anywhere gives the same packs as going on
    start = Cursor(epoch, min(resumed, len(packs) - 1))
    expected = [*packs, *epoch_of(corpus, epoch + 1)][start.pack :]
    assert list(itertools.islice(corpus.training(start), len(expected))) == expected


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=5, max_size=40), min_size=1, max_size=3),
    shares=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    packing=st.sampled_from(PACKINGS),
    epochs=st.integers(1, 5),
)
def test_sources_get_their_shares_of_tokens_and_skip_nothing(lengths, shares, packing, epochs):
    lengths = {f"source {number}": [8, 8, *sizes] for number, sizes in enumerate(lengths)}
    weights = {name: share / sum(shares[: len(lengths)]) for name, share in zip(lengths, shares, strict=False)}
    corpus = numbered_corpus(lengths, weights, sequence_length=8, validation_sequences=1, packing=packing)
    tokens_of = [source.num_tokens for source in corpus.sources]
    counts, packs = Counter(), []
    for epoch in range(epochs):
        packs = epoch_of(corpus, epoch)
        counts.update(inputs_of(packs))
        for number, (name, share) in enumerate(weights.items()):
            given = sum(count for token, count in counts.items() if token // 10_000 == number)
            assert -1 <= given - share * corpus.tokens_per_epoch * (epoch + 1) <= max(lengths[name])
            # as often as any other of its source, or once more or less
            times = [count for token, count in counts.items() if token // 10_000 == number]
            if len(times) < tokens_of[number]:
                times.append(0)
            assert max(times) - min(times) <= 1
    resumed = itertools.islice(corpus.training(Cursor(epochs - 1, 1)), len(packs) - 1)
    assert list(resumed) == packs[1:]
    assert set(corpus.validation()) == set(lengths)
    assert all(len(found) == 1 for found in corpus.validation().values())


def test_one_source_is_given_whole_in_each_epoch():
    corpus = numbered_corpus({"a": [7] * 50}, sequence_length=10, validation_sequences=2)
    first, second = (inputs_of(epoch_of(corpus, epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_held_out_documents_depend_on_the_seed_but_not_on_packing():
    def held_out(**config) -> list[int]:
        corpus = numbered_corpus({"a": [4] * 100}, sequence_length=8, validation_sequences=3, **config)
        return sorted(inputs_of(corpus.validation()["a"]))

    assert held_out() == held_out(packing="best_fit") != held_out(shuffle_seed=1)


def test_documents_to_validate_on_are_all_used_and_nothing_else_is_held_out():
    texts, own = store_of([[1] * 9] * 4), store_of([[2] * 6] * 5)
    corpus = Corpus({"a": texts}, DataConfig(sequence_length=8), validation_stores={"a": own})
    assert corpus.tokens_per_epoch == 36
    assert inputs_of(corpus.validation()["a"]) == [2] * 30


def test_of_a_mixture_the_sources_without_documents_to_validate_on_hold_some_out():
    stores = {"a": store_of([[1] * 9] * 4, "a"), "b": store_of([[2] * 9] * 4, "b")}
    config = DataConfig(sequence_length=9, validation_sequences=1)
    corpus = Corpus(stores, config, {"a": 0.5, "b": 0.5}, {"a": store_of([[3] * 6] * 5)})
    assert corpus.tokens_per_epoch == 36 + 27
    assert {name: set(inputs_of(packs)) for name, packs in corpus.validation().items()} == {"a": {3}, "b": {2}}


def test_training_starts_at_the_start():
    corpus = byte_corpus(["ring attention"] * 4, 8)
    assert next(corpus.training()) == next(corpus.training(START)) == next(corpus.training(Cursor(0, 0)))


def test_too_few_tokens_are_refused_with_what_is_needed():
    byte_corpus(["abc", "", "defgh", "ij"], 7)  # 14 tokens
    with refused(CorpusError, "texts", "14 tokens", "1 validation", 16, "data.sequence_length=7"):
        byte_corpus(["abc", "", "defgh", "ij"], 8)
    with refused(CorpusError, "14 tokens", 15, "data.validation_sequences=3", "data.sequence_length=2"):
        byte_corpus(["abc", "", "defgh", "ij"], 3, 4)


def test_dropping_every_document_is_refused():
    with refused(CorpusError, "data.long_documents=drop", "texts", 12, "data.sequence_length=4"):
        byte_corpus(["ring attention", "ring atoll.", "a longer sequence"], 4, long_documents="drop")


def test_validation_documents_without_tokens_are_refused():
    empty = store_of([[]])
    with refused(CorpusError, "data.validation_files"):
        Corpus({"a": store_of([[1] * 9])}, DataConfig(sequence_length=8), validation_stores={"a": empty})


@pytest.mark.parametrize("packing", PACKINGS)
def test_sequences_in_which_nothing_is_trained_are_left_out(packing: str):
    """Of chats of a long prompt and a short answer: one epoch, and from each pack on."""
    chats, trained = np.split(np.arange(1, 241), 8), np.tile(np.arange(30) >= 27, 8)
    config = DataConfig(sequence_length=6, validation_sequences=1, packing=packing)
    corpus = Corpus(
        {"chats": store_of(chats, "chats", trained)}, config, None, {"chats": store_of(chats, "chats", trained)}
    )
    packs = list(itertools.takewhile(lambda pack: pack.position.epoch == 0, corpus.training()))
    assert all(labels_of([pack]) for pack in packs)
    assert sorted(labels_of(packs)) == [token for chat in chats for token in chat.tolist()[27:]]
    assert len(packs) == 8  # of 40
    for number, pack in enumerate(packs):
        assert next(corpus.training(pack.position)) == pack
        following = next(corpus.training(pack.cursor))
        assert following.position.epoch == 1 if pack is packs[-1] else following == packs[number + 1]


def test_a_checkpoint_whose_last_sequence_is_left_out_now_says_that_it_may_be():
    chats = store_of(np.split(np.arange(1, 241), 8), "chats", np.tile(np.arange(30) >= 27, 8))
    config = DataConfig(sequence_length=6, packing="none")
    corpus = Corpus({"chats": chats}, config, None, {"chats": chats})
    kept = {pack.position.pack for pack in itertools.islice(corpus.training(), 8)}
    left_out = next(number for number in range(40) if number not in kept)
    with refused(CorpusError, f"sequence {left_out} of epoch 0", "older versions", "nothing is trained"):
        packs_after(corpus, LastRead(0, left_out, "0" * 64))


def test_documents_of_which_nothing_is_trained_are_refused():
    chats, validation = [store_of([range(1, 31)] * 4, "chats", np.full(120, mark)) for mark in (False, True)]
    config = DataConfig(sequence_length=8, packing="best_fit")
    with refused(CorpusError, "120 tokens", "data.sequence_length=16"):
        Corpus({"chats": chats}, config, None, {"chats": validation})


def test_validation_sequences_in_which_nothing_is_trained_are_refused():
    chats, trained = [list(range(1, 31))] * 9, np.tile(np.arange(30) >= 28, 9)  # of prompts and short answers
    config = DataConfig(sequence_length=10, validation_sequences=1, packing="best_fit")
    with refused(CorpusError, "chats", "data.validation_sequences=2", "data.sequence_length=20"):
        Corpus({"chats": store_of(chats, "chats", trained)}, config)
    config.sequence_length = 30
    assert Corpus({"chats": store_of(chats, "chats", trained)}, config).validation()
