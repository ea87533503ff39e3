"""The transport `copy_engine`: ranks of one host copy straight into each other's memory; p2p goes between hosts.

Copies are made by the GPU's copy engines and signalled by its front end, so that no kernel takes multiprocessors from
the compute that the messages hide behind, and no host waits. Each rank owns a mailbox of symmetric memory with a few
rooms, and every message says which room of the receiver's it goes to. Both ends count the messages from one to the
other's room, and tell each other by flags, which hold such counts:

    receiver    posts the receive; once all that it enqueued before is done, `free` at the sender says: so many may come
    sender      waits for `free` to be its count, copies into the room, and `full` at the receiver says: so many came
    receiver    waits for `full` to be its count, then computes with what is in the room, or sends it on

A rank's lane does its part of all hops in the order in which they were posted, receives before sends, so nothing waits
in a circle here either. A hop that nobody waited for, after an exception, is counted all the same.
"""

from __future__ import annotations

import functools
import importlib
import socket
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ring_attention.trace import profiler_range
from ring_attention.transport.collectives import group_timeout, rank_and_size
from ring_attention.transport.p2p import P2PMessage, P2PTransport, Transfer

ROOMS = ("keys0", "keys1", "gradients0", "gradients1")
_ALIGNMENT = 512  # bytes

Flags = list[tuple[Tensor, int]]  # with the count that each must come to


class CopyEngineTransport(P2PTransport):
    """Hops by copies into symmetric memory among the ranks of a host whose NVIDIA GPUs reach each other's memory.

    All exchanges of a group share one mailbox: their hops must not overlap.
    """

    def __init__(self, group: torch_dist.ProcessGroup, order: Sequence[int] | None = None) -> None:
        super().__init__(group, order)
        self._mail: SymmetricBuffers | None = None  # as long as no rank is near

    def connect(self, tensor: Tensor, rooms: dict[str, int]) -> None:
        """Make communicators and as much room as is asked for; waits for all ranks the first time, and to grow.

        Raises:
            ValueError: if this is no NVIDIA GPU.
        """
        super().connect(tensor, rooms)
        self._mail = _symmetric_buffers_of(self.group, tensor.device)  # a new one if they were released
        if self._mail is not None:
            self._mail.grow(rooms)

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._mail is None:
            return super().receive_buffer(name, numel, dtype, device)
        return self._mail.room(self._mail.rank, name, numel * dtype.itemsize).view(dtype)

    def _post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        mail = self._mail
        if mail is None:
            return super()._post(purpose, sends, receives)
        near = [mail.neighbours.get(rank) for rank in self.order]  # None is on another host
        far = [[move for move in moves if near[move.peer] is None] for moves in (sends, receives)]
        hops = [super()._post(purpose, *far)] if any(far) else []
        mail.lane.follow()
        full = []
        for move in receives:
            if (peer := near[move.peer]) is not None:
                count = mail.count(peer, mail.rank, move.room)
                mail.lane.tell(mail.flag(peer, "free", mail.rank, move.room), count)
                full.append((mail.flag(mail.rank, "full", peer, move.room), count))
        for move in sends:
            if (peer := near[move.peer]) is not None:
                parts = [part.view(torch.uint8) for part in move.parts]
                room = mail.room(peer, move.room, sum(map(len, parts)))
                count = mail.count(mail.rank, peer, move.room)
                mail.lane.await_flag(mail.flag(mail.rank, "free", peer, move.room), count)
                for target, part in zip(room.split([*map(len, parts)]), parts, strict=True):
                    mail.lane.copy(target, part)
                mail.lane.tell(mail.flag(peer, "full", mail.rank, move.room), count)
        names = ", ".join(self._names(sends, receives))
        where = f"{purpose}: ring rank {self.ring_rank} of {self.ring_degree}, {names}"
        return _CopyTransfer(mail.lane, hops, full, [part for move in sends for part in move.parts], where, self._watch)


class _CopyTransfer(Transfer):
    """Copies in flight, and what goes between hosts in the same hop."""

    def __init__(self, lane: CopyStream, hops: list[Transfer], full: Flags, sent: list[Tensor], where: str, watch: Any):
        super().__init__([], [], sent, where)
        self._lane, self._hops, self._full, self._watch, self._copied = lane, hops, full, watch, lane.mark()

    def wait(self) -> None:
        for hop in self._hops:
            hop.wait()
        with profiler_range("exchange wait"):
            arrived = self._lane.compute_awaits(self._full, self._copied)
        if self._watch is not None:
            self._watch.add([self._copied, arrived], self._where)
        self._sent.clear()


class CopyStream:
    """What a GPU's copy engines and front end do, in order, beside the stream that computes. The host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        """Why this process cannot copy into the memory of all other GPUs that it sees; None if it can.

        Raises:
            ValueError: for a device that is no NVIDIA GPU.
        """
        if device.type != "cuda" or torch.version.cuda is None:
            raise ValueError(f"transport=copy_engine needs NVIDIA GPUs, but the tensors are on {device.type}: use p2p")
        try:
            importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            return f"cuda.bindings, which PyTorch for CUDA brings, cannot be imported ({error})"
        others = {*range(torch.cuda.device_count())} - {device.index}
        if unreached := [other for other in sorted(others) if not torch.cuda.can_device_access_peer(device, other)]:
            return f"GPU {device.index} cannot access the memory of GPU {', '.join(map(str, unreached))}"
        return None

    def follow(self) -> None:
        """What comes waits for all that was given to the computing stream so far."""
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream), profiler_range("exchange copy"):
            target.copy_(source, non_blocking=True)

    def tell(self, flag: Tensor, count: int) -> None:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        # 0: what the stream did before, copies to another GPU too, comes before this write
        _check(*driver.cuStreamWriteValue32(self._stream.cuda_stream, flag.data_ptr(), count % 2**32, 0))

    def await_flag(self, flag: Tensor, count: int) -> None:
        _await(self._stream, flag, count)

    def mark(self) -> _Mark:
        return _Mark(self._stream)

    @staticmethod
    def rest() -> None:
        """The host waits until the GPU has nothing to do."""
        torch.cuda.synchronize()

    @staticmethod
    def compute_awaits(flags: Flags, mark: _Mark) -> _Mark:
        """The computing stream goes on once these flags have come to their counts, and `mark` is reached."""
        stream = torch.cuda.current_stream()
        for flag, count in flags:
            _await(stream, flag, count)
        stream.wait_event(mark.event)
        return _Mark(stream)


class _Mark:
    """A point in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = stream.record_event()

    def is_completed(self) -> bool:
        return self.event.query()


def _await(stream: torch.cuda.Stream, flag: Tensor, count: int) -> None:
    from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

    flags = _wait_flags(stream.device_index)
    _check(*driver.cuStreamWaitValue32(stream.cuda_stream, flag.data_ptr(), count % 2**32, flags))


@functools.cache
def _wait_flags(device_index: int) -> int:
    """At least so much, counted around 2^32; and what other GPUs wrote before the flag is to be seen after it."""
    from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

    kinds, attribute = driver.CUstreamWaitValue_flags, driver.CUdevice_attribute
    code, can_flush = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES, device_index)
    _check(code)
    flush = kinds.CU_STREAM_WAIT_VALUE_FLUSH.value if can_flush else 0  # else peers' writes arrive in order
    return kinds.CU_STREAM_WAIT_VALUE_GEQ.value | flush


def _check(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"CUDA driver: {code!r}")


class SymmetricBuffers:
    """The symmetric_buffers of a host's ranks of a group, and this rank's lane.

    Args:
        group: those of this host.
        neighbours: by rank in the whole group, the rank in `group`.
    """

    def __init__(self, group: torch_dist.ProcessGroup, neighbours: dict[int, int], device: torch.device) -> None:
        self.rank, self._degree = rank_and_size(group)
        self.neighbours, self.lane = neighbours, CopyStream(device)
        self._group, self._device = group, device
        self._sizes: dict[str, int] = {}
        self._counts: dict[tuple[int, int, str], int] = {}
        self._memory: SymmetricMemory | None = None

    def grow(self, rooms: dict[str, int]) -> None:
        """Have at least so many bytes in each room. The same on all ranks, which wait for each other if it is more."""
        wanted = {name: max(rooms.get(name, 0), self._sizes.get(name, 0)) for name in ROOMS}
        if wanted == self._sizes:
            return
        self.release()
        self._memory = SymmetricMemory(self._group, self._start_of(None, wanted), self._device)
        self._sizes = wanted

    def release(self) -> None:
        """Give the memory back, once no rank uses it any more. All must call it."""
        self.lane.rest()
        torch_dist.barrier(self._group)
        self._memory, self._sizes = None, {}
        self._counts.clear()

    def count(self, sender: int, receiver: int, room: str) -> int:
        """The number of one more message from the sender to that room, from 1; both ends count alike."""
        self._counts[sender, receiver, room] = 1 + self._counts.get((sender, receiver, room), 0)
        return self._counts[sender, receiver, room]

    @property
    def num_bytes(self) -> int:
        """Of this rank's mailbox."""
        return self._start_of(None, self._sizes) if self._sizes else 0

    def _start_of(self, name: str | None, sizes: dict[str, int]) -> int:
        """Of a room, in bytes; None is the end. In front of them are the flags."""
        position = _aligned(4 * 2 * self._degree * len(ROOMS))
        for other in ROOMS:
            if other == name:
                break
            position += _aligned(sizes[other])
        return position

    def room(self, owner: int, name: str, num_bytes: int) -> Tensor:
        """The first bytes of a room."""
        assert num_bytes <= self._sizes[name], (name, num_bytes, self._sizes)
        return self._bytes(owner, self._start_of(name, self._sizes), num_bytes)

    def flag(self, owner: int, kind: str, writer: int, room: str) -> Tensor:
        """Of the owner's, what that writer says: of its room, that so many are in it ("full"); of the writer's own
        room, that so many may come into it ("free").
        """
        number = (("full", "free").index(kind) * self._degree + writer) * len(ROOMS) + ROOMS.index(room)
        return self._bytes(owner, 4 * number, 4)

    def _bytes(self, owner: int, start: int, num_bytes: int) -> Tensor:
        assert self._memory is not None
        return self._memory.of_ranks[owner][start : start + num_bytes]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class SymmetricMemory:
    """`of_ranks`: bytes of each rank of `group`, all 0, that every other can write to. Every rank must construct it."""

    def __init__(self, group: torch_dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        torch.cuda.empty_cache()  # it comes straight from the driver, which does not ask PyTorch for what it keeps
        self._own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)
        try:
            self._handle = symmetric_memory.rendezvous(self._own, group)
        except RuntimeError as error:
            raise ValueError(
                f"transport=copy_engine: ranks of this host cannot share GPU memory ({error}): use p2p "
                "(attention.transport=p2p)"
            ) from error
        ranks = range(self._handle.world_size)
        # these own nothing: what they show lives as long as the two above
        self.of_ranks = [self._handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in ranks]


_symmetric_buffers: dict[torch_dist.ProcessGroup, SymmetricBuffers | None] = {}


def _symmetric_buffers_of(group: torch_dist.ProcessGroup, device: torch.device) -> SymmetricBuffers | None:
    """Every rank must call it. None if there is no rank of `group` that copies could go to."""
    if group not in _symmetric_buffers:
        own_group, neighbours = neighbours_of(group, device)
        _symmetric_buffers[group] = SymmetricBuffers(own_group, neighbours, device) if own_group else None
    return _symmetric_buffers[group]


def release_symmetric_buffers() -> None:
    """Give the memory of all symmetric_buffers back; `connect` makes new ones. All ranks that have one must call it."""
    for symmetric_buffers in filter(None, _symmetric_buffers.values()):
        symmetric_buffers.release()
    _symmetric_buffers.clear()


def symmetric_buffer_bytes() -> int:
    """Of this rank's symmetric_buffers, which PyTorch's allocator does not count."""
    return sum(symmetric_buffers.num_bytes for symmetric_buffers in filter(None, _symmetric_buffers.values()))


def neighbours_of(
    group: torch_dist.ProcessGroup, device: torch.device
) -> tuple[torch_dist.ProcessGroup | None, dict[int, int]]:
    """The ranks of `group` that this one can exchange copies with: as a group, and {rank in `group`: rank in that}.

    Those of this host, itself included, if every GPU there reaches the others; else none. Every rank must call it.
    """
    own_rank, degree = rank_and_size(group)
    infos: list[Any] = [None] * degree
    torch_dist.all_gather_object(infos, (socket.gethostname(), device.index, CopyStream.obstacle(device)), group=group)
    members = [rank for rank in range(degree) if infos[rank][0] == infos[own_rank][0]]
    own = group
    if len(members) < degree:
        # by every rank, also where it is of no use: their names have the number of a rank's groups in them.
        # gloo's are made by their members alone; NCCL's would be split off the world's, whose ranks may do otherwise
        global_ranks = [torch_dist.get_global_rank(group, rank) for rank in members]
        timeout = group_timeout(group)
        own = torch_dist.new_group(global_ranks, backend="gloo", timeout=timeout, use_local_synchronization=True)
        assert isinstance(own, torch_dist.ProcessGroup)
    if len(members) == 1:
        return None, {}
    devices, obstacles = ([infos[rank][number] for rank in members] for number in (1, 2))
    if device.index is not None and len({*devices}) < len(members):
        obstacles.append("its ranks do not see all of its GPUs (CUDA_VISIBLE_DEVICES)")
    if why := next(filter(None, obstacles), None):
        if own_rank == members[0]:
            warnings.warn(f"transport=copy_engine: on this host messages go by p2p, for {why}", stacklevel=2)
        return None, {}
    return own, {rank: number for number, rank in enumerate(members)}
