"""Sources: which documents each gives, in which order, and how it describes itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from conf.schema import DataConfig
from data.source import (
    BEGINNING,
    CorpusError,
    MegatronFile,
    describe,
    is_local,
    open_source,
    overlap_warning,
    stdlib_files,
)
from data.store import open_store
from tests.errors import names, refused

TEXTS = ["one", "two\nlines", "déjà vu 漢字", "four"]


def texts(**data) -> list[str]:
    return [str(row.content) for row in open_source(DataConfig(**data)).rows()]


def json_lines(*values: object, field: str = "text") -> bytes:
    return "".join(json.dumps({field: value, "other": 1}) + "\n" for value in values).encode()


def test_the_standard_library_excludes_tests_and_installed_packages():
    files = stdlib_files()
    assert any(name.endswith("/json/decoder.py") for name in files)
    assert all(name.endswith(".py") for name in files)
    assert not any(f"/{folder}/" in name for name in files for folder in ("site-packages", "test", "tests"))
    assert files == sorted(set(files))


def test_every_format_gives_the_same_texts(tmp_path):
    plain = json_lines(*TEXTS)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain[:20]) + gzip.compress(plain[20:]))  # as of cat
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.Codec("zstd").compress(plain, asbytes=True))
    table = pyarrow.table({"other": [1] * 4, "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_bytes(plain)
    assert texts(source="text_files", files=f"{tmp_path}/*.txt") == TEXTS
    for ending in ("", ".gz", ".zst"):
        assert texts(source="jsonl", files=f"{tmp_path}/a.jsonl{ending}") == TEXTS
    assert texts(source="parquet", files=f"{tmp_path}/a.parquet") == TEXTS
    assert texts(source="hub", name=str(tmp_path / "set")) == TEXTS
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    for name in ("saved", "splits", "splits/train"):
        assert texts(source="hub", name=str(tmp_path / name)) == TEXTS


@pytest.mark.parametrize(("setting", "value"), [("split", "test"), ("subset", "small")])
def test_one_saved_data_set_has_no_splits_and_subsets(tmp_path, setting, value):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    with refused(CorpusError, f"data.name={name}", f"{setting} {value}", f"data.{setting}", "data.validation_split"):
        texts(source="hub", name=name, **{setting: value})


def test_saved_splits_are_those_of_the_last_save(tmp_path):
    """load_dataset would take train_sft for a part of train, and read the files of both saves."""
    name = str(tmp_path / "splits")
    of_texts = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": of_texts}).save_to_disk(name, num_shards={"train": 2})
    others = datasets.Dataset.from_dict({"text": ["other"]})
    empty = others.select([])
    splits: Any = {"train": of_texts.with_format("numpy", columns=[]), "train_sft": others, "test": empty}
    datasets.DatasetDict(splits).save_to_disk(name)
    assert texts(source="hub", name=name) == TEXTS
    assert texts(source="hub", name=name, split="train_sft") == ["other"]
    with refused(CorpusError, f"data.name={name}", "split validation", "test, train, train_sft", "data.split"):
        texts(source="hub", name=name, split="validation")
    with refused(CorpusError, f"data.name={name}", "no rows"):
        texts(source="hub", name=name, split="test")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text_files", "hub", "saved"])
def test_reading_goes_on_at_any_row(tmp_path, kind):
    for name in "ab":
        if kind == "parquet":
            table = pyarrow.table({"text": [f"{name}{number}" for number in range(7)]})
            pyarrow.parquet.write_table(table, tmp_path / f"{name}.{kind}", row_group_size=3)
        else:
            content = json_lines(*(f"{name}{number}" for number in range(7)))
            ending = ".txt" if kind == "text_files" else ".jsonl"
            (tmp_path / f"{name}{ending}").write_bytes(content + b"\n")  # a blank line is no row
    where: dict[str, Any] = {"name": str(tmp_path)} if kind == "hub" else {"files": f"{tmp_path}/*"}
    if kind == "saved":
        datasets.Dataset.from_json(f"{tmp_path}/*.jsonl", cache_dir=tmp_path).save_to_disk(tmp_path / "set")
        kind, where = "hub", {"name": str(tmp_path / "set")}
    source = open_source(DataConfig(source=kind, **where))
    rows = list(source.rows())
    assert len(rows) == (2 if kind == "text_files" else 14)
    assert list(source.rows(BEGINNING)) == rows
    for number, row in enumerate(rows):
        rest = [(row.file, row.number, row.content) for row in source.rows(row.following)]
        assert rest == [(row.file, row.number, row.content) for row in rows[number + 1 :]]


def test_bytes_of_the_standard_library_that_are_not_utf8_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "noise.py").write_bytes(b"a\xff\x00b")
    monkeypatch.setattr("data.source.stdlib_files", lambda: [str(tmp_path / "noise.py")])
    assert texts(source="stdlib") == ["a\ufffd\0b"]


def test_files_are_sorted_by_name_and_read_once(tmp_path):
    for name in "cbadef":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts(source="text_files", files=[f"{tmp_path}/[b-c].txt", f"{tmp_path}/*.txt"]) == list("abcdef")


def test_a_null_is_a_text_without_characters(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines("one", None, "two", field="body"))
    assert texts(source="jsonl", files=f"{tmp_path}/a.jsonl", text_field="body") == ["one", "", "two"]


def test_a_folder_is_not_a_text_file(tmp_path):
    for source, suffix in (("text_files", "txt"), ("chat", "jsonl"), ("megatron", "bin")):
        with refused(CorpusError, f"data.files={tmp_path}", "folders", f"data.files='{tmp_path}/*.{suffix}'"):
            open_source(DataConfig(source=source, files=str(tmp_path)))


def test_a_python_without_its_library_is_told_to_read_files(monkeypatch):
    monkeypatch.setattr("data.source.stdlib_files", list)
    with refused(CorpusError, "standard library", "data=text_files", "data.files='texts/*.txt'"):
        open_source(DataConfig())


@pytest.mark.parametrize(("source", "name"), [("jsonl", "a.jsonl.bz2"), ("text_files", "a.txt.gz")])
def test_a_compression_that_is_not_read_is_named(tmp_path, source, name):
    (tmp_path / name).write_bytes(b"packed")
    with refused(CorpusError, tmp_path / name, f"data={source}", "unpack"):
        open_source(DataConfig(source=source, files=str(tmp_path / "*")))


def test_a_glob_of_megatron_that_has_more_than_tokens_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(b"")
    with refused(CorpusError, tmp_path / "a.idx", "data.files='a.bin'"):
        MegatronFile(str(tmp_path / "a.idx"))


@pytest.mark.parametrize("choice", [{"split": "nosuch"}, {"name": "not/a/name"}])
def test_the_error_of_a_data_set_that_cannot_be_opened_says_what_to_check(tmp_path, choice):
    (tmp_path / "rows.jsonl").write_bytes(json_lines("text"))
    data = {"source": "hub", "name": str(tmp_path), **choice}
    with pytest.raises(CorpusError) as caught:
        open_store(DataConfig(**data, token_store=str(tmp_path / "store")), "hub", print)
    names(str(caught.value), f"data.name={data['name']}", "data.subset", "data.split", "data=stdlib")


def test_the_description_names_source_files_tokens_and_epochs(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 99)
    (tmp_path / "b.txt").write_text("é" * 50)  # two bytes each
    pattern = f"{tmp_path}/*.txt"
    words = describe(DataConfig(source="text_files", files=pattern), num_tokens=402)
    for part in ("text_files", pattern, "2 files", "201 tokens", "402", "2 epochs"):
        assert part in words
    assert "owner/set" in describe(DataConfig(source="hub", name="owner/set"), num_tokens=402)
    sources = {"a": {"source": "stdlib", "weight": 0.25}, "b": {"source": "hub", "name": "o/s", "weight": 0.75}}
    names(describe(DataConfig(source="mixture", sources=sources), num_tokens=402), "a 0.25", "b 0.75", "402 tokens")


def test_the_description_counts_bytes_of_text_that_a_tokenizer_reads(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 99)
    words = describe(DataConfig(source="text_files", files=f"{tmp_path}/*", tokenizer="owner/model"), num_tokens=402)
    names(words, "1 file", "99 bytes", "owner/model", "402 tokens")
    assert "epochs" not in words
    hub = DataConfig(source="hub", name="owner/set", tokenizer="owner/model")
    names(describe(hub, num_tokens=402), "owner/set", "owner/model")


def test_what_the_hub_has_is_not_local(tmp_path):
    assert is_local(DataConfig(tokenizer=str(tmp_path)))
    assert not is_local(DataConfig(tokenizer="owner/model"))
    sources = {"a": {"source": "stdlib", "weight": 0.25}, "b": {"source": "hub", "name": "o/s", "weight": 0.75}}
    assert not is_local(DataConfig(source="mixture", sources=sources))


@pytest.mark.parametrize("name", ["/no/such", "./such", "../such", "~/such", "a/b/c", "a/"])
def test_what_the_hub_cannot_have_is_refused_without_asking_it(name):
    assert is_local(DataConfig(tokenizer=name))
    assert is_local(DataConfig(source="hub", name=name))


def test_json_lines_are_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json_lines(*TEXTS))
    with refused(CorpusError, "rows.jsonl", "data=jsonl", "data=chat"):
        open_source(DataConfig(source="text_files", files=f"{tmp_path}/*"))


class TestAFileThatIsTrainedOnAndValidatedOn:
    def jsonl(self, **settings: Any) -> DataConfig:
        return DataConfig(source="jsonl", **settings)

    def files(self, folder: Path, *names: str) -> None:
        (folder / "texts").mkdir()
        for name in names:
            (folder / "texts" / name).write_bytes(json_lines("text"))

    def test_is_named_with_what_to_type(self, tmp_path, monkeypatch):
        self.files(tmp_path, "a.jsonl", "b.jsonl")
        monkeypatch.chdir(tmp_path)
        warning = overlap_warning(self.jsonl(files="texts/*.jsonl", validation_files=["texts/b.jsonl"])) or ""
        names(warning, "texts/b.jsonl", "data.files=[texts/a.jsonl]")
        assert overlap_warning(self.jsonl(files="texts/a.jsonl", validation_files="texts/b.jsonl")) is None
        assert overlap_warning(self.jsonl(files="texts/*.jsonl")) is None

    def test_is_found_under_another_name(self, tmp_path):
        self.files(tmp_path, "a.jsonl")
        link = tmp_path / "validation.jsonl"
        link.symlink_to(tmp_path / "texts" / "a.jsonl")
        config = self.jsonl(files=f"{tmp_path}/texts/../texts/*", validation_files=str(link))
        names(overlap_warning(config) or "", tmp_path / "texts" / "a.jsonl")

    def test_of_many_the_first_is_named_and_others_are_counted(self, tmp_path, monkeypatch):
        self.files(tmp_path, *(f"{number}.jsonl" for number in range(9)))
        monkeypatch.chdir(tmp_path)
        warning = overlap_warning(self.jsonl(files="texts/*", validation_files="texts/[6-8].jsonl")) or ""
        names(warning, "texts/6.jsonl", "2 more")
        assert "data.files=[" not in warning  # six others are no line to type

    def test_is_found_in_another_source_of_a_mixture(self, tmp_path):
        self.files(tmp_path, "a.jsonl", "b.jsonl")
        a, b = (str(tmp_path / "texts" / name) for name in ("a.jsonl", "b.jsonl"))
        sources = {
            "x": {"source": "jsonl", "files": a, "validation_files": b, "weight": 0.5},
            "y": {"source": "jsonl", "files": b, "weight": 0.25},
            "z": {"source": "stdlib", "weight": 0.25},
        }
        names(overlap_warning(DataConfig(source="mixture", sources=sources)) or "", b, "data.sources.y.files")
