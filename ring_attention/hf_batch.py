"""What `ring_attention.hf.shard` reads from a whole batch: documents, positions and labels.

Shapes: B batch, L tokens of the whole sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ring_attention.decoding import CachedAttention
from ring_attention.sequence_attention import SequenceAttention
from ring_attention.transport.agreement import check_equal

IGNORED_LABEL = -100  # torch's and transformers'
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
DocumentEnds = list[list[int]] | None  # of each row, or of one for all rows: 0, then the end of each document


def check_same_batch(
    attention: SequenceAttention | CachedAttention, ids_BL: Tensor, given: Mapping[str, Tensor]
) -> None:
    """Raises ValueError on every rank if the ranks that share a sequence hold different batches of a new shape."""
    if attention._group is None:
        return
    shape: dict[str, Hashable] = {
        "the shape of input_ids": tuple(ids_BL.shape),
        "the entries of the batch": tuple(sorted(given)),
    }
    weights = torch.arange(1, ids_BL.shape[1] + 1)
    checksum: dict[str, Hashable] = {
        "the checksum of input_ids, of which shard takes the whole batch": int((ids_BL.cpu() * weights).sum())
    }
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    check_equal(attention._group, shape, checksum, device)


def check_padding(mask_BL: Tensor) -> None:
    """Raises ValueError unless an attention_mask says padding on the right and nothing else."""
    if bool((mask_BL.long().diff(dim=1) > 0).any()) or not bool(((mask_BL == 0) | (mask_BL == 1)).all()):
        raise ValueError(
            "attention_mask must be ones, then zeros (padding on the right): set tokenizer.padding_side='right', and "
            "give packed documents by position_ids"
        )


def read_documents(given: Mapping[str, Tensor], num_rows: int, length: int) -> DocumentEnds:
    """Where documents begin and end, by all that says so. None if each row is one document.

    Raises:
        ValueError: if sources contradict each other or the length.
    """
    found: dict[str, list[list[int]]] = {}
    if "position_ids" in given:
        found["position_ids"] = [_starts(row, row.diff() != 1, length) for row in given["position_ids"]]
        for row, starts in zip(given["position_ids"], found["position_ids"], strict=True):
            if row[starts[:-1]].any():
                raise ValueError(
                    "position_ids must start at 0 in each document and grow by 1: no left padding, no gaps"
                )
    if "seq_idx" in given:
        found["seq_idx"] = [_starts(row, row.diff() != 0, length) for row in given["seq_idx"]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in given:
            if num_rows != 1:
                raise ValueError(
                    f"{name} counts the tokens of one row, but input_ids has {num_rows}: flatten the batch"
                )
            found[name] = [_ends_at(given[name].flatten().tolist(), length, name)]
    for (name, documents), (other, others) in itertools.pairwise(found.items()):
        rows = max(len(documents), len(others))
        if [*documents] * (rows // len(documents)) != [*others] * (rows // len(others)):
            raise ValueError(f"{name} and {other} say different documents: give one of them, or the same in both")
    documents = max(found.values(), key=len, default=None)
    return None if documents is None or all(len(row) == 2 for row in documents) else documents


def _starts(row: Tensor, is_new: Tensor, length: int) -> list[int]:
    return [0, *(is_new.nonzero().flatten() + 1).tolist(), length]


def _ends_at(boundaries: list[int], length: int, name: str) -> list[int]:
    if boundaries[:1] != [0] or boundaries[-1] != length:
        ends = f"goes from {boundaries[0]} to {boundaries[-1]}" if boundaries else "is empty"
        raise ValueError(f"{name} {ends}, but must go from 0 to {length} tokens")
    if boundaries != sorted(boundaries):
        raise ValueError(f"{name}={boundaries} must grow: give the number of tokens up to the end of each document")
    return boundaries


def positions_of(documents: DocumentEnds, length: int) -> Tensor:
    """[rows, L]: each token's place in its document."""
    rows = documents or [[0, length]]
    return torch.stack(
        [torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(row)]) for row in rows]
    )


def shifted_labels(given: Mapping[str, Tensor], documents: DocumentEnds, length: int) -> Tensor:
    """[B, L]: the label of the next token, or IGNORED_LABEL at a document's end and on padding."""
    labels_BL = F.pad(given["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
    if "attention_mask" in given:
        labels_BL = labels_BL.masked_fill(F.pad(given["attention_mask"][:, 1:], (0, 1)) == 0, IGNORED_LABEL)
    for row, boundaries in enumerate(documents or ()):
        rows = slice(None) if len(documents or ()) == 1 else row
        labels_BL[rows, [end - 1 for end in boundaries[1:] if end]] = IGNORED_LABEL
    return labels_BL
