"""The time of a training or forward step on a cluster, by its parts, as arithmetic over measured speeds.

Here is the whole step. `attention_time` has a layer's attention, `layer_time` the layer, `engine_time` ZeRO and the
optimizer, `speeds` the measured speeds. `memory_timeline` is the same for memory. Times are of the slowest rank, in
seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from conf.degrees import accumulation_steps
from conf.schema import Config, Degrees
from recipes.planning.attention_time import AttentionTime
from recipes.planning.cluster import Cluster
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.engine_time import EngineTime
from recipes.planning.layer_time import LayerSeconds, LayerTime
from recipes.planning.memory import LAYERS_ON_DEVICE, dtype_bytes
from recipes.planning.pass_graphs import has_graphs
from recipes.planning.speeds import FITTED, Constants
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask

LOSS_BYTES = 12  # per logit: written, read and turned into its gradient


@dataclass(frozen=True)
class StepParts:
    """Where a step's time goes.

    Args:
        products: matrix products of the layers, recomputed ones too.
        head: the output layer and the loss.
        attention: kernels and sums.
        elementwise: norms, activations, rotary embeddings, additions, copies.
        messages: exposed messages of the sequence or of tensor ranks, and what waiting for each other costs.
        host: what devices wait for their hosts.
        gradients: sums and exposed collectives of ZeRO.
        optimizer: the update, and what is gathered after it.
        bubble: pipeline stages without work, and their messages.
        offloading: exposed copies of activations, and the host's optimizer.
    """

    products: float = 0.0
    head: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    messages: float = 0.0
    host: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    bubble: float = 0.0
    offloading: float = 0.0

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return ((part.name, getattr(self, part.name)) for part in fields(self))

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self)


@dataclass(frozen=True)
class StepTime:
    """One step of a configuration whose degrees are resolved.

    Args:
        method: the attention method, never auto.
        kernel: the attention kernel's name.
        mask: with documents for packed sequences.
        slowdown: factors on the attention kernels of each ring rank, for stragglers.
    """

    config: Config
    degrees: Degrees
    method: str
    kernel: str
    cluster: Cluster
    mask: Mask = CAUSAL
    constants: Constants = FITTED
    slowdown: tuple[float, ...] | None = None

    @property
    def tokens_per_step(self) -> int:
        """Without padding, of all ranks."""
        sequences = self.degrees.data * self.config.engine.micro_batch_size * self._micro_batches
        return sequences * self.config.data.sequence_length

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens_per_step / self.parts.total

    @functools.cached_property
    def parts(self) -> StepParts:
        """The step's time by parts."""
        layers, engine, compute = self._layers, self.engine, self._compute_s
        messages = layers.messages
        if self.degrees.sequence * self.degrees.tensor > 1:  # ranks of unequal speed, and messages in each layer
            messages += self.constants.wait_share * compute
        return StepParts(
            layers.products,
            self._micro_batches * self._head_s,
            layers.attention,
            layers.elementwise,
            messages,
            layers.host,
            engine.gradients_s,
            engine.optimizer_s + engine.gathered_weights_s,
            self._bubble_s((compute + messages + layers.host) / self._micro_batches),
            engine.offloading_s,
        )

    @property
    def engine(self) -> EngineTime:
        """DeepSpeed's part."""
        micro = self._micro_batches
        return EngineTime(self.config, self.degrees, self._speed, micro, self._compute_s / micro, self.offloaded_bytes)

    @functools.cached_property
    def _layers(self) -> LayerSeconds:
        """Of a rank's layers in all micro-batches."""
        number = self._micro_batches * math.ceil(self.config.model.num_layers / self.degrees.pipeline)
        return LayerSeconds(*(number * seconds for seconds in self._mean_layer))

    @property
    def _compute_s(self) -> float:
        """Kernels of all micro-batches."""
        layers = self._layers
        return layers.products + layers.attention + layers.elementwise + self._micro_batches * self._head_s

    @property
    def offloaded_bytes(self) -> float:
        """Activations of a micro-batch on a rank's host: layers' inputs, and attention's outputs if these are saved."""
        model, engine = self.config.model, self.config.engine
        if not engine.offload_activations:
            return 0.0
        attention = model.num_heads * model.head_dim if engine.recompute == "selective" else 0
        layers = max(0, model.num_layers - LAYERS_ON_DEVICE)
        return layers * self._tokens * (model.hidden_size + attention) * dtype_bytes(self.config)

    @functools.cached_property
    def _layout(self) -> Layout:
        name, length = self.config.attention.layout, self.config.data.sequence_length
        documents = self.mask.documents[0] if name == "balanced" and self.mask.documents else None
        return Layout(name, self.degrees.ring, length, self.degrees.ulysses, documents)

    @property
    def _speed(self) -> ClusterSpeed:
        return ClusterSpeed(self.cluster, self.constants, self.config.engine.dtype == "fp32")

    @property
    def _micro_batches(self) -> int:
        return accumulation_steps(self.config, self.degrees)

    @property
    def _tokens(self) -> int:
        """Of a micro-batch, that a rank's matrices see."""
        return self.config.engine.micro_batch_size * self._layout.local_length

    @property
    def _mean_layer(self) -> LayerSeconds:
        """Of all layers, windowed ones and others."""
        model = self.config.model
        full = self._layer(self.mask)
        if not model.num_window_layers or model.window is None:
            return full
        windowed, share = (
            self._layer(replace(self.mask, left=model.window - 1)),
            model.num_window_layers / model.num_layers,
        )
        return LayerSeconds(*(share * one + (1 - share) * other for one, other in zip(windowed, full, strict=True)))

    def _layer(self, mask: Mask) -> LayerSeconds:
        return LayerTime(self.config, self.degrees, self.attention(mask), self._speed, self._tokens).seconds

    def attention(self, mask: Mask) -> AttentionTime:
        """Of one layer in one micro-batch."""
        return AttentionTime(
            self.config.model,
            self.method,
            self.degrees,
            self._layout,
            self.config.engine.micro_batch_size,
            dtype_bytes(self.config),
            self.kernel,
            KERNELS[self.kernel].split,
            self._speed,
            mask,
            self.slowdown,
            has_graphs(self.config, self.degrees, self.method, self.kernel, self.cluster.gpus_per_host, self._tokens),
        )

    @property
    def _head_s(self) -> float:
        """The output layer and the loss of a micro-batch."""
        model, passes = self.config.model, 3 if self.config.recipe == "pretrain" else 1
        tokens = self._tokens / self.degrees.tensor
        flops = passes * 2 * model.vocab_size * model.hidden_size * tokens
        return self._speed.products_s(flops, tokens) + self._speed.memory_s(LOSS_BYTES * model.vocab_size * tokens)

    def _bubble_s(self, stage_s: float) -> float:
        """A pipeline's idle stages, and its activations' transfers, which nothing overlaps.

        Args:
            stage_s: of one stage and one micro-batch.
        """
        stages, passes = self.degrees.pipeline, 2 if self.config.recipe == "pretrain" else 1
        if stages == 1:
            return 0.0
        num_bytes = self._tokens * self.config.model.hidden_size * dtype_bytes(self.config) / self.degrees.tensor
        sent_s = self._speed.message_s(num_bytes, stages, self.degrees.tensor)
        return (stages - 1) * stage_s + (self._micro_batches + stages - 1) * passes * sent_s
