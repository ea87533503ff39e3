import pytest
import torch

from ring_attention import CAUSAL, FULL, Mask

TOKENS = torch.arange(5)


def allowed(mask: Mask, row: int = 0) -> list[str]:
    return ["".join("x" if seen else "." for seen in line) for line in mask.allows(TOKENS, TOKENS, row).tolist()]


def test_the_masks_by_sight():
    assert allowed(CAUSAL) == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert allowed(FULL) == ["xxxxx"] * 5
    assert allowed(Mask(left=1)) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert allowed(Mask(left=1, right=2)) == ["xxx..", "xxxx.", ".xxxx", "..xxx", "...xx"]
    assert allowed(CAUSAL.packed([0, 2, 2, 4])) == ["x....", "xx...", "..x..", "..xx.", "....x"]
    assert allowed(FULL.packed([0, 3])) == ["xxx..", "xxx..", "xxx..", "...xx", "...xx"]  # padding behind


def test_documents_can_differ_by_row():
    mask = CAUSAL.packed([[0, 2, 5], [0, 4, 5]])
    assert allowed(mask, 0) == ["x....", "xx...", "..x..", "..xx.", "..xxx"]
    assert allowed(mask, 1) == ["x....", "xx...", "xxx..", "xxxx.", "....x"]


def test_ids_and_cu_seqlens_say_the_same():
    assert CAUSAL.packed_by_ids(torch.tensor([7, 7, 3, 3, 9])) == CAUSAL.packed(torch.tensor([0, 2, 4, 5]))
    assert CAUSAL.packed_by_ids(torch.tensor([[1, 1, 2], [5, 6, 6]])) == CAUSAL.packed([[0, 2, 3], [0, 1, 3]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(left=-1), "left=-1 must be 0 or more tokens, or None for all"),
        (lambda: CAUSAL.packed([1, 4]), r"boundaries \(1, 4\) must start at 0, as cu_seqlens do"),
        (lambda: CAUSAL.packed([0, 4, 3]), "must not decrease, but 3 follows 4"),
        (lambda: CAUSAL.packed([]), r"boundaries \(\) must start at 0"),
        (lambda: CAUSAL.packed_by_ids(torch.tensor([1, 2, 1])), "a document id occurs in two runs"),
        (lambda: CAUSAL.packed([0, 9]).spans(8), "the documents end at 9, but the sequence has 8 tokens"),
        (lambda: Mask(documents=()), r"documents=\(\) has no row"),
    ],
)
def test_impossible_masks_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
