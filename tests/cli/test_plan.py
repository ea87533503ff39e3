"""`recipe=plan` as people type it, on a machine without GPUs."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.errors import names, some_line_names

ARGUMENTS = ["recipe=plan", "cluster=2x2xh100", "model=llama_1b", "data.sequence_length=32768", "plan.tokens=1e9"]


def test_the_fastest_settings_are_printed_and_written(program):
    run = program.run(*ARGUMENTS)
    assert (run.exit_code, run.stderr) == (0, "")
    assert not run.ranks_were_started
    found = json.loads((run.run_dir / "plan.json").read_text())
    best = found["ranked"][0]
    lines = run.stdout.splitlines()
    some_line_names(lines, "2 hosts of 2 x NVIDIA H100 80GB HBM3")
    some_line_names(lines, "1", best["method"], f"{best['tokens_per_s']:,.0f}", f"{best['memory_gib']:.1f}")
    some_line_names(lines, f"{best['gpu_hours']:,.0f} GPU-hours", f"{best['tokens_per_day'] / 1e9:,.2f} G")
    commands = [shlex.split(line) for line in run.stdout.replace("\\\n", "").splitlines() if " train.py " in line]
    assert len(commands) == 6  # the grids of four GPUs that share sequences
    assert commands[0] == shlex.split(best["command"])
    assert {"model=llama_1b", "data.sequence_length=32768", "recipe=pretrain"} <= set(commands[0])
    assert best["gpu_hours"] == pytest.approx(1e9 / best["tokens_per_s"] / 3600 * 4)
    assert all(row["memory_gib"] <= 0.9 * 79.2 and row["refusal"] is None for row in found["ranked"])
    assert all(re.search(r" GiB > |of its memory", row["refusal"]) for row in found["refused"])
    assert all(row["memory_is_lower_bound"] for row in found["unpredicted"])
    for name in ("plan_over_lengths.png", "plan_over_gpus.png"):
        assert (run.run_dir / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_hugging_face_folder_and_documents(program, tiny_llama):
    run = program.run(
        "recipe=plan", "cluster=2xh200", "model=huggingface", f"model.path={tiny_llama}", "data.sequence_length=4096",
        "+documents=[1024,3072]",
    )  # fmt: skip
    assert (run.exit_code, run.stderr) == (0, "")
    some_line_names(run.stdout.splitlines(), str(tiny_llama), "4,096")
    some_line_names(run.stdout.splitlines(), "1,024, 3,072")
    assert f"model.path={tiny_llama}" in json.loads((run.run_dir / "plan.json").read_text())["ranked"][0]["command"]


MISTAKES = {
    "no cluster": (["recipe=plan"], ["cluster=8xh200"]),
    "a CPU": (["recipe=plan", "cluster=4xcpu"], ["cluster=4xcpu", "GPUs", "cluster=8xh200"]),
    "an unknown GPU": (["recipe=plan", "cluster=8xh300"], ["cluster=8xh300", "h300", "h100", "h200"]),
    "a link without a speed": (["recipe=plan", "cluster={file}"], ["cluster.link_within_gb_per_s=0", "GB/s"]),
    "impossible degrees": ([*ARGUMENTS, "parallelism.ring_degree=3"], ["parallelism.ring_degree=3", "4", "1, 2"]),
    "a model that is too large": (
        ["recipe=plan", "cluster=2xh100", "model=llama_8b", "model.num_layers=200"],
        ["cluster=2xh100", "llama_8b", "71.28 GiB"],
    ),
    "too many GPUs": (["recipe=plan", "cluster=1000x8xh100"], ["cluster=1000x8xh100", "8,000", "4,096", "512x8xh100"]),
    "a budget for another recipe": (["plan.tokens=1e9"], ["plan.tokens=1e+09", "recipe=plan"]),
    "a cluster for another recipe": (["cluster=8xh200"], ["cluster=8xh200", "recipe=plan"]),
    "ranks beside a cluster": ([*ARGUMENTS, "launch.num_ranks=8"], ["launch.num_ranks=8", "cluster=8xh200"]),
    "other words for a cluster": (
        [*ARGUMENTS, "explain_gpu=h100"],
        ["explain_gpu=h100", "recipe=plan", "cluster=8xh200"],
    ),
    "documents in a pipeline": (
        [*ARGUMENTS, "+documents=lognormal", "+experiment=tp_pp"],
        ["documents=lognormal", "parallelism=tensor_pipeline"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(program, case):
    file = program.folder / "slow.yaml"
    file.write_text(
        "{gpu: h200, gpus_per_host: 8, hosts: 1, memory_gib: 139.8, link_within_gb_per_s: 0, "
        "link_between_gb_per_s: 45, latency_us: 20, host_memory_gib: 2000}"
    )
    arguments, parts = MISTAKES[case]
    result = program.run(*(argument.format(file=file) for argument in arguments))
    [error] = result.stderr.splitlines()
    assert error.startswith("error: ")
    names(error, *parts)
    assert (result.exit_code, result.stdout) == (1, "")
    assert not result.run_dir.exists()
