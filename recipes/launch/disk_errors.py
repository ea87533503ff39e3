"""Explains a rank that could not write: what it wrote, where and why. Every rank runs its task within this."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from recipes.checkpoint.manifest import resume_hint
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import read_rank_state

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_PROBE_BYTES = 2**20


@contextlib.contextmanager
def full_disk_explained(run_dir: Path, rank: int) -> Iterator[None]:
    """Raise RunFailed from an error of the block that a disk has caused.

    PyTorch does not say why it could not write a file ("iostream error"), so a test file finds out.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _named_reason(error) or _found_reason(run_dir)
        if isinstance(error, RunFailed) or reason is None:
            raise
        state = read_rank_state(run_dir, rank)
        raise RunFailed(
            f"rank {rank} could not write{f' ({state})' if state else ''}: {reason}\n{resume_hint(run_dir)}: first "
            "free space for checkpoint.keep + 1 checkpoints, or set hydra.run.dir to another disk"
        ) from error


def _named_reason(error: BaseException) -> str | None:
    """The reason that the error names; None if it names none, or no disk's."""
    if any(words in str(error) for words in ("/dev/shm", "shared memory object", "shared memory(shm)")):
        return f"/dev/shm is full: {error}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return None


def _found_reason(run_dir: Path) -> str | None:
    """Why a small file cannot be written to the run dir; None if it can."""
    probe = run_dir / f"probe.{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY)
        try:
            os.posix_fallocate(descriptor, 0, _PROBE_BYTES)
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        return f"{error.strerror}: {run_dir}"
    return None
