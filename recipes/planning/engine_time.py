"""What DeepSpeed's engine adds to a step's time: sums of gradients, the update, gathered weights, offloading."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Config, Degrees
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.memory import bucket_size, dtype_bytes, has_sharded_sums, num_parameters, sums_nothing

GRADIENT_BYTES = 4  # gradients travel in fp32
HOST_ADAM_COPIES = 6  # bytes a parameter: its gradient in fp32, and the new weight


@dataclass(frozen=True)
class EngineTime:
    """One step under DeepSpeed, in seconds.

    Args:
        micro_batches: of a step.
        compute_s: of a micro-batch, beside which messages travel.
        offloaded_bytes: activations of a micro-batch that go to the host and come back.
    """

    config: Config
    degrees: Degrees
    speed: ClusterSpeed
    micro_batches: int
    compute_s: float
    offloaded_bytes: float

    @property
    def gradients_s(self) -> float:
        """Sums of gradients in each micro-batch, and exposed messages."""
        if not self._trains:
            return 0.0
        has_sums = not sums_nothing(self.config, self._shards * self._stride)
        sums_s = self.speed.memory_s(self.speed.constants.gradient_bytes * self._trained) * has_sums
        return self.micro_batches * sums_s + self.num_reductions * self.reduction_s

    @property
    def num_reductions(self) -> int:
        """Times in a step that ranks' gradients are summed."""
        is_each = has_sharded_sums(self.config) or self.config.engine.zero_stage == 3
        return self.micro_batches if is_each else 1

    @property
    def reduction_s(self) -> float:
        """The exposed part of one: a backward pass overlaps all but the last bucket."""
        reduced_s = self._to_all_s(GRADIENT_BYTES * self._trained)
        last = bucket_size(int(self._trained)) / self._trained
        return max(last * reduced_s, reduced_s - 2 / 3 * self.compute_s)

    @property
    def optimizer_s(self) -> float:
        """The update on the device, and the gathering of new weights. ZeRO-3 gathers them in the passes."""
        if not self._trains:
            return 0.0
        offloads, stage = self.config.engine.offload_optimizer, self.config.engine.zero_stage
        updated = 0 if offloads else self._trained / (self._shards if stage else 1)
        gathered_s = self._to_all_s(dtype_bytes(self.config) * self._trained) if stage in (1, 2) else 0.0
        return self.speed.memory_s(self.speed.constants.optimizer_bytes * updated) + gathered_s

    @property
    def gathered_weights_s(self) -> float:
        """ZeRO-3 gathers each layer's weights ahead of it, in both passes: exposed but for the first layer's."""
        if self.config.engine.zero_stage != 3:
            return 0.0
        gathered_s = self._to_all_s(dtype_bytes(self.config) * self._parameters)
        passes, parts = 1 + self._trains, self.config.model.num_layers + 2  # the embedding and the head
        exposed_s = max(gathered_s / parts, gathered_s - self.compute_s / (3 if self._trains else 1))
        return passes * self.micro_batches * exposed_s

    @property
    def offloading_s(self) -> float:
        """What the host's memory costs: copies that are longer than the layers beside them, and Adam on the host."""
        engine, copy_s = self.config.engine, self.speed.host_copy_s(1)
        seconds = self.micro_batches * max(0.0, 2 * self.offloaded_bytes * copy_s - self.compute_s)
        if engine.offload_optimizer and self._trains:
            # all ranks of a host share its cores
            per_host = min(self.speed.cluster.gpus_per_host, self._shards)
            adam_s = per_host * self.speed.constants.host_adam_ns / 1e9
            seconds += self._trained / self._shards * (adam_s + HOST_ADAM_COPIES * copy_s)
        if engine.offload_parameters:
            shard = dtype_bytes(self.config) * self._parameters / self._shards
            seconds += (1 + self._trains) * self.micro_batches * shard * copy_s
        return seconds

    @property
    def _trains(self) -> bool:
        return self.config.recipe == "pretrain"

    @property
    def _parameters(self) -> float:
        """Of this rank's layers."""
        return num_parameters(self.config.model) / self._stride

    @property
    def _trained(self) -> float:
        trained = self.config.model.num_trained
        return self._parameters if trained is None else trained / self._stride

    @property
    def _shards(self) -> int:
        """Ranks that ZeRO shards over."""
        return self.degrees.data * self.degrees.sequence

    @property
    def _stride(self) -> int:
        return self.degrees.tensor * self.degrees.pipeline

    def _to_all_s(self, num_bytes: float) -> float:
        """An all-gather or reduce-scatter of tensors of `num_bytes` in all; nothing on one rank."""
        shards = self._shards
        return self.speed.collective_s(num_bytes * (shards - 1) / shards, shards, self._stride) if shards > 1 else 0.0
