"""The sources of text, all read with `datasets` as a stream of documents."""

from __future__ import annotations

import glob
import lzma
import os
import random
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conf.schema import ConfigError, DataConfig

_NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


class CorpusError(ConfigError):
    """The corpus cannot be opened or is too short."""


def is_local(config: DataConfig) -> bool:
    """Whether the corpus and its tokenizer are on this machine, so that reading it downloads nothing."""
    return _is_text_local(config) and (config.tokenizer is None or Path(config.tokenizer).exists())


def _is_text_local(config: DataConfig) -> bool:
    return config.source != "hub" or Path(str(config.name)).exists()


class Documents:
    """The documents of a data set, in the same order each time. Iterating raises CorpusError if it cannot be read."""

    def __init__(self, dataset: Iterable[dict], text_field: str, description: str) -> None:
        self._dataset, self._text_field, self.description = dataset, text_field, description

    def __iter__(self) -> Iterator[str]:
        from datasets.exceptions import DatasetsError

        try:
            for row in self._dataset:
                text = row.get(self._text_field)
                if isinstance(text, str):
                    yield text
                elif text is not None or self._text_field not in row:
                    found = f"{type(text).__name__}, not text, in its" if self._text_field in row else "no"
                    raise CorpusError(
                        f"{self.description} has {found} column {self._text_field!r}: set data.text_field to one of "
                        f"{sorted(row)}"
                    )
        except CorpusError:
            raise
        # pyarrow raises ValueErrors; truncated or damaged compressed files raise the last three
        except (OSError, ValueError, DatasetsError, EOFError, zlib.error, lzma.LZMAError) as error:
            # for a file that was deleted after it was listed, `datasets` gives only the name
            reason = "no such file: " if isinstance(error, FileNotFoundError) and error.errno is None else ""
            raise CorpusError(f"{self.description} cannot be read: {reason}{error}") from error


def open_documents(config: DataConfig) -> Documents:
    """The documents of the configured source, in a fixed order. Raises CorpusError if it cannot be opened."""
    return SOURCES[config.source](config)


def describe(config: DataConfig, num_tokens: int) -> str:
    """The source for people: its files and size, and how much of it `num_tokens` training tokens are."""
    tokenizer = f", tokenizer {config.tokenizer}" if config.tokenizer else ""
    if config.source == "hub":
        name = f"hub, {config.name}, split {config.split}{tokenizer}"
        return f"{name}: {num_tokens:,} tokens in these steps, of a size unknown here"
    files = _files(config)
    num_bytes = sum(map(os.path.getsize, files))
    source = config.source if config.source == "stdlib" else f"{config.source}, data.files={config.files}"
    text = f"{source}: {len(files):,} files, about"
    if config.tokenizer:  # how many tokens that is nobody knows before all of it was tokenized
        return f"{text} {num_bytes:,} bytes of text{tokenizer}; {num_tokens:,} tokens in these steps"
    size = max(1, num_bytes + len(files))  # a separator after each
    return f"{text} {size:,} tokens; {num_tokens:,} in these steps, {num_tokens / size:.3g} epochs"


def _files(config: DataConfig) -> list[str]:
    """The files of stdlib or text_files, sorted."""
    if config.source == "stdlib":
        return stdlib_files()
    patterns = [config.files] if isinstance(config.files, str) else config.files
    names = {name for pattern in patterns for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
    return [str(Path(name).resolve()) for name in sorted(names)]


def _open_files(config: DataConfig) -> Documents:
    description = "Python's standard library" if config.source == "stdlib" else f"data.files={config.files}"
    files = _files(config)
    if not files:
        raise CorpusError(f"{description} has no file to read: use data=text_files data.files='texts/*.txt'")
    random.Random(config.shuffle_seed).shuffle(files)
    dataset = _datasets().load_dataset(
        "text",
        data_files=[glob.escape(name) for name in files],
        sample_by="document",
        encoding_errors="replace",
        split="train",
        streaming=True,
    )
    return Documents(dataset, "text", description)


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


def _open_hub(config: DataConfig) -> Documents:
    datasets = _datasets()
    import huggingface_hub
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # not an OSError

    description, name = f"data.name={config.name}", str(config.name)
    try:
        if not _is_text_local(config) and not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(name, timeout=10)  # load_dataset retries for 30 s
        dataset = datasets.load_dataset(name, config.subset, split=config.split, streaming=True)
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        raise CorpusError(
            f"{description} cannot be opened ({type(error).__name__}: {error}): check data.name, data.subset, "
            "data.split and the network, or use data=stdlib"
        ) from error
    return Documents(dataset, config.text_field, description)


SOURCES = {"stdlib": _open_files, "text_files": _open_files, "hub": _open_hub}
