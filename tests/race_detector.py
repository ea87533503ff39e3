"""Streams of a GPU without one, and a detector of tensors that two of them touch without order."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ring_attention import streams


class Stream:
    """Counts its operations, and how many of each other stream's come before its next one."""

    device_index = 0

    def __init__(self, name: str) -> None:
        self.stream_id, self.clock = name, Counter[str]()

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Event:
    def __init__(self) -> None:
        self.clock = Counter[str]()

    def record(self, stream: Stream) -> None:
        self.clock = stream.clock.copy()


class _Uses:
    """Of one storage: when each of its numbers was last read and written, by stream. An owner's allocator made it."""

    def __init__(self, numel: int, owner: Stream | None) -> None:
        self.owner, self.last = owner, defaultdict[tuple[str, bool], np.ndarray](lambda: np.zeros(numel, dtype=int))


class RaceDetector(TorchDispatchMode):
    """Within, operators run on fake streams: `main` is current, `side` its `SideStream`, `network` for messages.

    `races` names what two streams touch without order, memory that a stream's allocator would give away while another
    stream may still use it included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side, self.network = map(Stream, ("main", "side", "network"))
        self.current, self.races = self.main, set[str]()
        self.num_operations = Counter[str]()
        self._uses: dict[int, _Uses] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[RaceDetector]:
        fakes = {"current_stream": lambda *_: self.current, "set_stream": self._set, "current_device": lambda: 0}
        with contextlib.ExitStack() as stack:
            for name, fake in fakes.items():
                stack.enter_context(patch.object(torch.cuda, name, fake))
            side = self.side, Event()
            stack.enter_context(patch.object(streams, "_side_of", lambda *_: side))
            stack.enter_context(patch("ring_attention.direct.has_side_stream", lambda *_: True))
            stack.enter_context(self)
            yield self

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _set(self, stream: Stream) -> None:
        self.current = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view
        self.current.clock[self.current.stream_id] += 1
        self.num_operations[self.current.stream_id] += 1
        arguments = [*zip(func._schema.arguments, args, strict=False)]
        arguments += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in (kwargs or {})]
        given = [
            (tensor, one.alias_info is not None and one.alias_info.is_write)
            for one, value in arguments
            for tensor in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(tensor, Tensor)
        ]
        for tensor, is_written in sorted(given, key=lambda use: use[1]):
            self._use(tensor, is_written, str(func), owner=None)
        storages = {tensor.untyped_storage()._cdata for tensor, _ in given}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in storages:
                self._use(tensor, True, str(func), owner=self.current)
        return result

    def _use(self, tensor: Tensor, is_written: bool, what: str, owner: Stream | None) -> None:
        storage = tensor.untyped_storage()
        numel = storage.nbytes() // tensor.element_size()
        if storage._cdata not in self._uses:
            self._uses[storage._cdata] = _Uses(numel, owner)
            weakref.finalize(storage, self._free, storage._cdata)
        uses, name = self._uses[storage._cdata], self.current.stream_id
        touched = torch.arange(numel).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).numpy()
        for (other, was_written), last in uses.last.items():
            conflicts = other != name and (is_written or was_written) and touched.size
            if conflicts and last[touched].max() > self.current.clock[other]:
                self.races.add(f"{what} on {name} and a {'write' if was_written else 'read'} on {other}")
        uses.last[name, is_written][touched] = self.current.clock[name]

    def _free(self, storage: int) -> None:
        uses = self._uses.pop(storage)
        for (name, _), last in uses.last.items():
            if uses.owner is not None and last.max(initial=0) > uses.owner.clock[name]:
                self.races.add(f"memory of {uses.owner.stream_id} is freed while {name} may use it")
