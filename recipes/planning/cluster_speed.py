"""How long a cluster takes for bytes and FLOPs: its data sheet's speeds, and the shares of them that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.planning.cluster import Cluster
from recipes.planning.speeds import FITTED, MEMORY_GB_PER_S, Constants


@dataclass(frozen=True)
class ClusterSpeed:
    """Times in seconds, of one GPU or of a group of them."""

    cluster: Cluster
    constants: Constants = FITTED

    def memory_s(self, num_bytes: float) -> float:
        """Reading and writing a GPU's memory."""
        return num_bytes / MEMORY_GB_PER_S[self.cluster.gpu] / self.constants.memory_share / 1e9

    def products_s(self, flops: float, tokens: float) -> float:
        """Matrix products over `tokens`: few tokens leave a GPU's multiprocessors without work."""
        share = self.constants.matmul_share * tokens / (tokens + self.constants.matmul_half_tokens)
        return flops / self.cluster.spec.peak_tflops / share / 1e12

    def collective_s(self, num_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """A collective in which each rank sends `num_bytes` to others, in a ring of ranks `stride` apart.

        Between hosts NCCL spreads a collective over the ports of all its ranks in a host, which share what leaves it.
        """
        speed, per_host = self.cluster.link_within_gb_per_s, self.cluster.gpus_per_host
        if num_ranks * stride > per_host:
            speed = min(speed, max(1, per_host // stride) * self.cluster.link_between_gb_per_s)
        return self.cluster.latency_us / 1e6 + num_bytes / speed / self.constants.link_share / 1e9

    def message_s(self, num_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """The slowest message between neighbours of such a ring. It leaves a host through one port."""
        is_within = num_ranks * stride <= self.cluster.gpus_per_host
        speed = self.cluster.link_within_gb_per_s if is_within else self.cluster.link_between_gb_per_s
        return self.cluster.latency_us / 1e6 + num_bytes / speed / self.constants.link_share / 1e9

    def all_to_all_s(self, num_bytes: float, num_ranks: int) -> float:
        """Each of `num_ranks` neighbours has `num_bytes`, of which each peer gets an equal part."""
        near = min(num_ranks, self.cluster.gpus_per_host) - 1  # peers in its host
        far = num_ranks - 1 - near
        s_per_gb = near / self.cluster.link_within_gb_per_s + far / self.cluster.link_between_gb_per_s
        return self.cluster.latency_us / 1e6 + num_bytes / num_ranks * s_per_gb / self.constants.link_share / 1e9
