"""What layers keep for the backward pass, in the host's memory meanwhile: copied there and back beside the computing.

Below `transformer`, which says where a layer starts, and gives `pack` and `unpack` to what keeps tensors: torch's
checkpoint, by its hooks, and `ring_attention.checkpointing`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from recipes.planning.memory import LAYERS_ON_DEVICE


@dataclass(eq=False)
class _Layer:
    """What one layer keeps: on the device, on the host or, while it is copied, on both.

    Args:
        before: the layer computed before this one, whose turn is next in the backward pass.
        stays: on the device alone.
    """

    before: weakref.ref[_Layer] | None
    stays: bool
    on_host: list[Tensor] = field(default_factory=list)
    on_device: list[Tensor] | None = field(default_factory=list)
    copied: torch.Event | None = None  # all that was begun last, there or back


class _Handle(NamedTuple):
    layer: _Layer
    number: int


class ActivationOffload:
    """Copies in pinned memory, on a stream of their own.

    Two layers' tensors are on the device at any time, whatever the number of layers: in the forward pass those of the
    layer that is computed and of the one before, which are copied meanwhile; in the backward pass those of the layer
    that is computed and of the next one, which come back meanwhile. So the last two layers' are never copied. The
    stream that computes waits for copies before it lets go of a tensor, or uses it, and copies wait for what was
    computed before them. So all memory belongs to the stream that computes and is free again in its order:
    `record_stream` would have it wait until the host has seen the copy's end, and the host runs whole layers ahead.

    On the CPU, where nothing is won, tensors are copied all the same.
    """

    def __init__(self) -> None:
        self._copies: torch.cuda.Stream | None = None  # None on the CPU
        self._device: torch.device | None = None
        self._last: weakref.ref[_Layer] | None = None  # that was started; what a layer keeps holds it
        self._current: _Layer | None = None
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}  # on the host

    @contextmanager
    def layer(self, num_after: int) -> Iterator[None]:
        """To be in while a layer is computed under `torch.utils.checkpoint`, whose input is kept on the host then.

        Args:
            num_after: how many layers of this forward pass are computed after it.
        """
        before = _alive(self._last)
        two_before = before and _alive(before.before)
        if two_before is not None and two_before.on_device is not None and not two_before.stays:
            self._wait_for(two_before)
            two_before.on_device = None
        self._current = _Layer(self._last, num_after < LAYERS_ON_DEVICE)
        self._last = weakref.ref(self._current)
        try:
            with saved_tensors_hooks(self._pack_input, self.unpack):
                yield
        finally:
            self._current = None

    def pack(self, tensor: Tensor) -> _Handle:
        """Begin to copy a tensor of the layer that is computed. It must not be written to any more."""
        layer, tensor = self._current, tensor.detach()
        assert layer is not None
        assert layer.on_device is not None
        if tensor.is_cuda and self._copies is None:
            self._copies = torch.cuda.Stream(tensor.device)
        self._device = tensor.device
        if not layer.stays:
            on_host = self._room_for(tensor)
            self._copy(layer, [on_host], [tensor])
            layer.on_host.append(on_host)
        layer.on_device.append(tensor)
        return _Handle(layer, len(layer.on_device) - 1)

    def unpack(self, kept: Tensor | _Handle) -> Tensor:
        """What was packed, on its device again; begins to bring back what the layer before has packed."""
        if isinstance(kept, Tensor):
            return kept
        on_device = self._brought_back(kept.layer)
        self._wait_for(kept.layer)
        if (before := _alive(kept.layer.before)) is not None:
            self._brought_back(before)
        return on_device[kept.number].detach()  # autograd makes what it gets its own, with all that it came from

    def _pack_input(self, tensor: Tensor) -> Tensor | _Handle:
        """Of what checkpoint keeps, the layer's input: not the angles of the positions, which layers share, nor the
        empty leaf that older PyTorches keep.
        """
        return self.pack(tensor) if tensor.grad_fn is not None else tensor

    def _brought_back(self, layer: _Layer) -> list[Tensor]:
        if layer.on_device is None:
            layer.on_device = [torch.empty_like(tensor, device=self._device) for tensor in layer.on_host]
            self._copy(layer, layer.on_device, layer.on_host)
            for tensor in layer.on_host:
                self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
            layer.on_host = []
        return layer.on_device

    def _room_for(self, tensor: Tensor) -> Tensor:
        """On the host. What was begun to be copied back from it before is done first, on the same stream: PyTorch's
        allocator, which waits for the host to see that, would give out as much again to the next micro-batch.
        """
        free = self._free.get((tensor.shape, tensor.dtype))
        return free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _copy(self, layer: _Layer, targets: list[Tensor], sources: list[Tensor]) -> None:
        """When all that was begun so far has been computed."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):  # of None nothing changes
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        if self._copies is not None:
            layer.copied = self._copies.record_event()

    def _wait_for(self, layer: _Layer) -> None:
        if layer.copied is not None:
            torch.cuda.current_stream().wait_event(layer.copied)


def _alive(layer: weakref.ref[_Layer] | None) -> _Layer | None:
    return None if layer is None else layer()
