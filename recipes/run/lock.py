"""One run at a time in a run dir. The operating system gives the lock back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from conf.schema import ConfigError

LOCK_FILE = "lock"


@contextlib.contextmanager
def locked(folder: Path, setting: str = "hydra.run.dir") -> Iterator[None]:
    """Hold the folder against other processes, also of other hosts. Makes the folder if it does not exist.

    A killed process leaves the file behind, but not the lock: the next run takes it. On a file system without locks
    the folder is not held, and a line on stderr says so.

    Args:
        setting: chooses another folder; for the error.

    Raises:
        ConfigError: if another process holds the folder; names the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with _lock(path, setting):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path, setting: str) -> TextIO:
    host = socket.gethostname()
    while True:
        file = path.open("a+", encoding="utf-8")  # NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                file.truncate(0)
                since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
                print(f"process {os.getpid()} on {host} since {since}", file=file, flush=True)
                return file
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                holder = file.read().strip() or "another process"
                gone = "" if f" on {host} " in holder else f"; if that host is down and keeps the lock, delete {path}"
                message = f"{path.parent} is used by {holder}: wait until it ends, or choose another {setting}{gone}"
                raise ConfigError(message) from None
            if error.errno != errno.ESTALE:
                print(f"{path} cannot be locked against a second run: {error.strerror}", file=sys.stderr, flush=True)
                return file
        file.close()  # its holder has just ended and removed it: try again
