"""`recipe=bench_attention` as people type it: on two ranks, and on one, which simulates larger rings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.program import Finished, Program
from tests.errors import some_line_names

pytestmark = pytest.mark.slow

SMALL = ["recipe=bench_attention", "data.sequence_length=250", "compare.rounds=2"]
KINDS = {"forward": 1, "forward_backward": 3}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Finished:
    return Program(tmp_path_factory.mktemp("bench")).run(*SMALL, "launch.num_ranks=2", "attention.layout=contiguous")


def saved(run: Finished) -> dict[str, Any]:
    return json.loads((run.run_dir / "bench_attention.json").read_text())


def test_every_method_that_fits_is_timed_beside_one_device(two_ranks):
    assert (two_ranks.exit_code, two_ranks.stderr) == (0, "")
    assert [(row["name"], row["grid"]) for row in saved(two_ranks)["rows"]] == [
        ("one device", "full sequences"), ("ring", "2 ring"), ("ulysses", "2 ulysses"), ("all_gather", "2 ring"),
        ("DeepSpeed Ulysses", ""),
    ]  # fmt: skip
    lines = two_ranks.stdout.splitlines()
    some_line_names(lines, "left out", "torch context_parallel", "cuda", "cpu")
    some_line_names(lines, "left out", "hybrid", "2 ranks", "ring", "ulysses")
    table = two_ranks.stdout.partition("timing ...")[2].strip().splitlines()
    shown = ["one device", "ring", "ulysses", "all_gather", "DeepSpeed Ulysses"]
    assert [line.split("  ")[0] for line in table[1:6]] == shown
    some_line_names(lines, "!!!", "CPU", "GPUs")
    assert "recipes.dashboard" not in two_ranks.stdout  # which has no step to show


def test_the_breakdown_of_a_call_has_its_own_parts(two_ranks):
    rows = {row["name"]: row["parts_ms"] for row in saved(two_ranks)["rows"]}
    for parts in rows.values():
        assert all(0 <= least <= most for least, most in parts.values())
        assert parts["attention"][0] > 0
    assert rows["one device"]["exchange"] == [0, 0]
    assert rows["ring"]["exchange"][0] > 0
    assert rows["ring"]["merge"][0] > 0
    printed = two_ranks.stdout.partition("profiling ...")[2].strip().splitlines()
    assert printed[0].split()[-5:] == ["attention", "merge", "exchange", "other", "idle"]
    assert printed[2].startswith("ring")
    assert printed[2].split("  ")[-1].strip().split(" - ")[1] == f"{rows['ring']['idle'][1]:.3f}"


def test_the_derived_numbers_follow_from_the_times(two_ranks):
    one_device, *methods = saved(two_ranks)["rows"]
    operations = 4 * 4 * 32 * 250 * 251 / 2  # 4 heads x 32
    for row, share in ((one_device, 1), *((row, 1 / 2) for row in methods)):
        for kind, passes in KINDS.items():
            own = row[kind]
            assert own["min_ms"] <= own["ms"] <= own["max_ms"]
            assert 0 < own["host_ms"] <= own["max_ms"]
            assert own["tflops"] == pytest.approx(passes * share * operations / own["ms"] / 1e9)
            assert own["ideal_pct"] == pytest.approx(100 * share * one_device[kind]["ms"] / own["ms"])
            assert (own["exposed_ms"] is None) == (row["name"] in ("one device", "DeepSpeed Ulysses"))
    summary = json.loads((two_ranks.run_dir / "summary.json").read_text())
    assert summary["ring/forward/ms"] == methods[0]["forward"]["ms"]


def test_a_method_that_cannot_split_the_heads_is_left_out(program):
    run = program.run(
        *SMALL, "launch.num_ranks=2", "model.num_heads=6", "model.num_kv_heads=3", "compare.rounds=1", "breakdown=false"
    )
    assert (run.exit_code, run.stderr) == (0, "")
    assert "profiling" not in run.stdout
    assert [row["name"] for row in saved(run)["rows"]] == ["one device", "ring", "all_gather"]
    some_line_names(run.stdout.splitlines(), "left out", "ulysses", "3 kv heads", "2 ranks")
    some_line_names(run.stdout.splitlines(), "left out", "DeepSpeed Ulysses", "250 tokens", "3 kv heads", "2 ranks")


def test_one_rank_simulates_larger_rings(program):
    run = program.run(*SMALL, "launch.num_ranks=1", "engine.micro_batch_size=2", "compare.rounds=1")
    assert (run.exit_code, run.stderr) == (0, "")
    assert [row["name"] for row in saved(run)["rows"]] == [
        "one device",
        *(f"ring of {n}" for n in (2, 4, 8, 16, 32, 64)),
    ]
    assert all(row[kind]["ideal_pct"] > 0 for row in saved(run)["rows"] for kind in KINDS)


PACKED = ["recipe=bench_attention", "data.sequence_length=256", "compare.rounds=1", "breakdown=false"]


def test_documents_are_timed_on_both_balanced_layouts_over_their_masks_area(program):
    run = program.run(*PACKED, "+documents=[10,54,192]", "launch.num_ranks=2")
    assert (run.exit_code, run.stderr) == (0, "")
    one_device, *others = saved(run)["rows"]
    assert [row["name"] for row in others] == [
        "ring, zigzag", "ring, balanced", "ulysses", "all_gather, zigzag", "all_gather, balanced", "DeepSpeed Ulysses",
    ]  # fmt: skip
    assert saved(run)["documents"] == [10, 54, 192]
    lines = run.stdout.splitlines()
    some_line_names(lines, "causal", "3 documents", "10", "192 tokens")
    some_line_names(lines, "left out", "torch context_parallel, flex", "CPU")
    some_line_names(lines, "left out", "varlen", "aten_flash", "flash_attn_4", "cuda", "cpu")
    operations = 4 * 4 * 32 * (10 * 11 + 54 * 55 + 192 * 193) / 2  # 4 heads x 32
    for row, share in ((one_device, 1), *((row, 1 / 2) for row in others)):
        for kind, passes in KINDS.items():
            assert row[kind]["tflops"] == pytest.approx(passes * share * operations / row[kind]["ms"] / 1e9)


def test_one_rank_simulates_both_layouts_of_documents(program):
    typed = ["data.sequence_length=16", "documents=lognormal", "launch.num_ranks=1", "attention.layout=balanced"]
    run = program.run(*PACKED, *typed)
    assert (run.exit_code, run.stderr) == (0, "")
    assert [row["name"] for row in saved(run)["rows"]] == [
        "one device",
        *(f"ring of {degree}, {layout}" for degree in (2, 4, 8) for layout in ("balanced", "zigzag")),
    ]
    assert saved(run)["documents"] == [2, 1, 4, 2, 1, 3, 3]


def test_documents_of_another_length_are_refused_before_ranks_start(program):
    run = program.run("recipe=bench_attention", "+documents=8x8192", "data.sequence_length=256")
    assert run.exit_code == 1
    some_line_names(run.stderr.splitlines(), "documents=8x8192", 65536, "data.sequence_length=256")
    assert not run.ranks_were_started
