from collections.abc import Callable

import pytest
import torch

from ring_attention import CAUSAL, FULL, Mask
from tests.errors import refused

TOKENS = torch.arange(5)


def allowed(mask: Mask, row: int = 0) -> list[str]:
    return ["".join("x" if seen else "." for seen in line) for line in mask.allows(TOKENS, TOKENS, row).tolist()]


def test_masks_as_pictures():
    assert allowed(CAUSAL) == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert allowed(FULL) == ["xxxxx"] * 5
    assert allowed(Mask(left=1)) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert allowed(Mask(left=1, right=2)) == ["xxx..", "xxxx.", ".xxxx", "..xxx", "...xx"]
    assert allowed(CAUSAL.packed([0, 2, 2, 4])) == ["x....", "xx...", "..x..", "..xx.", "....x"]
    assert allowed(FULL.packed([0, 3])) == ["xxx..", "xxx..", "xxx..", "...xx", "...xx"]  # padding at the end


def test_documents_can_differ_by_row():
    mask = CAUSAL.packed([[0, 2, 5], [0, 4, 5]])
    assert allowed(mask, 0) == ["x....", "xx...", "..x..", "..xx.", "..xxx"]
    assert allowed(mask, 1) == ["x....", "xx...", "xxx..", "xxxx.", "....x"]


def test_document_ids_and_cu_seqlens_give_the_same_mask():
    assert CAUSAL.packed_by_ids(torch.tensor([7, 7, 3, 3, 9])) == CAUSAL.packed(torch.tensor([0, 2, 4, 5]))
    assert CAUSAL.packed_by_ids(torch.tensor([[1, 1, 2], [5, 6, 6]])) == CAUSAL.packed([[0, 2, 3], [0, 1, 3]])


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Mask(left=-1), ["left=-1", 0, None]),
        (lambda: CAUSAL.packed([1, 4]), ["(1, 4)", 0, "cu_seqlens"]),
        (lambda: CAUSAL.packed([0, 4, 3]), ["boundaries", 3, 4]),
        (lambda: CAUSAL.packed([]), ["()", 0]),
        (lambda: CAUSAL.packed_by_ids(torch.tensor([1, 2, 1])), ["document id", "two runs"]),
        (lambda: CAUSAL.packed([0, 9]).spans(8), ["documents", 9, 8]),
        (lambda: Mask(documents=()), ["documents=()"]),
    ],
)
def test_invalid_masks_are_refused(make: Callable[[], object], parts: list[object]):
    with refused(ValueError, *parts):
        make()


def test_documents_that_are_whole_rows_are_no_documents():
    assert CAUSAL.packed([[0, 8], [0, 8]]).within(8) == CAUSAL
    for documents in ([0, 7], [0, 4, 8], [[0, 8], [0, 7, 8]]):  # padding, and two documents, are kept apart
        assert CAUSAL.packed(documents).within(8) == CAUSAL.packed(documents)
