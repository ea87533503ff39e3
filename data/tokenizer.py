"""Text to tokens: UTF-8 bytes, or the Hugging Face tokenizer that `data.tokenizer` names.

Both end a document with a separator, so that a sequence may hold several documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conf.schema import DataConfig
from data.source import CorpusError

SEPARATOR = 256  # the byte tokenizer's token after each document; bytes are 0..255
# names of EOS tokens, for a tokenizer.json without the files that name its own
USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
Tokens = np.ndarray


class Tokenizer(Protocol):
    """How documents become tokens."""

    name: str  # for messages
    size: int  # tokens are below it
    batch_characters: int  # documents of together so many are tokenized at once; 0: each by itself

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Each document's tokens and the separator."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, int16."""

    name = "bytes"
    size = SEPARATOR + 1
    batch_characters = 0

    def encode(self, texts: list[str]) -> list[Tokens]:
        as_bytes = (np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts)
        return [np.append(numbers.astype(np.int16), np.int16(SEPARATOR)) for numbers in as_bytes]


BYTES = ByteTokenizer()


class PretrainedTokenizer:
    """A tokenizer of `transformers`, int32. It adds no special token but EOS, the separator."""

    batch_characters = 2**18  # a fast tokenizer's batches use all cores

    def __init__(self, name: str, tokenizer: Any, eos_id: int) -> None:
        self.name, self._tokenizer, self._eos_id = name, tokenizer, eos_id
        # Without tokens added to the vocabulary, such as Gemma 3's image token, which its text model does not have.
        # Numbers may be left out, so that counting them is not enough.
        added = tokenizer.added_tokens_decoder.keys() - {eos_id}
        self.size = 1 + max(number for number in tokenizer.get_vocab().values() if number not in added)

    def encode(self, texts: list[str]) -> list[Tokens]:
        legal = [text.encode("utf-8", "replace").decode() for text in texts]  # a lone surrogate is an error in Rust
        batch = self._tokenizer(legal, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array([*tokens, self._eos_id], np.int32) for tokens in batch["input_ids"]]

    def save(self, folder: Path) -> None:
        """Write it as from_pretrained reads it, with its chat template."""
        self._tokenizer.eos_token = self._tokenizer.convert_ids_to_tokens(self._eos_id)  # a bare file does not say it
        self._tokenizer.save_pretrained(folder)


def save_tokenizer(config: DataConfig, folder: Path) -> None:
    """Write the configured tokenizer, which is not bytes, as from_pretrained reads it."""
    opened = open_tokenizer(config)
    assert isinstance(opened, PretrainedTokenizer)
    opened.save(folder)


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The configured tokenizer. Raises CorpusError if it cannot be opened or has no EOS token."""
    if config.tokenizer is None:
        return BYTES
    name, setting = config.tokenizer, f"data.tokenizer={config.tokenizer}"
    try:
        tokenizer = _load(name)
    except ModuleNotFoundError as error:
        raise CorpusError(f'{setting} needs {error.name}: type pip install -e ".[hf]" -c constraints.txt') from error
    except Exception as error:  # the tokenizers library raises nothing more precise
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"{setting} cannot be opened ({type(error).__name__}: {reason}): give a folder with tokenizer.json, a "
            "tokenizer.json, or OWNER/NAME of the hub and the network (HF_HUB_OFFLINE=1: what was downloaded before)"
        ) from error
    eos_id = _only_usual_eos(setting, tokenizer) if Path(name).is_file() else tokenizer.eos_token_id
    if eos_id is None:
        raise CorpusError(
            f"{setting} has no EOS token to end documents with: name one of its tokens as eos_token in its "
            "tokenizer_config.json"
        )
    return PretrainedTokenizer(name, tokenizer, eos_id)


def tokenizer_problem(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """Why a model with `vocab_size` embeddings cannot train on these tokens; None if it can."""
    if tokenizer.size <= vocab_size:
        return None
    setting = "bytes and a separator" if tokenizer is BYTES else f"data.tokenizer={tokenizer.name}"
    return (
        f"{setting}: {tokenizer.size:,} tokens are too many for model.vocab_size={vocab_size}: give the model's own "
        f"tokenizer, or without model.path type model.vocab_size={tokenizer.size} or more"
    )


def _load(name: str) -> Any:
    """The tokenizer of `transformers`, whose import takes two seconds."""
    import huggingface_hub
    import transformers

    if Path(name).is_file():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=name)
    if not Path(name).exists() and not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().model_info(name, timeout=10)  # from_pretrained retries for 46 s
    # without trust_remote_code=False it asks at the terminal whether to run the repository's code
    return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _only_usual_eos(setting: str, tokenizer: Any) -> int:
    """The EOS token of a bare tokenizer.json, which does not say which one it is."""
    vocabulary = tokenizer.get_vocab()
    found = [name for name in USUAL_EOS if name in vocabulary]
    if len(found) != 1:
        raise CorpusError(
            f"{setting} does not say which token is EOS, and has {' and '.join(found) or 'none'} of the usual "
            f"{', '.join(USUAL_EOS)}: give the tokenizer's folder, with eos_token in its tokenizer_config.json"
        )
    return vocabulary[found[0]]
