"""The documents people bring, from the command line: mixtures, streams and chats are trained, shown and resumed."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from tests.cli.program import Finished, Program
from tests.errors import names, some_line_names

STEPS = ["num_steps=24", "logging.every_n_steps=1", "checkpoint.every_n_steps=4", "breakdown=false"]
JOB = ["+experiment=ra_sp", "engine.dtype=fp32", "data.sequence_length=256", "data.validation_sequences=2", *STEPS]
COMPUTED = ("step", "train/loss", "train/data_epoch", "train/data_sequence", "validation/loss")
WORDS = [f"word{number}" for number in range(50)]


def write_lines(path: Path, num: int, seed: int) -> Path:
    """JSON lines of texts of very different lengths."""
    generator = random.Random(seed)
    texts = (" ".join(generator.choices(WORDS, k=generator.choice((3, 30, 300)))) for _ in range(num))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_chats(path: Path, num: int) -> Path:
    """Conversations that ask for sums, of one to three turns."""
    generator, lines = random.Random(0), []
    for _ in range(num):
        messages = [{"role": "system", "content": "You add numbers."}]
        for _ in range(generator.randrange(1, 4)):
            a, b = generator.randrange(100), generator.randrange(100)
            messages += [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
            ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[str]]:
    """The settings of each kind of data."""
    folder = tmp_path / "texts"
    folder.mkdir()
    first, second = write_lines(folder / "first.jsonl", 300, 1), write_lines(folder / "second.jsonl", 40, 2)
    mixture = (
        f"{{a: {{source: jsonl, files: {first}, weight: 0.75}}, b: {{source: jsonl, files: {second}, weight: 0.25}}}}"
    )
    return {
        "mixture": ["data=mixture", f"data.sources={mixture}", "data.packing=best_fit", "data.shuffle_window=64"],
        "stream": ["data=hub", f"data.name={first.parent}", "data.stream=true", "data.shuffle_window=32"],
    }


def computed(finished: Finished) -> list[list]:
    assert finished.exit_code == 0, finished.stderr
    return [[row.get(name) for name in COMPUTED] for row in finished.metrics]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "stream"])
def test_a_killed_run_goes_on_with_the_sequence_after_the_last(
    program: Program, sources: dict[str, list[str]], kind: str
):
    job = [*JOB, *sources[kind], "launch.num_ranks=2"]
    expected = computed(program.run(*job, name="whole"))
    assert len(expected) == 24
    with program.started(*job, name="killed") as running:
        running.until(lambda: "step 11/" in running.stdout)
        running.family()
        running.process.send_signal(signal.SIGKILL)
    resumed = (
        program.run(*job, "launch.num_ranks=1", name="killed")
        if kind == "mixture"
        else program.run(*job, name="killed")
    )
    got = computed(resumed)
    if kind == "stream":
        assert got == expected
        return
    for row, other in zip(got, expected, strict=True):  # on one rank sums are in another order
        assert row[2:4] == other[2:4]
        assert row[1] == pytest.approx(other[1], rel=1e-5)


def test_a_mixture_is_validated_by_source_and_explained(program: Program, sources: dict[str, list[str]]):
    job = [*JOB, *sources["mixture"], "launch.num_ranks=1", "num_steps=2"]
    finished = program.run(*job)
    assert finished.exit_code == 0, finished.stderr
    last = finished.metrics[-1]
    weighted = 0.75 * last["validation/loss/a"] + 0.25 * last["validation/loss/b"]
    assert last["validation/loss"] == pytest.approx(weighted)
    explained = program.run(*job, "launch.num_ranks=2", "explain=true", name="explained").stdout.splitlines()
    some_line_names(explained, "data.packing=best_fit", "256")
    some_line_names(explained, "padding")
    some_line_names(explained, "a", "75.0%")
    some_line_names(explained, "b", "25.0%")
    some_line_names(explained, "balanced", "of 4")  # of the first sequences


@pytest.mark.slow
def test_chats_are_shown_and_trained_on_what_the_assistant_says(program: Program, tmp_path: Path, tiny_llama: Path):
    chats = write_chats(tmp_path / "chats.jsonl", 240)
    job = ["+experiment=finetune", f"model.path={tiny_llama}", "data=chat", f"data.files={chats}", *STEPS]
    job += ["data.sequence_length=512", "data.validation_sequences=2", "launch.num_ranks=2", "optimizer.lr=3e-3"]
    shown = program.run(*job, "data.preview=1")
    assert shown.exit_code == 0, shown.stderr
    assert "You add numbers" in shown.stdout
    trained = "".join(part.split("-]")[-1] for part in shown.stdout.split("[-"))
    assert " plus " in trained
    assert "What is" not in trained
    assert "You add" not in trained
    finished = program.run(*job)
    assert finished.exit_code == 0, finished.stderr
    losses = [row["train/loss"] for row in finished.metrics]
    assert losses[-1] < losses[0] - 1
    untagged = program.run(
        *[setting for setting in job if not setting.startswith("data.files")], "data.files=nosuch.jsonl"
    )
    assert untagged.exit_code == 1
    names(untagged.stderr, "data.files=nosuch.jsonl")
