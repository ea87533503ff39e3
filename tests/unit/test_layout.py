import pytest
import torch

from ring_attention.layout import LAYOUTS, Layout
from tests.errors import refused


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk():
    layout = Layout("zigzag", ring_degree=2, length=8)
    assert [layout.positions(rank).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_contiguous_gives_each_rank_one_run():
    layout = Layout("contiguous", ring_degree=2, length=8)
    assert [layout.positions(rank).tolist() for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_length_is_padded_to_equal_parts():
    layout = Layout("zigzag", ring_degree=16, length=10_000)  # 10000 % 32 != 0
    assert (layout.chunk_length, layout.local_length, layout.padded_length) == (313, 626, 10_016)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ring_degree", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 29])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_inverts_shard(name: str, ring_degree: int, length: int, dim: int):
    layout = Layout(name, ring_degree, length)
    shape = [2, 3, 4]
    shape[dim] = length
    whole = torch.randn(shape)
    parts = [layout.shard(whole, rank, dim, pad_value=float("nan")) for rank in range(ring_degree)]
    assert {part.shape[dim] for part in parts} == {layout.local_length}
    assert torch.equal(layout.unshard(parts, dim), whole)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_comes_after_all_real_positions(name: str):
    layout = Layout(name, ring_degree=4, length=13)
    tokens = torch.arange(13)
    for rank in range(4):
        shard, positions = layout.shard(tokens, rank, dim=0, pad_value=-1), layout.positions(rank)
        assert torch.equal(shard, torch.where(positions < 13, positions, -1))


@pytest.mark.parametrize(
    ("arguments", "named", "choices"),
    [
        (("striped", 2, 8), "layout='striped'", "zigzag contiguous"),
        (("zigzag", 0, 8), "ring_degree=0", "1"),
        (("zigzag", 2, 0), "length=0", "1"),
    ],
)
def test_invalid_layouts_are_refused(arguments: tuple, named: str, choices: str):
    with refused(ValueError, named, *choices.split()):
        Layout(*arguments)


def test_shard_refuses_a_tensor_of_another_length():
    with refused(ValueError, "dim 0", 7, 8):
        Layout("zigzag", 2, 8).shard(torch.zeros(7), 0, dim=0)
