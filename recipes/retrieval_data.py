"""python -m recipes.retrieval_data --output FILE.jsonl --tokenizer FOLDER ...: retrieval tasks as rows to train on.

Each row has a prompt and a completion, which data=chat trains on. They are the samples that recipe=evaluate scores, of
another seed, other lengths and other depths.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from conf.schema import ConfigError, DataConfig
from data.tokenizer import Tokenizer, open_tokenizer
from recipes.evaluation.tasks import TASKS, Sample, make_samples, read_hay

END_SHARE = 0.1  # so much oftener than others are depths 0 and 1, where the hay does not surround the needle


def rows(
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    hay: Sequence[str],
    lengths: tuple[int, int],
    count: int,
    seed: int,
) -> Iterator[dict[str, str]]:
    """`count` rows of the tasks in turn, each of its own length and depth, which are drawn evenly, but for the ends.

    Args:
        lengths: the shortest and the longest, in tokens.

    Raises:
        ConfigError: as make_samples, or if data=chat would train on other tokens.
    """
    random = Random(seed)
    for number in range(count):
        length, depth = random.randint(*lengths), min(1.0, max(0.0, random.uniform(-END_SHARE, 1 + END_SHARE)))
        [sample] = make_samples(tasks[number % len(tasks)], tokenizer, hay, length, depth, 1, random.getrandbits(63))
        yield _row(tokenizer, sample)


def _row(tokenizer: Tokenizer, sample: Sample) -> dict[str, str]:
    prompt, completion = (tokenizer.decode(np.array(part)) for part in (sample.prompt, sample.answer))
    for text, tokens in ((prompt, sample.prompt), (completion, sample.answer)):
        found = tuple(tokenizer.encode([text])[0][:-1].tolist())
        if found != tokens:
            raise ConfigError(
                f"task {sample.task}: tokenizer {tokenizer.name} makes other tokens of {text[-40:]!r} alone than in a "
                f"text, {list(found)[-8:]} and not {list(tokens)[-8:]}: use one that keeps the space before a word"
            )
    return {"prompt": prompt, "completion": completion}


def write(arguments: argparse.Namespace) -> None:
    """Write the rows. The file appears when it is complete. Raises ConfigError if it cannot be made."""
    tasks = list(TASKS) if arguments.tasks is None else arguments.tasks.split(",")
    shortest, longest = arguments.min_length or arguments.length, arguments.length
    if not 1 <= shortest <= longest:
        raise ConfigError(f"--min-length {shortest} must be from 1 to --length {longest}")
    if arguments.count < 1:
        raise ConfigError(f"--count {arguments.count} must be at least 1")
    output = Path(arguments.output)
    if output.exists():
        raise ConfigError(f"--output {output} is there already: give a new name, or delete it")
    tokenizer, hay = open_tokenizer(DataConfig(tokenizer=arguments.tokenizer)), read_hay(DataConfig())
    partial = output.with_name(f".{output.name}.partial")
    made = rows(tasks, tokenizer, hay, (shortest, longest), arguments.count, arguments.seed)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for row in tqdm(made, "rows", arguments.count, unit=" rows", disable=not sys.stderr.isatty()):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}): give a file in a folder") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{output}: {arguments.count:,} rows of {', '.join(tasks)}, {shortest:,} to {longest:,} tokens", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.retrieval_data", description=__doc__)
    parser.add_argument("--output", required=True, help="the file of JSON lines to write")
    parser.add_argument("--tokenizer", required=True, help="a folder, a tokenizer.json or a name on the hub")
    parser.add_argument("--length", type=int, required=True, help="of the longest rows, in tokens")
    parser.add_argument("--min-length", type=int, help="of the shortest rows; without it all have --length")
    parser.add_argument("--count", type=int, required=True, help="of rows")
    parser.add_argument("--tasks", help=f"some of {','.join(TASKS)}, with commas; without it all")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rows")
    try:
        write(parser.parse_args(arguments))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1:])
