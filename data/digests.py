"""Digests of files' contents, remembered by their stat so that a restart does not read terabytes again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK_BYTES = 2**26  # digested on their own, so that threads share a file, and a file that grows needs its last one
_RACY_NS = 2 * 10**9  # a file that changed so shortly before may change again without another time stamp
_MAX_REMEMBERED = 200_000


def digest_of(parts: Iterable[str]) -> str:
    """Of digests in order, such as those of a file's chunks."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def chunk_digest(data: bytes | memoryview = b"") -> Any:
    """A blake2b object."""
    return hashlib.blake2b(data, digest_size=16)


def chunk_digests(path: str | Path, num_bytes: int, read: Callable[[int], None] = lambda _: None) -> list[str]:
    """The digest of each chunk of the file's first `num_bytes`, by threads.

    Args:
        read: called with the number of bytes after each chunk.
    """

    def digest(start: int) -> str:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            hasher, left = chunk_digest(), min(CHUNK_BYTES, num_bytes - start)
            while left and (piece := file.read(min(2**20, left))):
                hasher.update(piece)
                left -= len(piece)
        read(min(CHUNK_BYTES, num_bytes - start))
        return hasher.hexdigest()

    starts = range(0, num_bytes, CHUNK_BYTES)
    if len(starts) < 2:
        return [digest(start) for start in starts]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(digest, starts))


def file_stat(path: str | Path) -> list[int]:
    """What changes with the content of a file: size, times and inode."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class DigestCache:
    """The digests of files by path and stat, in a JSON file that processes share. Whoever cannot write it does without.

    A file that changed in the last two seconds is digested every time: a further change might not show in its stat.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, {}
        self._known = self._load()

    def file(self, path: str | Path, read: Callable[[int], None] = lambda _: None) -> str:
        """The digest of a file. Raises OSError if it cannot be read."""
        name = os.path.abspath(path)
        while True:
            stat = file_stat(name)
            if (known := self._known.get(name)) is not None and known[0] == stat:
                return known[1]
            now = time.time_ns()
            digest = digest_of(chunk_digests(name, stat[0], read))
            if file_stat(name) == stat:  # else it was written meanwhile
                break
        if max(stat[1], stat[2]) < now - _RACY_NS:
            self.remember(name, stat, digest)
        return digest

    def remember(self, name: str | Path, stat: list[int] | str, value: str) -> None:
        self._known[str(name)] = self._new[str(name)] = [stat, value]

    def recall(self, name: str) -> str | None:
        """What was remembered under a name that is no file."""
        return self._known.get(name, [None, None])[1]

    def refresh(self) -> None:
        """Learn what other processes have written since."""
        self._known = self._load() | self._new

    def save(self) -> None:
        """Write what is new beside what other processes have written."""
        if not self._new:
            return
        entries = self._load()
        for name, entry in self._new.items():
            entries.pop(name, None)
            entries[name] = entry  # at the end: the oldest are forgotten first
        names = list(entries)[-_MAX_REMEMBERED:]
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({name: entries[name] for name in names}))
            self._new = {}

    def _load(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text())
            return {name: [stat, str(value)] for name, (stat, value) in entries.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by one with this text, or leave it as it is. Power may fail at any time."""
    number, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets only its user read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def saved(cache: DigestCache) -> Iterator[DigestCache]:
    """The cache, saved after the block however it ends."""
    try:
        yield cache
    finally:
        cache.save()
