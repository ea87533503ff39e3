"""The protocol of the transport `copy_engine` on the CPU: buffers and flags in shared memory, a thread per copy stream.

tests/gpu/test_ring.py tests the copies and flags of real GPUs.
"""

from __future__ import annotations

import queue
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from ring_attention import CAUSAL, FULL, Mask, RingAttention, transport
from ring_attention.transport import (
    CopyEngineTransport,
    P2PMessage,
    copy_engine,
    messages_stay_local,
    release_symmetric_buffers,
    symmetric_buffer_bytes,
)
from ring_attention.transport.collectives import subgroup
from tests.cases import Case, check, on_rank
from tests.distributed.test_attention import LENGTH, MASKS, grid
from tests.errors import names
from tests.pool import WorkerPool

PATIENCE_S = 30


class SharedMemory:
    """Stands in for `copy_engine.SymmetricMemory`."""

    def __init__(self, group: torch_dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        folder: list[Any] = [tempfile.mkdtemp() if group.rank() == 0 else None]
        torch_dist.broadcast_object_list(folder, group=group, group_src=0)
        paths = [f"{folder[0]}/{rank}" for rank in range(group.size())]
        self.of_ranks = [torch.from_file(path, True, num_bytes, dtype=torch.uint8) for path in paths]  # all 0
        torch_dist.barrier(group)
        Path(paths[group.rank()]).unlink()
        torch_dist.barrier(group)
        if group.rank() == 0:
            Path(folder[0]).rmdir()


class ThreadCopyStream:
    """Stands in for `copy_engine.CopyStream`: a thread that is slow at random. The rank's main thread computes."""

    def __init__(self, device: torch.device) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        generator = random.Random(torch_dist.get_rank())
        while True:
            self._jobs.get()()
            if generator.random() < 0.2:
                time.sleep(generator.random() * 2e-3)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        return None

    def wait_for_compute(self) -> None:
        pass  # the main thread has no work left

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._jobs.put(lambda: target.copy_(source))

    def write_flag(self, flag: Tensor, count: int) -> None:
        self._jobs.put(lambda: flag.view(torch.int32).fill_(count))

    def wait_flag(self, flag: Tensor, count: int) -> None:
        self._jobs.put(lambda: wait_flag(flag, count))

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self._jobs.put(event.set)
        return event

    def synchronize(self) -> None:
        assert self.record_event().wait(PATIENCE_S)

    def make_compute_wait(self, flags: copy_engine.Flags, copied: threading.Event, reset: bool) -> None:
        assert copied.wait(PATIENCE_S)
        for flag, count in flags:
            wait_flag(flag, count)
            if reset:
                flag.view(torch.int32).fill_(0)

    def poison(self, buffer: Tensor) -> None:
        self._jobs.put(lambda: buffer.fill_(float("nan")))


def wait_flag(flag: Tensor, count: int) -> None:
    number = flag.view(torch.int32)
    stop = time.monotonic() + PATIENCE_S
    while number.item() < count:
        assert time.monotonic() < stop, f"the flag stayed below {count}"
        time.sleep(1e-5)


@contextmanager
def emulated() -> Iterator[None]:
    """Copy engines on the CPU. A receive buffer is overwritten with NaN once its next receive is posted."""
    post = CopyEngineTransport.post

    def poisoning(self: CopyEngineTransport, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> Any:
        for message in receives:
            if self._buffers is not None and self.order[message.peer] in self._buffers.neighbours:
                self._buffers.stream.poison(message.tensor)  # pyright: ignore[reportAttributeAccessIssue]
        return post(self, purpose, sends, receives)

    with ExitStack() as stack:
        stack.callback(release_symmetric_buffers)
        for owner, name, value in [
            (copy_engine, "CopyStream", ThreadCopyStream),
            (copy_engine, "SymmetricMemory", SharedMemory),
            (CopyEngineTransport, "post", poisoning),
        ]:
            stack.enter_context(patch.object(owner, name, value))
        yield


def many_on_rank(
    cases: list[Case], hosts: list[str] | None, without_access: str | None = None
) -> tuple[list[list[Tensor]], int, int]:
    """Results, and the number of messages by copies and over gloo.

    Args:
        hosts: the pretended host of each rank.
        without_access: the host whose GPUs pretend not to reach each other.
    """
    counts = {"copies": 0, "p2p": 0}
    copy, exchange = ThreadCopyStream.copy, torch_dist.batch_isend_irecv

    def counting_copy(self: ThreadCopyStream, target: Tensor, source: Tensor) -> None:
        counts["copies"] += 1
        copy(self, target, source)

    def counting_exchange(operations: list[torch_dist.P2POp]) -> Any:
        counts["p2p"] += sum(operation.op is torch_dist.isend for operation in operations)
        return exchange(operations)

    host = hosts[torch_dist.get_rank()] if hosts else "here"
    with (
        emulated(),
        patch.object(copy_engine.socket, "gethostname", lambda: host),
        patch.object(ThreadCopyStream, "obstacle", lambda device: "no access" if host == without_access else None),
        patch.object(ThreadCopyStream, "copy", counting_copy),
        patch.object(torch_dist, "batch_isend_irecv", counting_exchange),
    ):
        return [on_rank(case) for case in cases], counts["copies"], counts["p2p"]


def cases_of(num_ranks: int, method: str = "ring") -> list[Case]:
    return [
        case
        for layout in ("zigzag", "contiguous")
        for mask in MASKS.values()
        for dtype in (torch.float64, torch.bfloat16)[: 2 if mask == CAUSAL else 1]
        if (
            case := grid(
                Case(method, num_ranks, 1, layout, mask, LENGTH, num_kv_heads=4, dtype=dtype, transport="copy_engine")
            )
        )
    ]


@pytest.mark.parametrize(("num_ranks", "method"), [(2, "ring"), (3, "ring"), (4, "ring"), (4, "hybrid")])
def test_attention_by_copies_equals_whole_attention(pool: WorkerPool, num_ranks: int, method: str):
    """With every mask and layout, in several passes over the same buffers, which grow."""
    cases = cases_of(num_ranks, method)
    ranks = pool.run(many_on_rank, cases, None, num_ranks=num_ranks)
    for case, *shards in zip(cases, *(results for results, _, _ in ranks), strict=True):
        check(case, shards)
    assert sum(copies for _, copies, _ in ranks) > 0
    assert sum(p2p for _, _, p2p in ranks) == 0


@pytest.mark.parametrize(
    ("layout", "mask"), [("contiguous", Mask(8, 8)), ("zigzag", FULL.packed([0, 8, 28, 32]))], ids=["window", "packed"]
)
def test_gradients_that_return_twice_are_not_kept_in_the_receive_buffer(pool: WorkerPool, layout: str, mask: Mask):
    """Gradients of all of a rank's tokens, before the last ring step: the same pass writes to the buffer again."""
    case = Case("ring", 4, 1, layout, mask, 32, 2, dtype=torch.float64, transport="copy_engine")
    ranks = pool.run(many_on_rank, [case], None, num_ranks=4)
    check(case, [results[0] for results, _, _ in ranks])


def test_between_hosts_messages_go_by_p2p(pool: WorkerPool):
    cases = cases_of(4)
    ranks = pool.run(many_on_rank, cases, ["a", "a", "b", "b"], num_ranks=4)
    for case, *shards in zip(cases, *(results for results, _, _ in ranks), strict=True):
        check(case, shards)
    assert all(copies > 0 for _, copies, _ in ranks)
    assert all(p2p > 0 for _, _, p2p in (ranks[1], ranks[3]))  # their next rank is on the other host


def test_on_a_host_whose_gpus_do_not_reach_each_other_messages_go_by_p2p(pool: WorkerPool):
    cases = cases_of(4)
    ranks = pool.run(many_on_rank, cases, ["a", "a", "b", "b"], "a", num_ranks=4)
    for case, *shards in zip(cases, *(results for results, _, _ in ranks), strict=True):
        check(case, shards)
    assert [copies > 0 for _, copies, _ in ranks] == [False, False, True, True]
    assert all(p2p > 0 for _, _, p2p in (ranks[0], ranks[1], ranks[3]))


def warnings_with_one_gpu_per_rank() -> tuple[bool, str, list[str]]:
    with emulated(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = subgroup(torch_dist.group.WORLD, (0, 1))
        buffers, reason = copy_engine.make_symmetric_buffers(world, torch.device("cuda", 0))
    return buffers is None, reason, [str(warning.message) for warning in caught]


def test_ranks_that_see_one_gpu_each_warn(pool: WorkerPool):
    first, second = pool.run(warnings_with_one_gpu_per_rank, num_ranks=2)
    for alone, reason, _ in (first, second):
        assert alone
        names(reason, "CUDA_VISIBLE_DEVICES")
    (warned,), others = first[2], second[2]
    names(warned, "copy_engine", "CUDA_VISIBLE_DEVICES")
    assert others == []


def refusal_on_the_cpu() -> str:
    attention = RingAttention("auto", torch_dist.group.WORLD, transport="copy_engine")
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="copy_engine") as raised:
        attention(q, q, q, 0)
    return str(raised.value)


def test_copy_engine_without_a_gpu_is_refused(pool: WorkerPool):
    for message in pool.run(refusal_on_the_cpu, num_ranks=2):
        names(message, "transport=copy_engine", "GPUs", "cpu", "p2p")


def fallback_on_the_cpu() -> tuple[str | None, str | None, str]:
    """What "auto" does on a group that has NCCL for GPUs and gloo for the CPU, given tensors of the CPU."""
    gpus = SimpleNamespace(name=lambda: "nccl")
    with patch.object(transport, "device_backend", lambda *_: gpus), patch.object(torch.version, "cuda", "13.0"):
        attention = RingAttention("auto", torch_dist.group.WORLD)
    before, q = attention.transport_used, torch.randn(1, 4, 2, 8)
    attention(q, q, q, 0)
    return before, attention.transport_used, attention.transport_reason


def test_auto_takes_tensors_on_the_cpu_by_p2p(pool: WorkerPool):
    for before, used, reason in pool.run(fallback_on_the_cpu, num_ranks=2):
        assert (before, used) == (None, "p2p")
        names(reason, "cpu")


def used_transports(hosts: list[str], without_access: str | None) -> tuple[str | None, str]:
    host = hosts[torch_dist.get_rank()]
    attention = RingAttention("auto", torch_dist.group.WORLD, transport="copy_engine")
    q = torch.randn(1, 4, 2, 8)
    with (
        emulated(),
        patch.object(copy_engine.socket, "gethostname", lambda: host),
        patch.object(ThreadCopyStream, "obstacle", lambda device: "no access" if host == without_access else None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        attention(q, q, q, 0)
    return attention.transport_used, attention.transport_reason


@pytest.mark.parametrize(
    ("hosts", "without_access", "used", "reasons"),
    [
        ("aaaa", None, ["copy_engine"] * 4, []),
        ("aabb", None, ["copy_engine and p2p"] * 4, ["2 hosts"]),
        ("abcd", None, ["p2p"] * 4, ["4 hosts"]),
        ("aaaa", "a", ["p2p"] * 4, ["host a no access"]),
        ("aabb", "a", ["p2p", "p2p", "copy_engine and p2p", "copy_engine and p2p"], ["host a no access", "2 hosts"]),
    ],
)
def test_modules_say_what_carries_their_messages_and_why(
    pool: WorkerPool, hosts: str, without_access: str | None, used: list[str], reasons: list[str]
):
    ranks = pool.run(used_transports, list(hosts), without_access, num_ranks=4)
    assert [rank_used for rank_used, _ in ranks] == used
    for _, reason in ranks:
        assert all(part in reason for part in reasons)
        assert bool(reason) == bool(reasons)


def test_two_messages_in_one_buffer_are_detected(pool: WorkerPool):
    """The poison works: with one buffer for all keys the results are not finite."""
    case = replace(cases_of(4)[0], mask=CAUSAL)
    ranks = pool.run(on_rank_with_one_buffer, case, num_ranks=4)
    assert not all(part.isfinite().all() for shards in ranks for part in shards)


def on_rank_with_one_buffer(case: Case) -> list[Tensor]:
    with emulated(), patch("ring_attention.ring.keys_buffer", lambda step: "keys0"):
        return on_rank(case)


def a_pass_after_an_abandoned_one(case: Case) -> tuple[list[Tensor], int, int]:
    """An exception ends the first pass amid transfers. Results of the next pass, and the bytes of its buffers."""
    with emulated():
        with patch("ring_attention.ring.attend_forward", side_effect=MemoryError), pytest.raises(MemoryError):
            on_rank(case)
        results, num_bytes = on_rank(case), symmetric_buffer_bytes()
    return results, num_bytes, symmetric_buffer_bytes()


def test_an_abandoned_pass_does_not_harm_the_next(pool: WorkerPool):
    case = cases_of(4)[0]
    ranks = pool.run(a_pass_after_an_abandoned_one, case, num_ranks=4)
    check(case, [results for results, _, _ in ranks])
    numbers = 2 * case.batch * case.num_kv_heads * case.head_dim * case.global_layout.ring_length
    for _, before, after in ranks:  # two buffers for keys, two for returned gradients, and flags
        assert 4 * numbers * case.dtype.itemsize < before < 4 * numbers * case.dtype.itemsize + 8192
        assert after == 0


def copies_with_local_messages(case: Case) -> tuple[int, list[Tensor]]:
    copied = []
    with emulated(), patch.object(ThreadCopyStream, "copy", lambda self, target, source: copied.append(target)):
        with messages_stay_local():
            on_rank(case)
        num_copies = len(copied)
    with emulated():
        return num_copies, on_rank(case)


def test_messages_can_stay_local(pool: WorkerPool):
    case = cases_of(2)[0]
    ranks = pool.run(copies_with_local_messages, case, num_ranks=2)
    assert [num_copies for num_copies, _ in ranks] == [0, 0]
    check(case, [results for _, results in ranks])
