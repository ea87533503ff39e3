"""Disk errors become one message with the reason and the newest checkpoint; other errors pass through."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from recipes.launch.failure import full_disk_explained
from recipes.launch.worker import _output_to
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import Heartbeat
from tests.errors import names


def explained(run_dir, error: Exception) -> str:
    with pytest.raises(RunFailed) as caught, full_disk_explained(run_dir, 1):
        raise error
    return str(caught.value)


def test_the_message_has_the_reason_the_rank_state_and_the_checkpoint(tmp_path):
    (tmp_path / "logs").mkdir()
    Heartbeat(tmp_path, 1).update("part", "checkpoint of step 30")
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
    problem, advice = explained(tmp_path, error).splitlines()
    names(problem, "rank 1", "checkpoint of step 30", "No space left on device", tmp_path / "metrics.jsonl")
    names(advice, "checkpoint.keep + 1", "hydra.run.dir")
    assert "step_" not in advice
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    names(explained(tmp_path, error).splitlines()[1], "step_00000020", "checkpoint.keep + 1", "hydra.run.dir")


def test_a_test_file_finds_the_reason_of_pytorchs_error(tmp_path, monkeypatch):
    error = RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError, match=r"^basic_ios::clear: iostream error$"), full_disk_explained(tmp_path, 1):
        raise error  # the disk has space, so it is something else
    assert list(tmp_path.iterdir()) == []

    def quota_exceeded(*_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", quota_exceeded)
    names(explained(tmp_path, error).splitlines()[0], "rank 1", "Disk quota exceeded", tmp_path)


def test_full_shared_memory_is_named(tmp_path):
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    names(explained(tmp_path, error).splitlines()[0], "rank 1", "/dev/shm", error)


def test_a_full_disk_under_the_log_hides_no_error_and_nothing_reaches_the_console_later(monkeypatch, capfd):
    """What the log refuses stays in Python's buffers, from where the next print would take it."""
    streams = [open(descriptor, "w", closefd=False) for descriptor in (1, 2)]  # noqa: SIM115
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)

    def fail() -> None:
        with _output_to(Path("/dev/full")) as console:
            print("for the log")
            print("for people", file=console)
            raise RunFailed("could not write")

    with pytest.raises(RunFailed, match="could not write"):
        fail()
    with _output_to(Path("/dev/full")):  # a run that ends well
        print("for the log")
    for stream in streams:
        print("later", file=stream, flush=True)
    assert capfd.readouterr() == ("for people\nlater\n", "later\n")


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), full_disk_explained(tmp_path, 1):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
