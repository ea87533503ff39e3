"""Documents that cannot be read: one line that names file and row and says what to do, or skipped and counted."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HTTPError

from conf.schema import DataConfig
from data.source import CorpusError
from data.store import open_counted, open_stores, open_validation_stores
from tests.errors import names, refused

GOOD = b'{"text": "good"}\n'
SKIP = "data.bad_rows=skip"
MANY = b"".join(json.dumps({"text": f"text {number} " * 20}).encode() + b"\n" for number in range(30000))


def parquet_bytes(**columns: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


LINES = {
    "broken JSON": (GOOD + b"\n" + b'{"text": "cut\n' + GOOD, 3, ["broken JSON"]),
    "no object": (GOOD + b"[1]\n" + GOOD, 2, ["list"]),
    "no column": (GOOD + b'{"body": "x"}\n' + GOOD, 2, ["'text'", "data.text_field", "'body'"]),
    "a number": (
        GOOD + b'{"text": 3, "body": "x"}\n' + GOOD,
        2,
        ["int", "'text'", "data.text_field to one of ['body']"],
    ),
    "not UTF-8": (GOOD + b'{"text": "\xff"}\n' + GOOD, 2, ["UTF-8"]),
}


def config(file: Path, **data) -> DataConfig:
    return DataConfig(files=str(file), token_store=f"{file.parent}/stores", **data)


def check(file: Path, source: str, where: str, parts: list[str], num_documents: int) -> None:
    """Stopping names the row; skipping counts it and has the rest."""
    with pytest.raises(CorpusError) as caught:
        open_counted(config(file, source=source), source, print)
    message = str(caught.value)
    assert "\n" not in message
    names(message, where, SKIP, *parts)
    counts = open_counted(config(file, source=source, bad_rows="skip"), source, print).counts
    assert (counts.num_documents, counts.num_skipped, counts.first_problem) == (num_documents, 1, message)


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line(tmp_path, case):
    content, row, parts = LINES[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    check(tmp_path / "a.jsonl", "jsonl", f"a.jsonl, row {row}", parts, num_documents=2)


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b'[{"text": "good"}]', "list"), (b'{\n "text": "good"\n}\n', "several lines"), (b"[\n {}\n]", "several lines")],
)
def test_json_that_is_no_lines_says_how_to_make_them(tmp_path, content, fault):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        open_counted(config(tmp_path / "a.json", source="jsonl"), "jsonl", print)
    names(str(caught.value), "a.json, row 1", fault, "jq -c . FILE", "jq -c '.[]' FILE", SKIP)


def test_an_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(CorpusError) as caught:
        open_counted(config(tmp_path / "*.jsonl", source="jsonl"), "jsonl", print)
    names(str(caught.value), "b.jsonl, row 1", "empty", "data.files", SKIP)


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_off(tmp_path, codec):
    compressed = gzip.compress(MANY) if codec == "gz" else pyarrow.Codec("zstd").compress(MANY, asbytes=True)
    path = tmp_path / f"a.jsonl.{codec}"
    path.write_bytes(compressed[: len(compressed) * 2 // 3])
    with pytest.raises(CorpusError) as caught:
        open_counted(config(path, source="jsonl"), "jsonl", print)
    names(str(caught.value), SKIP)
    assert f"a.jsonl.{codec}, row " in str(caught.value)
    counts = open_counted(config(path, source="jsonl", bad_rows="skip"), "jsonl", print).counts
    assert 0 < counts.num_documents < 30000
    assert counts.num_skipped == 1
    path.write_bytes(b"this is not compressed")
    with pytest.raises(CorpusError) as caught:
        open_counted(config(path, source="jsonl"), "jsonl", print)
    names(str(caught.value), f"a.jsonl.{codec}, row 1")


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_what_a_damaged_compressed_file_has_before_the_damage_is_read(tmp_path, codec):
    rng = np.random.default_rng(0)
    rows = [json.dumps({"text": rng.bytes(300).hex()}) + "\n" for _ in range(600)]
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write("".join(rows).encode())
    compressed = sink.getvalue().to_pybytes()
    path = tmp_path / f"a.jsonl.{'gz' if codec == 'gzip' else 'zst'}"
    path.write_bytes(compressed[: len(compressed) // 2])
    counts = open_counted(config(path, source="jsonl", bad_rows="skip"), "jsonl", print).counts
    assert 150 < counts.num_documents < 310
    names(counts.first_problem, f"row {counts.num_documents + 1}:")
    path.write_bytes(compressed + b"not compressed")
    counts = open_counted(config(path, source="jsonl", bad_rows="skip"), "jsonl", print).counts
    assert (counts.num_documents, counts.num_skipped) == (600, 1)


def test_a_parquet_file_that_was_cut_off(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=["good"]))
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(text=["good"] * 9)[:-20])
    (tmp_path / "c.parquet").write_bytes(parquet_bytes(text=["good"]))
    check(tmp_path / "*.parquet", "parquet", "b.parquet, row 1", [], num_documents=2)


def test_json_lines_that_are_read_as_parquet(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    with refused(CorpusError, "a.jsonl.gz", "data=jsonl"):
        open_counted(config(tmp_path / "a.jsonl.gz", source="parquet"), "parquet", print)


def test_the_error_of_a_wrong_column_of_parquet_lists_the_columns(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(body=["good"], other=[1]))
    for bad_rows in ("stop", "skip"):  # all rows lack it
        with pytest.raises(CorpusError) as caught:
            open_counted(config(tmp_path / "a.parquet", source="parquet", bad_rows=bad_rows), "parquet", print)
        names(str(caught.value), "a.parquet", "'text'", "data.text_field", "'body'", "'other'")


def test_a_text_of_parquet_that_is_no_text(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(text=[3]))
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(text=["good"]))
    check(tmp_path / "*.parquet", "parquet", "a.parquet, row 1", ["int", "to a column of text"], num_documents=1)


def test_a_text_of_parquet_that_is_not_utf8(tmp_path):
    binary = pyarrow.array([b"good", b"\xff"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": binary.view(pyarrow.string())}), tmp_path / "a.parquet")
    check(tmp_path / "a.parquet", "parquet", "a.parquet, row 2", ["UTF-8"], num_documents=1)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"b\xffd")
    check(tmp_path / "*.txt", "text_files", "b.txt", ["byte 1", "UTF-8"], num_documents=1)


def test_a_broken_file_of_a_data_set(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_bytes(GOOD + b'{"te')
    data = DataConfig(source="hub", name=str(tmp_path / "set"), token_store=str(tmp_path / "stores"))
    with pytest.raises(CorpusError) as caught:
        open_counted(data, "hub", print)
    assert f"data.name={tmp_path / 'set'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_fails_while_a_data_set_is_read(tmp_path, monkeypatch):
    class Failing:
        column_names = ("text",)

        def __iter__(self):
            yield {"text": "good"}
            raise HTTPError("")

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_bytes(GOOD)
    monkeypatch.setattr("data.source._load_data_set", lambda *_: Failing())
    data = DataConfig(source="hub", name=str(tmp_path / "set"), token_store=str(tmp_path / "stores"))
    with pytest.raises(CorpusError) as caught:
        open_counted(data, "hub", print)
    names(str(caught.value), "row 2", "HTTPError", "network")


def test_documents_without_tokens_are_counted_and_never_all(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n{"text": null}\n' + GOOD)
    counts = open_counted(config(path, source="jsonl"), "jsonl", print).counts
    assert (counts.num_documents, counts.num_empty, counts.num_skipped) == (1, 2, 0)
    path.write_bytes(b'{"text": ""}\n{"text": 1}\n')
    with pytest.raises(CorpusError) as caught:
        open_counted(config(path, source="jsonl", bad_rows="skip"), "jsonl", print)
    names(str(caught.value), f"data.files={path}", "0 tokens", "1 are empty", "a.jsonl, row 2", "int")


@pytest.mark.parametrize(
    ("source", "ending", "content"),
    [
        ("jsonl", "jsonl", b""),
        ("jsonl", "jsonl", b'{"text": ""}\n'),
        ("parquet", "parquet", parquet_bytes(text=pyarrow.array([], "string"))),
        ("jsonl", "", None),
        ("megatron", "idx", b""),
    ],
)
def test_errors_of_files_for_validation_name_their_setting(tmp_path, source, ending, content):
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    bad = tmp_path / f"bad.{ending}"
    if content is None:
        bad.mkdir()
    else:
        bad.write_bytes(content)
    given = DataConfig(source=source, files=f"{tmp_path}/good.jsonl", token_store=f"{tmp_path}/stores")
    for setting, other, opened in (
        ("files", "validation_files", open_stores),
        ("validation_files", "files", open_validation_stores),
    ):
        with pytest.raises(CorpusError) as caught:
            opened(dataclasses.replace(given, **{setting: str(bad)}), None, print)
        assert f"data.{setting}" in str(caught.value)
        assert f"data.{other}" not in str(caught.value)


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("data.digests.chunk_digests", refuse)
    with pytest.raises(CorpusError) as caught:
        open_counted(config(path, source="jsonl"), "jsonl", print)
    names(str(caught.value), path, "Permission denied")
