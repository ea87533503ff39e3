"""Reading a corpus: what is accepted, and the error for each mistake."""

from __future__ import annotations

import json

import pytest

from conf.schema import DataConfig
from data.pack import open_corpus
from data.source import CorpusError, describe, is_local, open_documents, stdlib_files
from tests.errors import names


def rows(folder, *values: object) -> str:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"body": value}) + "\n" for value in values))
    return str(folder)


def corpus_error(**data) -> str:
    with pytest.raises(CorpusError) as caught:
        open_corpus(DataConfig(**data), vocab_size=257).check()
    return str(caught.value)


def test_the_standard_library_excludes_tests_and_installed_packages():
    files = stdlib_files()
    assert any(name.endswith("/json/decoder.py") for name in files)
    assert all(name.endswith(".py") for name in files)
    assert not any(f"/{folder}/" in name for name in files for folder in ("site-packages", "test", "tests"))
    assert files == sorted(set(files))


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    (tmp_path / "noise.bin").write_bytes(b"a\xff\x00b")
    assert list(open_documents(DataConfig(source="text_files", files=f"{tmp_path}/*"))) == ["a\ufffd\0b"]


def test_a_local_folder_of_jsonl_is_a_data_set_without_its_nulls(tmp_path):
    name = rows(tmp_path / "set", "one", None, "two")
    assert list(open_documents(DataConfig(source="hub", name=name, text_field="body"))) == ["one", "two"]


def test_each_iteration_gives_the_same_documents_in_the_seeds_order(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name)
    files = [f"{tmp_path}/[a-c].txt", f"{tmp_path}/*.txt"]
    documents = open_documents(DataConfig(source="text_files", files=files))
    assert list(documents) == list(documents)
    assert sorted(documents) == list("abcdef")
    other = open_documents(DataConfig(source="text_files", files=files, shuffle_seed=1))
    assert list(other) != list(documents)


def test_the_error_of_an_empty_or_short_corpus_counts_its_tokens(tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("0123456789")
    fields = ("data.sequence_length", "data.validation_sequences")
    for path, num_tokens in ((empty, 1), (short, 11)):
        message = corpus_error(source="text_files", files=str(path), sequence_length=4)
        names(message, f"{num_tokens} tokens", "8 validation", 45, *fields)  # 9 x (4 + 1)


def test_a_folder_is_not_a_text_file(tmp_path):
    message = corpus_error(source="text_files", files=str(tmp_path))
    names(message, f"data.files={tmp_path}", "data=text_files data.files='texts/*.txt'")


def test_the_error_of_a_wrong_column_lists_the_columns(tmp_path):
    name = rows(tmp_path / "set", "text")
    names(corpus_error(source="hub", name=name), f"data.name={name}", "'text'", "data.text_field", "'body'")


def test_a_column_of_numbers_is_an_error(tmp_path):
    name = rows(tmp_path / "set", 1, 2)
    message = corpus_error(source="hub", name=name, text_field="body")
    names(message, f"data.name={name}", "int", "'body'", "data.text_field")


def test_a_broken_file_is_an_error(tmp_path):
    name = rows(tmp_path / "set")
    (tmp_path / "set" / "rows.jsonl").write_text('{"body": "one"}\n{"bo')
    names(corpus_error(source="hub", name=name, text_field="body"), f"data.name={name}")


@pytest.mark.parametrize("choice", [{"split": "nosuch"}, {"name": "not/a/name"}])
def test_the_error_of_a_data_set_that_cannot_be_opened_says_what_to_check(tmp_path, choice):
    name = rows(tmp_path / "set", "text")
    data = {"source": "hub", "name": name, **choice}
    names(corpus_error(**data), f"data.name={data['name']}", "data.subset", "data.split", "data=stdlib")


def test_the_description_names_source_files_tokens_and_epochs(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 99)
    (tmp_path / "b.txt").write_text("é" * 50)  # two bytes each
    pattern = f"{tmp_path}/*.txt"
    words = describe(DataConfig(source="text_files", files=pattern), num_tokens=402)
    for part in ("text_files", pattern, "2 files", "201 tokens", "402", "2 epochs"):
        assert part in words
    assert "owner/set" in describe(DataConfig(source="hub", name="owner/set"), num_tokens=402)


def test_the_description_counts_bytes_of_text_that_a_tokenizer_reads(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 99)
    words = describe(DataConfig(source="text_files", files=f"{tmp_path}/*", tokenizer="owner/model"), num_tokens=402)
    names(words, "1 files", "99 bytes", "owner/model", "402 tokens")
    assert "epochs" not in words
    hub = DataConfig(source="hub", name="owner/set", tokenizer="owner/model")
    names(describe(hub, num_tokens=402), "owner/set", "owner/model")


def test_a_tokenizer_of_the_hub_is_not_local(tmp_path):
    assert is_local(DataConfig(tokenizer=str(tmp_path)))
    assert not is_local(DataConfig(tokenizer="owner/model"))
