"""A mistake on the command line prints one line with the value, the rule and what to type, and starts no rank.

tests/unit/test_schema.py and test_source.py test more mistakes, in one process.
"""

from __future__ import annotations

import pytest

from conf.schema import WANDB_MODES
from tests.errors import names

DEGREES = ["parallelism.ring_degree=3", "4 ranks", "1", "2", "parallelism.ring_degree=4", "launch.num_ranks"]
# what is typed; the value that the error names, the legal ones and what to type
CASES = {
    "an unknown field": (
        ["data.sequence_lenght=64"],
        ["data.sequence_lenght", "data.sequence_length", "python train.py --help"],
    ),
    "a renamed field": (["attention.block=cudnn"], ["attention.block", "attention.kernel=cudnn"]),
    "several values of one run": (["optimizer.lr=1e-3,3e-3"], ["optimizer.lr=1e-3,3e-3", "type python train.py -m"]),
    "an experiment without its plus": (["experiment=ra_sp"], ["type +experiment=ra_sp"]),
    "a misspelt group": (["optimiser.lr=1e-3"], ["optimiser", "optimizer?"]),
    "another tool's name in a group": (["data.max_length=4096"], ["data.max_length", "data.sequence_length=N"]),
    "DeepSpeed's name of a field": (["engine.zero=3"], ["engine.zero", "engine.zero_stage=0"]),
    "a value of another type": (["num_steps=many"], ["num_steps=many", "Integer"]),
    "an unknown option of a group": (["attention=rings"], ["attention=rings", "ring?", "attention=ring"]),
    "no option of a group": (["model=null"], ["model=tiny", "python train.py --help"]),
    "degrees that do not divide launch.num_ranks": (["parallelism.ring_degree=3", "launch.num_ranks=4"], DEGREES),
    "degrees that do not divide the ranks": (["parallelism.ring_degree=3"], DEGREES),
    "an unknown objective": (
        ["-m", "+sweep=lr_batch", "sweep.objective=accuracy"],
        ["sweep.objective=accuracy", "validation_loss", "tokens_per_s", "model_tflops_per_rank"],
    ),
    "a sweep without -m": (
        ["+sweep=lr_batch", "optimizer.lr=1e-3"],
        ["engine.train_batch_size", "python train.py -m +sweep=lr_batch optimizer.lr=1e-3"],
    ),
    "an unknown swept field": (
        ["-m", "+sweep=search", "optimizer.learning_rate=1e-3,3e-3"],
        ["optimizer.learning_rate", "optimizer.lr=..."],
    ),
    "parallel trials in one process": (
        ["-m", "+sweep=lr_batch", "sweep.num_parallel=2"],
        ["sweep.num_parallel=2", "hydra/launcher=submitit_slurm", "hydra/launcher=submitit_local"],
    ),
    "a data set that cannot be reached": (
        ["data=hub", "data.name=nobody/nothing"],
        ["data.name=nobody/nothing", "data=stdlib"],
    ),
    "a tokenizer that cannot be reached": (
        ["data.tokenizer=nobody/nothing"],
        ["data.tokenizer=nobody/nothing", "tokenizer.json", "OWNER/NAME"],
    ),
    "a model that is no folder": (
        ["+experiment=finetune", "model.path={folder}/nowhere"],
        ["model.path={folder}/nowhere", "config.json", "OWNER/NAME"],
    ),
    "a model that cannot be reached": (
        ["+experiment=finetune", "model.path=nobody/nothing"],
        ["model.path=nobody/nothing", "config.json", "OWNER/NAME"],
    ),
    "a shape beside model.path": (
        ["+experiment=finetune", "model.path=owner/model", "model.num_layers=4"],
        ["model.num_layers=4", "model.path=owner/model"],
    ),
    "rotary embeddings that lack a factor": (
        ["+experiment=finetune", "model.path={llama}", "model.rope={{rope_type:yarn}}"],
        ["model.rope", "factor", "yarn"],
    ),
    "LoRA without a model": (["lora.rank=8"], ["lora.rank=8", "model.path=FOLDER_OR_HUB_NAME"]),
    "LoRA on layers that are not there": (
        ["+experiment=finetune", "model.path={llama}", "lora.rank=8", "lora.target_modules=[nothing]"],
        ["lora.target_modules", "nothing", "q_proj"],
    ),
    "more ranks than kv heads": (
        ["+experiment=finetune", "model.path={llama}", "attention=ulysses", "launch.num_ranks=4"],
        ["model.num_kv_heads=2", "attention=ring"],
    ),
    "a tokenizer that is too large": (
        ["model=tiny", "data.tokenizer={llama}"],
        ["data.tokenizer={llama}", "2,048", "model.vocab_size=2048"],
    ),
    "no model to generate with": (
        ["recipe=generate", "generate.prompt=a"],
        ["recipe=generate", "generate.model=RUN_DIR"],
    ),
    "prompts that are not there": (
        ["recipe=generate", "generate.model={llama}", "generate.prompt_file={folder}/none.txt"],
        ["generate.prompt_file={folder}/none.txt"],
    ),
    "a run that is not there": (
        ["recipe=generate", "generate.model={folder}/nowhere", "generate.prompt=a"],
        ["generate.model={folder}/nowhere", "outputs/DATE/TIME", "config.json", "OWNER/NAME"],
    ),
    "a corpus that is too short": (
        ["data=text_files", "data.files={folder}/tiny.txt", "data.sequence_length=100000"],
        ["6 tokens", "8 validation", "900,000", "data.sequence_length=100000"],
    ),
}


# libraries that take half a second or more to import
SLOW = {"torch", "deepspeed", "datasets", "wandb", "optuna", "matplotlib", "transformers"}
# those that are needed to see the mistake; by default none
NEEDED = {
    "degrees that do not divide the ranks": {"torch"},  # GPUs are counted after the data is checked
    "an unknown swept field": {"optuna", "matplotlib"},
    "a tokenizer that cannot be reached": {"transformers", "torch"},
    "a model that is no folder": {"torch", "transformers"},
    "a model that cannot be reached": {"torch", "transformers"},
    "rotary embeddings that lack a factor": {"torch", "transformers"},
    "LoRA on layers that are not there": {"torch", "transformers"},
    "more ranks than kv heads": {"torch", "transformers"},
    "a tokenizer that is too large": {"torch", "transformers"},
    "a run that is not there": {"torch"},
}
FAST = (
    "an unknown field",
    "degrees that do not divide launch.num_ranks",
    "a sweep without -m",
    "a corpus that is too short",
    "prompts that are not there",
)
IMPORT = "import time:"  # prefix of the lines that PYTHONPROFILEIMPORTTIME adds


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_a_mistake_prints_one_line_and_starts_no_rank(program, tiny_llama, case):
    (program.folder / "tiny.txt").write_text("tiny\n")
    places = {"folder": program.folder, "llama": tiny_llama}
    arguments, parts = ([text.format(**places) for text in texts] for texts in CASES[case])
    result = program.run(*arguments, HF_HUB_OFFLINE="1", PYTHONPROFILEIMPORTTIME="1")
    lines = result.stderr.splitlines()
    [error] = [line for line in lines if not line.startswith(IMPORT)]
    assert error.startswith("error: ")
    names(error, *parts)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert not result.ranks_were_started
    assert not result.run_dir.exists()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith(IMPORT)}
    assert "hydra" in imported  # the list is not empty
    assert imported & SLOW == NEEDED.get(case, set())


def test_a_wandb_mode_that_does_not_exist_is_refused_before_ranks_start(program):
    result = program.run(WANDB_MODE="off")
    assert result.stderr.startswith("error: WANDB_MODE=off ")
    assert all(mode in result.stderr for mode in WANDB_MODES)
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 1
    assert not result.ranks_were_started
    assert not result.run_dir.exists()
