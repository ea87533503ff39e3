"""A stream that one rank of each sequence group reads: the others get their positions of the same packs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conf.schema import DataConfig
from data.corpus import Pack
from data.read_ahead import read_ahead
from data.shared_stream import SharedStream, shared_stream
from data.source import CorpusError
from data.stream import StreamCorpus
from ring_attention.layout import Layout
from tests.pool import WorkerPool, parallel_groups

LENGTH, NUM_PACKS = 21, 9  # an epoch has 6 packs
LENGTHS = [5, 30, 2, 9, 14, 40, 7, 3, 16, 8]
CONFIG = DataConfig(sequence_length=LENGTH, validation_sequences=1, packing="best_fit", shuffle_window=4)


class Documents:
    """A stream, and how often it was opened."""

    num_opened = 0

    def __call__(self) -> Iterator[np.ndarray]:
        self.num_opened += 1
        return iter(np.split(np.arange(sum(LENGTHS), dtype=np.int32) + 1, np.cumsum(LENGTHS)[:-1]))


def content(pack: Pack, positions: list[int]) -> tuple:
    """What a rank knows of a pack: token and label of each of its positions."""
    numbers = {}
    for position in positions:
        tokens, labels = pack.read(position, position + 1)
        numbers[position] = int(tokens[0]), int(labels[0])
    return pack.boundaries, pack.cursor, pack.sha256(), numbers


def read_on_a_rank(data_degree: int, sequence_degree: int, layout_name: str | None) -> tuple[int, int, Any, Any]:
    groups = parallel_groups(data_degree, sequence_degree)
    group: Any = groups.get_sequence_parallel_group()
    sequence_rank = sequence_degree - 1 - group.rank()  # need not be the rank in the group
    layout = Layout(layout_name, sequence_degree, LENGTH) if layout_name else None
    positions = layout.positions(sequence_rank).tolist() if layout else list(range(LENGTH))
    documents = Documents()
    shared = SharedStream(StreamCorpus(documents, CONFIG), group, sequence_rank, layout)
    validation = [content(pack, positions) for pack in shared.validation()["hub"]]
    packs = read_ahead(shared.training(), 2)
    training = [content(pack, positions) for pack in itertools.islice(packs, NUM_PACKS)]
    packs.close()
    time.sleep(0.5)  # until the threads are done with the group
    return documents.num_opened, sequence_rank, validation, training


@pytest.mark.parametrize(
    ("data_degree", "sequence_degree", "layout"),
    [(1, 1, "zigzag"), (1, 2, "zigzag"), (1, 2, None), (2, 2, "contiguous"), (1, 4, "zigzag")],
)
def test_ranks_together_hold_what_one_process_reads(
    pool: WorkerPool, data_degree: int, sequence_degree: int, layout: str | None
):
    ranks = pool.run(read_on_a_rank, data_degree, sequence_degree, layout, num_ranks=data_degree * sequence_degree)
    alone = StreamCorpus(Documents(), CONFIG)
    expected_validation = [content(pack, list(range(64))) for pack in alone.validation()["hub"]]
    expected = [content(pack, list(range(64))) for pack in itertools.islice(alone.training(), NUM_PACKS)]
    assert expected[-1][1].epoch == 1
    for start in range(0, len(ranks), sequence_degree):
        replica = ranks[start : start + sequence_degree]
        # once for validation and the first epoch, and once for the second
        assert [opened for opened, rank, _, _ in replica if rank == 0] == [2]
        assert {opened for opened, rank, _, _ in replica if rank} <= {0}
        for which, packs in ((2, expected_validation), (3, expected)):
            for number, (*known, numbers) in enumerate(packs):
                parts = [rank[which][number] for rank in replica]
                assert all(list(part[:-1]) == known for part in parts)
                together = {position: pair for part in parts for position, pair in part[-1].items()}
                assert together.items() <= numbers.items()
                assert set(together) >= set(range(LENGTH))
            assert all(len(rank[which]) == len(packs) for rank in replica)


def broken(kind: str) -> Iterator[Pack]:
    yield from itertools.islice(StreamCorpus(Documents(), CONFIG).training(), 2)
    if kind == "corpus error":
        raise CorpusError("rows.jsonl, row 7: broken JSON")
    raise ValueError("seven")


def error_of_a_rank(kind: str) -> tuple[int, str]:
    group: Any = parallel_groups(1, 2).get_sequence_parallel_group()
    packs = read_ahead(shared_stream(broken(kind), group, group.rank()), 2)
    num_packs = 0
    try:
        for _ in packs:
            num_packs += 1
    except CorpusError as error:
        return num_packs, str(error)
    return num_packs, ""


def test_an_error_of_the_reader_is_every_ranks(pool: WorkerPool):
    assert pool.run(error_of_a_rank, "corpus error", num_ranks=2) == [(2, "rows.jsonl, row 7: broken JSON")] * 2
    first, second = pool.run(error_of_a_rank, "another", num_ranks=2)
    assert first == second
    assert first[0] == 2
    assert "ValueError: seven" in first[1]


def too_short() -> str:
    group: Any = parallel_groups(1, 2).get_sequence_parallel_group()
    corpus = StreamCorpus(Documents(), DataConfig(sequence_length=1000, validation_sequences=1))
    with pytest.raises(CorpusError) as raised:
        SharedStream(corpus, group, group.rank())
    return str(raised.value)


def test_a_short_stream_is_refused_on_every_rank(pool: WorkerPool):
    first, second = pool.run(too_short, num_ranks=2)
    assert first == second
    assert "2,000" in first


def finite_and_closed() -> tuple[int, float, int]:
    """A finite stream, then an endless one that is closed after some packs, without a thread, and one after that."""
    group: Any = parallel_groups(1, 4).get_sequence_parallel_group()
    finite = list(shared_stream(itertools.islice(StreamCorpus(Documents(), CONFIG).training(), 3), group, group.rank()))
    started = time.monotonic()
    endless = shared_stream(StreamCorpus(Documents(), CONFIG).training(), group, group.rank())
    for _ in itertools.islice(endless, 4):
        time.sleep(0.02 * group.rank())
    endless.close()
    seconds = time.monotonic() - started
    again = list(shared_stream(itertools.islice(StreamCorpus(Documents(), CONFIG).training(), 2), group, group.rank()))
    return len(finite), seconds, len(again)


def test_streams_that_end_or_are_closed_leave_the_group_usable(pool: WorkerPool):
    for num_finite, seconds, num_again in pool.run(finite_and_closed, num_ranks=4):
        assert (num_finite, num_again) == (3, 2)
        assert seconds < 5


def read_twice() -> list[list[tuple]]:
    """Each rank closes a stream that its thread still reads, and goes on with another at once."""
    group: Any = parallel_groups(1, 2).get_sequence_parallel_group()
    shared = SharedStream(StreamCorpus(Documents(), CONFIG), group, group.rank())
    read = []
    for _ in range(3):
        packs = read_ahead(shared.training(), 2)
        read.append([(pack.position, pack.sha256()) for pack in itertools.islice(packs, 3)])
        packs.close()
        time.sleep(0.1 * group.rank())
    time.sleep(0.5)  # until the threads are done with the group
    return read


def test_a_stream_that_follows_one_that_was_closed_does_not_mix_with_it(pool: WorkerPool):
    first, second = pool.run(read_twice, num_ranks=2)
    assert first == second == [first[0]] * 3


def one_goes_on() -> int:
    """Rank 1 takes no more after two packs; rank 0 would go on."""
    group: Any = parallel_groups(1, 2).get_sequence_parallel_group()
    packs = shared_stream(StreamCorpus(Documents(), CONFIG).training(), group, group.rank())
    return len(list(itertools.islice(packs, 2 if group.rank() else 5)))


def test_a_rank_that_takes_no_more_ends_the_others_stream(pool: WorkerPool):
    assert pool.run(one_goes_on, num_ranks=2) == [2, 2]
