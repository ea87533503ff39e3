"""Why a run failed, in one error: the rank that failed first, where it was, and its log; or what a disk refused."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.checkpoint.manifest import resume_hint
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, STALL_FILE, describe_ranks, position

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class Outcome:
    """What a rank sends its parent: the recipe's result, or an error for people."""

    rank: int
    result: float = float("nan")
    error: str = ""
    refused: bool = False  # whether the configuration is at fault, not this rank
    reported: float = field(default_factory=time.monotonic)  # when, by the host's clock


def explain_failure(exit_codes: Sequence[int], first_seen: int, outcomes: Sequence[Outcome], run_dir: Path) -> str:
    """The error of a run: of a rank that a signal ended, else of the first rank that reported one.

    Args:
        exit_codes: by rank, when the first failure was seen; 0 for ranks that still ran.
        first_seen: the rank whose failure was seen first.
    """
    with contextlib.suppress(FileNotFoundError):  # the watchdog has ended the run
        return (run_dir / LOGS_DIR / STALL_FILE).read_text(encoding="utf-8").rstrip()
    first = min((outcome for outcome in outcomes if outcome.error), key=lambda outcome: outcome.reported, default=None)
    # survivors of a reported failure may abort, as NCCL's watchdog makes them do
    signalled = [rank for rank, code in enumerate(exit_codes) if code < 0 and not (first and code == -signal.SIGABRT)]
    transfers: list[str] = []
    if signalled:
        rank = signalled[0]
        names = {-number: number.name for number in signal.Signals}  # real-time signals have none
        name = names.get(exit_codes[rank], f"signal {-exit_codes[rank]}")
        what = f"rank {rank} was ended by {name}{position(run_dir, rank)}"
        transfers = _overdue_transfers(run_dir)
    elif first:
        rank, what = first.rank, first.error.rstrip()
        if first.refused:
            return what
    else:
        rank, what = first_seen, f"rank {first_seen} exited with code {exit_codes[first_seen]}"
    timed_out = "Timed out waiting" in what  # gloo's error
    if timed_out:  # the traceback is in the log
        what = f"rank {rank} failed: {what.splitlines()[-1]}"
    ranks = describe_ranks(run_dir, len(exit_codes), time.time()) if timed_out or transfers else []
    log = run_dir / LOGS_DIR / f"rank_{rank}.log"
    lines = [what, *transfers, *ranks, f"the other ranks were ended; its log: {log}"]
    if exit_codes[rank] == -signal.SIGKILL:
        lines.append("probably the OOM killer, if nobody killed it: see dmesg and explain=true")
    if signalled or timed_out or not first:  # an error of the rank says itself what to do
        lines.append(resume_hint(run_dir))
    return "\n".join(lines)


def _overdue_transfers(run_dir: Path) -> list[str]:
    """What ranks on NCCL logged before they aborted themselves: see `ring_attention.transport`."""
    logs = sorted((run_dir / LOGS_DIR).glob("rank_*.log"))
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if line.startswith("TransferError: ")]


@contextlib.contextmanager
def full_disk_explained(run_dir: Path, rank: int) -> Iterator[None]:
    """Raise RunFailed from an error of the block that a disk has caused. Every rank runs its task within this."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RunFailed) or (reason := _disk_problem(error, run_dir)) is None:
            raise
        raise RunFailed(
            f"rank {rank} could not write{position(run_dir, rank)}: {reason}\n{resume_hint(run_dir)}: first free space "
            "for checkpoint.keep + 1 checkpoints, or set hydra.run.dir to another disk"
        ) from error


def _disk_problem(error: Exception, run_dir: Path) -> str | None:
    """The disk's problem that the error names, or that writing a test file finds; None if there is none."""
    if any(words in str(error) for words in ("/dev/shm", "shared memory object", "shared memory(shm)")):
        return f"/dev/shm is full: {error}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    try:  # PyTorch does not say why it could not write a file ("iostream error")
        with tempfile.NamedTemporaryFile(dir=run_dir) as probe:
            os.posix_fallocate(probe.fileno(), 0, 2**20)
    except OSError as found:
        return f"{found.strerror}: {run_dir}"
    return None
