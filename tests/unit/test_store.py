"""The token store: what it holds, when it is made again, and that neither a kill nor damage changes it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conf.schema import DataConfig
from data import encoders
from data import store as store_module
from data.digests import CHUNK_BYTES, DigestCache, chunk_digests, digest_of
from data.source import CorpusError, Position
from data.store import TokenStore, open_counted, open_store, open_stores, open_validation_stores, validation_configs
from data.tokenizer import SEPARATOR
from tests.errors import names, refused

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["one", "two", "", "déjà vu"]
# tokenizes slowly, and records every batch
SLOW = """
import os, sys, time
from conf.schema import DataConfig
from data import encoders, store
store._RECORD_S, encoders._BATCH_ROWS, append = 0, 5, store._Build._append
def slow(*arguments):
    time.sleep(0.003)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    append(*arguments)
store._Build._append = slow
store.open_store(DataConfig(**eval(sys.argv[1])), "jsonl", lambda line: print(line, flush=True))
"""


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def jsonl(folder: Path, **data) -> DataConfig:
    return DataConfig(source="jsonl", files=f"{folder}/*.jsonl", token_store=f"{folder}/stores", **data)


def documents(store: TokenStore) -> list[list[int]]:
    return [tokens.tolist() for tokens in np.split(store.tokens, store.ends[:-1])]


def opened(config: DataConfig) -> store_module.OpenedStore:
    return open_counted(config, config.source, print)


def slow_build(config: DataConfig, gate: str = "/") -> subprocess.Popen:
    """A process that builds the store once the file `gate` exists."""
    data = repr({"source": "jsonl", "files": config.files, "token_store": config.token_store})
    command = [sys.executable, "-c", SLOW, data, gate]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)


def content(config: DataConfig) -> dict[str, bytes]:
    """Of the only store."""
    (folder,) = (path for path in Path(str(config.token_store)).iterdir() if (path / "store.json").exists())
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".bin"}


def test_a_store_holds_documents_and_their_ends(tmp_path, capsys):
    write(tmp_path / "a.jsonl", *TEXTS)
    config = jsonl(tmp_path)
    first = opened(config)
    assert documents(first.store) == [[*text.encode(), SEPARATOR] for text in TEXTS if text]
    assert first.store.lengths.tolist() == [4, 4, 10]
    assert (first.store.tokens.dtype, first.store.ends.dtype, first.store.trained) == (np.uint16, np.int64, None)
    assert (first.counts.num_empty, first.counts.num_skipped, first.counts.largest_token) == (1, 0, SEPARATOR)
    assert first.is_new
    assert not opened(config).is_new
    assert isinstance(first.store.tokens, np.memmap)
    assert capsys.readouterr().out == ""
    assert not list(Path(str(config.token_store)).glob("*.lock"))


def test_a_digest_of_documents_is_of_their_tokens_and_order_wherever_the_files_are(tmp_path):
    def digest(*files: tuple[str, ...]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, texts in enumerate(files):
            write(folder / f"{number}.jsonl", *texts)
        return opened(jsonl(folder)).store.digest

    first = digest(("one", "two"), ("three",))
    assert digest(("one", "two"), ("three",)) == first
    assert digest(("one",), ("two", "three")) == first
    others = [digest(("three",), ("one", "two")), digest(("one", "two", "three", "four")), digest(("one", "twothree"))]
    assert len({first, *others}) == 4


def test_the_cache_folder_of_the_user_is_the_default(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", *TEXTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = opened(DataConfig(source="jsonl", files=f"{tmp_path}/*.jsonl")).folder
    assert folder.parent == tmp_path / "cache" / "ring_attention" / "tokens"


def test_content_tokenizer_and_settings_make_another_store(tmp_path, tiny_llama):
    file = write(tmp_path / "a.jsonl", *TEXTS)
    config = jsonl(tmp_path)
    first = opened(config)
    assert opened(dataclasses.replace(config, shuffle_seed=1, sequence_length=7)).folder == first.folder
    folders = {first.folder, opened(dataclasses.replace(config, tokenizer=str(tiny_llama))).folder}
    stat = file.stat()
    file.write_text(file.read_text().replace("one", "won"))  # as long, at the same time
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = opened(config)
    assert documents(changed.store)[0] == [*b"won", SEPARATOR]
    folders.add(changed.folder)
    write(tmp_path / "b.jsonl", "more")
    folders.add(opened(config).folder)
    assert len(folders) == 4
    (tmp_path / "b.jsonl").unlink()
    file.rename(tmp_path / "c.jsonl")  # the content is the same
    assert not opened(config).is_new


@pytest.mark.parametrize("file", ["tokens.bin", "ends.bin", "store.json"])
@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone"])
def test_a_damaged_store_is_made_again(tmp_path, capsys, file, damage):
    write(tmp_path / "a.jsonl", *TEXTS)
    config = jsonl(tmp_path)
    first = opened(config)
    expected, path = documents(first.store), first.folder / file
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.unlink()  # a mapped file must not shrink
    if damage != "gone":
        path.write_bytes(data if damage == "flipped" else data[1:])
    again = opened(config)
    assert again.is_new
    assert documents(again.store) == expected
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    names(lines[0], str(first.folder), "damaged")


def test_damage_that_leaves_size_and_time_is_noticed(tmp_path, capsys):
    write(tmp_path / "a.jsonl", *TEXTS)
    config = jsonl(tmp_path)
    path = opened(config).folder / "tokens.bin"
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(config).is_new
    assert "digest" in capsys.readouterr().out


def test_a_kill_at_any_moment_changes_nothing(tmp_path):
    generator = random.Random(0)
    texts = ["x" * generator.randrange(50) for _ in range(1000)]
    for name in "abc":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "1.jsonl", *texts[:600])
        write(tmp_path / name / "2.jsonl", *texts[600:])
    opened(jsonl(tmp_path / "a"))
    config, num_kills = jsonl(tmp_path / "b"), 0
    partial = Path(str(config.token_store))
    while True:
        process = slow_build(config)
        deadline = time.monotonic() + 60
        while process.poll() is None and not list(partial.glob("*.partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.25 + num_kills / 20))  # longer each time: a busy machine is slow to build
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        num_kills += 1
        assert num_kills < 40
    assert num_kills
    assert content(config) == content(jsonl(tmp_path / "a"))
    assert not list(partial.glob("*.partial"))


def test_one_process_builds_and_others_wait(tmp_path):
    write(tmp_path / "a.jsonl", *(f"text {number}" for number in range(500)))
    config, gate = jsonl(tmp_path), tmp_path / "gate"
    processes = [slow_build(config, str(gate)) for _ in range(2)]
    waiting = [process.stdout for process in processes if process.stdout]
    readable, _, _ = select.select(waiting, [], [], 60)  # the one that does not build
    assert "is tokenized by" in readable[0].readline()  # another process, if that has not written its number yet
    gate.touch()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert not any("is tokenized" in output for output in outputs)
    assert not opened(config).is_new


def test_who_waited_does_not_read_the_new_store(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    config = DataConfig("jsonl", files=str(tmp_path / "a.jsonl"), token_store=str(tmp_path / "stores"))
    building, digested = store_module._building, []

    @contextlib.contextmanager
    def built_by_another(*arguments: Any):
        monkeypatch.setattr(store_module, "_building", building)
        open_store(config, "jsonl", print)
        monkeypatch.setattr("data.digests.chunk_digests", lambda path, *_: digested.append(Path(path).name) or [])
        with building(*arguments):
            yield

    monkeypatch.setattr(store_module, "_building", built_by_another)
    assert not open_counted(config, "jsonl", print).is_new
    assert digested == []


def test_what_a_killed_process_wrote_is_checked(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.jsonl", *(f"text {number}" for number in range(50)), "\ud800")
    bad = tmp_path / "b.jsonl"
    bad.write_text("{")
    config = jsonl(tmp_path)
    monkeypatch.setattr(encoders, "_BATCH_ROWS", 10)
    with pytest.raises(CorpusError):
        opened(config)
    (partial,) = Path(str(config.token_store)).glob("*.partial")
    assert json.loads((partial / "progress.json").read_text())["counts"]["num_documents"] == 50
    with (partial / "tokens.bin").open("r+b") as file:
        file.write(b"xx")
    skipping = opened(dataclasses.replace(config, bad_rows="skip"))
    assert (skipping.counts.num_documents, skipping.counts.num_skipped) == (51, 1)
    names(capsys.readouterr().out, str(partial), "damaged")


def test_skipping_goes_on_where_stopping_stopped_and_a_clean_store_serves_both(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", *(f"text {number}" for number in range(50)))
    stop = jsonl(tmp_path)
    skip = dataclasses.replace(stop, bad_rows="skip")
    assert opened(stop).folder == opened(skip).folder
    (tmp_path / "b.jsonl").write_text("{")
    monkeypatch.setattr(encoders, "_BATCH_ROWS", 10)
    with refused(CorpusError, "b.jsonl, row 1"):
        opened(stop)
    resumed, tokenize = [], store_module._Build._tokenize

    def noted(build: store_module._Build, partial: Path, position: Position) -> None:
        resumed.append(position.rows)
        tokenize(build, partial, position)

    monkeypatch.setattr(store_module._Build, "_tokenize", noted)
    assert opened(skip).counts.num_skipped == 1
    assert resumed == [50]
    with refused(CorpusError, "b.jsonl, row 1"):
        opened(stop)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", *TEXTS)
    key = store_module._key
    monkeypatch.setattr(store_module, "_key", lambda *a: (key(*a), write(file, "other"))[0])
    with refused(CorpusError, file, "changed while it was read"):
        opened(jsonl(tmp_path))


def test_a_full_disk_is_one_line_and_the_work_is_kept(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", *TEXTS)
    config = jsonl(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(store_module._Output, "flush", full)
        with pytest.raises(CorpusError) as caught:
            opened(config)
    names(str(caught.value), config.token_store, "No space left on device", "data.token_store=FOLDER")
    assert opened(config).is_new


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    write(tmp_path / "a.jsonl", *TEXTS)
    (tmp_path / "file").write_text("")
    with refused(CorpusError, tmp_path / "file", "data.token_store=FOLDER"):
        opened(dataclasses.replace(jsonl(tmp_path), token_store=str(tmp_path / "file")))


def test_all_sources_of_a_mixture_and_their_validation_have_stores(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "one"), write(tmp_path / "b.jsonl", "two")
    sources = {
        "x": {"source": "jsonl", "files": str(a), "validation_files": str(b), "weight": 0.5},
        "y": {"source": "jsonl", "files": [str(a), str(b)], "weight": 0.5},
    }
    config = DataConfig(source="mixture", sources=sources, token_store=str(tmp_path / "stores"))
    stores = open_stores(config, 257, print)
    assert {name: len(store.ends) for name, store in stores.items()} == {"x": 1, "y": 2}
    validation = open_validation_stores(config, 257, print)
    assert documents(validation["x"]) == [[*b"two", SEPARATOR]]
    assert [*validation] == ["x"]
    assert open_validation_stores(jsonl(tmp_path), 257, print) == {}


def test_all_formats_have_equal_tokens(tmp_path, tiny_llama):
    texts = ["def f(x):\n    return x", "déjà vu 漢字", "a sequence " * 50]
    write(tmp_path / "a.jsonl", *texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "set")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    same: dict[str, Any] = {"tokenizer": str(tiny_llama), "token_store": str(tmp_path / "stores")}
    found = [
        documents(open_store(DataConfig(**data, **same), "any", print))
        for data in (
            {"source": "jsonl", "files": f"{tmp_path}/a.jsonl"},
            {"source": "parquet", "files": f"{tmp_path}/a.parquet"},
            {"source": "hub", "name": f"{tmp_path}/set"},
            {"source": "text_files", "files": f"{tmp_path}/*.txt"},
        )
    ]
    assert len(found[0]) == 3
    assert all(one == found[0] for one in found)


def test_a_data_set_of_the_hub_is_known_by_its_revision_also_offline(tmp_path, monkeypatch):
    texts = {"old": "one", "new": "two"}
    newest, read = ["old"], []

    def info(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(sha=newest[0])

    def load(_: DataConfig, revision: str) -> datasets.IterableDataset:
        read.append(revision)
        return datasets.Dataset.from_list([{"text": texts[revision]}]).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("data.source._load_data_set", load)
    config = DataConfig(source="hub", name="owner/set", token_store=str(tmp_path))
    assert documents(opened(config).store) == documents(opened(config).store) == [[*b"one", SEPARATOR]]
    assert read == ["old"]
    newest[0] = "new"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert documents(opened(config).store) == [[*b"one", SEPARATOR]]
    with refused(CorpusError, "data.name=owner/other", "HF_HUB_OFFLINE"):
        opened(dataclasses.replace(config, name="owner/other"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert documents(opened(config).store) == [[*b"two", SEPARATOR]]
    assert read == ["old", "new"]


def test_progress_says_how_far_how_fast_and_how_long(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.jsonl", *["some text"] * 100)
    monkeypatch.setattr(encoders, "_BATCH_ROWS", 10)
    monkeypatch.setattr(store_module, "_FIRST_LINE_S", -1)
    monkeypatch.setattr(store_module, "_LINE_S", 0)
    opened(jsonl(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tokenizing")]
    assert len(lines) == 10
    names(lines[4], "50.0%", "50 documents", "500 tokens", "tokens/s", "left")


def megatron(path: Path, documents: list[list[list[int]]], dtype: str, code: int) -> None:
    """As Megatron-LM's IndexedDatasetBuilder writes it: documents of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    np.array([token for sequence in sequences for token in sequence], dtype).tofile(path.with_suffix(".bin"))
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code]))
        file.write(len(sequences).to_bytes(8, "little") + (len(documents) + 1).to_bytes(8, "little"))
        file.write(lengths.tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.cumsum([0, *map(len, documents)]).astype("<i8").tobytes())


@pytest.mark.parametrize(
    ("dtype", "code", "stored"), [("<u2", 8, np.uint16), ("<i4", 4, np.int32), ("<i8", 5, np.int32)]
)
def test_tokens_of_megatron_are_taken_as_they_are(tmp_path, monkeypatch, dtype, code, stored):
    monkeypatch.setattr(encoders, "_MEGATRON_BATCH", 3)
    megatron(tmp_path / "a", [[[1, 2], [3]], [[]], [[4, 5, 6, 7]]], dtype, code)
    megatron(tmp_path / "b", [[[8]]], dtype, code)
    config = DataConfig(source="megatron", files=f"{tmp_path}/*.bin", token_store=f"{tmp_path}/stores")
    first = opened(config)
    assert documents(first.store) == [[1, 2, 3], [4, 5, 6, 7], [8]]
    assert first.store.tokens.dtype == stored
    assert (first.counts.num_empty, first.counts.largest_token) == (1, 8)
    open_stores(config, 9, print)
    with refused(CorpusError, "token 8", "model has 8", "model.vocab_size=9"):
        open_stores(config, 8, print)


@pytest.mark.parametrize(("ending", "part"), [("bin", "bytes"), ("idx", "cut off")])
def test_cut_files_of_megatron_are_refused(tmp_path, ending, part):
    megatron(tmp_path / "a", [[[1, 2], [3]], [[4, 5, 6, 7]]], "<u2", 8)
    config = DataConfig(source="megatron", files=f"{tmp_path}/*.bin", token_store=f"{tmp_path}/stores")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(path.read_bytes()[:-2])
    with refused(CorpusError, path, part):
        opened(config)
    path.unlink()
    if ending == "idx":
        with refused(CorpusError, path, "missing"):
            opened(config)


def test_a_digest_is_of_the_content_and_remembered_once_the_file_is_old(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    cache = DigestCache(tmp_path / "digests.json")
    digest = cache.file(path)
    cache.save()
    assert not (tmp_path / "digests.json").exists()  # it may still change within the same time stamp
    stat = path.stat()
    cache.remember(path, [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], "remembered")
    cache.save()
    assert DigestCache(tmp_path / "digests.json").file(path) == "remembered" != digest
    path.write_bytes(b"abd")
    assert DigestCache(tmp_path / "digests.json").file(path) not in ("remembered", digest)


def test_an_output_that_resumes_has_the_digest_of_one_that_did_not(tmp_path, monkeypatch):
    monkeypatch.setattr("data.digests.CHUNK_BYTES", 16)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 16)
    assert CHUNK_BYTES > 16
    one = store_module._Output(tmp_path / "one")
    for size in (3, 13, 16, 40, 0, 7):
        one.append(np.arange(size, dtype=np.uint8))
        one.flush()
        assert one.digest() == digest_of(chunk_digests(tmp_path / "one", one.num_bytes))
        (tmp_path / "two").write_bytes((tmp_path / "one").read_bytes() + b"more")
        two = store_module._Output(tmp_path / "two")
        assert two.resume(one.num_bytes, one.digest())
        two.append(np.arange(20, dtype=np.uint8))
        two.flush()
        assert two.digest() == digest_of(chunk_digests(tmp_path / "two", two.num_bytes))
        two.close()
    one.close()


def test_validation_files_beside_a_data_set_are_opened_as_files(tmp_path):
    rows = tmp_path / "valid.jsonl"
    rows.write_text('{"text": "some text"}\n')
    config = DataConfig(source="chat", name="OWNER/NAME", subset="main", split="test", validation_files=str(rows))
    validates = validation_configs(config)["chat"]
    assert (validates.files, validates.name, validates.subset, validates.split) == (str(rows), None, None, "train")
