"""A disk without room is named, with what is left of the run; other errors pass."""

from __future__ import annotations

import errno
import os

import pytest

from recipes.launch.disk_errors import full_disk_explained
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import Heartbeat


def explained(run_dir, error: Exception) -> str:
    with pytest.raises(RunFailed) as caught, full_disk_explained(run_dir, 1):
        raise error
    return str(caught.value)


def test_an_error_that_names_its_reason(tmp_path):
    (tmp_path / "logs").mkdir()
    Heartbeat(tmp_path, 1).update("part", "checkpoint of step 30")
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
    assert explained(tmp_path, error) == (
        f"rank 1 could not write (checkpoint of step 30): No space left on device: {tmp_path}/metrics.jsonl\n"
        "there is no checkpoint yet: make room first, for checkpoint.keep + 1 checkpoints, or use hydra.run.dir on "
        "another disk"
    )
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    assert "the same command resumes from step_00000020: " in explained(tmp_path, error)


def test_pytorchs_error_names_none_so_the_disk_is_asked(tmp_path, monkeypatch):
    error = RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError, match=r"^basic_ios::clear: iostream error$"), full_disk_explained(tmp_path, 1):
        raise error  # there is room: it is something else
    assert list(tmp_path.iterdir()) == []

    def no_room(*_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert explained(tmp_path, error).startswith(f"rank 1 could not write: Disk quota exceeded: {tmp_path}\n")


def test_shared_memory_is_not_the_disk(tmp_path):
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    assert explained(tmp_path, error).startswith("rank 1 could not write: /dev/shm has no room: unable to allocate")


def test_what_is_no_error_of_writing_passes(tmp_path):
    with pytest.raises(FileNotFoundError), full_disk_explained(tmp_path, 1):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
