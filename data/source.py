"""The documents of a source, in a fixed order: files sorted by name, rows as they come. Each knows its file and row.

A document is a text, or with data=chat a `Conversation`. A row that cannot be read is a `BadRow`, which says why.
Megatron's files hold tokens already: `MegatronFile`.
"""

from __future__ import annotations

import glob
import io
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.schema import EXAMPLES, ConfigError, DataConfig, source_configs

_NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED = {*_CODECS, ".bz2", ".xz", ".lz4", ".zip"}
_BATCH_ROWS = 1024  # of parquet
_MAX_LISTED = 4  # files in a warning
_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # in folders of save_to_disk
_HUB_NAME = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]+\b")  # others are refused without asking it
_FIX = "correct the row, or leave out such rows with data.bad_rows=skip"
_ONE_A_LINE = (
    "write one object a line (jq -c '.[]' FILE, or jq -c . FILE if it is no list), or leave out such rows with "
    "data.bad_rows=skip"
)
_SHAREGPT_TO_MESSAGES = (
    'jq -c \'{messages: [.COLUMN[] | {role: ({human: "user", gpt: "assistant"}[.from] // .from), '
    "content: .value}]}' OLD > NEW"
)
_TO_COMPLETIONS = "jq -c '{prompt: .COLUMN, completion: .OTHER_COLUMN}' OLD > NEW"
_FIX_FILE = "give the whole file again, or leave out what cannot be read with data.bad_rows=skip"
# raised by damaged files: pyarrow's are ValueErrors and OSErrors, the last three come from compressed files
_UNREADABLE = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)


class CorpusError(ConfigError):
    """The corpus cannot be opened, has a row that cannot be read, or is too short."""


class Conversation(NamedTuple):
    """One row of data=chat: messages, or a prompt and its completion, both text or both messages."""

    messages: list[dict[str, Any]] | None
    prompt: Any = None
    completion: Any = None
    tools: Any = None


class BadRow(NamedTuple):
    """A row that cannot be read."""

    problem: str  # what is wrong and what to do


class Position(NamedTuple):
    """Where reading goes on: after so many rows of a file."""

    file: int = 0
    rows: int = 0


BEGINNING = Position()


class Row(NamedTuple):
    """One row of a source."""

    file: int  # its number in `Source.files`; 0 for a data set
    number: int  # in the file, from 1 on; of JSON lines the line
    content: str | Conversation | BadRow
    following: Position
    bytes_read: int  # of all files so far, about


@dataclass(frozen=True)
class Source:
    """Documents to read.

    `files` are all that is read, in order; `revision` says the version of a data set that is not here.
    """

    config: DataConfig
    description: str
    files: tuple[str, ...]
    revision: str | None = None

    @property
    def num_bytes(self) -> int | None:
        """Of its files; None for a data set."""
        return sum(map(os.path.getsize, self.files)) if self.config.name is None else None

    def where(self, file: int, number: int) -> str:
        """A row for people, as in "texts/a.jsonl, row 3"."""
        if self.config.name is not None:
            return f"{self.description}, row {number}"
        name = _shown(self.files[file])
        return name if self.config.source in ("stdlib", "text_files") else f"{name}, row {number}"

    def rows(self, start: Position = BEGINNING) -> Iterator[Row]:
        """The rows from a position on. Raises CorpusError if nothing can be read."""
        if self.config.name is not None:
            yield from self._data_set_rows(start.rows)
            return
        bytes_before = sum(map(os.path.getsize, self.files[: start.file]))
        for index in range(start.file, len(self.files)):
            size, skip = os.path.getsize(self.files[index]), start.rows if index == start.file else 0
            number = skip
            try:
                for number, content, share in self._file_rows(self.files[index], skip):
                    yield Row(index, number, content, Position(index, number), bytes_before + min(size, int(share)))
            except CorpusError:
                raise
            except FileNotFoundError as error:
                raise CorpusError(f"{self.files[index]} is gone: it was there when the files were listed") from error
            except _UNREADABLE as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                is_json = self.config.source == "parquet" and ".json" in Path(self.files[index]).name
                fix = "type data=jsonl, which reads JSON lines" if is_json else _FIX_FILE
                bad = BadRow(f"the file cannot be read from here on ({reason}): {fix}")
                yield Row(index, number + 1, bad, Position(index + 1), bytes_before + size)
            bytes_before += size

    def _file_rows(self, name: str, skip: int) -> Iterator[tuple[int, str | Conversation | BadRow, float]]:
        """Number, content, and how many of the file's bytes were read."""
        if self.config.source in ("stdlib", "text_files"):
            return self._text(name, skip)
        if name.endswith(".parquet") or self.config.source == "parquet":
            return self._parquet_rows(name, skip)
        return self._json_rows(name, skip)

    def _text(self, name: str, skip: int) -> Iterator[tuple[int, str | BadRow, float]]:
        if skip:
            return
        data = Path(name).read_bytes()
        content: str | BadRow
        try:
            content = data.decode("utf-8", "replace" if self.config.source == "stdlib" else "strict")
        except UnicodeDecodeError as error:
            content = BadRow(
                f"byte {error.start:,} is not UTF-8: convert the file (iconv -t utf-8), or leave out such files with "
                "data.bad_rows=skip"
            )
        yield 1, content, len(data)

    def _json_rows(self, name: str, skip: int) -> Iterator[tuple[int, str | Conversation | BadRow, float]]:
        codec, number = _CODECS.get(Path(name).suffix), 0
        compressed = _Decompressed(name, codec) if codec else None
        with io.BufferedReader(compressed, 2**20) if compressed else open(name, "rb", buffering=2**20) as lines:
            share = 0
            for number, line in enumerate(lines, 1):
                share = compressed.compressed_position if compressed else share + len(line)
                if number > skip and not line.isspace():
                    yield number, self._json_row(line, number), share
        if number == 0 and not skip:
            yield (
                1,
                BadRow(f"the file is empty: take it out of {files_setting(self.config)}, or add data.bad_rows=skip"),
                0,
            )

    def _json_row(self, line: bytes, number: int) -> str | Conversation | BadRow:
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            return BadRow(f"byte {error.start:,} is not UTF-8: {_FIX}")
        except ValueError as error:
            if number == 1 and line.strip() in (b"{", b"["):
                return BadRow(f"JSON over several lines: {_ONE_A_LINE}")
            return BadRow(f"broken JSON ({error}): {_FIX}")
        except RecursionError:
            return BadRow(f"JSON that is nested too deeply: {_FIX}")
        if not isinstance(row, dict):
            fix = _ONE_A_LINE if isinstance(row, list) and number == 1 else _FIX
            return BadRow(f"a {type(row).__name__}, no object with columns: {fix}")
        return self._content(row)

    def _parquet_rows(self, name: str, skip: int) -> Iterator[tuple[int, str | Conversation | BadRow, float]]:
        import pyarrow.parquet

        size = os.path.getsize(name)
        with pyarrow.parquet.ParquetFile(name) as file:
            columns = [column for column in self._columns if column in file.schema_arrow.names]
            if not columns:
                examples = {column.name: _example(column.type) for column in file.schema_arrow}
                raise CorpusError(f"{name}: {self._no_column(examples)}")
            num_rows, first = file.metadata.num_rows, 0
            if not num_rows and not skip:
                fix = f"take it out of {files_setting(self.config)}, or add data.bad_rows=skip"
                yield 1, BadRow(f"the file has no rows: {fix}"), 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                batches = file.iter_batches(_BATCH_ROWS, [group], columns) if end > skip else ()
                for batch in batches:
                    for index in range(max(0, skip - first), batch.num_rows):
                        number = first + index + 1
                        try:
                            row = {column: batch.column(column)[index].as_py() for column in columns}
                        except UnicodeDecodeError as error:
                            yield number, BadRow(f"byte {error.start:,} is not UTF-8: {_FIX}"), 0
                            continue
                        yield number, self._content_of_arrow(row), size * number / num_rows
                    first += batch.num_rows
                first = end

    def _data_set_rows(self, skip: int) -> Iterator[Row]:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError  # not an OSError

        number = skip
        try:
            dataset = _load_data_set(self.config, self.revision)
            columns = dataset.column_names
            if columns is not None and not any(column in columns for column in self._columns):
                examples = {column.name: _example(column.type) for column in dataset.features.arrow_schema}
                raise CorpusError(f"{self.description}: {self._no_column(examples)}")
            for number, row in enumerate(dataset.skip(skip) if skip else dataset, skip + 1):
                yield Row(0, number, self._content_of_arrow(row), Position(0, number), 0)
        except CorpusError:
            raise
        except (*_UNREADABLE, DatasetsError, HTTPError) as error:
            # for a file that was deleted after it was listed, `datasets` gives only the name
            reason = "no such file: " if isinstance(error, FileNotFoundError) and error.errno is None else ""
            reason += " ".join(str(error).split()) or type(error).__name__
            raise CorpusError(
                f"{self.description}, row {number + 1} cannot be read ({reason}): correct the data set, or if the "
                "network failed type the same command again"
            ) from error

    @property
    def _columns(self) -> tuple[str, ...]:
        """The columns that are read, if they are there."""
        if self.config.source == "chat":
            return self.config.messages_field, "prompt", "completion", "tools"
        return (self.config.text_field,)

    def _no_column(self, row: dict[str, Any]) -> str:
        """What to type instead, given a row or an example of one."""
        if self.config.source != "chat":
            problem = f"no column {self.config.text_field!r}"
            if chats := sorted(column for column, value in row.items() if _are_messages(value)):
                return f"{problem}, but conversations in column {chats[0]!r}: {_as_chat(chats[0])}"
            return f"{problem}: set data.text_field to one of {sorted(row)}"
        problem = f"no column {self.config.messages_field!r} of messages, and no prompt and completion"
        if lists := sorted(column for column, value in row.items() if isinstance(value, list)):
            return f"{problem}: set data.messages_field to one of {lists}"
        is_arrow = not self.files or any(Path(name).suffix in (".parquet", ".arrow") for name in self.files)
        how = "" if is_arrow else f" ({_TO_COMPLETIONS} makes them)"
        return f"{problem}: of the columns {sorted(row)} make rows of prompt and completion{how}"

    def _content_of_arrow(self, row: dict[str, Any]) -> str | Conversation | BadRow:
        if self.config.source == "chat":
            read = {column: _without_filled_keys(row[column]) for column in self._columns if column in row}
            row = {**row, **read}
        return self._content(row)

    def _content(self, row: dict[str, Any]) -> str | Conversation | BadRow:
        """What a row holds. A null is a text without characters."""
        if self.config.source == "chat":
            return self._conversation(row)
        field = self.config.text_field
        text = row.get(field, row)
        if isinstance(text, str):
            return text
        if text is None:
            return ""
        if text is row:
            return BadRow(f"{self._no_column(row)}, or leave out such rows with data.bad_rows=skip")
        if _are_messages(text):
            fix = f"{_as_chat(field)}, or leave out such rows with data.bad_rows=skip"
            return BadRow(f"conversations, not text, in column {field!r}: {fix}")
        others = sorted(column for column, value in row.items() if isinstance(value, str))  # parquet: only what is read
        choice = f"one of {others}" if others else "a column of text"
        return BadRow(
            f"{type(text).__name__}, not text, in column {field!r}: {_FIX}, or set data.text_field to {choice}"
        )

    def _conversation(self, row: dict[str, Any]) -> Conversation | BadRow:
        messages: Any = row.get(self.config.messages_field)
        prompt: Any = row.get("prompt")
        completion: Any = row.get("completion")
        try:
            tools = parsed_tools(row)
        except ValueError:
            return BadRow(f"broken JSON in column 'tools': {_FIX}")
        if messages is not None:
            problem = messages_problem(messages, self.config.messages_field)
            if problem:
                return BadRow(f"{problem} in column {self.config.messages_field!r}: {_FIX}")
            return Conversation(without_nulls(messages), tools=tools)
        if prompt is None or completion is None:
            return BadRow(f"{self._no_column(row)}, or leave out such rows with data.bad_rows=skip")
        if isinstance(prompt, str) and isinstance(completion, str):
            return Conversation(None, prompt, completion, tools)
        for column, value in (("prompt", prompt), ("completion", completion)):
            if problem := messages_problem(value, column):
                return BadRow(f"{problem} in column {column!r}, which may be text if both are: {_FIX}")
        return Conversation(None, without_nulls(prompt), without_nulls(completion), tools)


def parsed_tools(row: dict[str, Any]) -> Any:
    """The tools of a row, which may be JSON in a text; None if it has none. Raises ValueError for broken JSON."""
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None


def _are_messages(value: Any) -> bool:
    """Whether a column holds conversations, be they ShareGPT's."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def _as_chat(column: str) -> str:
    return "type data=chat" if column == "messages" else f"type data=chat data.messages_field={column}"


def _example(kind: Any) -> Any:
    """A value of an Arrow type, as far as `_no_column` looks at it."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return [_example(kind.value_type)]
    return {inner.name: None for inner in kind} if types.is_struct(kind) else None


def messages_problem(messages: Any, column: str) -> str | None:
    """Why a column's value is no conversation; None if it is one."""
    if not isinstance(messages, list) or not messages:
        return f"{'an empty list' if messages == [] else type(messages).__name__}, not messages,"
    for message in messages:
        if isinstance(message, dict) and "from" in message and "value" in message:
            conversion = _SHAREGPT_TO_MESSAGES.replace("COLUMN", column)
            return f"messages with from and value, as ShareGPT has them ({conversion} converts a file),"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message without a role"
        if message.get("content") is None and not message.get("tool_calls"):
            return "a message without content"
    return None


def without_nulls(messages: Any) -> list[dict[str, Any]]:
    """A key with null is one that a message lacks."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _without_filled_keys(value: Any) -> Any:
    """Arrow gives all structs of a column the same keys: those that were not written are null."""
    if isinstance(value, dict):
        return {key: _without_filled_keys(inner) for key, inner in value.items() if inner is not None}
    return [_without_filled_keys(inner) for inner in value] if isinstance(value, list) else value


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file. Of a damaged one all that can be read come before the error."""

    def __init__(self, name: str, codec: str) -> None:
        self._name, self._codec, self._num_read, self._is_damaged = name, codec, 0, False
        self._open()

    @property
    def compressed_position(self) -> int:
        """How many of the file's bytes were read."""
        return self._compressed.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(1 if self._is_damaged else len(buffer))
        except OSError:
            if self._is_damaged:
                raise
            # what this call had read before the error is lost: read it again, byte by byte
            self._is_damaged, left = True, self._num_read
            self._stream.close()
            self._open()
            while left:
                left -= len(self._stream.read(min(left, 2**20)))
            data = self._stream.read(1)
        buffer[: len(data)] = data
        self._num_read += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _open(self) -> None:
        import pyarrow

        self._compressed: Any = pyarrow.OSFile(self._name)
        self._stream: Any = pyarrow.CompressedInputStream(self._compressed, self._codec)


_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronFile:
    """Tokens that Megatron-LM's preprocess_data has written: a .bin of tokens, and an .idx with the documents' ends."""

    def __init__(self, name: str, setting: str = "data.files") -> None:
        """Raises CorpusError if the two files do not belong together or are cut off.

        Args:
            setting: that names it.
        """
        if not name.endswith(".bin"):
            raise CorpusError(f"{name} is no .bin: name these alone, as {setting}='{EXAMPLES['megatron']}'")
        self.name, index = name, str(Path(name).with_suffix(".idx"))
        advice = "give the whole pair of .bin and .idx that Megatron's tools/preprocess_data.py has written"
        try:
            with open(index, "rb") as file:
                if file.read(9) != _MEGATRON_MAGIC:
                    raise CorpusError(f"{index} is no index of Megatron's: {advice}")
                version = int.from_bytes(file.read(8), "little")
                code = int.from_bytes(file.read(1), "little")
                if version != 1 or code not in _MEGATRON_DTYPES:
                    raise CorpusError(f"{index} has version {version}, dtype {code}, not tokens of version 1: {advice}")
                num_sequences, num_documents = np.fromfile(file, "<u8", 2).tolist()
                if os.path.getsize(index) < file.tell() + 12 * num_sequences + 8 * num_documents:
                    raise CorpusError(f"{index} is cut off: {advice}")
                lengths = np.fromfile(file, "<i4", num_sequences)
                pointers = np.fromfile(file, "<i8", num_sequences)
                documents = np.fromfile(file, "<i8", num_documents)
            dtype = np.dtype(_MEGATRON_DTYPES[code])
            starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            needed, found = int(starts[-1]) * dtype.itemsize, os.path.getsize(name)
        except FileNotFoundError as error:
            raise CorpusError(f"{error.filename} is missing: {advice}") from error
        except (OSError, ValueError, MemoryError) as error:  # numbers are missing
            raise CorpusError(f"{index} cannot be read or is cut off ({error}): {advice}") from error
        if num_documents == 0 or documents[0] != 0 or documents[-1] != num_sequences:
            raise CorpusError(f"{index} is cut off or damaged: {advice}")
        if (np.diff(documents) < 0).any() or (lengths < 0).any():
            raise CorpusError(f"{index} is damaged, a length is negative: {advice}")
        if found != needed:
            raise CorpusError(f"{name} has {found:,} bytes, and its index {needed:,}: {advice}")
        if not np.array_equal(pointers, starts[:-1] * dtype.itemsize):
            raise CorpusError(f"{index} points to tokens in another order than {name} has them: {advice}")
        self.tokens: np.ndarray = np.memmap(name, dtype, "r") if needed else np.zeros(0, dtype)
        self.ends: np.ndarray = starts[documents[1:]]  # [N] of documents


def is_local(config: DataConfig) -> bool:
    """Whether reading the corpus with its tokenizer downloads nothing."""
    names = (config.tokenizer, *(source.name for source in source_configs(config).values()))
    return not any(is_on_hub(name) for name in names)


def is_on_hub(name: str | None) -> bool:
    """Whether reading what has this name asks the hub: it is not here, and the hub may have it."""
    return name is not None and not Path(name).exists() and _HUB_NAME.fullmatch(name) is not None


def _is_text_local(config: DataConfig) -> bool:
    return config.name is None or Path(config.name).exists()


def files_setting(config: DataConfig) -> str:
    """The setting that names the files: a source of documents to validate on has them as both."""
    is_validation = config.validation_files is not None and config.files == config.validation_files
    return "data.validation_files" if is_validation else "data.files"


def open_source(config: DataConfig) -> Source:
    """The configured source, which is no mixture. Raises CorpusError if it has no files or is not on the hub."""
    if config.name is not None:
        description = f"data.name={config.name}, split {config.split}"
        if not _is_text_local(config):
            return Source(config, description, (), "")
        names = glob.glob(f"{glob.escape(config.name)}/**", recursive=True)  # without hidden files, as load_dataset
        return Source(config, description, tuple(sorted(name for name in names if os.path.isfile(name))))
    setting = files_setting(config)
    description = "Python's standard library" if config.source == "stdlib" else f"{setting}={config.files}"
    files = _files(config)
    if not files:
        if config.source == "stdlib":
            raise CorpusError(f"{description} has no file to read: type data=text_files data.files='texts/*.txt'")
        folder = config.files if isinstance(config.files, str) else config.files[0]
        inside = os.path.join(folder, f"*{Path(EXAMPLES[config.source]).suffix}")
        raise CorpusError(f"{description} has no file to read, folders do not count: type {setting}='{inside}'")
    compressed = _COMPRESSED if config.source == "text_files" else _COMPRESSED - _CODECS.keys()
    if packed := next((name for name in files if Path(name).suffix in compressed), None):
        can = "unpack it" if config.source == "text_files" else "unpack it, or compress it with gzip or zstd"
        raise CorpusError(f"{packed}: data={config.source} does not read {Path(packed).suffix}: {can}")
    json_lines = [name for name in files if ".jsonl" in Path(name).suffixes]
    if config.source == "text_files" and json_lines:
        meant = "use data=jsonl, or data=chat for messages"
        raise CorpusError(f"{json_lines[0]}: data=text_files would train on its JSON as text: {meant}")
    return Source(config, description, tuple(files))


def hub_source(source: Source, revision: str | None = None) -> Source:
    """The source with the newest revision of its data set on the hub, or the one given. Raises CorpusError."""
    import huggingface_hub.constants
    from huggingface_hub.errors import HTTPError  # not an OSError

    if revision is None:
        try:
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set, and it was not tokenized before")
            # load_dataset would retry for 30 s
            revision = huggingface_hub.HfApi().dataset_info(str(source.config.name), timeout=10).sha
        except (OSError, ValueError, HTTPError) as error:
            raise _cannot_be_opened(source.config, error) from error
    return replace(source, revision=revision)


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    import huggingface_hub.constants

    return huggingface_hub.constants.HF_HUB_OFFLINE


def _load_data_set(config: DataConfig, revision: str | None) -> Any:
    datasets = _datasets()
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    saved = _saved_data_set(config)
    try:
        if saved is not None:  # whose skip also skips all; its rows may be of numpy or some columns
            return datasets.load_from_disk(str(saved)).with_format(None).to_iterable_dataset()
        return datasets.load_dataset(
            config.name, config.subset, split=config.split, streaming=True, revision=revision or None
        )
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        raise _cannot_be_opened(config, error) from error
    except IndexError as error:  # of load_from_disk
        raise _cannot_be_opened(config, ValueError("it has no rows")) from error


def _saved_data_set(config: DataConfig) -> Path | None:
    """The folder in which save_to_disk has written the data set, or its split; None if it has not.

    load_dataset would guess splits from names of folders, and read files that an earlier save_to_disk has left behind.

    Raises:
        CorpusError: if it has no such split or subset.
    """
    folder = Path(config.name or "")
    splits = sorted(file.parent.name for file in folder.glob(f"*/{_SAVED_DATASET}")) if saves_splits(config) else []
    if not splits and not (folder / _SAVED_DATASET).is_file():
        return None
    if config.subset is None and config.split in (splits or ["train"]):
        return folder / config.split if splits else folder
    wrong = f"split {config.split}" if config.subset is None else f"subset {config.subset}"
    how, advice = (
        "as one data set",
        "leave out data.split, data.validation_split and data.subset, or save a DatasetDict",
    )
    if splits:
        how, advice = f"with splits {', '.join(splits)}", "give these as data.split and data.validation_split alone"
    raise CorpusError(f"data.name={config.name} has no {wrong}: save_to_disk has written it {how}, so {advice}")


def saves_splits(config: DataConfig) -> bool:
    """Whether DatasetDict.save_to_disk has written the data set."""
    return config.name is not None and Path(config.name, _SAVED_SPLITS).is_file()


def _cannot_be_opened(config: DataConfig, error: Exception) -> CorpusError:
    return CorpusError(
        f"data.name={config.name} cannot be opened ({type(error).__name__}: {' '.join(str(error).split())}): check "
        "data.name, data.subset, data.split and the network, or use data=stdlib"
    )


def describe(config: DataConfig, num_tokens: int) -> str:
    """The source for people: its files and size, and how much of it `num_tokens` training tokens are."""
    tokenizer = f", tokenizer {config.tokenizer}" if config.tokenizer else ""
    if config.source == "mixture":
        shares = ", ".join(f"{name} {entry['weight']:g}" for name, entry in config.sources.items())
        return f"mixture of {shares}{tokenizer}: {num_tokens:,} tokens in these steps"
    if config.name is not None:
        name = f"{config.source}, {config.name}, split {config.split}{tokenizer}"
        return f"{name}: {num_tokens:,} tokens in these steps, of a size unknown here"
    files = _files(config)
    num_bytes = sum(map(os.path.getsize, files))
    source = config.source if config.source == "stdlib" else f"{config.source}, data.files={config.files}"
    text = f"{source}: {len(files):,} {'file' if len(files) == 1 else 'files'},"
    if config.source == "megatron":
        return f"{text} {num_bytes:,} bytes of tokens; {num_tokens:,} tokens in these steps"
    if config.tokenizer or config.source not in ("stdlib", "text_files"):  # nobody knows before all was tokenized
        return f"{text} about {num_bytes:,} bytes{tokenizer}; {num_tokens:,} tokens in these steps"
    size = max(1, num_bytes + len(files))  # a separator after each
    return f"{text} about {size:,} tokens; {num_tokens:,} in these steps, {num_tokens / size:.3g} epochs"


def overlap_warning(config: DataConfig) -> str | None:
    """If a file is trained on and validated on, be it under two names."""
    sources = source_configs(config)
    named = [source.validation_files for source in sources.values() if source.validation_files is not None]
    validated = {file for files in named for file in _named_files(files)}
    for name, source in sources.items():
        files = _named_files(source.files) if validated and source.files is not None else []
        both = [_shown(file) for file in files if file in validated]
        if not both:
            continue
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        setting = f"data.sources.{name}.files" if config.source == "mixture" else "data.files"
        others = [_shown(file) for file in files if file not in validated]
        alone = f", or type {setting}=[{','.join(others)}]" if 0 < len(others) <= _MAX_LISTED else ""
        return (
            f"{both[0]}{more} in {setting} is also in validation_files, so validation is on text that was trained on: "
            f"move it to a folder of its own{alone}"
        )
    return None


def _shown(file: str) -> str:
    """A file for people: below the working folder without it."""
    name = os.path.relpath(file)
    return file if name.startswith("..") else name


def _files(config: DataConfig) -> list[str]:
    """The files of a source, sorted."""
    if config.source == "stdlib":
        return stdlib_files()
    return _named_files(config.files)


def _named_files(files: Any) -> list[str]:
    """The files that a glob or a list of globs names, sorted."""
    patterns = [files] if isinstance(files, str) else files
    names = {name for pattern in patterns for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
    return [str(Path(name).resolve()) for name in sorted(names)]


def _datasets() -> Any:
    """The library. Importing it takes a second, so errors that need no data should not wait for it."""
    import datasets.config

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a CorpusError reports it
    datasets.config.TORCH_AVAILABLE = False  # else it imports torch for DataLoader: seconds before an error
    return datasets


def stdlib_files() -> list[str]:
    """The running interpreter's own library, without tests and installed packages, sorted."""
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - _NOT_LIBRARY_CODE  # os.walk skips these: site-packages alone takes a second
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)
