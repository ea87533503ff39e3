"""Activation offload: what layers save for the backward pass lies in host memory, and copies overlap with compute.

`transformer` wraps each layer in `ActivationOffload.layer`. `pack` and `unpack` serve whatever saves tensors: torch's
checkpoint, through its hooks, and `ring_attention.checkpointing`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from recipes.planning.memory import LAYERS_ON_DEVICE


@dataclass(eq=False)
class _Layer:
    """The saved tensors of one layer: on the device, on the host, or on both during a copy.

    Args:
        previous: weak reference to the layer before, whose backward pass comes next.
        stays: on the device, without a copy.
    """

    previous: Callable[[], _Layer | None]
    stays: bool
    on_host: list[Tensor] = field(default_factory=list)
    on_device: list[Tensor] | None = field(default_factory=list)
    copied: torch.Event | None = None  # the end of the last copy, in either direction


_Handle = tuple[_Layer, int]  # and which of its tensors


class ActivationOffload:
    """Copies to pinned memory and back, on a stream of their own.

    At any time two layers have their saved tensors on the device, however many layers there are. In the forward pass
    these are the running layer and the previous one, which is being copied out. In the backward pass they are the
    running layer and the next one, which is being copied in. So the last two layers are never copied.

    Copies wait for the compute stream, and the compute stream waits for a copy before it uses or frees a tensor. So all
    memory belongs to the compute stream and is free again in its order. `record_stream` would delay that until the
    host, which runs whole layers ahead, sees the end of the copy.

    On the CPU tensors are copied too, for tests: it saves nothing.
    """

    def __init__(self) -> None:
        self._copy_stream: torch.cuda.Stream | None = None  # None on the CPU
        self._device: torch.device | None = None
        self._last: Callable[[], _Layer | None] = lambda: None  # weak: saved handles keep layers alive
        self._running: _Layer | None = None
        self._host_buffers: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}  # free ones

    @contextmanager
    def layer(self, num_after: int) -> Iterator[None]:
        """Enter it around a layer's forward pass under `torch.utils.checkpoint`: offloads the layer's input.

        Args:
            num_after: how many layers follow in this forward pass.
        """
        previous = self._last()
        second = previous and previous.previous()
        if second and second.on_device is not None and not second.stays:
            self._wait_for_copy(second)
            second.on_device = None
        self._running = _Layer(self._last, num_after < LAYERS_ON_DEVICE)
        self._last = weakref.ref(self._running)
        try:
            with saved_tensors_hooks(self._pack_input, self.unpack):
                yield
        finally:
            self._running = None

    def pack(self, tensor: Tensor) -> _Handle:
        """Save a tensor of the running layer and start its copy. It must not be modified afterwards."""
        layer, tensor = self._running, tensor.detach()
        assert layer is not None
        assert layer.on_device is not None
        if tensor.is_cuda and self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(tensor.device)
        self._device = tensor.device
        if not layer.stays:
            layer.on_host.append(self._host_buffer(tensor))
            self._copy(layer, layer.on_host[-1:], [tensor])
        layer.on_device.append(tensor)
        return layer, len(layer.on_device) - 1

    def unpack(self, saved: Tensor | _Handle) -> Tensor:
        """The packed tensor, on its device; starts to copy the previous layer's tensors back."""
        if isinstance(saved, Tensor):
            return saved
        layer, slot = saved
        on_device = self._fetch(layer)
        self._wait_for_copy(layer)
        if previous := layer.previous():
            self._fetch(previous)
        return on_device[slot].detach()  # autograd attaches the graph to the tensor that it gets

    def _pack_input(self, tensor: Tensor) -> Tensor | _Handle:
        """Of what checkpoint saves, offload only the layer's input: not the rotary cos and sin, which layers share."""
        return self.pack(tensor) if tensor.grad_fn is not None else tensor

    def _fetch(self, layer: _Layer) -> list[Tensor]:
        """The layer's tensors on the device; starts their copy unless they are there."""
        if layer.on_device is None:
            layer.on_device = [torch.empty_like(tensor, device=self._device) for tensor in layer.on_host]
            self._copy(layer, layer.on_device, layer.on_host)
            for tensor in layer.on_host:
                self._host_buffers.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
            layer.on_host = []
        return layer.on_device

    def _host_buffer(self, tensor: Tensor) -> Tensor:
        """Reuses buffers whose copy back is still running: the same stream orders it before the new copy. PyTorch's
        allocator would wait for the host to see that, and allocate as much again for the next micro-batch.
        """
        free = self._host_buffers.get((tensor.shape, tensor.dtype))
        return free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _copy(self, layer: _Layer, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Copy once the compute stream has reached this point."""
        if self._copy_stream is not None:
            self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):  # None changes nothing
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        if self._copy_stream is not None:
            layer.copied = self._copy_stream.record_event()

    def _wait_for_copy(self, layer: _Layer) -> None:
        if layer.copied is not None:
            torch.cuda.current_stream().wait_event(layer.copied)
