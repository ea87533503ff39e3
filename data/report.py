"""What packing does to a corpus, as lines for people: `explain=true` shows them. What a stream left out. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from conf.schema import DataConfig
from data.chat import ROLES
from data.corpus import Corpus, num_labels, validation_name
from data.documents import Documents
from data.packing import window_packs

MAX_DOCUMENTS = 2_000_000  # that are packed for a report: seconds
MUCH = 0.1  # of the data, held out
FIRST_EDGE = 64  # documents are counted up to 64 tokens, 256, 1,024 ...


def packing_report(corpus: Corpus, sequences_per_step: int = 1) -> list[str]:
    """Documents by length, how many are split or dropped, the padding, and what an epoch has; of each source if there
    are several."""
    config, epoch = corpus.config, corpus.epoch_documents(0)
    num_packed = epoch.num_documents
    if num_packed > MAX_DOCUMENTS:
        num_packed = max(1, MAX_DOCUMENTS // config.shuffle_window) * config.shuffle_window
    documents = epoch.take(slice(num_packed))
    dropped = _dropped_lengths(corpus, config, num_packed / epoch.num_documents)
    num_tokens, length = int(documents.lengths.sum()), config.sequence_length
    num_kept = num_left_out = num_trained = num_read = 0
    for pack in window_packs(documents, config, corpus.key_of_packs(0)):  # may be many millions
        labels = num_labels(pack, corpus.stores) if corpus.says_what_is_trained else 1
        if labels:
            num_kept, num_trained = num_kept + 1, num_trained + labels
            num_read += sum(stop - start for _, start, stop, _ in pack)
        else:
            num_left_out += 1
    tokens_in_epoch = int(epoch.lengths.sum())
    is_part = num_packed < epoch.num_documents
    about = "about " if is_part else ""
    in_epoch = round(num_kept * tokens_in_epoch / num_tokens) if is_part else num_kept
    settings = f"data.packing={config.packing}, data.long_documents={config.long_documents}"
    lines = [f"documents to train on, in sequences of {length:,} tokens ({settings})"]
    if is_part:
        lines.append(f"  of the first {num_packed:,} of {epoch.num_documents:,} documents of an epoch")
    return [
        *lines,
        *_table(_rows(documents, dropped, config)),
        f"  padding {1 - num_read / (num_kept * length):.2%}",
        f"  an epoch has {about}{in_epoch:,} sequences, {tokens_in_epoch:,} tokens, {epoch.num_documents:,} documents: "
        f"num_steps={math.ceil(in_epoch / sequences_per_step)}",
        *_trained(corpus, num_trained, num_tokens, num_left_out),
        *_held_out(corpus),
        *(_table(_source_rows(corpus, epoch)) if len(corpus.names) > 1 else []),
        *_skipped(corpus),
    ]


def left_out(name: str, counts: Mapping[str, int]) -> list[str]:
    """What a stream left out so far, given `StreamCorpus.counts`; nothing if it used every row."""
    settings = {"skipped": " (data.bad_rows=skip)", "empty": "", "dropped": " (data.long_documents=drop)"}
    parts = [f"{counts[kind]:,} {kind}{setting}" for kind, setting in settings.items() if counts[kind]]
    return [f"{name}: {sum(counts.values()):,} rows read, of which {', '.join(parts)}"] if parts else []


def _rows(documents: Documents, dropped: np.ndarray, config: DataConfig) -> list[list[str]]:
    """A row per range of lengths."""
    lengths = documents.lengths
    is_split = _is_split(documents, config)
    longest = max(int(lengths.max(initial=1)), int(dropped.max(initial=1)))
    edges = [0, FIRST_EDGE]
    while edges[-1] < longest:
        edges.append(4 * edges[-1])
    rows = [["tokens", "documents", "of all tokens", "whole", "split", "dropped"]]
    total = int(lengths.sum() + dropped.sum())

    def row(name: str, first: int, last: int) -> list[str]:
        of, lost = (first < lengths) & (lengths <= last), (first < dropped) & (dropped <= last)
        num_split, num_dropped = int(is_split[of].sum()), int(lost.sum())
        share = (int(lengths[of].sum()) + int(dropped[lost].sum())) / total
        counts = (int(of.sum()) - num_split, num_split, num_dropped)
        return [name, f"{sum(counts):,}", f"{share:.1%}", *(f"{count:,}" if count else "-" for count in counts)]

    for first, last in itertools.pairwise(edges):
        rows.append(row(f"{first + 1:,} to {last:,}", first, last))
    while len(rows) > 2 and rows[1][1] == "0":  # lengths that no document has
        del rows[1]
    return [*rows, row("all", 0, edges[-1])]


def _is_split(documents: Documents, config: DataConfig) -> np.ndarray:
    """Whether a document is in several sequences, bool [N]."""
    length = config.sequence_length
    if config.packing != "concatenate":
        return documents.lengths > length
    ends = np.cumsum(documents.lengths)
    return (ends - documents.lengths) // length != (ends - 1) // length


def _dropped_lengths(corpus: Corpus, config: DataConfig, share: float) -> np.ndarray:
    """The lengths of documents that data.long_documents=drop drops, of the first `share` of each source."""
    if config.long_documents == "split":
        return np.zeros(0, np.int64)
    lengths = np.concatenate([store.lengths[: math.ceil(share * len(store.ends))] for store in corpus.stores])
    return lengths[lengths > config.sequence_length]


def _trained(corpus: Corpus, num_labels: int, num_tokens: int, num_left_out: int) -> list[str]:
    """Of documents that say what is trained, as chats do."""
    if not corpus.says_what_is_trained:
        return []
    line = f"  {num_labels:,} tokens are trained, {num_labels / num_tokens:.1%}"
    if num_left_out:
        line += f"; {num_left_out:,} more sequences have no such token, and are left out"
    return [line]


def _held_out(corpus: Corpus) -> list[str]:
    counts = {name: len(packs) for name, packs in corpus.validation().items()}
    tokens = sum(pack.num_tokens for packs in corpus.validation().values() for pack in packs)
    of = "" if len(counts) == 1 else f" ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"
    total = sum(counts.values())
    held_out, share = _tokens_held_out(corpus)
    share = f"; {held_out:,} tokens are held out, {share:.1%}" if held_out else ""
    return [f"  validation has {total:,} sequence{'s' if total > 1 else ''}, {tokens:,} tokens{of}{share}"]


def _tokens_held_out(corpus: Corpus) -> tuple[int, float]:
    """Of documents that no step trains on, and their share of all."""
    trained = sum(source.num_tokens for source in corpus.sources)
    held_out = sum(len(store.tokens) for store in corpus.stores) - trained
    held_out -= int(_dropped_lengths(corpus, corpus.config, 1).sum())
    return held_out, held_out / (held_out + trained)


def held_out_warning(corpus: Corpus) -> str | None:
    """If a run trains on much less than its data."""
    held_out, share = _tokens_held_out(corpus)
    if share < MUCH:
        return None
    config = corpus.config
    return (
        f"validation holds out {held_out:,} tokens, {share:.0%} of the data: of each source "
        f"data.validation_sequences={config.validation_sequences} times {config.sequence_length:,} tokens; fewer leave "
        "more to train on"
    )


def roles_warnings(corpus: Corpus) -> list[str]:
    """Of each source, and of its own documents for validation, if roles of its turns are unknown."""
    stores = {store.name: store for store in corpus.stores}
    stores |= {validation_name(name): store for name, store in corpus.validation_stores.items()}
    return [warning for name, store in stores.items() if (warning := roles_warning(name, store.unknown_roles))]


def roles_warning(name: str, unknown_roles: Mapping[str, int]) -> str | None:
    """If turns of a source may not be trained because their role is misspelt."""
    if not unknown_roles:
        return None
    most = sorted(unknown_roles.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(f"{role!r} in {num_rows:,} {'row' if num_rows == 1 else 'rows'}" for role, num_rows in most[:4])
    more = " and others" if len(most) > 4 else ""
    return (
        f"{name} has roles that are none of {', '.join(ROLES)}: {counts}{more}; turns that the chat template "
        "does not mark are not trained: correct misspelt roles in the files; data.preview=3 shows what is trained"
    )


def _source_rows(corpus: Corpus, epoch: Documents) -> list[list[str]]:
    """A row per source: the share of tokens that it should have and has, and how often it is repeated."""
    rows = [["source", "documents", "tokens", "weight", "share", "its epochs per epoch"]]
    total = int(epoch.lengths.sum())
    for number, (name, source) in enumerate(zip(corpus.names, corpus.sources, strict=True)):
        given = int(epoch.lengths[epoch.sources == number].sum())
        shares = f"{float(source.weight):.1%}", f"{given / total:.1%}", f"{given / source.num_tokens:.3g}"
        rows.append([name, f"{source.documents.num_documents:,}", f"{source.num_tokens:,}", *shares])
    return rows


def _skipped(corpus: Corpus) -> list[str]:
    return [
        f"  {store.num_skipped:,} rows of {store.name} were skipped (data.bad_rows=skip)"
        for store in corpus.stores
        if store.num_skipped
    ]


def _table(rows: list[list[str]]) -> list[str]:
    """Lines with aligned columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(["", row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
