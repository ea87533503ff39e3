"""What one pass over packed documents says of a model, on the ranks that share it: losses by position, exact answers.

Every rank must call these functions with the same arguments but its own engine, and gets the same result.

Shapes: T labelled tokens of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import deepspeed.comm as dist
import numpy as np
import torch
from torch import Tensor

from data.corpus import IGNORED_LABEL, START, Pack
from data.packing import Piece
from data.shard import Sharder, restarted
from data.store import TokenStore
from data.tokenizer import Tokenizer
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.evaluation.cells import NUM_SPARE
from recipes.evaluation.positions import bucket_edges, bucket_of, cut_pack
from recipes.inference.decoder import Decoder


class Sample(Protocol):
    """A prompt and its answer as tokens, and the answer's parts as texts."""

    @property
    def prompt(self) -> tuple[int, ...]: ...
    @property
    def answer(self) -> tuple[int, ...]: ...
    @property
    def answers(self) -> tuple[str, ...]: ...


class Bucket(NamedTuple):
    """The labels at positions [start, stop) of their documents.

    Args:
        loss: mean in nats.
        loss_of_context: the same with documents cut to a shorter context; None if that was not asked for.
    """

    start: int
    stop: int
    tokens: int
    loss: float
    loss_of_context: float | None = None


class Answers(NamedTuple):
    """Of samples.

    Args:
        accuracy: the share of samples whose answer greedy decoding would give, token for token; of texts that were
            decoded, the mean share of the answer's parts that a text contains, as RULER counts.
        answer_loss: the mean loss of the answers' tokens in nats; None of texts that were decoded.
        accuracy_of_context: the same with prompts cut to a shorter context; None if that was not asked for.
    """

    accuracy: float
    answer_loss: float | None
    accuracy_of_context: float | None = None


@dataclass(frozen=True)
class Scored:
    """The labelled tokens of one pack on this rank.

    Args:
        index: of the pack.
        positions_T: in the pack, int64.
        losses_T: in nats, fp64.
        hits_T: 1 where the label is the argmax, fp64.
    """

    index: int
    positions_T: Tensor
    losses_T: Tensor
    hits_T: Tensor


def loss_by_position(
    engine: TrainingEngine, sharder: Sharder, packs: Sequence[Pack], context: int | None = None
) -> list[Bucket]:
    """The mean loss of the labels of all packs, by their position within their document; empty buckets are left out.

    Args:
        context: also with documents cut after so many tokens.
    """
    edges = bucket_edges(packs[0].length)
    whole = _bucket_sums(engine, sharder, packs, packs, edges)
    cut = whole
    if context is not None:
        cut = _bucket_sums(engine, sharder, [cut_pack(pack, context) for pack in packs], packs, edges)
    buckets = []
    for start, stop, (loss, num), (cut_loss, _) in zip(edges, edges[1:], whole, cut, strict=False):
        if num:
            of_context = None if context is None else cut_loss / num
            buckets.append(Bucket(start, stop, round(num), loss / num, of_context))
    return buckets


def exact_answers(
    engine: TrainingEngine, sharder: Sharder, samples: Sequence[Sample], length: int, context: int | None = None
) -> Answers:
    """Whether each answer's tokens are the likeliest ones after the prompt and the answer before them.

    Samples lie beside each other in a sequence, as documents, where several of `length` tokens fit the layout.

    Args:
        context: also with samples cut after so many tokens, none of which sees what is before its cut.
    """
    num_packed = max(1, min(sharder.layout.length // length, math.ceil(len(samples) / sharder.data_degree)))
    packs = pack_samples(samples, num_packed, num_packed * length)
    own = replace(sharder, layout=replace(sharder.layout, length=num_packed * length), document_mask=True)

    def answered(cut: Sequence[Pack]) -> tuple[float, float]:
        totals = torch.zeros(3, len(samples), dtype=torch.float64)  # tokens, hits, losses
        for scored in _scored(engine, own, cut):
            ends = torch.tensor(packs[scored.index].boundaries[1:])
            sample = scored.index * num_packed + torch.bucketize(scored.positions_T, ends, right=True)
            for total, values in zip(totals, (None, scored.hits_T, scored.losses_T), strict=True):
                total += torch.bincount(sample, values, len(samples))
        tokens, hits, losses = _sum_over_ranks(totals, engine)
        return (hits == tokens).double().mean().item(), (losses.sum() / tokens.sum()).item()

    of_context = None if context is None else answered([cut_pack(pack, context) for pack in packs])[0]
    return Answers(*answered(packs), of_context)


def decoded_answers(
    engine: TrainingEngine, sharder: Sharder, samples: Sequence[Sample], tokenizer: Tokenizer
) -> Answers:
    """What greedy decoding writes after each prompt, in as many tokens as the answer has and 32 more."""
    model: Any = engine.model
    stop = {int(tokenizer.encode([""])[0][-1]), *model.stop_tokens}  # the separator, and what the model ends texts with
    decoder, total = Decoder(engine), torch.zeros(1, dtype=torch.float64)
    for sample in samples[sharder.data_rank :: sharder.data_degree]:
        (tokens,) = decoder.generate([sample.prompt], len(sample.answer) + NUM_SPARE, stop)
        text = tokenizer.decode(np.array(tokens, np.int64))
        if sharder.sequence_rank == 0:  # the others have the same text
            total += sum(part in text for part in sample.answers) / len(sample.answers)
    return Answers(_sum_over_ranks(total, engine).item() / len(samples), None)


def pack_samples(samples: Sequence[Sample], num_packed: int, length: int) -> list[Pack]:
    """Packs of `length` tokens with `num_packed` samples each, of which only answers are labels."""
    documents = [(*sample.prompt, *sample.answer) for sample in samples]
    trained = np.concatenate([np.arange(len(s.prompt) + len(s.answer)) >= len(s.prompt) for s in samples])
    ends = np.cumsum([len(document) for document in documents])
    store = TokenStore(
        "samples", np.concatenate([np.array(document, np.int64) for document in documents]), ends, trained
    )
    pieces = [Piece(0, start, stop, False) for start, stop in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    return [
        Pack(tuple(pieces[first : first + num_packed]), length, START, START, (store,))
        for first in range(0, len(pieces), num_packed)
    ]


def _bucket_sums(
    engine: TrainingEngine, sharder: Sharder, packs: Sequence[Pack], whole: Sequence[Pack], edges: list[int]
) -> list[list[float]]:
    """(sum of losses, number of labels) of each bucket; positions are those in the documents of `whole`."""
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for scored in _scored(engine, sharder, packs):
        positions_T = scored.positions_T
        if sharder.document_mask:
            positions_T = restarted(positions_T, whole[scored.index].boundaries)
        buckets = bucket_of(positions_T, edges)
        sums[0] += torch.bincount(buckets, scored.losses_T, len(edges) - 1)
        sums[1] += torch.bincount(buckets, None, len(edges) - 1)
    return _sum_over_ranks(sums, engine).T.tolist()


def _scored(engine: TrainingEngine, sharder: Sharder, packs: Sequence[Pack]) -> Iterator[Scored]:
    """This rank's labelled tokens of its packs. Every rank must take all; a rank without a pack takes an empty one."""
    firsts = range(0, len(packs), sharder.data_degree)
    for first, batch in zip(firsts, sharder.validation(packs), strict=True):
        index = first + sharder.data_rank if first + sharder.data_rank < len(packs) else first
        is_labelled = batch.labels_BS[0] != IGNORED_LABEL
        positions_S = sharder.layout_of([packs[index]]).positions(sharder.sequence_rank)
        losses_S, hits_S = engine.token_scores(batch)[:, 0].double().cpu()
        yield Scored(index, positions_S[is_labelled], losses_S[is_labelled], hits_S[is_labelled])


def _sum_over_ranks(sums: Tensor, engine: TrainingEngine) -> Tensor:
    sums = sums.to(engine.device)
    dist.all_reduce(sums)
    return sums.cpu()
