"""The tokens of a source on disk: made once, then memory-mapped.

A store is a folder named by its key: a digest of the documents' content, the tokenizer and the settings that matter.
Another content or tokenizer is another store, so a store is never stale. It is written as KEY.partial beside a record
of how far it is, so that a killed process loses seconds, and renamed when it is complete. One process builds; others
wait for its lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DataConfig, source_configs
from data.digests import (
    CHUNK_BYTES,
    DigestCache,
    chunk_digest,
    chunk_digests,
    digest_of,
    file_stat,
    saved,
    write_atomically,
)
from data.encoders import Encoded, open_encoder
from data.read_ahead import read_ahead
from data.source import (
    BEGINNING,
    CorpusError,
    Position,
    Source,
    files_setting,
    hub_source,
    is_offline,
    is_on_hub,
    open_source,
    saves_splits,
)
from data.tokenizer import open_tokenizer, tokenizer_problem

FORMAT = 1  # of a store; another one is never read
CHAT_FORMAT = 2  # of a store of data=chat: 1 had keys of null in tools and their calls, and no unknown roles
TOKENS, ENDS, TRAINED = "tokens.bin", "ends.bin", "trained.bin"
STORE_FILE, PROGRESS_FILE = "store.json", "progress.json"
_RECORD_S = 2.0  # a killed process loses so much work
_FIRST_LINE_S, _LINE_S = 2.0, 5.0  # when a build says something
_MAX_ROLES = 100  # that are counted: where each row has another, the record is written all the same every two seconds
_NUM_AHEAD = 2  # batches that are tokenized while one is written

Say = Callable[[str], None]


@dataclass(frozen=True)
class TokenStore:
    """All documents of one source, one after the other."""

    name: str  # of the source, as in conf.schema.source_configs
    tokens: np.ndarray  # [T] memory-mapped, uint16 or int32
    ends: np.ndarray  # [N] int64, cumulative; document d is tokens[ends[d-1]:ends[d]], with its separator or EOS
    trained: np.ndarray | None = None  # [T] bool: whether a token may be a label; None: all may
    num_skipped: int = 0  # rows that data.bad_rows=skip left out
    unknown_roles: Mapping[str, int] = field(default_factory=dict)  # of chats: the rows with each
    digest: str = ""  # of all documents' tokens in order, wherever their files are; empty: nobody has digested them

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [N] int64."""
        return np.diff(self.ends, prepend=0)


@dataclass
class Counts:
    """What a store holds, or holds so far."""

    num_documents: int = 0
    num_tokens: int = 0
    num_skipped: int = 0  # rows that data.bad_rows=skip left out
    num_empty: int = 0  # rows without tokens
    largest_token: int = -1
    unknown_roles: dict[str, int] = field(default_factory=dict)  # of chats: the rows with each
    first_problem: str = ""  # of the rows that were skipped
    seconds: float = 0.0  # that building took


@dataclass(frozen=True)
class OpenedStore:
    """A store, and what `recipes.tokenize` says of it."""

    store: TokenStore
    counts: Counts
    folder: Path
    is_new: bool


def open_store(config: DataConfig, name: str, say: Say) -> TokenStore:
    """The tokens of one source, which is no mixture: from disk, or tokenized now.

    Args:
        say: takes a line for people, such as the progress.

    Raises:
        CorpusError: if the documents cannot be read or tokenized, or the store cannot be written.
    """
    return open_counted(config, name, say).store


def open_stores(config: DataConfig, vocab_size: int | None, say: Say) -> dict[str, TokenStore]:
    """The tokens of each source, by name. Raises CorpusError, also if the model lacks one of the tokens.

    Args:
        vocab_size: of the model; None: any.
    """
    return _checked(source_configs(config), vocab_size, say)


def open_validation_stores(config: DataConfig, vocab_size: int | None, say: Say) -> dict[str, TokenStore]:
    """The tokens of data.validation_files or data.validation_split, of each source that sets one."""
    return _checked(validation_configs(config), vocab_size, say)


def validation_configs(config: DataConfig) -> dict[str, DataConfig]:
    """The validation documents of each source that has its own, as a source."""
    configs = {}
    for name, source in source_configs(config).items():
        if source.validation_files is not None:  # which stays set, for messages to name it
            no_set = {field: getattr(DataConfig, field) for field in ("name", "subset", "split")}
            configs[name] = dataclasses.replace(source, files=source.validation_files, **no_set)
        elif source.validation_split is not None:
            configs[name] = dataclasses.replace(source, split=source.validation_split, validation_split=None)
    return configs


def _checked(configs: dict[str, DataConfig], vocab_size: int | None, say: Say) -> dict[str, TokenStore]:
    stores = {}
    for name, config in configs.items():
        _check_vocabulary(config, vocab_size)  # before hours of tokenizing
        opened = open_counted(config, name, say)
        largest = opened.counts.largest_token
        if vocab_size is not None and largest >= vocab_size:  # else one rank's lookup fails
            if config.source == "megatron":
                raise CorpusError(
                    f"{files_setting(config)}={config.files} has token {largest}, but the model has {vocab_size}: give "
                    "files of the model's own tokenizer, or without model.path type "
                    f"model.vocab_size={largest + 1} or more"
                )
            raise CorpusError(
                f"a document has token {largest} of data.tokenizer={config.tokenizer}, but the model has "
                f"{vocab_size}: take the text of that added token out of the documents"
            )
        stores[name] = opened.store
    return stores


def check_without_download(config: DataConfig, vocab_size: int) -> None:
    """What opening the stores would refuse of a corpus of which a part is on the hub, as far as the rest shows it.

    Raises:
        CorpusError: as `open_stores`, of a source without files, or of the tokenizer if that is here.
    """
    for source in (*source_configs(config).values(), *validation_configs(config).values()):
        if not is_on_hub(source.tokenizer):
            open_encoder(source)
            _check_vocabulary(source, vocab_size)
        open_source(source)


def _check_vocabulary(config: DataConfig, vocab_size: int | None) -> None:
    if vocab_size is None or config.source == "megatron":
        return
    if problem := tokenizer_problem(open_tokenizer(config), vocab_size):
        raise CorpusError(problem)


def stores_folder(config: DataConfig) -> Path:
    """Where stores are."""
    if config.token_store:
        return Path(config.token_store).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "ring_attention" / "tokens"


def open_counted(config: DataConfig, name: str, say: Say) -> OpenedStore:
    """`open_store` with what it counted."""
    root = stores_folder(config)
    with saved(DigestCache(root / "digests.json")) as cache:
        encoder = open_encoder(config)
        source = _at_its_revision(open_source(config), cache)
        stats = {path: file_stat(path) for path in _inputs(source)}
        key = _key(source, encoder, cache, say)
        folder = root / key
        if (opened := _open(folder, name, cache, say)) is not None:
            _check_skipped(config, opened.counts)
            return opened
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _building(root / f"{key}.lock", source.description, say):
                cache.refresh()  # the process that has built it meanwhile knows its digests
                if (opened := _open(folder, name, cache, _nothing)) is not None:  # another process has built it
                    _check_skipped(config, opened.counts)
                    return opened
                if folder.exists():  # damaged
                    shutil.rmtree(folder)
                _Build(source, encoder, folder, say).run(stats, cache)
                cache.save()  # before the next process looks
        except OSError as error:
            if error.filename in stats:
                raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error
            raise CorpusError(_disk_problem(root, error)) from error
        opened = _open(folder, name, cache, say)
        if opened is None:
            raise CorpusError(f"{folder} is damaged as soon as it is written: check the disk, or set data.token_store")
        return dataclasses.replace(opened, is_new=True)


def _nothing(_: str) -> None:
    """Says nothing."""


def _check_skipped(config: DataConfig, counts: Counts) -> None:
    """A store made with data.bad_rows=skip is the same as one made with stop, if nothing had to be skipped."""
    if config.bad_rows == "stop" and counts.num_skipped:
        raise CorpusError(counts.first_problem)


def _disk_problem(root: Path, error: OSError) -> str:
    advice = "set data.token_store=FOLDER to one that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some, and the same command resumes, or set data.token_store=FOLDER on a larger disk"
    return f"tokens cannot be written to {root} ({error.strerror or error}): {advice}"


# --- its key


def _inputs(source: Source) -> list[str]:
    """All files that are read."""
    if source.config.source != "megatron":
        return list(source.files)
    return [path for name in source.files for path in (name, str(Path(name).with_suffix(".idx")))]


def _at_its_revision(source: Source, cache: DigestCache) -> Source:
    """A data set of the hub at its newest revision, or without network at the one that was tokenized last."""
    if source.revision is None:
        return source
    name = f"hub:{source.config.name}"
    found = hub_source(source, cache.recall(name) if is_offline() else None)
    cache.remember(name, "", str(found.revision))
    return found


def _key(source: Source, encoder: Any, cache: DigestCache, say: Say) -> str:
    """Equal for equal documents, tokenizer and settings."""
    config, paths, progress = source.config, _inputs(source), _Progress(say)
    total, num_read = sum(os.path.getsize(path) for path in paths), [0]

    def read(num_bytes: int) -> None:
        num_read[0] += num_bytes
        progress.line(
            lambda: f"reading {source.description}: {num_read[0] / max(1, total):.0%} of {total / 1e9:,.1f} GB"
        )

    try:
        digests = [cache.file(path, read) for path in paths]
    except OSError as error:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error
    names = [os.path.relpath(path, config.name) for path in paths] if config.name is not None else []
    # the extension says how a file is read
    kinds = [Path(path).suffix for path in paths] if config.source in ("jsonl", "parquet", "chat") else []
    settings = {
        "format": FORMAT,
        "source": config.source,
        "content": digest_of(digests),
        "names": names,
        "kinds": kinds,
        "revision": source.revision,
        "name": config.name if source.revision else None,
        "subset": config.subset,
        "split": config.split if config.name is not None else None,
        "field": config.messages_field if config.source == "chat" else config.text_field,
        "tokenizer": encoder.fingerprint(),
    }
    if config.source == "chat":
        settings["chat_format"] = CHAT_FORMAT
    if saves_splits(config):
        settings["reader"] = "load_from_disk"  # load_dataset, as before, mixed splits
    return digest_of([json.dumps(settings, sort_keys=True)])


# --- reading


def _open(folder: Path, name: str, cache: DigestCache, say: Say) -> OpenedStore | None:
    """The store, if it is there and undamaged."""
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / STORE_FILE).read_text(encoding="utf-8"))
        for file, (num_bytes, digest) in record["files"].items():
            if os.path.getsize(folder / file) != num_bytes:
                raise ValueError(f"{file} has {os.path.getsize(folder / file):,} bytes instead of {num_bytes:,}")
            if cache.file(folder / file) != digest:
                raise ValueError(f"{file} has another digest than was written")
        counts = Counts(**record["counts"])
        tokens = np.memmap(folder / TOKENS, np.dtype(record["dtype"]), "r")
        ends = np.memmap(folder / ENDS, np.int64, "r")
        trained = np.memmap(folder / TRAINED, np.bool_, "r") if TRAINED in record["files"] else None
        if len(tokens) != counts.num_tokens or len(ends) != counts.num_documents:
            raise ValueError(f"{STORE_FILE} has other counts than the files")
    except PermissionError as error:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}: set data.token_store=FOLDER") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{STORE_FILE} has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        say(f"{folder} is damaged ({reason}): its documents are tokenized again")
        return None
    digest = digest_of([record["dtype"], *(f"{file} {entry[1]}" for file, entry in sorted(record["files"].items()))])
    store = TokenStore(name, tokens, ends, trained, counts.num_skipped, counts.unknown_roles, digest)
    return OpenedStore(store, counts, folder, is_new=False)


# --- building


class _Output:
    """A file that grows. Knows the digests of its chunks."""

    def __init__(self, path: Path) -> None:
        """At its beginning, whatever is there."""
        self.path, self.num_bytes = path, 0
        self._chunks: list[str] = []
        self._hasher = chunk_digest()
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115

    def resume(self, num_bytes: int, digest: str) -> bool:
        """Go on after `num_bytes`; False if these are not what was written."""
        if os.path.getsize(self.path) < num_bytes:
            return False
        chunks = chunk_digests(self.path, num_bytes)
        if digest_of(chunks) != digest:
            return False
        start = num_bytes // CHUNK_BYTES * CHUNK_BYTES
        self._file.seek(start)
        self._hasher = chunk_digest(self._file.read(num_bytes - start))
        self._chunks, self.num_bytes = chunks[: num_bytes // CHUNK_BYTES], num_bytes
        self._file.truncate(num_bytes)
        return True

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate(0)
        self.num_bytes, self._chunks, self._hasher = 0, [], chunk_digest()

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        while len(data):
            part = data[: CHUNK_BYTES - self.num_bytes % CHUNK_BYTES]
            self._hasher.update(part)
            self.num_bytes += len(part)
            data = data[len(part) :]
            if self.num_bytes % CHUNK_BYTES == 0:
                self._chunks.append(self._hasher.hexdigest())
                self._hasher = chunk_digest()

    def flush(self) -> None:
        """Onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def digest(self) -> str:
        return digest_of([*self._chunks, *([self._hasher.hexdigest()] if self.num_bytes % CHUNK_BYTES else [])])

    def close(self) -> None:
        self._file.close()


@dataclass
class _Build:
    """Tokenizes a source into a folder that appears when all is done."""

    source: Source
    encoder: Any
    folder: Path
    say: Say
    counts: Counts = field(default_factory=Counts)
    outputs: dict[str, _Output] = field(default_factory=dict)

    def run(self, stats: dict[str, list[int]], cache: DigestCache) -> None:
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        partial.mkdir(exist_ok=True)
        names = [TOKENS, ENDS, *([TRAINED] if self.encoder.has_mask else [])]
        try:
            self.outputs = {name: _Output(partial / name) for name in names}
            position = self._resume(partial)
            self._tokenize(partial, position)
            for path, stat in stats.items():
                if not os.path.exists(path) or file_stat(path) != stat:
                    raise CorpusError(f"{path} was changed while it was read: start again when it is complete")
            if not self.counts.num_documents:
                shutil.rmtree(partial)
                raise CorpusError(self._nothing_left())
            self._finish(partial, cache)
        finally:
            for output in self.outputs.values():
                with contextlib.suppress(OSError):  # that the disk is full is known by now
                    output.close()

    def _nothing_left(self) -> str:
        counts = self.counts
        first = f"; the first: {counts.first_problem}" if counts.first_problem else ""
        return (
            f"{self.source.description} has 0 tokens: {counts.num_skipped + counts.num_empty:,} rows, of which "
            f"{counts.num_empty:,} are empty and {counts.num_skipped:,} cannot be read{first}: give documents with text"
        )

    def _resume(self, partial: Path) -> Position:
        """Where the process before this one was when it last recorded that."""
        try:
            record = json.loads((partial / PROGRESS_FILE).read_text(encoding="utf-8"))
            counts, position = Counts(**record["counts"]), Position(*record["position"])
            files = [(self.outputs[name], *entry) for name, entry in record["files"].items()]
            if len(files) == len(self.outputs) and all(output.resume(*entry) for output, *entry in files):
                self.counts = counts
                _check_skipped(self.source.config, counts)
                if counts.seconds >= _FIRST_LINE_S:
                    self.say(f"resuming {self.source.description} after {counts.num_documents:,} documents")
                return position
            self.say(f"{partial} is damaged: its documents are tokenized again")
        except FileNotFoundError:
            pass  # nothing was recorded
        except (ValueError, KeyError, TypeError):
            self.say(f"{partial / PROGRESS_FILE} is damaged: its documents are tokenized again")
        for output in self.outputs.values():
            output.restart()
        return BEGINNING

    def _tokenize(self, partial: Path, position: Position) -> None:
        counts, start, before = self.counts, time.monotonic(), self.counts.seconds
        progress, recorded = _Progress(self.say), start
        first_token, first_byte = counts.num_tokens, None
        total = self.source.num_bytes
        for batch in read_ahead(self.encoder.encoded(self.source, position), _NUM_AHEAD):
            if batch.problems:
                if self.source.config.bad_rows == "stop":
                    self._record(partial, position)  # with data.bad_rows=skip it goes on from here
                    raise CorpusError(batch.problems[0])
                counts.first_problem = counts.first_problem or batch.problems[0]
            self._append(batch)
            position = batch.following
            now = time.monotonic()
            counts.seconds = before + now - start
            if now - recorded >= _RECORD_S:
                self._record(partial, position)
                recorded = now
            if first_byte is None:
                first_byte = batch.bytes_read
            rate = (counts.num_tokens - first_token) / max(1e-9, now - start)
            progress.line(lambda b=batch, f=first_byte, n=now, r=rate: self._progress(b, f, n - start, r, total))
        if progress.has_spoken:
            self.say(
                f"tokenized {self.source.description}: {counts.num_documents:,} documents, "
                f"{counts.num_tokens:,} tokens in {_duration(counts.seconds)}"
            )

    def _progress(self, batch: Encoded, first_byte: int, seconds: float, rate: float, total: int | None) -> str:
        parts = [
            f"{self.counts.num_documents:,} documents",
            f"{self.counts.num_tokens:,} tokens",
            f"{rate:,.0f} tokens/s",
        ]
        share = ""
        if total:
            share = f" {batch.bytes_read / total:.1%},"
            if batch.bytes_read > first_byte:
                left = (total - batch.bytes_read) * seconds / (batch.bytes_read - first_byte)
                parts.append(f"{_duration(left)} left")
        return f"tokenizing {self.source.description}:{share} {', '.join(parts)}"

    def _append(self, batch: Encoded) -> None:
        counts = self.counts
        self.outputs[ENDS].append(counts.num_tokens + np.cumsum(batch.lengths, dtype=np.int64))
        self.outputs[TOKENS].append(batch.tokens)
        if batch.trained is not None:
            self.outputs[TRAINED].append(batch.trained)
        counts.num_documents += len(batch.lengths)
        counts.num_tokens += len(batch.tokens)
        counts.num_skipped += len(batch.problems)
        counts.num_empty += batch.num_empty
        for role in batch.unknown_roles:
            if role in counts.unknown_roles or len(counts.unknown_roles) < _MAX_ROLES:
                counts.unknown_roles[role] = counts.unknown_roles.get(role, 0) + 1
        counts.largest_token = max(counts.largest_token, int(batch.tokens.max(initial=0)))

    def _files(self) -> dict[str, tuple[int, str]]:
        return {name: (output.num_bytes, output.digest()) for name, output in self.outputs.items()}

    def _record(self, partial: Path, position: Position) -> None:
        """Data first: what the record says is on the disk."""
        for output in self.outputs.values():
            output.flush()
        record = {"position": position, "counts": dataclasses.asdict(self.counts), "files": self._files()}
        write_atomically(partial / PROGRESS_FILE, json.dumps(record))

    def _finish(self, partial: Path, cache: DigestCache) -> None:
        for output in self.outputs.values():
            output.flush()
        files = self._files()
        record = {
            "format": FORMAT,
            "description": self.source.description,
            "dtype": self.encoder.dtype.name,
            "counts": dataclasses.asdict(self.counts),
            "files": files,
        }
        write_atomically(partial / STORE_FILE, json.dumps(record, indent=1))
        (partial / PROGRESS_FILE).unlink(missing_ok=True)
        for name, (_, digest) in files.items():  # known without reading it again
            cache.remember(self.folder / name, file_stat(partial / name), digest)
        partial.rename(self.folder)


class _Progress:
    """Says a line now and then, and nothing in the first seconds."""

    def __init__(self, say: Say) -> None:
        self._say, self._next, self.has_spoken = say, time.monotonic() + _FIRST_LINE_S, False

    def line(self, text: Callable[[], str]) -> None:
        if time.monotonic() >= self._next:
            self._say(text())
            self._next, self.has_spoken = time.monotonic() + _LINE_S, True


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


@contextlib.contextmanager
def _building(path: Path, description: str, say: Say) -> Iterator[None]:
    """Hold the lock; wait for another process that builds, and say so. A killed process gives it back."""
    has_spoken = False
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    if not has_spoken:
                        file.seek(0)
                        holder = file.read().strip() or "another process"
                        say(f"{description} is tokenized by {holder}: waiting until it is done")
                        has_spoken = True
                    time.sleep(0.2)
                    continue
                say(f"{path} cannot be locked against a second process: {error.strerror}")
            if os.fstat(file.fileno()).st_nlink == 0:  # its holder has just ended and removed it
                continue
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
