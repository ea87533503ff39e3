"""A fine-tuned Hugging Face model from the command line: trained, exported, and the start of the next run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.export import main
from tests.cli.program import REPOSITORY, TIMEOUT_S, Program
from tests.errors import names

SHORT = [
    "+experiment=finetune",
    "launch.num_ranks=2",
    "num_steps=3",
    "data.sequence_length=256",
    "data.validation_sequences=1",
    "breakdown=false",
]


def export(program: Program, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.export", *map(str, arguments)]
    environment = program.environment()
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.slow
def test_an_exported_model_is_the_next_runs_model(program: Program, tiny_llama: Path, monkeypatch):
    rope = "model.rope={rope_type:yarn,factor:4}"
    trained = program.run(*SHORT, f"model.path={tiny_llama}", rope)
    assert trained.exit_code == 0, trained.stderr
    output = program.folder / "exported"
    result = export(program, trained.run_dir, "--output", output)
    assert result.returncode == 0, result.stderr
    names(result.stdout.splitlines()[-1], f"{output}:", "1,311,872 parameters", "bf16", "step 3")

    (program.folder / "new").touch()
    usual = (program.folder / "new").stat().st_mode
    assert {path.stat().st_mode for path in output.iterdir()} == {usual}  # colleagues can read what umask lets them

    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.max_position_embeddings == 4 * 2048
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama, output))
    assert after.get_vocab() == before.get_vocab()
    assert (after.chat_template, after.eos_token) == (before.chat_template, before.eos_token)
    assert (
        GenerationConfig.from_pretrained(output).eos_token_id
        == GenerationConfig.from_pretrained(tiny_llama).eos_token_id
    )

    nowhere = program.folder / "no such" / "model"
    for place, part in ((output, "empty"), (nowhere, f"mkdir -p '{nowhere.parent}'")):
        monkeypatch.setattr(sys, "argv", ["export", str(trained.run_dir), "--output", str(place)])
        with pytest.raises(SystemExit) as ended:
            main()
        message = str(ended.value.code)  # which Python prints, and exits with 1
        names(message, "error", f"--output {place}", part)
        assert "\n" not in message

    further = program.run(*SHORT, f"model.path={output}", "num_steps=1", name="further")
    assert further.exit_code == 0, further.stderr
