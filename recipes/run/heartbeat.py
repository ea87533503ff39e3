"""Where each rank is, for when it can no longer say so itself: a record per rank, which it keeps up to date.

RUN_DIR/logs/rank_N.state is one line that the rank writes through a memory map: that takes about a microsecond and no
system call, and what was written last is there after kill -9 or SIGSTOP, too. Pure files, no torch: the launcher's
parent looks here when a rank has died. `watchdog` writes the records, and looks when a step does not end.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from recipes.run.run_dir import LOGS_DIR, PREEMPTED_FILE, STALL_FILE

KINDS = ("step", "part", "ring_step", "wait")  # the coarse first: a new one ends the finer ones
_RECORD_BYTES = 1024


class Heartbeat:
    """The record of this rank.

    Raises:
        OSError: if the disk is full. Later it cannot fail: all its bytes are there.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        path = record_path(run_dir, rank)
        path.unlink(missing_ok=True)  # of an earlier start
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # a write through the map of a byte that the disk has no room for would kill the rank (SIGBUS)
            os.posix_fallocate(descriptor, 0, _RECORD_BYTES)
            try:
                self._bytes = mmap.mmap(descriptor, _RECORD_BYTES)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                self._bytes = mmap.mmap(-1, _RECORD_BYTES)  # a file system without shared maps: nobody else sees it
        finally:
            os.close(descriptor)
        self._owner = f"{os.getpid()}\t{socket.gethostname()}"
        self._now: dict[str, str] = dict.fromkeys(KINDS, "")
        self._progress = 0
        self.tell("part", "starting")

    def tell(self, kind: str, text: str) -> None:
        """From now on the rank is there."""
        now = self._now
        now[kind] = text
        if kind != "wait":
            self._progress += 1
        if kind in ("step", "part"):
            now["ring_step"] = now["wait"] = ""
        line = "\t".join((self._owner, f"{time.time():.6f}", str(self._progress), *now.values()))
        self._bytes[:] = line.encode()[: _RECORD_BYTES - 1].ljust(_RECORD_BYTES - 1) + b"\n"


@dataclass(frozen=True)
class RankState:
    """Where a rank is, or was last.

    Args:
        since: in seconds since the epoch, by its host's clock.
        progress: how many steps, parts and stages it has come through; all ranks come through the same.
    """

    rank: int
    pid: int
    host: str
    since: float
    progress: int
    step: str
    part: str
    ring_step: str
    wait: str

    def __str__(self) -> str:
        """Such as: step 7, forward, forward ring step 1, waiting for (hop)."""
        return ", ".join(
            [
                *([f"step {self.step}"] if self.step else []),
                self.part,
                *([self.ring_step] if self.ring_step else []),
                *([f"waiting in {self.wait}"] if self.wait else []),
            ]
        )

    @property
    def trouble(self) -> str:
        """What the system says of a process of this host that does not go on by itself; empty for any other."""
        if self.host != socket.gethostname():
            return ""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "its process is gone"
        return {
            "T": "its process is stopped by a signal",
            "t": "its process is stopped by a debugger",
            "D": "its process waits for a device, such as a disk",
            "Z": "its process has died",
        }.get(state, "")


def record_path(run_dir: Path, rank: int) -> Path:
    return run_dir / LOGS_DIR / f"rank_{rank}.state"


def clear_rank_states(run_dir: Path) -> None:
    """Remove what an earlier start in the run dir has left."""
    logs = run_dir / LOGS_DIR
    for path in [logs / STALL_FILE, logs / PREEMPTED_FILE, *logs.glob("rank_*.state")]:
        path.unlink(missing_ok=True)


def read_rank_state(run_dir: Path, rank: int) -> RankState | None:
    """Where the rank is or was last; None if it has not come so far as to say."""
    try:
        fields = record_path(run_dir, rank).read_text(encoding="utf-8", errors="replace").rstrip().split("\t")
    except FileNotFoundError:
        return None
    if len(fields) < 4:  # made, but not written yet
        return None
    pid, host, since, progress, *told = [*fields, *[""] * len(KINDS)][: 4 + len(KINDS)]
    return RankState(rank, int(pid), host, float(since), int(progress), *told)


def describe_ranks(run_dir: Path, num_ranks: int, now: float) -> list[str]:
    """A line per rank: where it is, since when, what is wrong with it, and whether it is behind others.

    Args:
        now: seconds since the epoch.
    """
    places = [place for rank in range(num_ranks) if (place := read_rank_state(run_dir, rank))]
    furthest, last = (choose((place.progress for place in places), default=0) for choose in (max, min))
    return [
        f"rank {place.rank} (process {place.pid} on {place.host}): {place}, for {now - place.since:.1f} s"
        + (" <- behind" if last == place.progress < furthest else "")
        + (f" <- {place.trouble}" if place.trouble else "")
        for place in places
    ]
