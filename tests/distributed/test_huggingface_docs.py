"""The programs in the pages about Hugging Face models, as printed, each in its own processes on one and two ranks."""

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


def printed(code: str, num_ranks: int, tmp_path: Path, *arguments: str | Path) -> str:
    """What the program prints: several ranks under torchrun, one as a fork, which need not import anything anew."""
    program, outputs = tmp_path / "program.py", [tmp_path / "stdout", tmp_path / "stderr"]
    program.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [str(program), *map(str, arguments)]
    if num_ranks == 1:
        rank = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        run = ForkedProgram(command, tmp_path, environment | rank, outputs)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
            run = subprocess.Popen([*launcher, *command], cwd=tmp_path, env=environment, stdout=stdout, stderr=stderr)
    try:
        assert run.wait(180) == 0, outputs[1].read_text()
    finally:
        run.kill()
    return outputs[0].read_text()


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
    one, two = (printed(example(page), n, tmp_path, tiny_llama, tmp_path / f"trained{n}") for n in (1, 2))
    assert len(numbers("loss", one)) == num_losses
    for name in ("loss", "eval_loss", "num_input_tokens_seen"):
        assert numbers(name, two) == pytest.approx(numbers(name, one), rel=1e-6), name
    assert (tmp_path / "trained2" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_script_of_alst_gives_the_same_losses_before_and_after(tmp_path, tiny_llama: Path):
    before, after = (printed(example("migrate_from_alst", index), 2, tmp_path, tiny_llama) for index in (0, 1))
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
        assert f"generated: {expected}\n" in printed(example("generate"), num_ranks, tmp_path, tiny_llama)
