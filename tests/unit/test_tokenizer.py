"""Text to tokens by a tokenizer of the Hugging Face hub's format, and the error for each tokenizer that cannot work."""

from __future__ import annotations

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
from data.source import CorpusError
from data.store import open_stores
from data.tokenizer import BYTES, Tokenizer, open_tokenizer, token_dtype, tokenizer_problem
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
    assert tokens.dtype == np.uint16
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


def test_tokens_are_those_of_transformers(tiny_llama):
    reference = transformers.AutoTokenizer.from_pretrained(tiny_llama)(DOCUMENTS, add_special_tokens=False)["input_ids"]
    assert [tokens[:-1].tolist() for tokens in opened(tiny_llama).encode(DOCUMENTS)] == reference


def test_a_tokenizer_that_truncates_and_pads_by_itself_does_neither_here(tiny_llama, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = [tokens.tolist() for tokens in opened(tiny_llama).encode(DOCUMENTS)]
    assert [tokens.tolist() for tokens in opened(tmp_path / "tokenizer.json").encode(DOCUMENTS)] == expected


def test_a_tokenizer_with_code_of_its_own_is_called_itself(tiny_llama, monkeypatch):
    class Shouting(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super()._encode_plus([one.upper() for one in text], **options)

    shouting = Shouting.from_pretrained(tiny_llama)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: shouting)
    assert opened(tiny_llama).encode(["abc"])[0].tolist() == [*shouting(["abc"])["input_ids"][0][1:], EOS]
    assert shouting.decode(shouting(["abc"])["input_ids"][0][1:]) == "ABC"


def test_tokens_are_as_small_on_disk_as_the_vocabulary_allows():
    assert token_dtype(2**16) is np.uint16
    assert token_dtype(2**16 + 1) is np.int32


def test_the_fingerprint_is_of_what_makes_tokens(tiny_llama, tmp_path):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert opened(copy).fingerprint() == opened(tiny_llama).fingerprint() != BYTES.fingerprint()
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert opened(copy).fingerprint() != opened(tiny_llama).fingerprint()


def store_config(folder: Path, tokenizer: Path) -> DataConfig:
    files = str(folder / "*.txt")
    return DataConfig(source="text_files", files=files, tokenizer=str(tokenizer), token_store=str(folder / "stores"))


def test_a_model_with_fewer_embeddings_than_tokens_is_refused(tiny_llama, tmp_path):
    (tmp_path / "one.txt").write_text("a sequence " * 100)
    config = store_config(tmp_path, tiny_llama)
    open_stores(config, 2048, print)
    parts = (f"data.tokenizer={tiny_llama}", "2,048 tokens", "model.vocab_size=2047", "model.vocab_size=2048")
    with refused(CorpusError, *parts):
        open_stores(config, 2047, print)


def test_text_of_an_added_token_that_the_model_lacks_is_refused(tiny_llama, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # as Gemma 3's, of which its text model knows nothing
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "0.txt").write_text("some words of text " * 20)
    config = store_config(tmp_path, tmp_path / "tokenizer")
    open_stores(config, 2048, print)
    (tmp_path / "1.txt").write_text("an <image> here " * 20)
    with refused(CorpusError, "token 2048", "model has 2048"):
        open_stores(config, 2048, print)


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


def test_a_model_without_a_tokenizer_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    message = refusal(tmp_path)
    names(message, f"data.tokenizer={tmp_path}", "no tokenizer", "tokenizer.json", "OWNER/NAME")
    assert "sentencepiece" not in message  # what transformers asks for would not help


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
