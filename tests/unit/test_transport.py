"""The choice of the transport, and what waits for transfers on GPUs, with stand-ins for groups, streams and events."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ring_attention import transport
from ring_attention.transport import collectives, copy_engine, make_transport, p2p
from ring_attention.transport.p2p import TransferWatchdog
from tests.errors import names

TIMEOUT_S, INTERVAL_S = 0.4, 0.01


class StubGroup:
    """A process group with these backends, by device type."""

    def __init__(self, **backends: str) -> None:
        self._backends = backends
        self._device_types = [torch.device(device_type) for device_type in backends]

    def _get_backend(self, device: torch.device) -> Any:
        name = self._backends[device.type]
        timeout = timedelta(minutes={"gloo": 30, "nccl": 10}[name])
        return SimpleNamespace(name=lambda: name, options=SimpleNamespace(_timeout=timeout))


@pytest.mark.parametrize(
    ("group", "chosen", "minutes"),
    [
        (StubGroup(cuda="nccl"), "copy_engine", 10),
        (StubGroup(cpu="gloo", cuda="nccl"), "copy_engine", 10),  # init_process_group("cpu:gloo,cuda:nccl")
        (StubGroup(cpu="gloo", cuda="gloo"), "p2p", 30),  # init_process_group("gloo")
        (StubGroup(cpu="gloo"), "p2p", 30),
    ],
)
def test_the_backend_of_the_gpus_chooses_the_transport_and_has_the_timeout(
    monkeypatch: pytest.MonkeyPatch, group: Any, chosen: str, minutes: int
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(transport, "rank_and_size", lambda group: (0, 2))
    for name in ("p2p", "copy_engine"):
        monkeypatch.setitem(transport.TRANSPORTS, name, lambda *_, name=name: name)  # pyright: ignore[reportArgumentType]
    assert make_transport("auto", group) == chosen
    assert collectives.group_timeout(group) == timedelta(minutes=minutes)


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> TransferWatchdog:
    monkeypatch.setattr(p2p, "_WATCHDOG_INTERVAL_S", INTERVAL_S)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # report only
    return TransferWatchdog(TIMEOUT_S)


class StubEvent:
    def __init__(self) -> None:
        self.is_reached = False

    def query(self) -> bool:
        return self.is_reached


def test_a_transfer_behind_earlier_work_is_not_overdue(watchdog: TransferWatchdog, capfd: pytest.CaptureFixture[str]):
    earlier_work, transfer = StubEvent(), StubEvent()
    watchdog.add(earlier_work.query, [transfer.query], "behind long work")
    time.sleep(2 * TIMEOUT_S)  # the host is that far ahead of the GPU
    earlier_work.is_reached = True
    time.sleep(TIMEOUT_S / 2)
    transfer.is_reached = True
    time.sleep(TIMEOUT_S)
    assert capfd.readouterr().err == ""


def test_time_counts_from_the_end_of_earlier_work_and_of_earlier_transfers(
    watchdog: TransferWatchdog, capfd: pytest.CaptureFixture[str]
):
    earlier_work, first, second = StubEvent(), StubEvent(), StubEvent()
    watchdog.add(earlier_work.query, [first.query], "the first")
    watchdog.add(earlier_work.query, [second.query], "the second")
    earlier_work.is_reached = True
    time.sleep(TIMEOUT_S / 2)
    first.is_reached = True
    time.sleep(TIMEOUT_S / 2 + 3 * INTERVAL_S)
    assert capfd.readouterr().err == ""
    time.sleep(TIMEOUT_S)
    [line] = [line for line in capfd.readouterr().err.splitlines() if "TransferError" in line]
    assert line.startswith("TransferError: ")  # the launcher looks for it in the ranks' logs
    names(line, "the second")


@pytest.mark.parametrize("reset", [False, True])
def test_the_computing_stream_waits_for_own_offers_before_it_waits_for_peers(
    monkeypatch: pytest.MonkeyPatch, reset: bool
):
    """CUDA may put what no event orders behind a wait for a flag, and peers send nothing without the offers."""
    done: list[Any] = []
    stream = SimpleNamespace(wait_event=done.append, record_event=lambda: "arrived")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device_index: stream)
    for name in ("_wait_flag", "_write_flag"):
        monkeypatch.setattr(copy_engine, name, lambda _, *flag, name=name: done.append((name, *flag)))
    flag, copied, copies = torch.zeros(1), torch.Event(), object.__new__(copy_engine.CopyStream)
    copies._stream = SimpleNamespace(device_index=0)  # pyright: ignore[reportAttributeAccessIssue]
    assert copies.make_compute_wait([(flag, 7)], copied, reset) == "arrived"
    assert done == [copied, ("_wait_flag", flag, 7), *[("_write_flag", flag, 0)] * reset]


def test_a_replay_behind_copies_that_an_exception_left_is_overdue(
    monkeypatch: pytest.MonkeyPatch, watchdog: TransferWatchdog, capfd: pytest.CaptureFixture[str]
):
    """The computing stream's earlier work is done, but a copy waits for a peer, and the replay for that copy."""
    stuck, done = StubEvent(), StubEvent()
    done.is_reached = True

    def make_compute_wait(flags: Any, copied: StubEvent, reset: bool) -> StubEvent:
        copies.compute_event = lambda: copied  # what comes later is reached once the copy is
        return copied

    copies = SimpleNamespace(
        compute_event=lambda: done, record_event=lambda: stuck, make_compute_wait=make_compute_wait
    )
    made: Any = object.__new__(copy_engine.CopyEngineTransport)
    made._buffers, made._watchdog = SimpleNamespace(stream=copies), watchdog
    made.ring_rank, made.ring_degree = 1, 4
    with made.watched("forward pass"):
        pass
    time.sleep(2 * TIMEOUT_S)
    [line] = [line for line in capfd.readouterr().err.splitlines() if "TransferError" in line]
    names(line, "forward pass", "ring rank 1 of 4")
