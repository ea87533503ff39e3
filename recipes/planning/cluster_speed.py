"""How long a cluster takes for bytes and FLOPs: as measured on such a host, else shares of its data sheet's speeds."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.planning.cluster import Cluster
from recipes.planning.speeds import (
    FITTED,
    FP32_SHARE,
    HOST_GB_PER_S,
    MEMORY_GB_PER_S,
    Constants,
    interpolated,
    kernel_tflops,
    table_tflops,
)


@dataclass(frozen=True)
class ClusterSpeed:
    """Times in seconds, of one GPU or of a group of them.

    Args:
        is_fp32: whether products and attention are in fp32, without a GPU's tensor cores.
    """

    cluster: Cluster
    constants: Constants = FITTED
    is_fp32: bool = False

    def memory_s(self, num_bytes: float) -> float:
        """Reading and writing a GPU's memory."""
        if measured := self.cluster.measured:
            return num_bytes / measured.memory_gb_per_s / 1e9
        sheet = MEMORY_GB_PER_S[self.cluster.gpu] / self.cluster.ranks_per_device
        return num_bytes / sheet / self.constants.memory_share / 1e9

    def products_s(self, flops: float, tokens: float) -> float:
        """Matrix products over `tokens`: few tokens leave a GPU's multiprocessors without work."""
        if (measured := self.cluster.measured) and (table := measured.products):
            tflops = interpolated(table, tokens) * min(1.0, tokens / table[0].tokens)
        else:
            share = self.constants.matmul_share * tokens / (tokens + self.constants.matmul_half_tokens)
            tflops = self.cluster.spec.peak_tflops / self.cluster.ranks_per_device * share
        return flops / tflops / self._dtype_share / 1e12

    def kernel_tflops(self, kernel: str, head_dim: int, size: float, backward: bool, is_full: bool) -> float:
        """The speed of an attention kernel alone. The arguments are those of `speeds.kernel_tflops`."""
        if (measured := self.cluster.measured) and (table := measured.table(kernel, head_dim)):
            tflops = table_tflops(table, kernel, size, backward, is_full)
        else:
            of_device = kernel_tflops(self.cluster.gpu, kernel, head_dim, size, backward, is_full)
            tflops = of_device / self.cluster.ranks_per_device
        return tflops * self._dtype_share

    @property
    def _dtype_share(self) -> float:
        return FP32_SHARE if self.is_fp32 and self.cluster.gpu != "cpu" else 1.0

    @property
    def call_ms(self) -> float:
        """Of the host for a forward call of attention."""
        return measured.call_ms if (measured := self.cluster.measured) else self.constants.call_ms

    @property
    def ring_step_ms(self) -> float:
        """Of the host for a forward ring step."""
        measured = self.cluster.measured
        return measured.ring_step_ms if measured and measured.ring_step_ms else self.constants.ring_step_ms

    @property
    def backward_issue(self) -> float:
        """The host's time for a backward pass, of that for a forward pass."""
        return measured.backward_issue if (measured := self.cluster.measured) else self.constants.backward_issue

    def host_copy_s(self, num_bytes: float) -> float:
        """Between a GPU and its host's memory."""
        measured = self.cluster.measured
        return num_bytes / ((measured and measured.host_copy_gb_per_s) or HOST_GB_PER_S) / 1e9

    def collective_s(self, num_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """A collective in which each rank sends `num_bytes` to others, in a ring of ranks `stride` apart.

        Between hosts NCCL spreads a collective over the ports of all its ranks in a host, which share what leaves it.
        """
        measured, per_host = self.cluster.measured, self.cluster.gpus_per_host
        speed, between = self._collective_gb_per_s(measured and measured.all_gather_gb_per_s)
        if num_ranks * stride > per_host:
            speed = min(speed, max(1, per_host // stride) * between)
        return self.cluster.latency_us / 1e6 + num_bytes / speed / 1e9

    def message_s(self, num_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """The slowest message between neighbours of such a ring. It leaves a host through one port."""
        is_within = num_ranks * stride <= self.cluster.gpus_per_host
        speed = self.cluster.link_within_gb_per_s if is_within else self.cluster.link_between_gb_per_s
        return self.cluster.latency_us / 1e6 + num_bytes / speed / self.constants.link_share / 1e9

    def all_to_all_s(self, num_bytes: float, num_ranks: int) -> float:
        """Each of `num_ranks` neighbours has `num_bytes`, of which each peer gets an equal part."""
        measured = self.cluster.measured
        within, between = self._collective_gb_per_s(measured and measured.all_to_all_gb_per_s)
        near = min(num_ranks, self.cluster.gpus_per_host) - 1  # peers in its host
        far = num_ranks - 1 - near
        return self.cluster.latency_us / 1e6 + num_bytes / num_ranks * (near / within + far / between) / 1e9

    def _collective_gb_per_s(self, measured_within: float | None) -> tuple[float, float]:
        """Of a rank in a collective, within a host and between hosts."""
        share = self.constants.link_share
        within = measured_within or self.cluster.link_within_gb_per_s * share
        return within, self.cluster.link_between_gb_per_s * share
