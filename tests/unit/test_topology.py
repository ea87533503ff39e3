import pytest

from ring_attention.topology import hybrid_split, ring_order
from tests.errors import refused


def test_the_ring_visits_all_ranks_of_a_host_before_it_crosses():
    assert ring_order("AAAABBBB") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert ring_order("ABABABAB") == [0, 2, 4, 6, 1, 3, 5, 7]  # round robin, as some schedulers do
    assert ring_order("BAAB") == [0, 3, 1, 2]
    assert ring_order("ABCABC") == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("hosts", ["AAAABBBB", "ABABABAB", "BAAB", "ABCABC"])
def test_the_ring_crosses_once_per_host(hosts: str):
    ring = [hosts[rank] for rank in ring_order(hosts)]
    assert sum(host != ring[index - 1] for index, host in enumerate(ring)) == len(set(hosts))


def test_the_hybrid_keeps_ulysses_within_a_host_and_rings_across():
    assert hybrid_split("AAAABBBB", 4) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert hybrid_split("AAAABBBB", 2) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert hybrid_split("ABABABAB", 4) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert hybrid_split("ABBA", 2) == ((0, 3), (1, 2))
    assert hybrid_split("AABB", 4) == ((0, 1, 2, 3),)  # more than one host has


def test_a_degree_that_does_not_divide_is_refused():
    with refused(ValueError, "ulysses_degree=3", "4 ranks", "[1, 2, 4]"):
        hybrid_split("AAAA", 3)
