"""Whether the loss is of documents that the run of evaluate.model held out, and is measured as the run validates.

The launcher's parent asks before ranks start. Documents that train are refused, other differences become warnings.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import LOSS_TASK, Config, ConfigError, DataConfig, source_configs
from conf.stages import length_at
from data.corpus import Corpus, Pack, validation_name, validation_packs
from data.documents import Documents, hold_out, usable_documents
from data.feed import packs_after
from data.source import CorpusError, open_source
from data.store import TokenStore, validation_configs
from recipes.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest

_CHANGE_LOSS = ("packing", "document_mask", "long_documents", "shuffle_window")
_SAY_WHICH = ("files", "name", "subset", "split", "text_field", "messages_field")  # documents of a source
_SAY_WHICH_VALIDATE = ("validation_files", "validation_split")
_NUM_TRIED = 4  # numbers of sequences: the largest does not fit if it needs the rest of a document that the run cut


def check_held_out(config: Config, corpus: Corpus) -> list[str]:
    """What to warn of; nothing unless evaluate.model is a run's checkpoint and a loss is asked for.

    Args:
        config: as `resolve_source` returns it.
        corpus: of config.data.

    Raises:
        ConfigError: if the run trained on documents whose loss would be measured, or that cannot be told.
    """
    folder = Path(config.evaluate.model or "")
    if LOSS_TASK not in config.evaluate.tasks or not (folder / MANIFEST_FILE).exists():
        return []
    manifest = read_manifest(folder)
    known = {field.name for field in dataclasses.fields(DataConfig)}
    try:
        settings = {name: value for name, value in manifest.config["data"].items() if name in known}
        run = DataConfig(**_where_they_are(settings, manifest.documents or {}, config.data, corpus.digests() or {}))
        sources = source_configs(run)
        read_by_run = {name: _read(source) for name, source in sources.items()}
        validates_run = {name: _read(source) for name, source in validation_configs(run).items()}
    except ConfigError as error:  # its files are not here
        return [f"nobody can tell whether the run of evaluate.model trained on these documents: {error}"]
    same: dict[str, str] = {}  # the source of the run whose documents each source holds out
    others = []
    own = validation_configs(config.data)
    for name, source in source_configs(config.data).items():
        documents = own.get(name, source)
        read = _read(documents)
        shared = [run_name for run_name, of_run in read_by_run.items() if set(read) & set(of_run)]
        for run_name in shared:
            _check_source(source, name in own, sources[run_name], run, run_name in validates_run)
            same[name] = run_name
        if not shared and read not in validates_run.values():
            others.append(documents)
    stores = {run_name: corpus.stores[corpus.names.index(name)] for name, run_name in same.items()}
    if manifest.documents:
        changed = [name for name, store in stores.items() if manifest.documents[name] != store.digest]
        if changed:
            raise _documents_changed(run, f"those of {' and '.join(changed)} are others")
    elif stores.keys() == sources.keys():  # the run's whole corpus is here
        _check_unchanged(manifest, run, {name: stores[name] for name in sources})
    for name in same:
        _check_packs(corpus, name, run)
    return [*_other_documents(others, run), *_other_settings(config.data, run)]


def _where_they_are(
    settings: dict[str, Any], documents: dict[str, str], now: DataConfig, digests: dict[str, str]
) -> dict[str, Any]:
    """The run's data settings, with the paths of `now` for documents of the same digest: their files may have moved."""
    settings = copy.deepcopy(settings)
    own = {validation_name(name): source for name, source in validation_configs(now).items()}
    here = {digests[name]: source for name, source in (source_configs(now) | own).items() if name in digests}
    entries = settings["sources"] if settings["source"] == "mixture" else {settings["source"]: settings}
    for name, entry in entries.items():
        source, validates = (here.get(documents.get(one, "")) for one in (name, validation_name(name)))
        places: dict[str, Any] = {}
        if source is not None and source.source == entry["source"]:
            places = {field: getattr(source, field) for field in ("files", "name", "subset", "split")}
        if validates is not None and validates.source == entry["source"]:
            split = validates.split if validates.files is None else None
            places |= {"validation_files": validates.files, "validation_split": split}
        entry.update({field: at for field, at in places.items() if at != entry.get(field, getattr(DataConfig, field))})
    return settings


def _read(source: DataConfig) -> tuple[str, ...]:
    """The files or the data set that a source reads."""
    if source.name is None:
        return open_source(source).files
    name = str(Path(source.name).resolve()) if Path(source.name).exists() else source.name
    return (f"{name} {source.subset} {source.split}",)


def _check_source(source: DataConfig, is_own: bool, of_run: DataConfig, run: DataConfig, has_own: bool) -> None:
    """Raises ConfigError unless a source that shares files with the run's holds out the same order of documents."""
    if is_own:
        own = _typed(source, _SAY_WHICH_VALIDATE)
        raise ConfigError(f"{own} has documents that the run of evaluate.model trained on: {_give_others(source)}")
    typed = _typed(of_run, ("source", *_SAY_WHICH))
    if has_own:
        validates = _typed(of_run, ("source", *_SAY_WHICH, *_SAY_WHICH_VALIDATE))
        raise ConfigError(
            f"the run of evaluate.model trained on all of {typed} and held out none of it: type {validates}"
        )
    if run.stream:
        raise ConfigError(
            f"the run of evaluate.model read {typed} with data.stream=true and held out its first documents, "
            f"which an evaluation cannot read: {_give_others(source)}"
        )
    now, before = ((_read(one), one.source, *_hold_out_settings(one)) for one in (source, of_run))
    if now != before:
        names = ("source", *_SAY_WHICH, "shuffle_seed", "long_documents", "tokenizer")
        differing = [name for name in names if getattr(source, name) != getattr(of_run, name)]
        differing = differing or ["files"]  # globs of the same text, read elsewhere
        raise ConfigError(
            f"{_settings(source, differing)} holds out other documents than the run of evaluate.model, which may "
            f"have trained on them: type {_settings(of_run, differing)}, or {_give_others(source)}"
        )


def _hold_out_settings(source: DataConfig) -> tuple[object, ...]:
    """What decides the tokens of documents and their seeded order, beside the files."""
    tokenizer = source.tokenizer
    if tokenizer and Path(tokenizer).exists():
        tokenizer = str(Path(tokenizer).resolve())
    return source.text_field, source.messages_field, tokenizer, source.shuffle_seed, source.long_documents


def _check_unchanged(manifest: Manifest, run: DataConfig, stores: dict[str, TokenStore]) -> None:
    """Raises ConfigError if the last sequence that the run read is another one now: others may be held out, too.

    For checkpoints without digests, which tell nothing else. A document more or less may leave this sequence as it is.
    """
    if manifest.last_read is None:
        return
    weights = {name: entry["weight"] for name, entry in run.sources.items()} if run.sources else None
    try:
        corpus = Corpus(stores, run, weights).of_length(length_at(run, manifest.step))
        packs_after(corpus, manifest.last_read)
    except CorpusError as error:
        raise _documents_changed(run, "its last sequence is another one") from error


def _documents_changed(run: DataConfig, how: str) -> ConfigError:
    return ConfigError(
        f"the documents have changed since the run of evaluate.model ({how}), so nobody can tell which of them it "
        f"trained on: give those that it read, or {_give_others(run)}"
    )


def _check_packs(corpus: Corpus, name: str, run: DataConfig) -> None:
    """Raises ConfigError if a token of the source's packs is of no document that the run held out."""
    store, now = corpus.stores[corpus.names.index(name)], corpus.config
    held_out, _ = hold_out(usable_documents(store, 0, run), run)
    packs = corpus.validation()[name]
    if not (num_trained := _num_outside(packs, held_out)):
        return
    remedies = [_give_others(now)]
    if num := _largest_number(store, now, run, held_out):
        remedies.insert(0, f"type data.validation_sequences={num}")
    elif now.sequence_length != run.sequence_length:
        remedies.insert(
            0, f"type evaluate.lengths=[{run.sequence_length}] data.validation_sequences={run.validation_sequences}"
        )
    raise ConfigError(
        f"the run of evaluate.model did not hold out {num_trained:,} of the {sum(p.num_tokens for p in packs):,} "
        f"tokens of {name} whose loss would be measured: it held out data.validation_sequences="
        f"{run.validation_sequences} x {run.sequence_length:,} tokens, and these are {now.validation_sequences} x "
        f"{now.sequence_length:,}: {', or '.join(remedies)}"
    )


def _num_outside(packs: Iterable[Pack], documents: Documents) -> int:
    """The tokens of packs that are in none of these documents."""
    order = np.argsort(documents.starts)
    starts, stops, outside = documents.starts[order], documents.stops[order], 0
    for piece in itertools.chain.from_iterable(pack.pieces for pack in packs):
        at = int(np.searchsorted(starts, piece.start, "right")) - 1
        if at < 0 or piece.stop > stops[at]:
            outside += piece.stop - piece.start
    return outside


def _largest_number(store: TokenStore, now: DataConfig, run: DataConfig, held_out: Documents) -> int | None:
    """The most sequences of this length whose documents the run held out."""
    largest = min(now.validation_sequences, run.validation_sequences * run.sequence_length // now.sequence_length)
    for num in range(largest, max(0, largest - _NUM_TRIED), -1):
        fewer = dataclasses.replace(now, validation_sequences=num)
        try:
            packs = validation_packs(hold_out(usable_documents(store, 0, fewer), fewer)[0], store, fewer, num)
        except CorpusError:  # no token of these is trained
            return None
        if not _num_outside(packs, held_out):
            return num
    return None


def _other_documents(others: list[DataConfig], run: DataConfig) -> list[str]:
    """A warning if documents are none that the run read."""
    if not others:
        return []
    loss_of = " and ".join(_typed(one, ("source", *_SAY_WHICH)) for one in others)
    names = ("source", "sources", *_SAY_WHICH, *_SAY_WHICH_VALIDATE)
    return [
        f"the loss is of {loss_of}, and the run of evaluate.model read other files: type {_typed(run, names)} for "
        "documents that it held out"
    ]


def _other_settings(now: DataConfig, run: DataConfig) -> list[str]:
    """A warning if the same documents would have another loss than in the run's validations."""
    names = [name for name in _CHANGE_LOSS if getattr(now, name) != getattr(run, name)]
    if now.packing == "concatenate" == run.packing and "shuffle_window" in names:
        names.remove("shuffle_window")
    if not names:
        return []
    return [
        f"{_settings(now, names)} gives another loss than the run of evaluate.model has in its validations, which had "
        f"{_settings(run, names)}: type that to compare the two"
    ]


def _typed(data: DataConfig, names: Iterable[str]) -> str:
    """The settings of these names that are not at their defaults; the source always."""
    return _settings(data, [n for n in names if n == "source" or getattr(data, n) != getattr(DataConfig, n)])


def _settings(data: DataConfig, names: Iterable[str]) -> str:
    """As a user types them."""
    values = {"data" if name == "source" else f"data.{name}": _as_typed(getattr(data, name)) for name in names}
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def _as_typed(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_as_typed(one)}' for name, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


def _give_others(data: DataConfig) -> str:
    """What to type for documents that the run did not read."""
    if data.source in ("stdlib", "mixture"):
        return "type data=text_files data.files=FILES that the run did not read"
    name = "split" if data.name is not None else "files"
    return f"type data.validation_{name}={name.upper()} that the run did not read"
