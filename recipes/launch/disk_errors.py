"""How a run ends that cannot write: with the place and the reason, not with the traceback of a library.

The launcher runs every rank's task within `full_disk_explained`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from recipes.checkpoint.manifest import resume_hint
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import read_rank_state

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_PROBE_BYTES = 2**20


@contextlib.contextmanager
def full_disk_explained(run_dir: Path, rank: int) -> Iterator[None]:
    """Turn an error of the block that comes from want of room into RunFailed.

    PyTorch's of a file that it could not write names no reason ("iostream error"), so the disk is asked.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _reason(error) or _cannot_write(run_dir)
        if isinstance(error, RunFailed) or reason is None:
            raise
        place = read_rank_state(run_dir, rank)
        where = f" ({place})" if place else ""
        raise RunFailed(
            f"rank {rank} could not write{where}: {reason}\n{resume_hint(run_dir)}: make room first, for "
            "checkpoint.keep + 1 checkpoints, or use hydra.run.dir on another disk"
        ) from error


def _reason(error: BaseException) -> str | None:
    """Of an error that says it itself."""
    if any(words in str(error) for words in ("/dev/shm", "shared memory object", "shared memory(shm)")):
        return f"/dev/shm has no room: {error}"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return None


def _cannot_write(run_dir: Path) -> str | None:
    """Why a small file cannot be written there; None if it can."""
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
