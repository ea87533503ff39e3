"""The time of one layer in one micro-batch: products, attention, the kernels between them, exposed messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from conf.schema import Config, Degrees
from recipes.planning.attention_time import AttentionTime
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.memory import dtype_bytes, layer_matmul_parameters, layer_matrices, mlp_tile_tokens
from recipes.planning.throughput import matmul_flops_per_token


class LayerSeconds(NamedTuple):
    """All passes of one layer in one micro-batch. `host` is what the device waits for its host."""

    products: float
    attention: float
    elementwise: float
    messages: float
    host: float


@dataclass(frozen=True)
class LayerTime:
    """One layer.

    Args:
        tokens: of a micro-batch, that a rank's matrices see.
    """

    config: Config
    degrees: Degrees
    attention: AttentionTime
    speed: ClusterSpeed
    tokens: int

    @property
    def seconds(self) -> LayerSeconds:
        """Of a forward pass; if the recipe trains, also of recomputing and of the backward pass."""
        trains, recompute = self._trains, self.config.engine.recompute
        forward, backward = (self.attention.pass_seconds(is_backward) for is_backward in (False, True))
        attended = 1 + (trains and recompute == "full")
        products = self.speed.products_s(self._flops * self._passes, self.tokens)
        attention = attended * (forward.kernels + forward.sums) + trains * (backward.kernels + backward.sums)
        messages = attended * forward.messages + trains * backward.messages + self._tensor_messages_s
        num_bytes = (1 + (trains and recompute != "none")) * self._elementwise_bytes(False)
        num_bytes += trains * self._elementwise_bytes(True)
        elementwise = self.speed.memory_s(num_bytes) + attended * forward.copies + trains * backward.copies
        # the host issues layers ahead, so devices wait for it only if it takes longer than they do
        issued = attended * self.attention.issue_s(False) + trains * self.attention.issue_s(True)
        host = max(0.0, issued - products - attention - elementwise - messages)
        return LayerSeconds(products, attention, elementwise, messages, host)

    @property
    def _trains(self) -> bool:
        return self.config.recipe == "pretrain"

    @property
    def _flops(self) -> float:
        """Of a forward pass's products on this rank."""
        model = self.config.model
        layers = matmul_flops_per_token(model) - 2 * model.vocab_size * model.hidden_size
        return layers / model.num_layers * self.tokens / self.degrees.tensor

    @property
    def _passes(self) -> float:
        """How often a layer's products are computed, a forward pass counted as one.

        Frozen weights need no gradients. Recomputing ends before the down projection, whose output nobody saved. MLP
        tiles recompute `up` alone.
        """
        if not self._trains:
            return 1.0
        model = self.config.model
        *_, up, down = (outputs * inputs for outputs, inputs in layer_matrices(model))
        full, passes = layer_matmul_parameters(model), 3 if model.num_trained is None else 2
        if self.config.engine.recompute != "none":
            return passes + (full - down) / full
        return passes + (up / full if mlp_tile_tokens(self.config, self.tokens) else 0)

    def _elementwise_bytes(self, backward: bool) -> float:
        """Memory traffic of the kernels between the products: each input read and each output written once."""
        model, tensor = self.config.model, self.degrees.tensor
        hidden, is_gated = model.hidden_size / tensor, model.mlp == "swiglu"  # tensor ranks share norms by tokens
        rotated = (model.num_heads + model.num_kv_heads) * model.head_dim / tensor
        width = model.mlp_size * model.experts_per_token / tensor
        if not backward:  # two norms, two additions
            numbers = 10 * hidden + 2 * rotated + (3 if is_gated else 2) * width
        else:
            numbers = 12 * hidden + 2 * rotated + (5 if is_gated else 3) * width
            if model.bias:  # whose gradients are sums over tokens
                numbers += 2 * model.hidden_size + rotated + (2 if is_gated else 1) * width
        return numbers * dtype_bytes(self.config) * self.tokens

    @property
    def _tensor_messages_s(self) -> float:
        """Of tensor ranks: two all-gathers and two reduce-scatters a pass. Products overlap two of the backward's."""
        degree = self.degrees.tensor
        if degree == 1:
            return 0.0
        num_bytes = self.tokens * self.config.model.hidden_size * dtype_bytes(self.config) * (degree - 1) / degree
        one_s = self.speed.collective_s(num_bytes, degree)
        if not self._trains:
            return 4 * one_s
        weight_gradients_s = self.speed.products_s(self._flops, self.tokens)
        return 6 * one_s + max(0.0, 2 * one_s - weight_gradients_s)
