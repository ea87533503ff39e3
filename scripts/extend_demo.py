"""Shows that training at a long context gives a long context: trains, extends and evaluates a small model.

python scripts/extend_demo.py FOLDER           # two cores: from 512 tokens to 4,096, in a ring of 4 ranks
python scripts/extend_demo.py FOLDER 131072    # needs 2 GPUs: from 8,192 tokens to 131,072, in a ring of 2

1. A model learns at a short length to find a number in a text, and fails at the long one.
2. +experiment=extend trains it at the long length, whose tokens are cut over a ring.
3. Without the ring each rank has its share of the tokens alone: of 4,096 in training and in evaluation, of 131,072 in
   evaluation alone.

Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` and `scripts` are folders of the checkout

from scripts.make_tiny_llama import BOS, EOS, PAD, SEED, SPECIAL_TOKENS, write_tokenizer

CHECKOUT = Path(__file__).resolve().parents[1]
TASK, NUM_DEPTHS = "niah_single", 5
COPY_LENGTHS, CHARACTERS = (4, 24), "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
JOINT = 4  # tokens that joining adds for each row, at most
BASE = 512  # tokens of rows with one question


@dataclass(frozen=True)
class Size:
    """What a demonstration's length decides.

    Args:
        short, long: tokens of a sequence, before and after the extension.
        rows: by file: how many of one question, their shortest and longest length.
        joined: by file: of which rows it is joined, how many, their shortest and longest length.
        num_copies: rows that repeat their prompt.
        model: of a transformers.Qwen2Config.
        learn, extend: settings of the two runs.
        trains_alone: whether the extension runs without the ring, too.
    """

    short: int
    long: int
    num_ranks: int
    rows: dict[str, tuple[int, int, int]]
    joined: dict[str, tuple[str, int, int, int]]
    num_copies: int
    num_samples: int
    dtype: str
    model: dict[str, Any]
    learn: str
    extend: str
    trains_alone: bool

    @property
    def train(self) -> str:
        return (
            f"data=chat data.validation_sequences=4 engine.dtype={self.dtype} engine.zero_stage=1 "
            "engine.recompute=none optimizer.warmup_fraction=0.06 checkpoint.every_n_steps=0 "
            "logging.wandb=disabled breakdown=false"
        )


SIZES = {
    4096: Size(
        short=512,
        long=4096,
        num_ranks=4,
        rows={"bare": (2500, 72, 96), "short": (2000, 96, BASE)},
        joined={"dense": ("bare", 1500, BASE // 4, BASE), "long": ("short", 150, 4096 - 64, 4096)},
        num_copies=8_000,
        num_samples=40,
        dtype="fp32",
        model={"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.06},
        learn="num_steps=700 optimizer.lr=3.0e-3 launch.num_ranks=2 engine.micro_batch_size=2",
        extend="num_steps=400 optimizer.lr=1.0e-3",
        trains_alone=True,
    ),
    131072: Size(
        short=8192,
        long=131072,
        num_ranks=2,
        rows={"bare": (10_000, 72, 96), "short": (10_000, 96, BASE)},
        joined={
            "dense": ("bare", 5_000, BASE // 4, BASE),
            "medium": ("short", 1_000, 8192 - 128, 8192),
            "long": ("short", 116, 131072 - 512, 131072),
        },
        num_copies=40_000,
        num_samples=10,
        dtype="bf16",
        model={
            "hidden_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "initializer_range": 0.02,
        },
        learn="num_steps=400 optimizer.lr=3.0e-4 launch.num_ranks=2 engine.micro_batch_size=2",
        extend=(
            "num_steps=44 optimizer.lr=2.0e-4 evaluate.every_n_steps=11 evaluate.tasks=[niah_single] "
            "evaluate.lengths=[8192,131072] evaluate.depths=3 evaluate.samples=4"
        ),
        trains_alone=False,
    ),
}


def main(arguments: list[str]) -> None:
    legal = {str(length): size for length, size in SIZES.items()}
    folder, length = [*arguments, "4096"][:2] if arguments else ("", "")
    if len(arguments) > 2 or not folder or folder.startswith("-") or length not in legal:
        sys.exit(
            f"error: it takes a folder, and one of the lengths {' and '.join(legal)}: type "
            "python scripts/extend_demo.py FOLDER"
        )
    path = Path(folder).absolute()
    if path.exists() and any(path.iterdir()):
        sys.exit(f"error: {path} is not empty: give a new or an empty folder")
    started = time.perf_counter()
    print(
        *table(demonstrate(path, legal[length])), f"{time.perf_counter() - started:.0f} s in all", sep="\n", flush=True
    )


def demonstrate(folder: Path, size: Size) -> dict[str, dict[tuple[int, float], float]]:
    """Accuracies by model, then by length and depth."""
    base, share = folder / "base", size.long // size.num_ranks
    write_base(base, size)
    for name, (count, shortest, longest) in size.rows.items():
        lengths = f"--min-length {shortest} --length {longest} --count {count}"
        run(f"-m recipes.retrieval_data --output {folder}/{name}.jsonl --tokenizer {base} --tasks {TASK} {lengths}")
    write_joined(folder, base, size.joined)
    write_copies(folder / "copies.jsonl", size.num_copies)

    files = [f"{folder}/{name}.jsonl" for name in ("copies", *size.rows, *size.joined) if name != "long"]
    learn = (
        f"+experiment=finetune {size.train} data.sequence_length={size.short} parallelism.data_degree=2 {size.learn}"
    )
    train(folder / "short", f"{learn} model.path={base} data.files=[{','.join(files)}]")
    model = folder / "short_model"
    run(f"-m recipes.export {folder}/short --output {model}")

    extend = (
        f"+experiment=extend {size.train} data.sequence_length={size.long} launch.num_ranks={size.num_ranks} "
        f"model.path={model} model.rope='{{rope_type:yarn,factor:{size.long // size.short}}}' "
        f"data.files=[{folder}/bare.jsonl,{folder}/long.jsonl] {size.extend}"
    )
    train(folder / "ring", extend)
    if size.trains_alone:  # as many tokens a step, on as many ranks, but none sees beyond its own
        alone = f"attention=local parallelism.data_degree={size.num_ranks} data.sequence_length={share}"
        train(folder / "alone", f"{extend} {alone}")

    short, context = evaluate(folder, size, "short"), f"evaluate.context={share}"
    if size.trains_alone:
        ring, alone = evaluate(folder, size, "ring"), evaluate(folder, size, "alone", context)
    else:
        ring = alone = evaluate(folder, size, "ring", context)
    return {
        f"trained at {size.short:,}": accuracies(short),
        f"extended, ring of {size.num_ranks}": accuracies(ring),
        "the same without it": accuracies(alone, "accuracy_of_context"),
    }


def write_base(folder: Path, size: Size) -> None:
    """A tokenizer of 512 tokens, and random weights of a shape that learns to look things up within minutes.

    Looking up needs a layer in which each token sees those before it, and one that then finds what followed the same
    tokens earlier. So every other layer, from the first, has a window of six tokens.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder, vocab_size=512)
    import torch
    import transformers

    bos_id, eos_id, pad_id = map(SPECIAL_TOKENS.index, (BOS, EOS, PAD))
    hidden_size, num_layers = size.model["hidden_size"], size.model["num_hidden_layers"]
    config = transformers.Qwen2Config(
        vocab_size=512,
        num_key_value_heads=size.model["num_attention_heads"],
        intermediate_size=3 * hidden_size,
        max_position_embeddings=size.short,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * (num_layers // 2),
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        **size.model,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def write_joined(folder: Path, tokenizer: Path, files: dict[str, tuple[str, int, int, int]]) -> None:
    """Rows of many questions. A row of one question has about six tokens to learn from, however long it is."""
    from transformers import AutoTokenizer

    count = AutoTokenizer.from_pretrained(tokenizer)
    draw = random.Random(SEED)
    for name, (part, num_rows, shortest, longest) in files.items():
        parts = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        texts = [row["prompt"] + row["completion"] for row in parts]
        lengths = [len(tokens) + JOINT for tokens in count(texts, add_special_tokens=False)["input_ids"]]
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(num_rows):
                chosen = some(lengths, draw.randint(shortest, longest), draw)
                file.write(json.dumps(joined([parts[index] for index in chosen], draw)) + "\n")


def some(lengths: list[int], most: int, draw: random.Random) -> list[int]:
    """Indices of lengths that add up to at most `most`, drawn until the next one is too many."""
    chosen: list[int] = []
    left = most
    while lengths[index := draw.randrange(len(lengths))] <= left:
        chosen.append(index)
        left -= lengths[index]
    return chosen


def joined(rows: list[dict[str, str]], draw: random.Random) -> dict[str, str]:
    """All texts behind each other, then their questions. What follows the first question is trained.

    The first is about the last text, so that some rows ask for what is near. The others are in any order.
    """
    texts, questions = zip(*(row["prompt"].removeprefix(BOS).rsplit("\n", 1) for row in rows), strict=True)
    asked = [(question, row["completion"]) for question, row in zip(questions, rows, strict=True)]
    (question, answer), others = asked[-1], asked[:-1]
    draw.shuffle(others)
    completion = answer + "".join(f".\n{question}{answer}" for question, answer in others)
    return {"prompt": "\n".join([f"{BOS}{texts[0]}", *texts[1:], question]), "completion": completion}


def write_copies(file: Path, count: int) -> None:
    """Rows that repeat their prompt. Without them the model needs thousands of steps to learn to look things up."""
    draw = random.Random(SEED)
    with open(file, "w") as rows:
        for _ in range(count):
            text = "".join(draw.sample(CHARACTERS, draw.randint(*COPY_LENGTHS)))
            rows.write(json.dumps({"prompt": f"{text}\n", "completion": text}) + "\n")


def train(run_dir: Path, settings: str) -> None:
    run(f"train.py {settings} hydra.run.dir={run_dir}")


def evaluate(folder: Path, size: Size, name: str, context: str = "") -> list[dict[str, Any]]:
    """The cells of its evaluation.json."""
    run_dir = folder / f"{name}_evaluation"
    run(
        f"train.py recipe=evaluate evaluate.model={folder}/{name} evaluate.tasks=[{TASK}] evaluate.depths={NUM_DEPTHS} "
        f"evaluate.lengths=[{size.short},{size.long}] evaluate.samples={size.num_samples} engine.dtype={size.dtype} "
        f"logging.wandb=disabled launch.num_ranks={size.num_ranks} hydra.run.dir={run_dir} {context}"
    )
    return json.loads((run_dir / "evaluation.json").read_text())["cells"]


def accuracies(cells: list[dict[str, Any]], of: str = "accuracy") -> dict[tuple[int, float], float]:
    """By length and depth."""
    return {(cell["length"], cell["depth"]): cell[of] for cell in cells}


def table(results: dict[str, dict[tuple[int, float], float]]) -> Iterator[str]:
    cells = list(next(iter(results.values())))
    yield f"{TASK}, accuracy by length and depth"
    yield f"{'':22}" + "".join(f"{length:>8}@{depth:.2f}" for length, depth in cells)
    for name, accuracy in results.items():
        yield f"{name:22}" + "".join(f"{accuracy[cell]:>12.0%} " for cell in cells)


def run(command: str) -> None:
    print(f"\n$ python {command}", flush=True)
    if code := subprocess.run([sys.executable, *shlex.split(command)], cwd=CHECKOUT).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
