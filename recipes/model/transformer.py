"""A dense pre-norm transformer in one file. The attention module is passed in.

The model knows nothing of ranks. It sees this rank's tokens and their positions, and hands q, k and v to `attention`,
any module with the contract of DeepSpeed's DistributedAttention (`ring_attention.attention`).

Shapes: B batch, S local tokens, E hidden size, H query heads, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from data.shard import DocumentEnds
from recipes.model.head import Head
from recipes.model.mlp import MLP
from recipes.model.ops import make_norm, rotary_qkv
from recipes.model.recompute import Recompute
from ring_attention import CAUSAL, Mask
from ring_attention.decoding import CachedAttention

Part = TypeVar("Part", bound=nn.Module)


def rotary_cos_sin(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, S, 1, D/2] in fp32 of positions: RoPE (Su et al. 2021).

    Angles are computed in fp64: in fp32 position 1,000,000 is off by 0.03 radians.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BS.device) / head_dim
    angles = positions_BS.to(torch.float64)[..., None, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def init_weights_(part: Part, config: ModelConfig, seed: int, index: int) -> Part:
    """Draw the weights of part `index` of the model (0 the embedding, then the layers, then the head); biases are 0.

    Each part has its own generator, so that a pipeline stage draws only its own weights. The two projections that add
    to the residual stream are scaled down by its depth (GPT-2).
    """
    generator = None
    for name, parameter in part.named_parameters():
        if parameter.dim() == 2:
            generator = generator or torch.Generator(parameter.device).manual_seed((seed << 20) + index)
            depth = 2 * config.num_layers if name.endswith(("out.weight", "down.weight")) else 1
            nn.init.normal_(parameter, std=config.init_std / depth**0.5, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return part


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, attention: nn.Module) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        self.head_counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv = nn.Linear(config.hidden_size, sum(self.head_counts) * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self, x_BSE: Tensor, cos: Tensor, sin: Tensor, mask: Mask = CAUSAL, cached: CachedAttention | None = None
    ) -> Tensor:
        qkv_BSND = self.qkv(x_BSE).unflatten(-1, (-1, self.head_dim))
        q_BSHD, k_BSKD, v_BSKD = rotary_qkv(qkv_BSND, self.head_counts, cos, sin)
        out_BSHD = (cached or self.attention)(q_BSHD, k_BSKD, v_BSKD, 0, mask=mask)
        return self.out(out_BSHD.flatten(2))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, attention: nn.Module, mlp_tile_tokens: int = 0) -> None:
        super().__init__()
        self.attention_norm, self.attention = make_norm(config), SelfAttention(config, attention)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config, mlp_tile_tokens)

    def forward(
        self, x_BSE: Tensor, cos: Tensor, sin: Tensor, mask: Mask = CAUSAL, cached: CachedAttention | None = None
    ) -> Tensor:
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), cos, sin, mask, cached)
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))


def make_embedding(config: ModelConfig, seed: int) -> nn.Embedding:
    return init_weights_(nn.Embedding(config.vocab_size, config.hidden_size), config, seed, 0)


def make_layer(config: ModelConfig, attention: nn.Module, seed: int, index: int, mlp_tile_tokens: int = 0) -> Layer:
    """Layer `index`, from 0."""
    return init_weights_(Layer(config, attention, mlp_tile_tokens), config, seed, 1 + index)


def make_head(config: ModelConfig, seed: int, tile_tokens: int = 0) -> Head:
    return init_weights_(Head(config.hidden_size, config.vocab_size, tile_tokens), config, seed, 1 + config.num_layers)


class Transformer(nn.Module):
    """The model. `forward` returns the SUM of this rank's token losses, which the engine normalises over all ranks.

    Args:
        attention: any module with DeepSpeed's DistributedAttention contract.
        seed: of the weights, which are drawn on torch's default device.
        recompute: activation checkpointing of each layer: none, selective (all but attention) or full.
        tile_tokens: tiled loss: how many tokens have logits at the same time; 0: all.
        mlp_tile_tokens: tiled MLP: how many tokens have hidden activations at the same time; 0: all.
        offload: whether what checkpointed layers save lies in host memory until their backward pass.
    """

    rope_switch: int | None = None  # the position from which on a text takes other frequencies, as longrope has one
    stop_tokens: frozenset[int] = frozenset()  # that end a text, beside the tokenizer's separator

    def __init__(
        self,
        config: ModelConfig,
        attention: nn.Module,
        seed: int = 0,
        recompute: str = "none",
        tile_tokens: int = 0,
        mlp_tile_tokens: int = 0,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self._recompute = Recompute(recompute, config.num_layers, offload)
        self.embedding = make_embedding(config, seed)
        self.layers = nn.ModuleList(
            make_layer(config, attention, seed, index, mlp_tile_tokens) for index in range(config.num_layers)
        )
        self.final_norm = make_norm(config)
        self.head = make_head(config, seed, tile_tokens)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        labels_BS: Tensor | None = None,
        documents: DocumentEnds | None = None,
        by_token: bool = False,
    ) -> Tensor:
        """The sum of the cross-entropies of labels in nats, a scalar in fp32; without labels the logits [B, S, V].

        The arguments are those of `TokenBatch`; with `by_token` it gives `Head.token_scores`.
        """
        mask = CAUSAL if documents is None else CAUSAL.packed(documents)
        return self.head(self._layers_output(tokens_BS, positions_BS, mask), labels_BS, by_token)

    def hidden_states(self, tokens_BS: Tensor, positions_BS: Tensor, cached: CachedAttention) -> Tensor:
        """[B, S, E] for `logits`: of a shard, or of one token, as `cached` was told."""
        return self._layers_output(tokens_BS, positions_BS, CAUSAL, cached)

    def logits(self, hidden_BSE: Tensor) -> Tensor:
        """[B, S, V]."""
        return self.head(hidden_BSE)

    def _layers_output(self, tokens_BS: Tensor, positions_BS: Tensor, mask: Mask, *cached: CachedAttention) -> Tensor:
        cos, sin = rotary_cos_sin(positions_BS, self.config.head_dim, self.config.rope_theta)
        x_BSE = self.embedding(tokens_BS)
        for index, layer in enumerate(self.layers):
            x_BSE = self._recompute(index, layer, x_BSE, cos, sin, mask, *cached)
        return self.final_norm(x_BSE)
