"""Streams of a GPU beside the one that computes."""

from __future__ import annotations

import contextlib
import functools

import torch

# Tokens x query heads of a pass. Kernels of longer ones have so many waves of blocks that the last one matters little.
# And PyTorch keeps the second stream's freed memory for that stream: 2 GiB at four times as many, in Llama 3.1 8B.
_MOST_QUERIES = 16_384 * 32


def has_side_stream(is_cuda: bool, num_queries: int) -> bool:
    """Whether a pass in two parts has them on two streams. `num_queries` are tokens x query heads of a ring rank."""
    return is_cuda and num_queries <= _MOST_QUERIES


class SideStream:
    """Within this context, `work()` runs beside the current stream, and its kernels come first where both are waiting.

    A kernel that leaves multiprocessors idle in its last wave of blocks then shares them with the other part's.

    `work()` begins after all that the current stream had before the context, and the current stream waits for it at the
    end. PyTorch gives memory that a stream's tensor leaves to the same stream's next work, or back to the GPU. So what
    both streams touch is allocated before the context and lives until its end, and what `work()` allocates is freed
    within the context.

    Args:
        is_used: False runs all on the current stream.
    """

    def __init__(self, device: torch.device, is_used: bool) -> None:
        self._device, self._is_used = device, is_used

    def __enter__(self) -> SideStream:
        if self._is_used:
            self._main = torch.cuda.current_stream(self._device)
            self._side, self._event = _side_of(self._main.device_index, self._main.stream_id)
            self._event.record(self._main)
            self._side.wait_event(self._event)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_used:
            self._event.record(self._side)
            self._main.wait_event(self._event)

    def work(self) -> contextlib.AbstractContextManager[None]:
        """What is launched within runs on the second stream. May be entered several times."""
        return OnStream(self._side, self._main) if self._is_used else contextlib.nullcontext()


class OnStream(contextlib.AbstractContextManager[None]):
    """As torch.cuda.stream, 20 us faster for the host, given the stream that is current on this stream's device."""

    def __init__(self, stream: torch.cuda.Stream, current: torch.cuda.Stream) -> None:
        self._stream, self._current = stream, current

    def __enter__(self) -> None:
        self._device_index = torch.cuda.current_device()
        torch.cuda.set_stream(self._stream)  # makes its device current, too

    def __exit__(self, *exception: object) -> None:
        torch.cuda.set_stream(self._current)
        if self._device_index != self._stream.device_index:
            torch.cuda.set_device(self._device_index)


@functools.cache
def _side_of(device_index: int, stream_id: int) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
    """The second stream of one stream alone, and an event for both. Of PyTorch's streams every 33rd is the first again.

    So each use of its memory comes after the uses before, and no `record_stream` is needed. That would keep memory from
    being used again while the host is ahead: log-normal documents took up to 35 % longer with one for a pass's lse.
    """
    return torch.cuda.Stream(device_index, priority=-1), torch.cuda.Event()
