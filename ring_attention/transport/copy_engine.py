"""The transport `copy_engine`: ranks of one host copy straight into each other's memory. Between hosts it uses p2p.

Copy engines copy and the GPU's front end signals: no kernel takes multiprocessors from the compute, and no host waits.
Each rank owns a few receive buffers in symmetric memory, and every message names the receiver's buffer that it goes to.
Both ends count the messages from one rank to a buffer of the other, and signal by flags that hold such counts:

    receiver    posts the receive; once its earlier work is done, it writes the count to the sender's flag `free`
    sender      waits until `free` has the count, copies into the buffer, writes the count to the receiver's flag `full`
    receiver    waits until `full` has the count, then computes with the buffer or sends it on

A rank's copy stream does its part of all transfers in the order in which they were posted, receives before sends, so no
ranks wait for each other in a circle. A transfer that nobody waits for, after an exception, is still counted.

A CUDA graph repeats the same writes, so its messages have no counts but flags of their own, which are 1 or 0: who waits
for a flag sets it to 0 before the other end may set it again. A graph runs as a whole, so none is left behind.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import socket
import warnings
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ring_attention.streams import OnStream
from ring_attention.trace import profiler_range
from ring_attention.transport.collectives import new_subgroup, rank_and_size
from ring_attention.transport.p2p import P2PMessage, P2PTransport, Transfer

BUFFERS: tuple[str, ...] = ("keys0", "keys1", "gradients0", "gradients1")
_ALIGNMENT = 512  # bytes
_MAX_VIEWS = 1024

Flags = list[tuple[Tensor, int]]  # each with the count that it must reach


class CopyEngineTransport(P2PTransport):
    """Copies into symmetric memory among the ranks of a host whose NVIDIA GPUs can access each other's memory.

    All transports of a group share its symmetric buffers, so their transfers must not overlap.
    """

    falls_back = False  # whether tensors that are not on a GPU go by p2p, or are refused
    _buffers: SymmetricBuffers | None = None  # stays None if no rank of the group can be copied to

    def connect(self, tensor: Tensor, buffer_bytes: dict[str, int]) -> None:
        """Also create the buffers. Waits for all ranks the first time, and whenever a buffer must grow.

        Raises:
            ValueError: if the tensor is not on an NVIDIA GPU.
        """
        super().connect(tensor, buffer_bytes)
        if self.falls_back and tensor.device.type != "cuda":
            self._buffers, self.reason = None, f"the tensors are on {tensor.device.type}"
            return
        if self.group not in _symmetric_buffers:  # the first time, and after a release
            _symmetric_buffers[self.group] = make_symmetric_buffers(self.group, tensor.device)
        self._buffers, self.reason = _symmetric_buffers[self.group]
        if self._buffers is not None:
            self.used = "copy_engine" if len(self._buffers.neighbours) == self.ring_degree else "copy_engine and p2p"
            self._buffers.grow(buffer_bytes)

    @property
    def graphs(self) -> dict[Hashable, Any] | None:
        buffers = self._buffers
        if buffers is None or len(buffers.neighbours) < self.ring_degree:
            return None
        return buffers.graphs[tuple(self.order)]

    @contextlib.contextmanager
    def in_graph(self) -> Iterator[None]:
        """Within, transfers become part of a CUDA graph that replays them."""
        assert self._buffers is not None, "has no graphs"
        self._buffers.are_in_graph = True
        try:
            yield
        finally:
            self._buffers.are_in_graph = False

    @contextlib.contextmanager
    def watched(self, purpose: str) -> Iterator[None]:
        """Around the replay of a pass, whose transfers the watchdog cannot tell apart."""
        assert self._buffers is not None, "has no graphs"
        stream = self._buffers.stream
        # of the computing stream alone: a pass that waits in vain for what an exception left is overdue, too
        earlier_work = None if self._watchdog is None else stream.compute_event()
        # a graph's copies do not queue behind the stream's, which may have some left after an exception
        stream.make_compute_wait([], stream.record_event(), reset=False)
        yield
        if self._watchdog is None or earlier_work is None:  # in tests without a GPU
            return
        done = stream.compute_event()
        where = f"{purpose} in one CUDA graph: ring rank {self.ring_rank} of {self.ring_degree}"
        self._watchdog.add(earlier_work.query, [done.query], where)

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._buffers is None:
            return super().receive_buffer(name, numel, dtype, device)
        return self._buffers.part(self._buffers.rank, name, 0, numel * dtype.itemsize, dtype)

    def _post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Transfer:
        buffers = self._buffers
        if buffers is None:
            return super()._post(purpose, sends, receives)
        neighbours = [buffers.neighbours.get(rank) for rank in self.order]  # None is on another host
        remote = [[message for message in some if neighbours[message.peer] is None] for some in (sends, receives)]
        transfer = super()._post(purpose, *remote) if any(remote) else Transfer([], [])
        buffers.stream.wait_for_compute()
        full: Flags = []
        for message in receives:
            if (peer := neighbours[message.peer]) is not None:
                full.append(buffers.offer(peer, message.buffer))
        for message in sends:
            if (peer := neighbours[message.peer]) is not None:
                buffers.send(peer, message)
                transfer.sent += message.parts
        copied = buffers.stream.record_event()
        where, _ = self._describe(purpose, sends, receives)

        def wait_for_copies() -> None:
            if self._watchdog is None or buffers.are_in_graph:  # without a GPU in tests; a graph is watched as a whole
                buffers.stream.make_compute_wait(full, copied, buffers.are_in_graph)
                return
            earlier_work = buffers.stream.compute_event()
            arrived = buffers.stream.make_compute_wait(full, copied, reset=False)
            self._watchdog.add(earlier_work.query, [copied.query, arrived.query], where)

        transfer.waits.append((where, wait_for_copies))
        return transfer


class CopyStream:
    """A GPU's copies and flags, in order, on a stream beside the one that computes. The host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        """Why this process cannot copy into the memory of all other GPUs that it sees; None if it can.

        Raises:
            ValueError: if the device is not an NVIDIA GPU.
        """
        if device.type != "cuda" or torch.version.cuda is None:
            raise ValueError(f"transport=copy_engine needs NVIDIA GPUs, but the tensors are on {device.type}: use p2p")
        try:
            _driver()
        except ImportError as error:
            return f"cuda.bindings, which PyTorch for CUDA brings, cannot be imported ({error})"
        others = {*range(torch.cuda.device_count())} - {device.index}
        if unreached := [other for other in sorted(others) if not torch.cuda.can_device_access_peer(device, other)]:
            return f"GPU {device.index} cannot access the memory of GPU {', '.join(map(str, unreached))}"
        return None

    def wait_for_compute(self) -> None:
        """Make later work wait for all work on the computing stream so far."""
        self._stream.wait_stream(self._compute_stream())

    def copy(self, target: Tensor, source: Tensor) -> None:
        with OnStream(self._stream, self._compute_stream()), profiler_range("exchange copy"):
            target.copy_(source, non_blocking=True)

    def write_flag(self, flag: Tensor, count: int) -> None:
        _write_flag(self._stream, flag, count)

    def wait_flag(self, flag: Tensor, count: int) -> None:
        _wait_flag(self._stream, flag, count)

    def record_event(self) -> torch.Event:
        return self._stream.record_event()

    @staticmethod
    def synchronize() -> None:
        """The host waits until the GPU is idle."""
        torch.cuda.synchronize()

    def compute_event(self) -> torch.Event:
        """Reached once the computing stream has done its work so far."""
        return self._compute_stream().record_event()

    def make_compute_wait(self, flags: Flags, copied: torch.Event, reset: bool) -> torch.Event:
        """Make the computing stream wait until `copied` is reached and the flags have their counts.

        `reset` sets the flags to 0 then.
        """
        stream = self._compute_stream()
        # first, because peers fill no buffer that was not offered: CUDA sees no order that flags alone make, and could
        # have the offer of a graph, or of a stream that shares a hardware queue, wait behind the flag
        stream.wait_event(copied)
        for flag, count in flags:
            _wait_flag(stream, flag, count)
            if reset:
                _write_flag(stream, flag, 0)
        return stream.record_event()

    def _compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._stream.device_index)  # without an index it takes the host 10 us longer


@functools.cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _write_flag(stream: torch.cuda.Stream, flag: Tensor, count: int) -> None:
    # flags 0: the stream's earlier work, copies to other GPUs included, comes before this write
    _check(*_driver().cuStreamWriteValue32(stream.cuda_stream, flag.data_ptr(), count % 2**32, 0))


def _wait_flag(stream: torch.cuda.Stream, flag: Tensor, count: int) -> None:
    flags = _wait_flags(stream.device_index)
    _check(*_driver().cuStreamWaitValue32(stream.cuda_stream, flag.data_ptr(), count % 2**32, flags))


@functools.cache
def _wait_flags(device_index: int) -> int:
    """Wait for at least the count, modulo 2^32. What other GPUs wrote before the flag is visible afterwards."""
    driver = _driver()
    kinds, attribute = driver.CUstreamWaitValue_flags, driver.CUdevice_attribute
    code, can_flush = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES, device_index)
    _check(code)
    flush = kinds.CU_STREAM_WAIT_VALUE_FLUSH.value if can_flush else 0  # without it, peers' writes arrive in order
    return kinds.CU_STREAM_WAIT_VALUE_GEQ.value | flush


def _check(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"CUDA driver: {code!r}")


class SymmetricBuffers:
    """The receive buffers and flags of `group`, the ranks of one host, and this rank's copy stream.

    `neighbours` is {rank in the whole group: rank in `group`}.
    """

    def __init__(self, group: torch_dist.ProcessGroup, neighbours: dict[int, int], device: torch.device) -> None:
        self.rank, self._degree = rank_and_size(group)
        self.neighbours, self.stream = neighbours, CopyStream(device)
        self._group, self._device = group, device
        self.memory: SymmetricMemory | None = None
        self._sizes: dict[str, int] = {}
        self._flags: list[Tensor] = []  # of each rank: [in a graph or not, full or free, writer, buffer]
        self._buffers: list[dict[str, Tensor]] = []  # of each rank
        # views of both, as they were asked for: to make one costs the host 3 us, and transfers are alike
        self._flag_views: dict[tuple[int, bool, str, int, str], Tensor] = {}
        self._part_views: dict[tuple[int, str, int, int, torch.dtype], Tensor] = {}
        self._counts: collections.Counter[tuple[int, int, str]] = collections.Counter()
        self.are_in_graph = False  # the transfers that are posted now
        # of passes, which use these buffers; by ring order, in which transports of a group can differ
        self.graphs: collections.defaultdict[tuple[int, ...], dict[Hashable, Any]] = collections.defaultdict(dict)

    @torch.inference_mode(False)  # tensors made in that mode could be written to only within it
    def grow(self, buffer_bytes: dict[str, int]) -> None:
        """Make each buffer at least so large. All ranks must call it, with equal sizes."""
        sizes = {name: max(buffer_bytes.get(name, 0), self._sizes.get(name, 0)) for name in BUFFERS}
        if sizes == self._sizes:
            return
        self.release()
        parts = [
            -(-size // _ALIGNMENT) * _ALIGNMENT for size in (4 * 2 * 2 * self._degree * len(BUFFERS), *sizes.values())
        ]
        self.memory = SymmetricMemory(self._group, sum(parts), self._device)
        self._sizes = sizes
        for rank_bytes in self.memory.of_ranks:
            flags, *buffers = rank_bytes.split(parts)
            self._flags.append(flags.view(torch.int32).view(2, 2, -1, len(BUFFERS)))
            self._buffers.append(dict(zip(BUFFERS, buffers, strict=True)))

    def release(self) -> None:
        """Free the memory once no rank uses it any more. All ranks must call it."""
        self.stream.synchronize()
        torch_dist.barrier(self._group)
        self.memory, self._sizes = None, {}
        for some in (self.graphs, self._flags, self._buffers, self._counts, self._flag_views, self._part_views):
            some.clear()

    def offer(self, peer: int, buffer: str) -> tuple[Tensor, int]:
        """Let the peer's next message come into that buffer. Returns the flag that says it is there, and its count."""
        count = self._next_count(peer, self.rank, buffer)
        self.stream.write_flag(self._flag(peer, "free", self.rank, buffer), count)
        return self._flag(self.rank, "full", peer, buffer), count

    def send(self, peer: int, message: P2PMessage) -> None:
        """Copy a message into the peer's buffer, once that is free."""
        count = self._next_count(self.rank, peer, message.buffer)
        free = self._flag(self.rank, "free", peer, message.buffer)
        self.stream.wait_flag(free, count)
        if self.are_in_graph:
            self.stream.write_flag(free, 0)
        start = message.start * message.parts[0].itemsize
        for part in message.parts:
            stop = start + part.nbytes
            self.stream.copy(self.part(peer, message.buffer, start, stop, part.dtype), part)
            start = stop
        self.stream.write_flag(self._flag(peer, "full", self.rank, message.buffer), count)

    def part(self, owner: int, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The bytes [start, stop) of a buffer, as a vector of this dtype."""
        key = owner, name, start, stop, dtype
        if key not in self._part_views:
            assert stop <= self._sizes[name], (name, stop, self._sizes)
            if len(self._part_views) == _MAX_VIEWS:  # packed documents make new sizes with each batch
                self._part_views.clear()
            with torch.inference_mode(False):  # as in `grow`
                self._part_views[key] = self._buffers[owner][name][start:stop].view(dtype)
        return self._part_views[key]

    def _next_count(self, sender: int, receiver: int, buffer: str) -> int:
        """The number of the next message from the sender to that buffer, from 1. Both ends count alike.

        In a graph always 1.
        """
        if self.are_in_graph:
            return 1
        self._counts[sender, receiver, buffer] += 1
        return self._counts[sender, receiver, buffer]

    def _flag(self, owner: int, kind: str, writer: int, buffer: str) -> Tensor:
        """The owner's flag that `writer` sets: "full" for messages in the owner's buffer, "free" for the writer's."""
        key = owner, self.are_in_graph, kind, writer, buffer
        if key not in self._flag_views:
            place = int(self.are_in_graph), ("full", "free").index(kind), writer, BUFFERS.index(buffer)
            self._flag_views[key] = self._flags[owner][place]
        return self._flag_views[key]


class SymmetricMemory:
    """`of_ranks`: zeroed bytes of each rank of `group`, which all others can write to. Every rank must construct it."""

    def __init__(self, group: torch_dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        torch.cuda.empty_cache()  # the driver allocates this memory, and cannot use what PyTorch has cached
        self._own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)
        try:
            self._handle = symmetric_memory.rendezvous(self._own, group)
        except RuntimeError as error:
            message = f"transport=copy_engine: ranks of this host cannot share GPU memory ({error}): use transport=p2p"
            raise ValueError(message) from error
        # views that own nothing: their memory lives as long as the two attributes above
        self.of_ranks = [self._handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(group.size())]


# of each group, with the reason why messages go by p2p, between some ranks or, for None, all
_symmetric_buffers: dict[torch_dist.ProcessGroup, tuple[SymmetricBuffers | None, str]] = {}


def release_symmetric_buffers() -> None:
    """Free the memory of all symmetric buffers; `connect` makes new ones. All ranks that have some must call it."""
    for buffers, _ in _symmetric_buffers.values():
        if buffers is not None:
            buffers.release()
    _symmetric_buffers.clear()


def symmetric_buffer_bytes() -> int:
    """Of this rank's symmetric buffers, which PyTorch's allocator does not count."""
    return sum(len(some.memory.of_ranks[0]) for some, _ in _symmetric_buffers.values() if some and some.memory)


class _RankInfo(NamedTuple):
    host: str
    gpu: int | None
    obstacle: str | None


def make_symmetric_buffers(group: torch_dist.ProcessGroup, device: torch.device) -> tuple[SymmetricBuffers | None, str]:
    """For this host's ranks of `group`; None for one rank, or GPUs without access. Every rank must call it.

    Also returns, on all ranks alike, why messages between some of them go by p2p; empty if none do.
    """
    own_rank, degree = rank_and_size(group)
    infos: list[Any] = [None] * degree
    own = _RankInfo(socket.gethostname(), device.index, CopyStream.obstacle(device))
    torch_dist.all_gather_object(infos, own, group=group)
    hosts = {info.host: [rank for rank in range(degree) if infos[rank].host == info.host] for info in infos}
    obstacles = {host: _obstacle([infos[rank] for rank in members]) for host, members in hosts.items()}
    reasons = [f"on host {host} {obstacle}" for host, obstacle in obstacles.items() if obstacle]
    if len(hosts) > 1:
        reasons.append(f"the ranks are on {len(hosts)} hosts")
    reason, members = "; ".join(reasons), hosts[own.host]
    if obstacles[own.host] and own_rank == members[0]:
        warnings.warn(f"transport=copy_engine: messages on this host go by p2p, because {reason}", stacklevel=2)
    if len(members) == 1 or obstacles[own.host]:
        return None, reason
    # an NCCL group would be split off the world's, whose other ranks may not take part
    host_group = group if len(members) == degree else new_subgroup(group, members, backend="gloo")
    return SymmetricBuffers(host_group, {rank: number for number, rank in enumerate(members)}, device), reason


def _obstacle(infos: list[_RankInfo]) -> str | None:
    """Why these ranks of one host cannot copy to each other; None if they can, and for one rank."""
    if len(infos) == 1:
        return None
    if obstacle := next(filter(None, (info.obstacle for info in infos)), None):
        return obstacle
    if infos[0].gpu is not None and len({info.gpu for info in infos}) < len(infos):
        return "its ranks do not see all of its GPUs (CUDA_VISIBLE_DEVICES)"
    return None
