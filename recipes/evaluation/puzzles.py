"""The retrieval tasks as texts, in the manner of RULER: what is hidden in the hay, the question, and the answer.

A question ends in the middle of a sentence, which the answer ends, so that a model without a chat template is asked
too. The order of the parts of an answer follows from the question, so that one text is right. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

NUM_DISTRACTORS = 3  # of niah_multikey: needles that nobody asks for
NUM_NEEDLES = 4  # values of niah_multivalue, keys asked for by niah_multiquery
NUM_VARIABLES = 4  # of a chain of variable_tracing
NUM_FREQUENT = 3  # words that aggregation asks for: they occur 4, 3 and 2 times as often as the others
NUM_RARE = 5
ITEMS_SHARE = 0.25  # of a sequence: the items of aggregation, at most
DIGITS = "0123456789"
NUM_DIGITS = 6

ADJECTIVES = """
able bold brave brief bright broad calm cheap clean clear close cold cool dark deep dry early eager easy exact
faint fair fast fine firm flat fresh full glad good grand green happy hard heavy hollow huge ideal kind large
late light little local lone long loud low main mild narrow neat new noble old open pale plain proud pure quick
quiet rapid rare ready real rich round safe sharp short silent simple slow small smooth soft solid steep strong
sweet tall tame thin tidy tiny vast warm weak wide wild wise young
"""
NOUNS = """
anchor apple arrow basin beach bell bird boat book bottle branch bridge brush bucket butter button cabin camel
candle canyon carpet castle chair cherry circle clock cloud coat coin copper corner cotton crown desert door
dragon drum eagle engine falcon feather field finger flame flower forest fountain garden gate glove grass
hammer harbor hill honey horse island jacket kettle kitten ladder lake lamp lantern leaf lemon letter lion
market meadow mirror monkey moon mountain needle ocean orange owl paper pearl pencil pepper piano pillow planet
pocket potato rabbit ribbon river rocket saddle salmon shell silver spider spoon spring stone table temple
tiger tower train tree tunnel turtle valley violin wagon wall water whale window winter wolf
"""


class Needle(NamedTuple):
    """A line to hide."""

    text: str
    depth: float  # the share of the hay before it


class Puzzle(NamedTuple):
    """A sample before its hay. Needles of equal depth stay in order."""

    needles: tuple[Needle, ...]
    question: str  # follows the hay
    answer: str  # follows the question
    answers: tuple[str, ...]  # its parts


def niah_single(random: Random, depth: float, num_items: int) -> Puzzle:
    """One key, one value."""
    return _asked_keys(random, [depth], num_asked=1)


def niah_multikey(random: Random, depth: float, num_items: int) -> Puzzle:
    """One value of several keys."""
    return _asked_keys(random, [depth, *_depths(random, NUM_DISTRACTORS)], num_asked=1)


def niah_multiquery(random: Random, depth: float, num_items: int) -> Puzzle:
    """The values of several keys, in the order of the question. The first is at `depth`."""
    return _asked_keys(random, [depth, *_depths(random, NUM_NEEDLES - 1)], num_asked=NUM_NEEDLES)


def niah_multivalue(random: Random, depth: float, num_items: int) -> Puzzle:
    """All values of one key, in the order of the text. One of them is at `depth`."""
    (key,), values = _keys(random, 1), _values(random, NUM_NEEDLES)
    depths = sorted([depth, *_depths(random, NUM_NEEDLES - 1)])
    needles = [Needle(f"A magic number of {key} is {value}.", at) for value, at in zip(values, depths, strict=True)]
    question = f"The {NUM_NEEDLES} magic numbers of {key}, in the order of the text, are"
    return Puzzle(tuple(needles), question, _answer(values), tuple(values))


def variable_tracing(random: Random, depth: float, num_items: int) -> Puzzle:
    """Variables that have a value, given to the first at `depth`, and to each other by the one before, further down."""
    names = _names(random, NUM_VARIABLES)
    (value,) = _values(random, 1)
    later = sorted(depth + (1 - depth) * share for share in _depths(random, NUM_VARIABLES - 1))
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    needles = [
        Needle(f"VAR {name} = {source}", at) for name, source, at in zip(names, assigned, [depth, *later], strict=True)
    ]
    question = f"The {NUM_VARIABLES} variables that have the value {value}, in the order of the text, are"
    return Puzzle(tuple(needles), question, _answer(names), tuple(names))


def aggregation(random: Random, depth: float, num_items: int) -> Puzzle:
    """The most frequent of words that are spread over the text; `num_items` of them, rounded down, at least a set."""
    words = random.sample(NOUNS.split(), NUM_FREQUENT + NUM_RARE)
    weights = [*range(NUM_FREQUENT + 1, 1, -1), *[1] * NUM_RARE]
    repeats = max(1, num_items // sum(weights))
    items = [word for word, weight in zip(words, weights, strict=True) for _ in range(weight * repeats)]
    random.shuffle(items)
    depths = sorted(_depths(random, len(items)))
    needles = [Needle(f"Item: {word}.", at) for word, at in zip(items, depths, strict=True)]
    frequent = words[:NUM_FREQUENT]
    question = f"The {NUM_FREQUENT} most frequent items, the most frequent first, are"
    return Puzzle(tuple(needles), question, _answer(frequent), tuple(frequent))


TASKS: dict[str, Callable[[Random, float, int], Puzzle]] = {
    "niah_single": niah_single,
    "niah_multikey": niah_multikey,
    "niah_multivalue": niah_multivalue,
    "niah_multiquery": niah_multiquery,
    "variable_tracing": variable_tracing,
    "aggregation": aggregation,
}
WITHOUT_DEPTH = ("aggregation",)


def _asked_keys(random: Random, depths: list[float], num_asked: int) -> Puzzle:
    keys, values = _keys(random, len(depths)), _values(random, len(depths))
    needles = [
        Needle(f"The magic number of {key} is {value}.", at)
        for key, value, at in zip(keys, values, depths, strict=True)
    ]
    asked, answers = keys[:num_asked], tuple(values[:num_asked])
    if num_asked == 1:
        question = f"The magic number of {asked[0]} is"
    else:
        question = f"The magic numbers of {_listed(asked)}, in this order, are"
    return Puzzle(tuple(sorted(needles, key=lambda needle: needle.depth)), question, _answer(answers), answers)


def _depths(random: Random, num: int) -> list[float]:
    return [random.random() for _ in range(num)]


def _keys(random: Random, num: int) -> list[str]:
    """Keys without a common word."""
    pairs = zip(random.sample(ADJECTIVES.split(), num), random.sample(NOUNS.split(), num), strict=True)
    return [f"{adjective}-{noun}" for adjective, noun in pairs]


def _values(random: Random, num: int) -> list[str]:
    """Numbers. The digits of each differ, so that a digit says what follows it: small models can copy it, too."""
    values: list[str] = []
    while len(values) < num:
        digits = "".join(random.sample(DIGITS, NUM_DIGITS))
        if digits[0] != "0" and digits not in values:
            values.append(digits)
    return values


def _names(random: Random, num: int) -> list[str]:
    names: list[str] = []
    while len(names) < num:
        name = "".join(random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=4))
        if name not in names:
            names.append(name)
    return names


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _answer(parts: Sequence[str]) -> str:
    return f" {', '.join(parts)}"
