"""Text to tokens by a tokenizer of the Hugging Face hub's format, and the error for each tokenizer that cannot work."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import transformers

from conf.schema import DataConfig
from data.pack import Corpus, open_corpus
from data.source import CorpusError
from data.tokenizer import BYTES, Tokenizer, open_tokenizer, tokenizer_problem
from tests.errors import names, refused

EOS = 1  # of tiny_llama
DOCUMENTS = ["def f(x):\n    return x", "", "déjà vu 漢字", "a sequence " * 5]


def opened(name: Path | str) -> Tokenizer:
    return open_tokenizer(DataConfig(tokenizer=str(name)))


def refusal(name: Path | str) -> str:
    with pytest.raises(CorpusError) as caught:
        opened(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bare(path: Path, **vocabulary: int) -> Path:
    """A tokenizer.json of whole words."""
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")).save(str(path))
    return path


@pytest.fixture
def without_eos(tiny_llama, tmp_path) -> Path:
    folder = shutil.copytree(tiny_llama, tmp_path / "without_eos")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("file", [".", "tokenizer.json"], ids=["a folder", "a bare tokenizer.json"])
@pytest.mark.parametrize("document", [*DOCUMENTS, "<|begin_of_text|>"])
def test_tokens_are_the_text_and_eos(tiny_llama, file, document):
    tokens = opened(tiny_llama / file).encode([document])[0]
    assert tokens.dtype == np.int32
    assert tokens[-1] == EOS
    assert transformers.AutoTokenizer.from_pretrained(tiny_llama).decode(tokens[:-1]) == document  # no BOS was added


def test_a_lone_surrogate_is_replaced(tiny_llama):
    tokenizer = opened(tiny_llama)
    assert tokenizer.encode(["a\ud800b"])[0].tolist() == tokenizer.encode(["a?b"])[0].tolist()


def test_the_size_is_above_every_token_also_where_numbers_are_left_out(tiny_llama, tmp_path):
    assert opened(tiny_llama).size == 2048
    tokenizer = opened(bare(tmp_path / "gaps.json", **{"a": 0, "</s>": 7}))
    assert tokenizer.size == 8
    assert tokenizer.encode(["a"])[0].tolist() == [0, 7]


@pytest.mark.parametrize("cursor", [0, 1, 20, 46, 47, 48, 1000])
def test_training_resumes_at_any_cursor(tiny_llama, cursor):
    tokenizer = opened(tiny_llama)
    epoch = np.concatenate(tokenizer.encode(DOCUMENTS)).tolist()
    assert epoch.count(EOS) == len(DOCUMENTS)
    corpus = Corpus(DOCUMENTS, sequence_length=4, validation_sequences=1, tokenizer=tokenizer)
    assert [sequence.tolist() for sequence in corpus.validation()] == [epoch[:5]]
    endless, start = epoch[5:] * 4, cursor % (len(epoch) - 5)
    expected = [endless[start + i : start + i + 5] for i in range(0, 100, 5)]
    assert [sequence.tolist() for sequence in itertools.islice(corpus.training(cursor), 20)] == expected


def test_a_model_with_fewer_embeddings_than_tokens_is_refused(tiny_llama, tmp_path):
    (tmp_path / "one.txt").write_text("a sequence " * 100)
    data = DataConfig(
        source="text_files", files=f"{tmp_path}/*", tokenizer=str(tiny_llama), sequence_length=4, validation_sequences=1
    )
    open_corpus(data, vocab_size=2048).check()
    parts = (f"data.tokenizer={tiny_llama}", "2,048 tokens", "model.vocab_size=2047", "model.vocab_size=2048")
    with refused(CorpusError, *parts):
        open_corpus(data, vocab_size=2047).check()


def test_text_of_an_added_token_that_the_model_lacks_is_refused(tiny_llama, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # as Gemma 3's, of which its text model knows nothing
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for number, text in enumerate(["some words of text " * 20, "an <image> here " * 20]):
        (tmp_path / f"{number}.txt").write_text(text)
    config = DataConfig(
        source="text_files",
        files=str(tmp_path / "*.txt"),
        tokenizer=str(tmp_path / "tokenizer"),
        sequence_length=4,
        validation_sequences=1,
    )
    corpus = open_corpus(config, 2048)
    corpus.check()  # reads no further than it needs to
    with refused(CorpusError, "token 2048", "model has 2048"):
        list(itertools.islice(corpus.training(cursor=0), 100))


def test_bytes_fit_a_model_of_257_tokens():
    assert tokenizer_problem(BYTES, 257) is None
    names(str(tokenizer_problem(BYTES, 256)), "bytes", 257, "model.vocab_size=256")


def test_a_tokenizer_without_eos_is_refused(without_eos):
    names(refusal(without_eos), f"data.tokenizer={without_eos}", "EOS", "eos_token", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("vocabulary", "found"), [({"a": 0}, "none"), ({"a": 0, "</s>": 1, "<eos>": 2}, "</s> and <eos>")]
)
def test_a_bare_file_needs_exactly_one_usual_eos(tmp_path, vocabulary, found):
    path = bare(tmp_path / "tokenizer.json", **vocabulary)
    names(refusal(path), f"data.tokenizer={path}", "eos_token", "tokenizer_config.json")
    assert found in refusal(path)


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'], ids=["no file", "not JSON", "other JSON"])
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
        names(refusal(tmp_path / "tokenizer.json"), f"data.tokenizer={tmp_path}/tokenizer.json", "OWNER/NAME")
    names(refusal(tmp_path), f"data.tokenizer={tmp_path}", "tokenizer.json", "OWNER/NAME")


def test_a_hub_name_without_network_is_refused_at_once(monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("it would retry"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    names(refusal("nobody/nothing"), "data.tokenizer=nobody/nothing", "no network", "HF_HUB_OFFLINE=1")


def test_a_hub_name_that_was_not_downloaded_is_refused_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    names(refusal("nobody/nothing"), "data.tokenizer=nobody/nothing", "OWNER/NAME", "HF_HUB_OFFLINE=1")


def test_the_error_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    names(refusal("owner/name"), "data.tokenizer=owner/name", "transformers", 'pip install -e ".[hf]"')
