"""recipe=generate from the command line: a Hugging Face folder and a run, against transformers in one process."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.export import main as export
from tests.cli.program import Finished, Program
from tests.cli.test_export import SHORT
from tests.errors import names

NUM_NEW = 12
GENERATE = ["recipe=generate", "launch.num_ranks=2", f"generate.max_new_tokens={NUM_NEW}"]
PROMPTS = ["def main(", "import os\nimport sys\n" * 8, "class A:\n    pass"]
CHAT = [{"role": "user", "content": "Hello there"}]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_transformers(folder: Path, *chats: list[dict[str, str]]) -> list[list[int]]:
    """The greedy tokens after each prompt and each chat, without EOS."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    given: list[Any] = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    given += [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt") for chat in chats]
    for inputs in given:
        out = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append([token for token in out.tolist() if token != tokenizer.eos_token_id])
    return found


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def test_prompts_of_a_file_are_completed_as_by_transformers(program: Program, tiny_llama: Path, prompt_file: Path):
    output = program.folder / "out.jsonl"
    with prompt_file.open("a") as file:
        file.write(json.dumps({"messages": CHAT}) + "\n")
    given = [f"generate.model={tiny_llama}", f"generate.prompt_file={prompt_file}", f"generate.output={output}"]
    result = program.run(*GENERATE, "engine.dtype=fp32", *given)
    assert result.exit_code == 0, result.stderr
    written = rows(output)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert [row["prompt"] for row in written] == [*PROMPTS, text]
    assert [row.get("messages") for row in written] == [None] * len(PROMPTS) + [CHAT]
    assert [row["tokens"] for row in written] == by_transformers(tiny_llama, CHAT)
    for row in written:
        assert row["completion"] in result.stdout
        assert row["ended_by"] == ("max_new_tokens" if len(row["tokens"]) == NUM_NEW else "stop token")
    names(result.stdout, "4 prompts", output)
    assert len(re.findall(r"prefill [\d,.]+ tokens/s, decode [\d,.]+ tokens/s", result.stdout)) == 4
    assert result.summary["decode_tokens_per_s"] > 0


def test_a_run_of_the_recipes_own_model(plain_run: Finished, program: Program):
    given = [f"generate.model={plain_run.run_dir}", "generate.prompt='import os'"]
    result = program.run(*GENERATE, *given, "generate.temperature=1.0", "launch.num_ranks=3")
    assert result.exit_code == 0, result.stderr
    names(result.stdout, f"{plain_run.run_dir}/checkpoints/step_00000008", "step 8", "bf16", "3 ring")
    (row,) = rows(result.run_dir / "generated.jsonl")
    assert row["num_prompt_tokens"] == len("import os")
    assert 0 < len(row["tokens"]) <= NUM_NEW


@pytest.mark.slow
def test_the_lora_matrices_of_a_run_apply(program: Program, tiny_llama: Path, prompt_file: Path, monkeypatch):
    trained = program.run(
        *SHORT, f"model.path={tiny_llama}", "lora.rank=4", "engine.dtype=fp32", "optimizer.lr=0.05", "num_steps=6"
    )
    assert trained.exit_code == 0, trained.stderr
    merged = program.folder / "merged"
    monkeypatch.setattr(sys, "argv", ["export", str(trained.run_dir), "--output", str(merged), "--merge"])
    export()
    given = [f"generate.model={trained.run_dir}/checkpoints/step_00000006", f"generate.prompt_file={prompt_file}"]
    result = program.run(*GENERATE, *given, name="generated")
    assert result.exit_code == 0, result.stderr
    found = [row["tokens"] for row in rows(result.run_dir / "generated.jsonl")]
    assert found == by_transformers(merged)
    assert found != by_transformers(tiny_llama)
