"""Activation checkpointing of a model's layers, with what it saves on the device or on the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from recipes.model.activation_offload import ActivationOffload
from ring_attention.checkpointing import selective_checkpointing


class Recompute:
    """Runs layers so that the backward pass recomputes them.

    Args:
        mode: none, selective (all but attention) or full.
        offload: whether what layers save lies in host memory until their backward pass.
    """

    def __init__(self, mode: str, num_layers: int, offload: bool = False) -> None:
        self.mode, self._num_layers = mode, num_layers
        self._offload = ActivationOffload() if offload else None

    def __call__(self, index: int, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """The output of layer `index`, from 0."""
        if self.mode == "none" or not torch.is_grad_enabled():
            return layer(*inputs)
        offload, context_fn = self._offload, noop_context_fn
        if self.mode == "selective":
            packing = (offload.pack, offload.unpack) if offload else ()
            context_fn = functools.partial(selective_checkpointing, *packing)
        with offload.layer(self._num_layers - 1 - index) if offload else contextlib.nullcontext():
            # no random numbers are drawn, so there is no state to preserve
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=context_fn, preserve_rng_state=False)
