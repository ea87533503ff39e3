"""The programs in the pages about Hugging Face models, as printed, on one rank and on two, once under torchrun."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_docs import ROOT, python_examples
from tests.fork_server import ForkedProgram


def printed(code: str, num_ranks: int, tmp_path: Path, *arguments: str | Path, torchrun: bool = False) -> str:
    """What the program prints: under torchrun, as people start it, or as forks, which import nothing anew."""
    program = tmp_path / "program.py"
    program.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [str(program), *map(str, arguments)]
    outputs = [[tmp_path / f"{rank}.{name}" for name in ("stdout", "stderr")] for rank in range(num_ranks)]
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        outputs = outputs[:1]  # of the launcher
        with outputs[0][0].open("w") as stdout, outputs[0][1].open("w") as stderr:
            runs = [
                subprocess.Popen([*launcher, *command], cwd=tmp_path, env=environment, stdout=stdout, stderr=stderr)
            ]
    else:
        group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        runs = [
            ForkedProgram(command, tmp_path, environment | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, own)
            for rank, own in enumerate(outputs)
        ]
    try:
        for run, (_, stderr) in zip(runs, outputs, strict=True):
            assert run.wait(180) == 0, stderr.read_text()
    finally:
        for run in runs:
            run.kill()
    return "".join(stdout.read_text() for stdout, _ in outputs)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def numbers(name: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(rf"\b{name}'?:? ([\d.]+)", text)]


def example(page: str, index: int = 0) -> str:
    return python_examples(ROOT / "docs" / f"{page}.md")[index]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "num_losses"), [("huggingface_loop", 7), ("huggingface_trainer", 6)])
def test_a_program_prints_the_same_losses_on_one_rank_and_on_two(tmp_path, tiny_llama: Path, page, num_losses):
    one, two = (
        printed(example(page), n, tmp_path, tiny_llama, tmp_path / f"trained{n}", torchrun=n == 1) for n in (1, 2)
    )
    assert len(numbers("loss", one)) == num_losses
    for name in ("loss", "eval_loss", "num_input_tokens_seen"):
        assert numbers(name, two) == pytest.approx(numbers(name, one), rel=1e-6), name
    assert (tmp_path / "trained2" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_script_of_alst_gives_the_same_losses_before_and_after(tmp_path, tiny_llama: Path):
    before, after = (
        printed(example("migrate_from_alst", index), 2, tmp_path, tiny_llama, torchrun=index == 1) for index in (0, 1)
    )
    assert len(numbers("loss", before)) == 6
    assert numbers("loss", after) == pytest.approx(numbers("loss", before), rel=1e-6)
    # as the page says
    assert numbers("gradient norm", before) == pytest.approx([2 * x for x in numbers("gradient norm", after)], rel=1e-4)


@pytest.mark.slow
def test_the_decoding_program_prints_what_transformers_generates(tmp_path, tiny_llama: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    inputs: Any = AutoTokenizer.from_pretrained(tiny_llama)("import os\nimport sys\n\n\ndef main", return_tensors="pt")
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    for num_ranks in (1, 2):
        text = printed(example("generate"), num_ranks, tmp_path, tiny_llama, torchrun=num_ranks == 1)
        assert f"generated: {expected}\n" in text
