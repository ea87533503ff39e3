"""Retrieval tasks as tokens: a puzzle in hay, real text that is cut so that the sample has the length that was asked.

`python -m recipes.retrieval_data` writes the same samples as rows to train on.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from conf.schema import ConfigError, DataConfig
from data.source import open_source
from data.tokenizer import PretrainedTokenizer, Tokenizer
from recipes.evaluation.puzzles import ITEMS_SHARE, TASKS, WITHOUT_DEPTH, Puzzle

__all__ = ["TASKS", "WITHOUT_DEPTH", "Sample", "make_samples", "read_hay"]

_WORD = re.compile(r"\s*\S+")  # with the space before it, as most tokenizers cut texts
_CANNOT = "task {}: tokenizer {} cannot make it:"
_CHARACTERS_PER_TOKEN = 6  # of hay to begin with; more is taken if it does not last


@dataclass(frozen=True)
class Sample:
    """One question about one text.

    `answer` is one text's tokens, and `answers` its parts: a generated text that has all of them is right, too.
    """

    task: str
    length: int  # at most so many tokens have prompt and answer together
    depth: float | None  # the share of the text before the needle; None: the task has none
    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # what greedy decoding must give, first to last
    answers: tuple[str, ...]


def make_samples(
    task: str, tokenizer: Tokenizer, hay: Sequence[str], length: int, depth: float | None, count: int, seed: int
) -> list[Sample]:
    """Samples of one task. Equal arguments give equal samples.

    Args:
        task: one of TASKS.
        hay: texts, of which each sample takes a stretch; they begin again after the last.
        length: of prompt and answer together, in tokens. Samples fall short of it by less than a word.
        depth: 0 to 1; None: each sample's own, drawn evenly.

    Raises:
        ConfigError: if the length does not hold the question, or the tokenizer changes what is asked.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task} is not known: use {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"task {task}: depth={depth} must be from 0, the text's start, to 1, its end")
    if not any(map(str.strip, hay)):
        raise ConfigError(f"task {task}: the hay has no words: give texts to hide the needles in, such as data=stdlib")
    samples = []
    for number in range(count):
        random = Random(f"{task} {length} {depth} {seed} {number}")  # an int or a text seeds alike in every process
        samples.append(_sample(task, tokenizer, hay, length, depth, random))
    return samples


def read_hay(config: DataConfig) -> list[str]:
    """The texts of a source. Raises CorpusError if they cannot be read."""
    return [row.content for row in open_source(config).rows() if isinstance(row.content, str)]


def _sample(
    task: str, tokenizer: Tokenizer, hay: Sequence[str], length: int, depth: float | None, random: Random
) -> Sample:
    has_depth = task not in WITHOUT_DEPTH
    at = random.random() if depth is None or not has_depth else depth
    num_items = int(length * ITEMS_SHARE) // _count(tokenizer, ["\nItem: mountain.\n"])[0]
    puzzle = TASKS[task](random, at, num_items)
    start = _bos(tokenizer)
    answer = _answer(task, tokenizer, puzzle)
    room = length - len(start) - len(answer)
    bare = _count(tokenizer, [_text(puzzle, [], [])])[0]
    if bare > room:
        raise ConfigError(
            f"task {task}: length={length} is too short: question and answer alone take "
            f"{bare + len(start) + len(answer)} tokens of tokenizer {tokenizer.name}; give that or more"
        )
    words, counts = _words(tokenizer, hay, room - bare, random)
    text, prompt = _fitted(tokenizer, puzzle, words, counts, room)
    if _tokens(tokenizer, text + puzzle.answer) != prompt + answer:
        raise ConfigError(f"{_CANNOT.format(task, tokenizer.name)} the text changes the tokens of its end: use another")
    return Sample(task, length, at if has_depth else None, (*start, *prompt), answer, puzzle.answers)


def _fitted(
    tokenizer: Tokenizer, puzzle: Puzzle, words: list[str], counts: list[int], room: int
) -> tuple[str, tuple[int, ...]]:
    """The longest text that fits, and its tokens. The sum of the words' tokens is close to the text's, not equal."""
    num_words = len(words)
    too_many = num_words + 1
    while True:
        text = _text(puzzle, words[:num_words], counts[:num_words])
        prompt = _tokens(tokenizer, text)
        left = room - len(prompt)
        if left < 0:
            too_many = num_words
            num_words -= _first_to_reach(reversed(counts[:num_words]), -left)
        elif num_words + 1 < too_many and left >= counts[num_words]:
            num_words = min(too_many - 1, num_words + max(1, _first_to_reach(counts[num_words:], left) - 1))
        else:
            return text, prompt


def _first_to_reach(counts: Iterable[int], tokens: int) -> int:
    """How many of the counts, from the first on, add up to at least so many tokens; all of them if they do not."""
    totals = list(itertools.accumulate(counts))
    return min(len(totals), 1 + bisect.bisect_left(totals, tokens))


def _text(puzzle: Puzzle, words: list[str], counts: list[int]) -> str:
    """Hay with each needle on a line of its own, behind its share of the hay's tokens; then the question."""
    ends = list(itertools.accumulate(counts))
    parts, first = [], 0
    for needle in puzzle.needles:
        goal = needle.depth * (ends[-1] if ends else 0)
        last = max(first, bisect.bisect_right(ends, goal))
        parts += ["".join(words[first:last]).strip("\n"), needle.text]
        first = last
    parts += ["".join(words[first:]).strip("\n"), f"\n{puzzle.question}"]
    return "\n".join(part for part in parts if part)


def _words(tokenizer: Tokenizer, hay: Sequence[str], tokens: int, random: Random) -> tuple[list[str], list[int]]:
    """A stretch of the hay from a random place on, at least so many tokens long: its words, and each one's tokens."""
    words: list[str] = []
    counts: list[int] = []
    number = random.randrange(len(hay))
    offset = random.randrange(1 + len(hay[number]))
    while (missing := tokens - sum(counts)) >= 0:
        stretch = hay[number][offset : offset + _CHARACTERS_PER_TOKEN * (missing + 16)]
        found = _WORD.findall(stretch if offset else f"\n{stretch}")
        if offset and not words:
            del found[:1]  # the random place may lie within a word
        offset += len(stretch)
        if offset == len(hay[number]):
            number, offset = (number + 1) % len(hay), 0
        if distinct := sorted(set(found)):
            of_word = dict(zip(distinct, _count(tokenizer, distinct), strict=True))
            words += found
            counts += [of_word[word] for word in found]
    return words, counts


def _answer(task: str, tokenizer: Tokenizer, puzzle: Puzzle) -> tuple[int, ...]:
    """Its tokens behind the question. Raises ConfigError if the puzzle's texts do not survive the tokenizer."""
    cannot = _CANNOT.format(task, tokenizer.name)
    question = _tokens(tokenizer, f"\n{puzzle.question}")
    joined = _tokens(tokenizer, f"\n{puzzle.question}{puzzle.answer}")
    if joined[: len(question)] != question:
        raise ConfigError(f"{cannot} it joins the question's end with the answer, {puzzle.answer!r}: use another")
    texts = [needle.text for needle in puzzle.needles] + [f"{puzzle.question}{puzzle.answer}"]
    for text in dict.fromkeys(texts):
        decoded = tokenizer.decode(np.array(_tokens(tokenizer, text), np.int64))
        if text.split() != decoded.split():
            raise ConfigError(f"{cannot} {text!r} becomes {decoded!r}: use one that keeps letters and digits")
    return joined[len(question) :]


def _bos(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer of `transformers` puts before a text."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        return ()
    bos_id, first = tokenizer.wrapped.bos_token_id, tokenizer.wrapped("a")["input_ids"][:1]
    return (bos_id,) if bos_id is not None and first == [bos_id] else ()


def _tokens(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Without the separator."""
    return tuple(tokenizer.encode([text])[0][:-1].tolist())


def _count(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [len(tokens) - 1 for tokens in tokenizer.encode(texts)]
