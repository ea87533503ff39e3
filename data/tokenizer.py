"""Text to tokens: UTF-8 bytes, or the Hugging Face tokenizer that `data.tokenizer` names.

Both end a document with a separator, so that a sequence may hold several documents.
"""

from __future__ import annotations

import hashlib
import json
import os
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
    size: int  # a model's vocabulary needs so many
    dtype: Any  # numpy's, of tokens on disk
    batch_characters: int  # documents of together so many are tokenized at once

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Each document's tokens and the separator; of a text without tokens the separator alone."""
        ...

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens, for people: special tokens and separators are shown."""
        ...

    def fingerprint(self) -> str:
        """Equal for tokenizers that make equal tokens."""
        ...


def token_dtype(size: int) -> Any:
    """The smallest of uint16 and int32 that holds tokens below `size`."""
    return np.uint16 if size <= 2**16 else np.int32


class ByteTokenizer:
    """UTF-8 bytes."""

    name = "bytes"
    size = SEPARATOR + 1
    dtype: Any = np.uint16
    batch_characters = 2**20

    def encode(self, texts: list[str]) -> list[Tokens]:
        as_bytes = [text.encode("utf-8", "replace") for text in texts]
        joined = np.frombuffer(b"\0".join([*as_bytes, b""]), np.uint8).astype(self.dtype)
        ends = np.cumsum([len(one) + 1 for one in as_bytes])
        joined[ends - 1] = SEPARATOR
        return np.split(joined, ends[:-1])

    def decode(self, tokens: Tokens) -> str:
        if (tokens > SEPARATOR).any():  # of Megatron's files without data.tokenizer
            return " ".join(map(str, tokens.tolist()))
        documents = np.split(tokens, np.flatnonzero(tokens == SEPARATOR) + 1)
        parts = [document[document != SEPARATOR].astype(np.uint8).tobytes() for document in documents]
        return "<end>".join(part.decode("utf-8", "replace") for part in parts)

    def fingerprint(self) -> str:
        return self.name


BYTES = ByteTokenizer()


class PretrainedTokenizer:
    """A tokenizer of `transformers`. It adds no special token but EOS, the separator.

    Attributes:
        wrapped: of `transformers`.
        eos_id: the separator.
    """

    def __init__(self, name: str, tokenizer: Any, eos_id: int) -> None:
        # a fast tokenizer's batches use all cores
        self.batch_characters = min(2**24, 2**19 * max(2, len(os.sched_getaffinity(0))))
        self.name, self.wrapped, self.eos_id = name, tokenizer, eos_id
        # Without tokens added to the vocabulary, such as Gemma 3's image token, which its text model does not have.
        # Numbers may be left out, so that counting them is not enough.
        added = tokenizer.added_tokens_decoder.keys() - {eos_id}
        numbers = set(tokenizer.get_vocab().values())
        self.size = 1 + max(number for number in numbers if number not in added)
        self.dtype = token_dtype(1 + max(numbers | {eos_id}))
        self._backend = _plain_backend(tokenizer)

    def encode(self, texts: list[str]) -> list[Tokens]:
        return [np.array([*tokens, self.eos_id], self.dtype) for tokens in self.tokens(texts)]

    def decode(self, tokens: Tokens) -> str:
        return self.wrapped.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Each text's tokens, and nothing else: as `transformers` makes them with add_special_tokens=False."""
        try:
            return self._tokens(texts)
        except Exception:  # a lone surrogate is an error in Rust, which the library reports as a TypeError
            legal = [text.encode("utf-8", "replace").decode() for text in texts]
            if legal == texts:
                raise
            return self._tokens(legal)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            return self.wrapped(texts, **options)["input_ids"]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def fingerprint(self) -> str:
        backend = getattr(self.wrapped, "backend_tokenizer", None)
        if backend is not None:
            parts = [backend.to_str(), self.eos_id, bool(self.wrapped.split_special_tokens)]
        else:
            settings = {key: str(value) for key, value in self.wrapped.init_kwargs.items()}
            parts = [type(self.wrapped).__name__, self.wrapped.get_vocab(), settings, self.eos_id]
            for file in vars(self.wrapped).values():  # what is beside the vocabulary, such as merges or a model
                if isinstance(file, str) and Path(file).is_file():
                    parts.append(hashlib.blake2b(Path(file).read_bytes()).hexdigest())
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it as from_pretrained reads it, with its chat template."""
        self.wrapped.eos_token = self.wrapped.convert_ids_to_tokens(self.eos_id)  # a bare file does not say it
        self.wrapped.save_pretrained(folder)


def _plain_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, if calling `tokenizer` does nothing else than to call it; else None."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    for method in ("__call__", "_encode_plus"):
        if getattr(type(tokenizer), method) is not getattr(PreTrainedTokenizerFast, method):
            return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


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
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):  # transformers asks for sentencepiece
            reason = "the folder has no tokenizer"
        raise CorpusError(
            f"{setting} cannot be opened ({reason}): give data.tokenizer a folder with tokenizer.json, a "
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
