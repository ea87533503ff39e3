"""explain=true, --help and --cfg: they start no rank."""

from __future__ import annotations

import re

import yaml

from tests.errors import names, some_line_names


def test_explain_prints_the_plan_and_stops(program):
    result = program.run("+experiment=ra_sp", "model=llama_1b", "explain=true")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert not result.ranks_were_started
    some_line_names(result.stdout.splitlines(), "llama_1b", "1,235.81 M", "16 layers")
    names(result.stdout, "zigzag", "imbalance", "parameters")


def test_explain_shows_the_cost_model_of_attention_auto(program):
    result = program.run("attention=auto", "model=llama_1b", "launch.num_ranks=4", "explain=true")
    assert result.exit_code == 0, result.stderr
    totals = [
        float(ms) for ms in re.findall(r"^  \w+, ring \d x ulysses \d: .* total ([\d.]+) ms$", result.stdout, re.M)
    ]
    assert len(totals) == 3
    assert totals == sorted(totals)
    first = re.search(r"^  (\w+), ring (\d) x ulysses (\d): ", result.stdout, re.M)
    assert first is not None
    some_line_names(result.stdout.splitlines(), "attention", first[1], "zigzag", "explain=true")


def test_explain_says_that_it_reads_no_data_of_the_hub(program):
    result = program.run("data=hub", "data.name=nobody/nothing", "explain=true")
    assert result.exit_code == 0, result.stderr
    some_line_names(result.stdout.splitlines(), "packing of documents", "not shown")


def test_relative_paths_are_the_users_where_hydra_changes_the_folder(program):
    arguments = ["data=text_files", "data.sequence_length=64", "hydra.job.chdir=true", "explain=true"]
    result = program.run(*arguments, "data.files=README.md")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^ +data  text_files, data.files=README.md: 1 ", result.stdout, re.M)


def test_what_wandb_agent_writes_runs(program):
    """${args_no_hyphens}: whole numbers as floats, and null as None."""
    result = program.run("engine.train_batch_size=8.0", "parallelism.data_degree=None", "explain=true")
    assert result.exit_code == 0, result.stderr
    assert " = 8 sequences per step" in result.stdout


def test_help_starts_with_common_commands(program):
    result = program.run("--help")
    assert result.exit_code == 0
    commands = re.findall(r"^  (\S.*)$", result.stdout.partition("== Options")[0], re.MULTILINE)
    assert commands[0].startswith("python train.py +experiment=ra_sp")
    assert any("explain=true" in command for command in commands)
    assert "model: huggingface, llama_1b, llama_70b, llama_8b" in result.stdout
    assert "sequence_length: 2048" in result.stdout


def test_cfg_job_prints_the_configuration(program):
    result = program.run("--cfg", "job", "engine.zero_stage=3")
    assert result.exit_code == 0
    configuration = yaml.safe_load(result.stdout)
    assert configuration["engine"]["zero_stage"] == 3
    assert "hydra" not in configuration
