import itertools

import pytest
import torch

from ring_attention import CAUSAL, FULL, Layout, Mask
from ring_attention.direct_routing import goes_direct
from ring_attention.layout import LAYOUTS, num_tokens
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import (
    Message,
    RingStep,
    buffer_tokens,
    gradient_buffer,
    imbalance,
    keys_buffer,
    ring_schedule,
    tokens_sent,
    work_per_rank,
)
from ring_attention.tiles import AttentionTile
from tests.tools.packed_speed import mixes

ZIGZAG = Layout("zigzag", ring_degree=3, length=12)  # chunks of 2, 4 tokens a rank
ALL, EARLY = ((0, 4),), ((0, 2),)
SQUARE = (AttentionTile(None, MaskedBlock(0, 4, 0, 4, None, 0)),)
EARLY_KEYS = (AttentionTile(None, MaskedBlock(0, 4, 0, 2)),)
LATE_QUERIES = (AttentionTile(None, MaskedBlock(2, 4, 0, 4)),)


def test_zigzag_on_three_ranks():
    """No rank sees rank 0's late chunk. All other keys travel twice, and gradients return after each ring step."""
    assert ring_schedule(ZIGZAG, CAUSAL, 0) == (
        RingStep(0, SQUARE, ALL, None, Message(1, EARLY), None, (), None),
        RingStep(2, LATE_QUERIES, ALL, 2, Message(1, ALL), None, ALL, Message(1, EARLY)),
        RingStep(1, LATE_QUERIES, ALL, 2, None, None, ALL, Message(2, EARLY)),
    )
    assert ring_schedule(ZIGZAG, CAUSAL, 1) == (
        RingStep(1, SQUARE, ALL, None, Message(2, ALL), None, (), None),
        RingStep(0, EARLY_KEYS, EARLY, 0, Message(2, EARLY), None, EARLY, Message(2, EARLY)),
        RingStep(2, LATE_QUERIES, ALL, 0, None, None, ALL, Message(0, ALL)),
    )


def test_contiguous_keys_travel_no_further_than_the_last_rank():
    layout = Layout("contiguous", ring_degree=3, length=12)
    full = (AttentionTile(None, MaskedBlock(0, 4, 0, 4)),)
    assert ring_schedule(layout, CAUSAL, 0) == (
        RingStep(0, SQUARE, ALL, None, Message(1, ALL), None, (), None),
        RingStep(2, (), (), None, None, None, (), Message(1, ALL)),
        RingStep(1, (), (), None, None, None, (), Message(2, ALL)),
    )
    assert ring_schedule(layout, CAUSAL, 2) == (
        RingStep(2, SQUARE, ALL, None, None, None, (), None),
        RingStep(1, full, ALL, 1, None, None, ALL, None),
        RingStep(0, full, ALL, 1, None, None, ALL, None),
    )


def test_a_two_sided_window_sends_to_both_neighbours_only():
    layout = Layout("contiguous", ring_degree=4, length=16)
    steps = ring_schedule(layout, Mask(left=1, right=1), 1)
    assert [step.source for step in steps if step.tiles] == [1, 0, 2]
    assert steps[0].send_next == Message(2, ((3, 4),))  # its last token
    assert steps[2].send_direct == Message(0, ((0, 1),))  # its first token, which the ranks in between do not need
    assert [step.keys for step in steps[1:]] == [((3, 4),), (), ((0, 1),)]
    assert [step.gradient_return for step in steps] == [None, Message(2, ((3, 4),)), None, Message(0, ((0, 1),))]


MASKS = {
    "causal": CAUSAL,
    "full": FULL,
    "left": Mask(left=3),
    "both": Mask(left=2, right=4),
    "right": Mask(right=3),
    "diagonal": Mask(left=0),
    "packed": CAUSAL.packed([0, 3, 3, 4, 11]),
    "packed full": FULL.packed([0, 6, 9]),
    "packed rows": Mask(left=4).packed([[0, 2, 5], [0, 7], [0]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [11, 16, 31])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_pair_of_tokens_is_computed_exactly_once(name: str, ring_degree: int, length: int, mask: Mask):
    layout = Layout(name, ring_degree, length)
    num_rows = len(mask.documents or [()])
    seen = torch.zeros(num_rows, layout.padded_length, layout.padded_length, dtype=torch.int)
    for rank in range(ring_degree):
        for step in ring_schedule(layout, mask, rank):
            for tile in step.tiles:
                part = tile.block
                block = torch.ones(part.num_queries, part.num_keys, dtype=torch.int)
                block = block if part.lower is None else block.triu(part.lower)
                block = block if part.upper is None else block.tril(part.upper)
                assert block.any(0).all()
                assert block.any(1).all()  # no fully masked row reaches a kernel
                assert block.sum() == part.work
                rows = layout.positions(rank)[part.q_start : part.q_stop]
                columns = layout.positions(step.source)[part.k_start : part.k_stop]
                seen[slice(None) if tile.row is None else tile.row, rows[:, None], columns[None, :]] += block
    everywhere = torch.arange(layout.padded_length)
    for row in range(num_rows):
        assert torch.equal(seen[row], mask.allows(everywhere, everywhere, row).int())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [2, 3, 4, 8])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_each_message_that_is_sent_is_received_in_the_same_ring_step(name: str, ring_degree: int, mask: Mask):
    """A receive without a send, or of another size, would hang."""
    layout = Layout(name, ring_degree, 23)
    schedules = [ring_schedule(layout, mask, rank) for rank in range(ring_degree)]
    for number in range(ring_degree):
        sent, received, sent_gradients, received_gradients = [], [], [], []
        for rank, steps in enumerate(schedules):
            step, following = steps[number], steps[number + 1] if number + 1 < ring_degree else None
            sent += [(rank, m.peer, m.spans) for m in (step.send_next, step.send_direct) if m]
            if step.gradients:
                sent_gradients.append((rank, step.source, step.gradients))
            if following is not None and following.keys_from is not None:
                received.append((following.keys_from, rank, following.keys))
            if step.gradient_return is not None:
                received_gradients.append((step.gradient_return.peer, rank, step.gradient_return.spans))
        assert sorted(sent) == sorted(received)
        assert sorted(sent_gradients) == sorted(received_gradients)
        for messages in (sent, sent_gradients):
            assert len({(source, target) for source, target, _ in messages}) == len(messages)  # one per pair of ranks


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [2, 3, 4, 8])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_receive_buffers_are_as_large_as_the_largest_message(name: str, ring_degree: int, mask: Mask):
    layout = Layout(name, ring_degree, 23)
    if goes_direct(layout, mask):
        pytest.skip("test_one_exchange_receives_all_messages_of_a_rank_at_once has it")
    largest: dict[str, int] = {}
    for rank in range(ring_degree):
        steps = ring_schedule(layout, mask, rank)
        for number, step in enumerate(steps):
            received = {gradient_buffer(number): step.gradient_return.spans if step.gradient_return else ()}
            if number + 1 < ring_degree:
                following = steps[number + 1]
                received[keys_buffer(number)] = following.keys if following.keys_from is not None else ()
            for buffer, spans in received.items():
                largest[buffer] = max(largest.get(buffer, 0), num_tokens(spans))
    largest = {buffer: tokens for buffer, tokens in largest.items() if tokens}
    buffers = buffer_tokens(layout, mask)
    assert buffers.keys() == largest.keys()
    assert buffers == (largest if mask.documents is None else dict.fromkeys(largest, layout.ring_length))


def test_one_exchange_receives_all_messages_of_a_rank_at_once():
    """The second document lies on three ranks, the third on two. Buffers are whole shards."""
    layout, mask = Layout("contiguous", 4, 64), CAUSAL.packed([0, 10, 42, 64])
    assert [tokens_sent(layout, mask, rank) for rank in range(4)] == [(12, 0), (16, 6), (6, 22), (0, 6)]
    assert buffer_tokens(layout, mask) == {"keys0": 32, "gradients1": 16}
    assert buffer_tokens(layout, CAUSAL.packed(range(0, 65, 16))) == {}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_keys_arrive_before_their_tiles(mask: Mask):
    layout = Layout("zigzag", 5, 37)
    for rank in range(5):
        for step in ring_schedule(layout, mask, rank):
            here = {token for start, stop in step.keys for token in range(start, stop)}
            assert here.issuperset(
                token for tile in step.tiles for token in range(tile.block.k_start, tile.block.k_stop)
            )


def test_work_counts_query_key_pairs():
    assert work_per_rank(Layout("zigzag", 2, 8)) == [[10, 8], [10, 8]]
    assert work_per_rank(Layout("contiguous", 2, 8)) == [[10, 0], [10, 16]]
    assert work_per_rank(Layout("contiguous", 2, 8), Mask(left=1)) == [[7, 0], [7, 1]]


@pytest.mark.parametrize("ring_degree", [2, 4, 8, 64])
def test_zigzag_is_balanced_and_contiguous_is_not(ring_degree: int):
    assert imbalance(Layout("zigzag", ring_degree, 128 * ring_degree)) == 1.0
    assert imbalance(Layout("contiguous", ring_degree, 128 * ring_degree)) > 1.3


def test_on_two_ranks_one_exchange_needs_no_buffers_beside_those_of_the_ring():
    layout, packed = Layout("contiguous", 2, 16), CAUSAL.packed([0, 6, 10, 16])
    assert goes_direct(layout, packed)
    assert buffer_tokens(layout, packed) == buffer_tokens(layout, CAUSAL) == {"keys0": 8, "gradients1": 8}


def test_in_one_exchange_ranks_do_not_wait_for_each_other_between_steps():
    """So what counts is each rank's work in all."""
    ends = tuple(itertools.accumulate(mixes(65536)["log-normal"], initial=0))
    assert imbalance(Layout("balanced", 8, 65536, documents=ends), CAUSAL.packed(ends)) < 1.05


def test_a_window_costs_its_width_whatever_the_length():
    """Each rank sends the 64 tokens that its neighbour sees, and as many gradients; in zigzag both chunks do."""
    for length in (1024, 8192):
        assert tokens_sent(Layout("contiguous", 8, length), Mask(left=64), 3) == (64, 64)
        assert tokens_sent(Layout("zigzag", 8, length), Mask(left=64), 3) == (128, 128)


def test_documents_within_a_rank_send_nothing():
    layout = Layout("contiguous", 8, 1024)
    documents = CAUSAL.packed(list(range(0, 1025, 64)))
    assert {tokens_sent(layout, documents, rank) for rank in range(8)} == {(0, 0)}
    assert sum(sum(work) for work in work_per_rank(layout, documents)) == 16 * 64 * 65 // 2
