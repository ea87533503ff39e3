"""Which keys travel: those of documents that are cut, and of them what a rank's queries see."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_attention import CAUSAL, Mask
from ring_attention.layout import LAYOUTS, Layout, Run
from ring_attention.routing import CutDocument, cut_documents, required_keys


def test_documents_of_one_run_are_not_cut():
    """The chunks of zigzag are [0, 4), [4, 8), [8, 12) and [12, 16); the second rank's are one run."""
    layout, mask = Layout("zigzag", 2, 16), CAUSAL.packed([[0, 3, 11, 14], [0, 4, 12]])
    first = CutDocument((3, 11), ((0, Run(3, 3, 4)), (1, Run(0, 4, 11))))
    second = CutDocument((11, 14), ((1, Run(7, 11, 12)), (0, Run(4, 12, 14))))
    assert cut_documents(layout, mask) == ((first, second), ())
    with pytest.raises(ValueError, match="17"):
        cut_documents(layout, CAUSAL.packed([0, 17]))


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from(LAYOUTS),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_required_keys_are_those_that_the_mask_allows(
    lengths: list[int], degree: int, name: str, left: int | None, right: int | None, is_reversed_too: bool
):
    ends = tuple(itertools.accumulate(lengths, initial=0))
    rows = [ends]
    if is_reversed_too and name != "balanced":
        rows.append(tuple(itertools.accumulate(reversed(lengths), initial=0)))
    layout = Layout(name, degree, max(1, ends[-1]), documents=ends if name == "balanced" else None)
    mask, positions = Mask(left, right).packed(rows), [layout.positions(rank) for rank in range(degree)]
    required = required_keys(layout, mask)
    for source, rank in itertools.product(range(degree), repeat=2):
        spans = required[source][(rank - source) % degree]
        assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
        found = torch.zeros(layout.ring_length, dtype=torch.bool)
        for start, stop in spans:
            found[start:stop] = True
        seen = [mask.allows(positions[rank], positions[source], row).any(0) for row in range(len(rows))]
        assert torch.equal(found, torch.stack(seen).any(0) & (rank != source))
