"""The time of a training or forward step on a cluster, by its parts, as arithmetic over measured speeds.

`speeds` has the speeds, `attention_time` a layer's attention. `recipes.planning.memory_timeline` is the same for memory.
All times are of the slowest rank, in seconds.
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
from recipes.planning.memory import (
    LAYERS_ON_DEVICE,
    bucket_size,
    dtype_bytes,
    has_sharded_sums,
    layer_matmul_parameters,
    layer_matrices,
    mlp_tile_tokens,
    num_parameters,
    sums_nothing,
)
from recipes.planning.speeds import FITTED, MEMORY_GB_PER_S, Constants
from recipes.planning.throughput import matmul_flops_per_token
from ring_attention.kernels import KERNELS
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask

HOST_GB_PER_S = 50.0  # between a GPU and its host's memory: PCIe 5, 16 lanes, as attained
GRADIENT_BYTES = 4  # gradients travel in fp32
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
    def trains(self) -> bool:
        return self.config.recipe == "pretrain"

    @property
    def tokens_per_step(self) -> int:
        sequences = self.degrees.data * self.config.engine.micro_batch_size * self._micro_batches
        return sequences * self.config.data.sequence_length

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.parts.total

    @functools.cached_property
    def parts(self) -> StepParts:
        """The step's time by parts."""
        micro = self._micro_batches
        layers = micro * math.ceil(self.config.model.num_layers / self.degrees.pipeline)
        products, attention, elementwise, messages, host = (layers * seconds for seconds in self._mean_layer)
        head = micro * self._head_s
        compute = products + attention + elementwise + head
        waits = self.constants.wait_share * compute if self._waits_in_layers else 0.0
        stage = (compute + messages + waits + host) / micro
        gradients, optimizer = self._zero(compute / micro) if self.trains else (0.0, 0.0)
        return StepParts(
            products,
            head,
            attention,
            elementwise,
            messages + waits,
            host,
            gradients,
            optimizer + self._gathered_weights_s(compute / micro),
            self._bubble_s(stage),
            self._offloading_s(compute / micro),
        )

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
        degrees = self.degrees
        return Layout(self.config.attention.layout, degrees.ring, self.config.data.sequence_length, degrees.ulysses)

    @property
    def _micro_batches(self) -> int:
        return accumulation_steps(self.config, self.degrees)

    @property
    def _tokens(self) -> int:
        """Of a micro-batch, that a rank's matrices see."""
        return self.config.engine.micro_batch_size * self._layout.local_length

    @property
    def _waits_in_layers(self) -> bool:
        return self.degrees.sequence * self.degrees.tensor > 1

    @functools.cached_property
    def _attention(self) -> AttentionTime:
        return self._attention_under(self.mask)

    def _attention_under(self, mask: Mask) -> AttentionTime:
        config = self.config
        return AttentionTime(
            config.model,
            self.method,
            self.degrees,
            self._layout,
            config.engine.micro_batch_size,
            dtype_bytes(config),
            self.kernel,
            KERNELS[self.kernel].split,
            self.cluster,
            self.constants,
            mask,
            self.slowdown,
        )

    def _memory_s(self, num_bytes: float) -> float:
        return num_bytes / MEMORY_GB_PER_S[self.cluster.gpu] / self.constants.memory_share / 1e9

    def _products_s(self, flops: float, tokens: float) -> float:
        """Matrix products over `tokens`: few tokens leave a GPU's multiprocessors without work."""
        share = self.constants.matmul_share * tokens / (tokens + self.constants.matmul_half_tokens)
        return flops / self.cluster.spec.peak_tflops / share / 1e12

    @property
    def _mean_layer(self) -> list[float]:
        """Of all layers, windowed ones and others, in one micro-batch."""
        model, attentions = self.config.model, [(self.config.model.num_layers, self._attention)]
        if model.num_window_layers and model.window is not None:
            windowed = self._attention_under(replace(self.mask, left=model.window - 1))
            others = model.num_layers - model.num_window_layers
            attentions = [(model.num_window_layers, windowed), (others, self._attention)]
        layers = [[count * seconds for seconds in self._layer(attention)] for count, attention in attentions if count]
        return [sum(seconds) / model.num_layers for seconds in zip(*layers, strict=True)]

    def _layer(self, of_layer: AttentionTime) -> tuple[float, float, float, float, float]:
        """One layer in one micro-batch: products, attention, elementwise, exposed messages, host."""
        model, recompute = self.config.model, self.config.engine.recompute
        head_flops = 2 * model.vocab_size * model.hidden_size
        flops = (matmul_flops_per_token(model) - head_flops) / model.num_layers * self._tokens / self.degrees.tensor
        forward, backward = of_layer.pass_seconds(False), of_layer.pass_seconds(True)
        forwards = 1 + (recompute != "none") * self.trains
        attended = 1 + (recompute == "full") * self.trains
        products = self._products_s(flops * self._passes, self._tokens)
        elementwise = forwards * self._memory_s(self._elementwise_bytes(False))
        messages, attention = attended * forward.messages, attended * (forward.kernels + forward.sums)
        copies, host = attended * forward.copies, attended * of_layer.issue_s(False)
        if self.trains:
            elementwise += self._memory_s(self._elementwise_bytes(True))
            messages, attention = messages + backward.messages, attention + backward.kernels + backward.sums
            copies, host = copies + backward.copies, host + of_layer.issue_s(True)
        messages, elementwise = messages + self._tensor_messages_s(flops), elementwise + copies
        # the host issues layers ahead, so devices wait for it only if it takes longer than they do
        return (
            products,
            attention,
            elementwise,
            messages,
            max(0.0, host - products - attention - elementwise - messages),
        )

    @property
    def _passes(self) -> float:
        """How often a layer's products are computed, a forward pass counted as one.

        Recomputing ends before the down projection, whose output nobody saved. MLP tiles recompute `up` alone.
        """
        if not self.trains:
            return 1.0
        *_, up, down = (outputs * inputs for outputs, inputs in layer_matrices(self.config.model))
        full = layer_matmul_parameters(self.config.model)
        if self.config.engine.recompute != "none":
            return 3 + (full - down) / full
        return 3 + (up / full if mlp_tile_tokens(self.config, self._tokens) else 0)

    def _elementwise_bytes(self, backward: bool) -> float:
        """Memory traffic of a layer's kernels between the products: each input read and each output written once."""
        model, tensor = self.config.model, self.degrees.tensor
        hidden, gated = model.hidden_size, model.mlp == "swiglu"
        rotated = (model.num_heads + model.num_kv_heads) * model.head_dim / tensor
        width = model.mlp_size * model.experts_per_token / tensor
        if backward:
            biased = 2 * hidden + width * (2 if gated else 1) + rotated if model.bias else 0  # sums over tokens
            numbers = 12 * hidden / tensor + 2 * rotated + (5 if gated else 3) * width + biased
        else:  # two norms and two additions, which tensor ranks share by tokens
            numbers = 10 * hidden / tensor + 2 * rotated + (3 if gated else 2) * width
        return numbers * dtype_bytes(self.config) * self._tokens

    def _tensor_messages_s(self, flops: float) -> float:
        """Of tensor ranks: two all-gathers and two reduce-scatters a pass. Two of the backward pass overlap products."""
        degree = self.degrees.tensor
        if degree == 1:
            return 0.0
        num_bytes = self._tokens * self.config.model.hidden_size * dtype_bytes(self.config) * (degree - 1) / degree
        one = self._attention.collective_s(num_bytes, degree, 1)
        if not self.trains:
            return 4 * one
        overlapped = self._products_s(flops, self._tokens)  # the weights' gradients
        return 6 * one + max(0.0, 2 * one - overlapped)

    @property
    def _head_s(self) -> float:
        model, passes = self.config.model, 3 if self.trains else 1
        tokens = self._tokens / self.degrees.tensor
        products = self._products_s(passes * 2 * model.vocab_size * model.hidden_size * tokens, tokens)
        return products + self._memory_s(LOSS_BYTES * model.vocab_size * tokens)

    @property
    def _parameters(self) -> float:
        """Of this rank's layers."""
        return num_parameters(self.config.model) / self.degrees.tensor / self.degrees.pipeline

    @property
    def _shards(self) -> int:
        """Ranks that ZeRO shards over."""
        return self.degrees.data * self.degrees.sequence

    @property
    def _stride(self) -> int:
        return self.degrees.tensor * self.degrees.pipeline

    @property
    def _reductions(self) -> int:
        """Times in a step that ranks' gradients are summed."""
        is_each = has_sharded_sums(self.config) or self.config.engine.zero_stage == 3
        return self._micro_batches if is_each else 1

    def _zero(self, compute_s: float) -> tuple[float, float]:
        """Of a step: sums and exposed reductions of gradients; the update, with the gathering of weights after it.

        Args:
            compute_s: of one micro-batch; reductions overlap its backward pass, but for the last bucket.
        """
        constants, parameters, shards, micro = self.constants, self._parameters, self._shards, self._micro_batches
        num_sums = 0 if sums_nothing(self.config, shards * self._stride) else micro
        gradients = num_sums * self._memory_s(constants.gradient_bytes * parameters)
        update = self._memory_s(constants.optimizer_bytes * parameters / shards)
        if shards == 1:
            return gradients, 0.0 if self.config.engine.offload_optimizer else update
        numbers = parameters * (shards - 1) / shards
        last = bucket_size(int(parameters)) / parameters
        reduced_s = self._attention.collective_s(GRADIENT_BYTES * numbers, shards, self._stride)
        exposed = max(last * reduced_s, reduced_s - 2 / 3 * compute_s)
        gathered_s = self._attention.collective_s(dtype_bytes(self.config) * numbers, shards, self._stride)
        gathered = 0.0 if self.config.engine.zero_stage == 3 else gathered_s
        if self.config.engine.offload_optimizer:
            update = 0.0
        return gradients + self._reductions * exposed, update + gathered

    def _gathered_weights_s(self, compute_s: float) -> float:
        """ZeRO-3 gathers each layer's weights before it is computed, in both passes: exposed but for the first."""
        if self.config.engine.zero_stage != 3 or self._shards == 1:
            return 0.0
        numbers = self._parameters * (self._shards - 1) / self._shards
        gathered_s = self._attention.collective_s(dtype_bytes(self.config) * numbers, self._shards, self._stride)
        passes, layers = 1 + self.trains, self.config.model.num_layers + 2
        exposed = max(gathered_s / layers, gathered_s - compute_s / (3 if self.trains else 1))
        return passes * self._micro_batches * exposed

    def _bubble_s(self, stage_s: float) -> float:
        """A pipeline's idle stages, and its activations' transfers, which nothing overlaps."""
        stages = self.degrees.pipeline
        if stages == 1:
            return 0.0
        num_bytes = self._tokens * self.config.model.hidden_size * dtype_bytes(self.config) / self.degrees.tensor
        sent_s = self._attention.collective_s(num_bytes, stages, self.degrees.tensor)
        return (stages - 1) * stage_s + (self._micro_batches + stages - 1) * (1 + self.trains) * sent_s

    def _offloading_s(self, compute_s: float) -> float:
        """What the host's memory costs: copies that are longer than the layers beside them, and Adam on the host."""
        engine = self.config.engine
        seconds, copy = 0.0, 1 / HOST_GB_PER_S / 1e9
        seconds += self._micro_batches * max(0.0, 2 * self.offloaded_bytes * copy - compute_s)
        if engine.offload_optimizer and self.trains:
            # all ranks of a host share its cores and its memory
            per_host = min(self.cluster.gpus_per_host, self._shards)
            numbers = self._parameters / self._shards
            seconds += numbers * (per_host * self.constants.host_adam_ns / 1e9 + 6 * copy)
        if engine.offload_parameters:
            seconds += (1 + self.trains) * self._parameters / self._shards * dtype_bytes(self.config) * copy
        return seconds
