"""Shows on two cores that training at a long context gives a long context: trains, extends and evaluates a tiny model.

python scripts/extend_demo.py FOLDER

1. A model of two layers learns at 512 tokens to find a number in a text, and fails at 4,096.
2. +experiment=extend trains it at 4,096 tokens, which are cut over a ring of 4 ranks.
3. Without the ring each of the 4 ranks has its 1,024 tokens alone, in training and in evaluation.

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` and `scripts` are folders of the checkout

from scripts.make_tiny_llama import BOS, EOS, PAD, SEED, SPECIAL_TOKENS, write_tokenizer

CHECKOUT = Path(__file__).resolve().parents[1]
SHORT, LONG, NUM_RANKS = 512, 4096, 4
TASK, NUM_SAMPLES, NUM_DEPTHS = "niah_single", 40, 5
# file: rows, shortest, longest
ROWS = {"bare": (2500, 72, 96), "short": (2000, 96, SHORT)}
# file: of which rows it is joined, rows, shortest, longest
JOINED = {"dense": ("bare", 1500, SHORT // 4, SHORT), "long": ("short", 150, LONG - 64, LONG)}
NUM_COPIES, COPY_LENGTHS, CHARACTERS = 8_000, (4, 24), "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
JOINT = 4  # tokens that joining adds for each row, at most
TRAIN = (
    "data=chat data.validation_sequences=4 engine.dtype=fp32 engine.zero_stage=1 engine.recompute=none "
    "optimizer.warmup_fraction=0.06 checkpoint.every_n_steps=0 logging.wandb=disabled breakdown=false"
)
LEARN = (
    f"+experiment=finetune {TRAIN} data.sequence_length={SHORT} num_steps=700 optimizer.lr=3.0e-3 "
    "launch.num_ranks=2 parallelism.data_degree=2 engine.micro_batch_size=2"
)
EXTEND = (
    f"+experiment=extend {TRAIN} data.sequence_length={LONG} num_steps=320 optimizer.lr=1.0e-3 "
    f"model.rope='{{rope_type:yarn,factor:{LONG // SHORT}}}' launch.num_ranks={NUM_RANKS}"
)
# as many tokens a step, on as many ranks, but none sees beyond its own
ALONE = f"attention=local parallelism.data_degree={NUM_RANKS} data.sequence_length={LONG // NUM_RANKS}"
EVALUATE = (
    f"recipe=evaluate evaluate.tasks=[{TASK}] evaluate.samples={NUM_SAMPLES} evaluate.depths={NUM_DEPTHS} "
    f"engine.dtype=fp32 logging.wandb=disabled launch.num_ranks={NUM_RANKS}"
)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("error: it takes one folder: type python scripts/extend_demo.py FOLDER")
    folder = Path(arguments[0]).absolute()
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty: give a new or an empty folder")
    started = time.perf_counter()
    print(*table(demonstrate(folder)), f"{time.perf_counter() - started:.0f} s in all", sep="\n", flush=True)


def demonstrate(folder: Path) -> dict[str, dict[tuple[int, float], float]]:
    """Accuracies by model, then by length and depth."""
    base = folder / "base"
    write_base(base)
    for name, (count, shortest, longest) in ROWS.items():
        lengths = f"--min-length {shortest} --length {longest} --count {count}"
        run(f"-m recipes.retrieval_data --output {folder}/{name}.jsonl --tokenizer {base} --tasks {TASK} {lengths}")
    write_joined(folder, base)
    write_copies(folder / "copies.jsonl")

    files = ",".join(f"{folder}/{name}.jsonl" for name in ("copies", "bare", "short", "dense"))
    train(folder / "short", f"{LEARN} model.path={base} data.files=[{files}]")
    model = folder / "short_model"
    run(f"-m recipes.export {folder}/short --output {model}")
    train(folder / "ring", f"{EXTEND} model.path={model} data.files=[{folder}/bare.jsonl,{folder}/long.jsonl]")

    train(folder / "alone", f"{EXTEND} {ALONE} model.path={model} data.files=[{folder}/bare.jsonl,{folder}/long.jsonl]")

    return {
        "trained at 512": evaluate(folder, "short"),
        "extended, ring of 4": evaluate(folder, "ring"),
        "the same without it": evaluate(
            folder, "alone", f"evaluate.context={LONG // NUM_RANKS}", "accuracy_of_context"
        ),
    }


def write_base(folder: Path) -> None:
    """A tokenizer of 512 tokens, and random weights of a shape that learns to look things up within minutes.

    Looking up needs a layer in which each token sees those before it, and one that then finds what followed the same
    tokens earlier. So the first layer's window is six tokens.
    """
    folder.mkdir(parents=True)
    write_tokenizer(folder, vocab_size=512)
    import torch
    import transformers

    bos_id, eos_id, pad_id = map(SPECIAL_TOKENS.index, (BOS, EOS, PAD))
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=SHORT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def write_joined(folder: Path, tokenizer: Path) -> None:
    """Rows of many questions. A row of one question has about six tokens to learn from, however long it is."""
    from transformers import AutoTokenizer

    count = AutoTokenizer.from_pretrained(tokenizer)
    draw = random.Random(SEED)
    for name, (part, num_rows, shortest, longest) in JOINED.items():
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


def write_copies(file: Path) -> None:
    """Rows that repeat their prompt. Without them the model needs thousands of steps to learn to look things up."""
    draw = random.Random(SEED)
    with open(file, "w") as rows:
        for _ in range(NUM_COPIES):
            text = "".join(draw.sample(CHARACTERS, draw.randint(*COPY_LENGTHS)))
            rows.write(json.dumps({"prompt": f"{text}\n", "completion": text}) + "\n")


def train(run_dir: Path, settings: str) -> None:
    run(f"train.py {settings} hydra.run.dir={run_dir}")


def evaluate(folder: Path, name: str, context: str = "", of: str = "accuracy") -> dict[tuple[int, float], float]:
    """Accuracy by length and depth."""
    run_dir = folder / f"{name}_evaluation"
    lengths = f"evaluate.lengths=[{SHORT},{LONG}] hydra.run.dir={run_dir}"
    run(f"train.py {EVALUATE} evaluate.model={folder}/{name} {lengths} {context}")
    cells = json.loads((run_dir / "evaluation.json").read_text())["cells"]
    return {(cell["length"], cell["depth"]): cell[of] for cell in cells}


def table(accuracies: dict[str, dict[tuple[int, float], float]]) -> Iterator[str]:
    cells = list(next(iter(accuracies.values())))
    yield f"{TASK}, accuracy by length and depth"
    yield f"{'':22}" + "".join(f"{length:>6}@{depth:.2f}" for length, depth in cells)
    for name, accuracy in accuracies.items():
        yield f"{name:22}" + "".join(f"{accuracy[cell]:>10.0%} " for cell in cells)


def run(command: str) -> None:
    print(f"\n$ python {command}", flush=True)
    if code := subprocess.run([sys.executable, *shlex.split(command)], cwd=CHECKOUT).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
