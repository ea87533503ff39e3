"""Estimates which attention method, and which split of the ranks, is fastest: one forward pass of one rank.

Arithmetic: operations over the rate of kernels, bytes over link speeds, a latency per message. A ring's transfer
overlaps the compute of its ring step; nothing overlaps an all-to-all. With H heads, K key-value heads of size D, L
tokens, P = R x U ranks (ring x Ulysses):

    compute, all methods         2 * H * D * L^2 / P operations (causal, counted once); on a ring times its imbalance
    a transfer of the ring       2 * K/U * D * L/R numbers, R - 1 times, each beside 1/R of the compute
    Ulysses' all-to-alls         (2H + 2K) * D * L/P numbers, of which each of U ranks keeps 1/U
"""

from __future__ import annotations

from dataclasses import dataclass

from ring_attention.layout import Layout
from ring_attention.schedule import imbalance

MESSAGE_LATENCY_MS = 0.05  # assumed, for posting, launching and waiting


@dataclass(frozen=True)
class Workload:
    """Causal attention of one layer over whole sequences.

    Args:
        attained_tflops: the rate of an attention kernel.
        layout: of the ring; with "contiguous" each ring step waits for the busiest rank.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    length: int
    batch: int
    bytes_per_number: int
    attained_tflops: float
    layout: str = "zigzag"


@dataclass(frozen=True)
class Links:
    """Speeds of one rank's links to others, in one direction."""

    ranks_per_host: int
    intra_host_gb_per_s: float
    inter_host_gb_per_s: float


@dataclass(frozen=True)
class Candidate:
    """A split into ring x Ulysses ranks, and its estimated times in a forward pass."""

    ring_degree: int
    ulysses_degree: int
    compute_ms: float
    transfer_ms: float
    all_to_all_ms: float
    exposed_ms: float

    @property
    def method(self) -> str:
        if self.ulysses_degree == 1:
            return "local" if self.ring_degree == 1 else "ring"
        return "ulysses" if self.ring_degree == 1 else "hybrid"

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.exposed_ms

    def __str__(self) -> str:
        return (
            f"{self.method}, ring {self.ring_degree} x ulysses {self.ulysses_degree}: compute {self.compute_ms:.3f} "
            f"ms, {self.ring_degree - 1} transfers of {self.transfer_ms:.3f}, all-to-alls {self.all_to_all_ms:.3f}; "
            f"exposed {self.exposed_ms:.3f}; total {self.total_ms:.3f} ms"
        )


def rank_methods(workload: Workload, links: Links, num_ranks: int) -> list[Candidate]:
    """All splits whose Ulysses degree divides the key-value heads, fastest first; of equals the longer ring first."""
    candidates = [
        _candidate(workload, links, num_ranks // ulysses_degree, ulysses_degree)
        for ulysses_degree in range(1, num_ranks + 1)
        if num_ranks % ulysses_degree == 0 and workload.num_kv_heads % ulysses_degree == 0
    ]
    return sorted(candidates, key=lambda candidate: round(candidate.total_ms, 6))


def _candidate(workload: Workload, links: Links, ring_degree: int, ulysses_degree: int) -> Candidate:
    num_ranks, num_heads, num_kv_heads = ring_degree * ulysses_degree, workload.num_heads, workload.num_kv_heads
    size = workload.batch * workload.head_dim * workload.bytes_per_number  # of one token in one head
    operations = 2 * num_heads * workload.head_dim * workload.length**2 * workload.batch / num_ranks
    busiest = imbalance(Layout(workload.layout, ring_degree, 128 * ring_degree))
    compute_ms = busiest * operations / workload.attained_tflops / 1e9

    transfer_ms = 0.0
    if ring_degree > 1:
        gb_per_s = links.intra_host_gb_per_s if num_ranks <= links.ranks_per_host else links.inter_host_gb_per_s
        transfer_bytes = 2 * num_kv_heads / ulysses_degree * workload.length / ring_degree * size
        transfer_ms = MESSAGE_LATENCY_MS + transfer_bytes / gb_per_s / 1e6
    exposed_ms = (ring_degree - 1) * max(MESSAGE_LATENCY_MS, transfer_ms - compute_ms / ring_degree)

    all_to_all_ms = 0.0
    if ulysses_degree > 1:
        to_each = 2 * (num_heads + num_kv_heads) * workload.length / num_ranks / ulysses_degree * size
        near = min(ulysses_degree, links.ranks_per_host) - 1
        far = ulysses_degree - 1 - near
        peer_s_per_gb = near / links.intra_host_gb_per_s + far / links.inter_host_gb_per_s
        all_to_all_ms = 4 * MESSAGE_LATENCY_MS + to_each * peer_s_per_gb / 1e6  # q, k, v and out
    return Candidate(ring_degree, ulysses_degree, compute_ms, transfer_ms, all_to_all_ms, exposed_ms + all_to_all_ms)
