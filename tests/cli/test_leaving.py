"""A trained model leaves: its export answers under plain transformers as recipe=evaluate has counted on a ring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.schema import DataConfig
from data.tokenizer import open_tokenizer
from recipes.evaluation.tasks import Sample, make_samples, read_hay
from recipes.export import export
from tests.cli.program import Program

pytestmark = pytest.mark.slow

TASKS, LENGTHS, DEPTHS, NUM_SAMPLES, SEED = ("niah_single", "variable_tracing"), (192, 256), (0.0, 1.0), 3, 5
LEARNED_DEPTH = 0.0  # training shows the first sample of each cell of this depth, with its answer
COMMON = ["launch.num_ranks=2", "engine.dtype=fp32"]
TRAIN = [
    *COMMON,
    "+experiment=finetune",
    "data=chat",
    "data.sequence_length=512",
    "data.validation_sequences=1",
    "model.rope={rope_type:yarn,factor:2}",
    "engine.recompute=none",
    "optimizer.lr=3e-3",
    "optimizer.decay=constant",
    "optimizer.weight_decay=0",
    "num_steps=80",
    "breakdown=false",
]


class CellOf(NamedTuple):
    """As evaluation.json names it."""

    task: str
    length: int
    depth: float


def samples_of(tokenizer_folder: Path) -> dict[CellOf, list[Sample]]:
    tokenizer, hay = open_tokenizer(DataConfig(tokenizer=str(tokenizer_folder))), read_hay(DataConfig())
    cells = [CellOf(task, length, depth) for length in LENGTHS for task in TASKS for depth in DEPTHS]
    return {cell: make_samples(cell.task, tokenizer, hay, cell.length, cell.depth, NUM_SAMPLES, SEED) for cell in cells}


def write_rows(file: Path, samples: dict[CellOf, list[Sample]], tokenizer_folder: Path) -> None:
    """The learned samples, for data=chat."""
    decode = open_tokenizer(DataConfig(tokenizer=str(tokenizer_folder))).decode
    learned = [of_cell[0] for cell, of_cell in samples.items() if cell.depth == LEARNED_DEPTH]
    rows = [{"prompt": decode(np.array(s.prompt)), "completion": decode(np.array(s.answer))} for s in learned]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def by_transformers(folder: Path, samples: Sequence[Sample]) -> tuple[float, float]:
    """(share of answers that greedy decoding gives, mean loss of the answers' tokens in nats), in one process."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    num_right, losses = 0, []
    for sample in samples:
        prompt_1S, answer_S = torch.tensor([sample.prompt]), torch.tensor(sample.answer)
        decoded = model.generate(prompt_1S, max_new_tokens=len(sample.answer), do_sample=False)
        num_right += decoded[0, len(sample.prompt) :].tolist() == [*sample.answer]
        logits_SV = model(torch.tensor([[*sample.prompt, *sample.answer]])).logits[0, len(sample.prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits_SV.double(), answer_S, reduction="none").tolist()
    return num_right / len(samples), sum(losses) / len(losses)


def test_an_exported_model_answers_alike_under_plain_transformers(program: Program, tiny_llama: Path):
    samples, rows, exported = samples_of(tiny_llama), program.folder / "rows.jsonl", program.folder / "exported"
    write_rows(rows, samples, tiny_llama)
    data = [f"data.files={rows}", f"data.validation_files={rows}"]
    trained = program.run(*TRAIN, f"model.path={tiny_llama}", *data, name="trained")
    assert trained.exit_code == 0, trained.stderr
    export(trained.run_dir, exported)

    expected = {cell: by_transformers(exported, of_cell) for cell, of_cell in samples.items()}
    for cell, (accuracy, _) in expected.items():  # a count that is always 0 cannot pass
        assert (accuracy > 0) == (cell.depth == LEARNED_DEPTH), cell
    asked = [f"evaluate.tasks=[{','.join(TASKS)}]", f"evaluate.lengths=[{','.join(map(str, LENGTHS))}]"]
    asked += [f"evaluate.depths={len(DEPTHS)}", f"evaluate.samples={NUM_SAMPLES}", f"evaluate.seed={SEED}"]
    for model, name in ((trained.run_dir, "run"), (exported, "folder")):
        evaluated = program.run(*COMMON, "recipe=evaluate", f"evaluate.model={model}", *asked, name=name)
        assert evaluated.exit_code == 0, evaluated.stderr
        cells = json.loads((evaluated.run_dir / "evaluation.json").read_text())["cells"]
        found = {CellOf(row["task"], row["length"], row["depth"]): row for row in cells}
        assert [*found] == [*expected]
        for cell, (accuracy, loss) in expected.items():
            assert found[cell]["accuracy"] == accuracy, cell
            assert found[cell]["answer_loss"] == pytest.approx(loss, rel=1e-5), cell
