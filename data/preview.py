"""The first sequences as text, so that a person sees what is trained before a long run (data.preview=3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from data.corpus import IGNORED_LABEL, Corpus, Pack
from data.stream import StreamCorpus
from data.tokenizer import Tokenizer

OPEN, CLOSE = "[-", "-]"  # around what is not trained, as in `git diff --word-diff`
MAX_RUN, SHOWN = 600, 200  # of a longer run of tokens the first and last are shown
LEGEND = f"{OPEN}...{CLOSE} is not trained, like padding and the first token of a document"


def preview(corpus: Corpus | StreamCorpus, tokenizer: Tokenizer, num: int) -> list[str]:
    """The first `num` training sequences: their documents, with what is not trained in brackets."""
    lines = [LEGEND]
    for number, pack in enumerate(itertools.islice(corpus.training(), num), 1):
        lines += ["", *_pack_lines(pack, number, corpus.names, tokenizer)]
    return lines


def _pack_lines(pack: Pack, number: int, names: tuple[str, ...], tokenizer: Tokenizer) -> Iterator[str]:
    tokens, labels = pack.read(0, pack.length)
    num_trained = int((labels != IGNORED_LABEL).sum())
    yield (
        f"=== sequence {number}: {pack.num_tokens:,} tokens in {_counted(len(pack.pieces), 'document')}, "
        f"{num_trained:,} trained, {pack.length - pack.num_tokens:,} of padding"
    )
    for index, piece in enumerate(pack.pieces):
        start, stop = pack.boundaries[index : index + 2]
        source = f" of {names[piece.source]}" if len(names) > 1 else ""
        goes_on = ", goes on in another sequence" if piece.has_next else ""
        yield f"--- document {index + 1}{source}: {_counted(stop - start, 'token')}{goes_on}"
        trained = np.empty(stop - start, bool)
        trained[1:] = labels[start : stop - 1] != IGNORED_LABEL
        trained[:1] = trained[1:2] if stop - start > 1 else False  # as the second, so that texts have no bracket more
        yield from _marked(tokens[start:stop], trained, tokenizer).split("\n")


def _marked(tokens: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a document."""
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    parts = []
    for first, last in itertools.pairwise(cuts):
        text = _text(tokens[first:last], tokenizer)
        parts.append(text if trained[first] else f"{OPEN}{text}{CLOSE}")
    return "".join(parts)


def _text(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    if len(tokens) <= MAX_RUN:
        return tokenizer.decode(tokens)
    left_out = f" ... {len(tokens) - 2 * SHOWN:,} tokens ... "
    return tokenizer.decode(tokens[:SHOWN]) + left_out + tokenizer.decode(tokens[-SHOWN:])


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
