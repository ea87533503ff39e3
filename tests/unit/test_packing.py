"""Lengths to packs: nothing lost, nothing twice, little padding, and fast."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import DataConfig
from data.documents import Documents
from data.packing import Piece, pack_documents, window_packs

PACKINGS = ("concatenate", "best_fit", "none")


def documents_of(lengths) -> Documents:
    stops = np.cumsum(np.asarray(lengths, np.int64))
    return Documents(np.zeros(len(stops), np.int64), stops - lengths, stops)


def size(pack: tuple[Piece, ...]) -> int:
    return sum(piece.stop - piece.start for piece in pack)


def test_documents_are_joined_and_cut():
    packs = pack_documents(documents_of([3, 1, 6]), 4, "concatenate")
    assert packs == [
        (Piece(0, 0, 3, False), Piece(0, 3, 4, False)),
        (Piece(0, 4, 8, True),),
        (Piece(0, 8, 10, False),),
    ]


def test_best_fit_takes_the_fullest_pack_and_keeps_documents_in_order():
    packs = pack_documents(documents_of([3, 7, 5, 9]), 10, "best_fit")
    assert sorted(packs) == [
        (Piece(0, 0, 3, False), Piece(0, 3, 10, False)),
        (Piece(0, 10, 15, False),),
        (Piece(0, 15, 24, False),),
    ]


def test_long_documents_give_full_packs_and_a_remainder():
    long, other = documents_of([11]), documents_of([2])
    for packing in ("best_fit", "none"):
        assert pack_documents(long, 4, packing) == [
            (Piece(0, 0, 4, True),),
            (Piece(0, 4, 8, True),),
            (Piece(0, 8, 11, False),),
        ]
    assert pack_documents(other, 4, "none") == [(Piece(0, 0, 2, False),)]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    length=st.integers(1, 20),
    window=st.integers(1, 70),
    packing=st.sampled_from(PACKINGS),
    skip=st.integers(0, 30),
)
def test_every_token_is_in_one_pack_and_skipping_changes_nothing(lengths, length, window, packing, skip):
    documents = documents_of(lengths)
    config = DataConfig(sequence_length=length, shuffle_window=window, packing=packing)
    packs = list(window_packs(documents, config, (1, 2)))
    pieces = [piece for pack in packs for piece in pack]
    assert Counter(t for piece in pieces for t in range(piece.start, piece.stop)) == Counter(range(sum(lengths)))
    ends = set(documents.stops.tolist())
    assert all(piece.has_next == (piece.stop not in ends) for piece in pieces)
    assert all(not ends & set(range(piece.start + 1, piece.stop)) for piece in pieces)  # one document each
    assert all(1 <= size(pack) <= length for pack in packs)
    assert list(window_packs(documents, config, (1, 2), skip)) == packs[skip:]
    if packing == "concatenate":
        assert all(size(pack) == length for pack in packs[:-1])
    else:  # only what is longer than a sequence is cut
        assert all(
            (piece.start in {0} | ends and piece.stop in ends) for piece in pieces if fits(piece, documents, length)
        )


def fits(piece: Piece, documents: Documents, length: int) -> bool:
    return documents.lengths[np.searchsorted(documents.stops, piece.start, "right")] <= length


def test_windows_are_packed_alone_and_their_packs_shuffled():
    documents = documents_of([4] * 64)
    config = DataConfig(sequence_length=4, shuffle_window=32, packing="best_fit")
    starts = [pack[0].start // 4 for pack in window_packs(documents, config, (0,))]
    assert sorted(starts[:32]) == list(range(32)) != starts[:32]
    assert sorted(starts[32:]) == list(range(32, 64))
    assert starts != [pack[0].start // 4 for pack in window_packs(documents, config, (1,))]


def log_normal(count: int, generator: np.random.Generator) -> np.ndarray:
    drawn = generator.lognormal(np.log(2000), 1.3, 3 * count).astype(np.int64)
    return drawn[(drawn >= 64) & (drawn <= 32768)][:count]


MIXES = {
    "log-normal, 64 to 32,768": (65536, log_normal),
    "uniform, 100 to 2,000": (8192, lambda count, generator: generator.integers(100, 2001, count)),
    "chats of 20 to 400": (4096, lambda count, generator: generator.integers(20, 401, count)),
}


@pytest.mark.parametrize("mix", MIXES)
def test_best_fit_has_little_padding_and_splits_nothing(mix: str):
    length, draw = MIXES[mix]
    lengths = draw(40_000, np.random.default_rng(0))
    config = DataConfig(sequence_length=length, packing="best_fit")
    packs = list(window_packs(documents_of(lengths), config, (0,)))
    assert lengths.sum() / (len(packs) * length) > 0.98
    assert not any(piece.has_next for pack in packs for piece in pack)


def test_a_hundred_thousand_documents_are_packed_in_a_second_or_so():
    documents = documents_of(log_normal(100_000, np.random.default_rng(0)))
    started = time.process_time()
    assert (
        sum(map(len, window_packs(documents, DataConfig(sequence_length=65536, packing="best_fit"), (0,)))) == 100_000
    )
    assert time.process_time() - started < 3  # 0.15 s on one core
