"""recipe=compare without ranks: the entries, their choice, and the arithmetic of the table."""

# ruff: noqa: E501 - a line of the table is one line here, as it is on the console

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from conf.compose import entry_overrides
from conf.degrees import resolve_degrees
from conf.schema import CompareConfig, Config, ConfigError
from recipes.benchmark import comparison_report
from recipes.benchmark.compare import ComparisonTask
from recipes.benchmark.entries import Entry, choose_entries, roofline_entry
from recipes.benchmark.rounds import ROOFLINE
from recipes.monitor.metric_registry import PARTS
from tests.errors import names, refused, some_line_names
from tests.unit.test_downscale import composed
from tests.unit.test_rounds import done, failed
from tests.unit.test_schema import compose


def test_the_roofline_needs_entries_of_one_model_length_and_number_of_ranks():
    a, b = Config(), Config()
    b.compare.micro_batch_sizes = [1, 2]
    entry, num_ranks = roofline_entry({"b": Entry(b, 2), "a": Entry(a, 2)})
    assert (entry.compare.micro_batch_sizes, num_ranks, b.compare.micro_batch_sizes) == ([1], 2, [1, 2])
    b.data.sequence_length = 7
    for others in ({"a": Entry(a, 2), "b": Entry(b, 2)}, {"a": Entry(a, 2), "b": Entry(Config(), 4)}):
        with refused(ConfigError, "compare.roofline=true", "data.sequence_length", "launch.num_ranks", "compare.only"):
            roofline_entry(others)


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        ([], [], ["data.document_mask=false", "recipe=forward"]),
        (
            ["+experiment=paper_table", "recipe=compare"],
            ["+experiment=tp_pp"],
            ["+experiment=[paper_table,tp_pp]", "data.document_mask=false", "recipe=forward"],
        ),
        (
            ["+experiment=[paper_table,dp]"],
            ["+experiment=dp", "+experiment=[ra_sp]"],
            ["+experiment=[paper_table,dp,ra_sp]", "data.document_mask=false", "recipe=forward"],
        ),
        (
            ["model=tiny", "launch.num_ranks=2", "seed=1"],
            ["launch.num_ranks=4"],
            ["data.document_mask=false", "model=tiny", "launch.num_ranks=4", "seed=1", "recipe=forward"],
        ),
        (
            ["data.files='a=b'"],
            ["data.files='c=d'"],
            ["data.document_mask=false", "data.files='c=d'", "recipe=forward"],
        ),
        (["data.document_mask=true"], [], ["data.document_mask=true", "recipe=forward"]),
    ],
)
def test_an_entry_is_what_was_typed_unless_its_own_overrides_replace_it(given, own, expected):
    assert entry_overrides(given, own, "forward") == expected


def test_the_overrides_of_an_entry_compose():
    given = ["recipe=compare", "+experiment=paper_table", "parallelism.data_degree=2", "data.sequence_length=64"]
    config = compose(*entry_overrides(given, ["+experiment=tp_pp", "parallelism.data_degree=1"], "pretrain"))
    assert (config.recipe, config.model.name, config.data.sequence_length) == ("pretrain", "paper_10k", 64)
    assert (config.parallelism.method, config.parallelism.data_degree) == ("tensor_pipeline", 1)


def measured(entry: str, number: int, times_s: list[float], tokens: int = 100, **extra: Any) -> dict[str, Any]:
    """A result on 2 ranks with `tokens` per step in sequences of 50; its numbers are the median step's."""
    times = sorted(times_s)
    middle = (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2
    return {
        **done(entry, number, tokens_per_s=tokens / middle),
        "step_times_s": times_s,
        "tokens_per_step": tokens,
        "sequence_length": 50,
        "tokens_per_s_per_rank": tokens / middle / 2,
        "tpot_ms": 1e3 * middle / 50,
        "model_tflops_per_rank": 3.0 / middle,
        "mfu_pct": 20.0 / middle,
        "peak_memory_gib": 1.0 + number,
        "losses": [5.5, 5.4],
        "sequences_per_step": tokens // 50,
        "degrees": {"data": 1, "ring": 2, "ulysses": 1, "tensor": 1, "pipeline": 1},
        "kernel": "cudnn",
        "device": "GPU",
        "num_ranks": 2,
        **extra,
    }


PARTS_OF_A: dict[str, Any] = {f"parts/{part}_pct": 12.5 for part in PARTS} | {"parts/exposed_communication_ms": 7.0}
RESULTS = [
    done("a", 0, 1, 100.0),
    failed("a", 0, 2),
    measured("a", 1, [1.0, 2.0]),
    measured("b", 1, [2.0, 2.0], mfu_pct=None, peak_memory_gib=None),
    failed("c", 1)
    | {"error": "rank 1 failed:\nTraceback\nMemoryError: all of it\nthe other ranks were ended; its log"},
    measured("a", 2, [10.0, 4.0]),  # times 1, 2, 4, 10: speeds 100, 50, 25, 10
    {"entry": "a", "micro_batch_size": 1, "round": 2, "parts": PARTS_OF_A},
    measured("b", 2, [4.0, 5.0], mfu_pct=None, peak_memory_gib=None),  # times 2, 2, 4, 5: speeds 50, 50, 25, 20
]


class TestSummary:
    def test_a_row_has_medians_over_the_steps_of_all_rounds_and_their_spread(self):
        a = comparison_report.summarize(RESULTS, ["a"], "a")[0]
        assert (a["tokens_per_s"], a["tokens_per_s_min"], a["tokens_per_s_max"]) == (37.5, 10.0, 100.0)
        assert a["num_steps"] == 4
        assert a["tokens_per_s_per_rank"] == 18.75
        step_s = 100 / 37.5
        assert a["step_time_ms"] == pytest.approx(1e3 * step_s)
        assert a["tpot_ms"] == pytest.approx(1e3 * step_s / 50)
        assert a["model_tflops_per_rank"] == pytest.approx(3.0 / step_s)
        assert a["mfu_pct"] == pytest.approx(20.0 / step_s)

    def test_a_row_has_the_peak_the_breakdown_the_first_loss_and_the_trials(self):
        a, b = comparison_report.summarize(RESULTS, ["a", "b"], "a")
        assert (a["peak_memory_gib"], b["peak_memory_gib"], b["mfu_pct"]) == (3.0, None, None)
        assert (a["exposed_communication_ms"], b["exposed_communication_ms"]) == (7.0, None)
        assert (a["shares_pct"], b["shares_pct"]) == (dict.fromkeys(PARTS, 12.5), {})
        assert (a["first_loss"], a["grid"], a["sequences_per_step"]) == (5.5, "2 ring", 2)
        assert (a["tried"], a["errors"]) == ({1: 100.0, 2: None}, ["out of memory"])

    def test_the_table_names_the_transport_that_ran(self):
        """Above the table if all rows have one; nothing where no rank sends keys around a ring."""
        fell_back = {"transport": "p2p", "transport_reason": "GPU 0 cannot access the memory of GPU 1"}
        copied = {"transport": "copy_engine", "transport_reason": ""}
        for of_a, of_b, common, column in [
            (copied, fell_back, False, True),
            (fell_back, fell_back, True, False),
            ({}, {}, False, False),
        ]:
            results = [measured("a", 1, [1.0]) | of_a, measured("b", 1, [1.0]) | of_b]
            above, header, *_ = comparison_report.table(comparison_report.summarize(results, ["a", "b"], "a"), "a")
            assert ("transport p2p" in above, "transport" in header) == (common, column)
        line = comparison_report.measurement_line(measured("a", 1, [1.0]) | fell_back)
        names(line, "p2p", "GPU 0 cannot access the memory of GPU 1")

    @pytest.mark.parametrize("time_s", [29_000 * 3e-7, 29_001 * 3e-7, 29_002 * 3e-7])
    def test_the_change_of_the_baseline_is_exactly_zero(self, time_s):
        [row] = comparison_report.summarize([measured("a", 1, [time_s], tokens=256)], ["a"], "a")
        assert row["change_pct"] == 0

    def test_the_change_is_a_percentage_of_the_baseline(self):
        rows = comparison_report.summarize(RESULTS, ["b", "a", "c"], "a")
        assert [row["entry"] for row in rows] == ["b", "a", "c"]
        assert [row.get("change_pct") for row in rows] == [0.0, 0.0, None]  # b's median is 37.5, too
        faster = [*RESULTS, measured("d", 1, [2.0])]
        assert comparison_report.summarize(faster, ["a", "d"], "a")[1]["change_pct"] == pytest.approx(
            100 * (50 / 37.5 - 1)
        )
        assert comparison_report.summarize(faster, ["a", "d"], "d")[0]["change_pct"] == pytest.approx(-25.0)

    @pytest.mark.parametrize("baseline", ["c", "left out"])
    def test_without_a_measured_baseline_there_is_no_change(self, baseline):
        rows = comparison_report.summarize(RESULTS, ["a", "b", "c"], baseline)
        assert [row.get("change_pct") for row in rows] == [None, None, None]

    def test_beside_the_roofline_each_row_is_a_share_of_its_speed(self):
        alone = {**measured(ROOFLINE, 1, [1.0], tokens=200), "degrees": {}, "losses": [None]}
        rows = comparison_report.summarize([measured("a", 1, [1.0]), alone], ["a", ROOFLINE], "a")
        assert [(row["grid"], row["roofline_pct"]) for row in rows] == [("2 ring", 50.0), ("each rank alone", 100.0)]
        lines = comparison_report.table(rows, "a")
        assert "  of roofline  " in lines[1]
        assert "  50.0 %  " in lines[2]
        assert "of roofline" not in "".join(
            comparison_report.table(comparison_report.summarize([measured("a", 1, [1.0])], ["a"], "a"), "a")
        )

    def test_a_failed_entry_has_a_row_and_an_unmeasured_one_has_none(self):
        rows = comparison_report.summarize(RESULTS, ["c", "never"], "a")
        assert rows == [{"entry": "c", "error": RESULTS[4]["error"]}]

    def test_an_entry_that_failed_in_a_later_round_keeps_its_numbers_and_the_error(self):
        [before] = comparison_report.summarize(RESULTS, ["b"], "b")
        [after] = comparison_report.summarize([*RESULTS, failed("b", 3)], ["b"], "b")
        assert (before["errors"], after["errors"]) == ([], ["out of memory"])
        assert after == before | {"errors": ["out of memory"]}

    def test_only_the_rounds_of_the_size_that_succeeded_count(self):
        larger, smaller = (measured("one", 1, [time_s], micro_batch_size=size) for time_s, size in ((1.0, 2), (2.0, 1)))
        parts = {"entry": "one", "micro_batch_size": 2, "round": 1, "parts": PARTS_OF_A}
        [row] = comparison_report.summarize([larger, parts, failed("one", 2, 2), smaller], ["one"], "one")
        assert (row["micro_batch_size"], row["tokens_per_s_max"], row["errors"]) == (1, 50, ["out of memory"])
        assert row["shares_pct"] == {}

    def test_the_grid_of_one_rank_is_named(self):
        degrees = dict.fromkeys(("data", "ring", "ulysses", "tensor", "pipeline"), 1)
        one, four = (
            measured("one", 1, [1.0], degrees=degrees),
            measured("four", 1, [1.0], degrees=degrees | {"tensor": 2}),
        )
        four["degrees"]["pipeline"] = 2
        rows = comparison_report.summarize([one, four], ["one", "four"], "one")
        assert [row["grid"] for row in rows] == ["1 rank", "2 tensor x 2 pipeline"]


def test_the_table_is_aligned_and_shows_failures():
    rows = comparison_report.summarize(RESULTS, ["a", "c", "b"], "a")
    assert comparison_report.table(rows, "a") == [
        "L 50, batch 2, kernel cudnn",
        "method  grid    micro  TPS, median (min - max)  TPS/rank  TPOT ms  vs a    TFLOP/s/rank  MFU    peak GiB  exposed ms  of step ms  loss",
        "a       2 ring  1      38 (10 - 100)            19        53.3333  +0.0 %  1.12          7.5 %  3.0       7.00        2666.7      5.5000",
        "c       FAILED: rank 1 failed: MemoryError: all of it",
        "b       2 ring  1      38 (20 - 50)             19        53.3333  +0.0 %  1.12          n/a    n/a       n/a         2666.7      5.5000",
    ]  # fmt: skip


def test_a_common_value_is_no_column_and_neither_is_a_missing_one():
    long = measured("longer", 1, [1.0], sequence_length=1000, mfu_pct=None)
    rows = comparison_report.summarize([measured("a", 1, [1.0], mfu_pct=None), long], ["a", "longer"], "a")
    common, header, *lines = comparison_report.table(rows, "a")
    assert common == "batch 2, kernel cudnn"
    assert header.split("  ")[0] == "method"
    assert " L " in header
    assert " MFU " not in header
    assert [line.split()[3] for line in lines] == ["50", "1,000"]


def test_with_a_failed_baseline_there_is_no_column_of_changes():
    lines = comparison_report.table(comparison_report.summarize(RESULTS, ["c", "a", "b"], "c"), "c")
    assert "vs c" not in lines[1]  # nobody has one
    assert lines[2] == "c       FAILED: rank 1 failed: MemoryError: all of it"
    only_failures = comparison_report.table(comparison_report.summarize(RESULTS, ["c"], "c"), "c")
    assert only_failures[-1] == "c       FAILED: rank 1 failed: MemoryError: all of it"


def test_losses_are_compared_on_equal_batches():
    results = [measured("a", 1, [1.0], losses=[5.0]), measured("b", 1, [1.0], losses=[5.05])]
    other = measured("c", 1, [1.0], losses=[9.0], sequences_per_step=4)
    rows = comparison_report.summarize([*results, other], ["a", "b", "c"], "a")
    text = comparison_report.agreement(rows)
    assert text is not None
    names(text, "1 %")
    assert comparison_report.agreement(rows[1:]) is None


def test_only_entries_with_a_breakdown_are_in_its_table():
    rows = comparison_report.summarize(RESULTS, ["a", "b", "c"], "a")
    assert comparison_report.shares_table(rows) == [
        "time of a step, %  attention  merge  exchange  gemm  optimizer  data  other  idle",
        "a                  12.5       12.5   12.5      12.5  12.5       12.5  12.5   12.5",
    ]
    assert comparison_report.shares_table(comparison_report.summarize(RESULTS, ["b", "c"], "b")) == []


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (RESULTS[2], ["1/2", "a", "micro-batch 1", "67 tok/s", "33 tok/s/rank", "30.0000 ms", "13.3%", "1.000, 2.000 s"]),
        (RESULTS[3], ["1/2", "b", "micro-batch 1", "50 tok/s", "25 tok/s/rank", "40.0000 ms", "2.000, 2.000 s"]),
        (RESULTS[1], ["trial", "a", "micro-batch 2", "FAILED", "out of memory"]),
    ],
)  # fmt: skip
def test_a_measurement_is_one_line(row: dict[str, Any], parts: list[str]):
    line = comparison_report.measurement_header(row, 3, 9, 2) + comparison_report.measurement_line(row)
    assert "\n" not in line
    names(line, "3/9", *parts)
    assert ("%" in line) == ("13.3%" in parts)  # of the peak, where it is known


def test_progress_counts_earlier_measurements():
    two_sizes = Config(compare=CompareConfig(micro_batch_sizes=[1, 2]))
    task = ComparisonTask(Config(compare=CompareConfig(rounds=2)), {"a": Entry(two_sizes, 2), "b": Entry(Config(), 2)})
    assert task.progress([]) == (1, 2 + 4)
    results = [done("a", 0, 1), {**done("a", 0, 1), "parts": {}}, done("a", 0, 2), done("elsewhere", 1)]
    assert task.progress(results) == (3, 6)
    assert task.progress([done("a", 1)] * 7) == (8, 8)  # a size failed after some rounds


@pytest.mark.parametrize("entries", [["a", "c", "b"], ["c"], ["a", "on four ranks"]], ids=["bars", "failed", "scaling"])
def test_the_figure_is_drawn_even_if_all_entries_failed(entries, tmp_path):
    results = [*RESULTS, measured("on four ranks", 1, [1.0], num_ranks=4)]
    rows = comparison_report.summarize(results, entries, entries[0])
    paths = comparison_report.draw(rows, "tiny", tmp_path)
    assert [path.name for path in paths] == ["comparison.png", "comparison.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def assert_notes(notes: list[str], *expected: tuple[str, ...]) -> None:
    """One note for each, in this order, with these parts."""
    assert len(notes) == len(expected), notes
    for note, parts in zip(notes, expected, strict=True):
        names(note, *parts)


KEEP_SIZES = "compare.downscale=false"  # what to type to keep the sizes as typed


@pytest.mark.slow
class TestChooseEntries:
    @staticmethod
    def entries(config: Config, *typed: str) -> dict[str, Config]:
        return {
            name: composed(*entry_overrides([*typed], own, "forward")) for name, own in config.compare.entries.items()
        }

    @staticmethod
    def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    def test_on_two_gpus_equal_entries_run_once(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        config = compose("+experiment=paper_table")
        entries = self.entries(config, "+experiment=paper_table")
        chosen, notes = choose_entries(config, entries)
        assert list(chosen) == ["tp_pp", "pp", "ra_sp", "ulysses", "all_gather", "dp"]
        changed = ("engine.train_batch_size 1024 -> 64",)
        assert_notes(notes, changed, (KEEP_SIZES,), ("tp", "2 ranks", "tp_pp"), ("hybrid", "2 ranks", "ulysses"))
        assert {(num_ranks, entry.engine.train_batch_size) for entry, num_ranks in chosen.values()} == {(2, 64)}
        assert {entry.data.sequence_length for entry, _ in chosen.values()} == {10_000}
        assert {entry.engine.train_batch_size for entry in entries.values()} == {1024}  # as composed
        assert resolve_degrees(*chosen["pp"]) == (1, 1, 1, 1, 2)

    def test_on_eight_gpus_a_pipeline_of_more_stages_than_layers_is_left_out(self, monkeypatch):
        self.gpus(monkeypatch, 8)
        config = compose("+experiment=paper_table")
        chosen, notes = choose_entries(config, self.entries(config, "+experiment=paper_table"))
        assert list(chosen) == ["tp_pp", "tp", "ra_sp", "ulysses", "all_gather", "dp"]
        degrees = ("parallelism.pipeline_degree=8", "parallelism.pipeline_degree=4")
        some_line_names(notes, "pp", "model.num_layers=4", *degrees)

    def test_on_the_cpu_the_warning_comes_first(self, monkeypatch):
        self.gpus(monkeypatch, 0)
        config = compose("+experiment=paper_table")
        chosen, notes = choose_entries(config, self.entries(config, "+experiment=paper_table"))
        assert list(chosen) == ["tp_pp", "tp", "pp", "ra_sp", "ulysses", "all_gather", "dp"]
        assert {num_ranks for _, num_ranks in chosen.values()} == {4}
        assert notes[0].startswith("!!! ")
        names(notes[0], "CPU", "GPUs")
        some_line_names(notes, "data.sequence_length 10000 -> 1250")
        some_line_names(notes, "engine.train_batch_size 1024 -> 24")
        names(notes[-1], "hybrid", "4 ranks", "ulysses")

    def test_on_the_cpu_even_typed_sizes_shrink_unless_downscale_is_off(self, monkeypatch):
        self.gpus(monkeypatch, 0)
        typed = ["+experiment=paper_table", "data.sequence_length=800", "engine.dtype=bf16", "model.head_dim=32"]
        typed += ["model.hidden_size=512", "model.mlp_size=512", "engine.train_batch_size=8", "launch.num_ranks=1"]
        typed += ["compare.micro_batch_sizes=[1]"]
        chosen, notes = choose_entries(config := compose(*typed), self.entries(config, *typed))
        assert {entry.data.sequence_length for entry, _ in chosen.values()} == {100}
        some_line_names(notes, "data.sequence_length 800 -> 100")
        some_line_names(notes, KEEP_SIZES)
        typed += ["compare.downscale=false"]
        entries = self.entries(config := compose(*typed), *typed)
        chosen, notes = choose_entries(config, entries)
        assert {name: entry for name, (entry, _) in chosen.items()} == {name: entries[name] for name in chosen}
        assert not any(KEEP_SIZES in note for note in notes)

    def test_without_downscale_all_entries_get_one_batch(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        config = compose("model.num_kv_heads=4")
        chosen, notes = choose_entries(config, self.entries(config, "model.num_kv_heads=4"))
        changed = ("engine.train_batch_size None -> 16",)
        assert_notes(notes, changed, ("tp", "2 ranks", "tp_pp"), ("hybrid", "2 ranks", "ulysses"))
        assert {entry.engine.train_batch_size for entry, _ in chosen.values()} == {16}

    def test_a_typed_batch_stays(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        config = compose()
        chosen, notes = choose_entries(config, self.entries(config, "engine.train_batch_size=3"))
        assert {entry.engine.train_batch_size for entry, _ in chosen.values()} == {3}
        sizes = ("engine.train_batch_size=3", "engine.micro_batch_size=1", "engine.train_batch_size=4")
        some_line_names(notes, "dp", "2 data ranks", *sizes)

    def test_entries_that_differ_in_any_setting_are_distinct(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        entries = {
            name: compose("+experiment=ra_sp", *overrides)
            for name, overrides in {
                "plain": [],
                "again": ["parallelism.ring_degree=2"],
                "contiguous": ["attention.layout=contiguous"],
                "zero_3": ["engine.zero_stage=3"],
                "longer": ["data.sequence_length=4096"],
                "dp": ["attention=local"],
                "dp of a ring": ["parallelism.ring_degree=1"],
            }.items()
        }
        chosen, notes = choose_entries(compose(), entries)
        assert list(chosen) == ["plain", "contiguous", "zero_3", "longer", "dp"]
        same = ("again", "2 ranks", "plain"), ("dp of a ring", "2 ranks", "dp")
        assert_notes(notes[-3:], *same, ("baseline", "plain", "tp_pp"))

    def test_an_entry_in_compare_only_must_fit(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        config = compose("+experiment=paper_table", "compare.only=[ra_sp,ulysses,hybrid]")
        with refused(ConfigError, "compare.only", "hybrid", "2 ranks", "ulysses"):
            choose_entries(
                config, self.entries(config, "+experiment=paper_table", "compare.only=[ra_sp,ulysses,hybrid]")
            )

    def test_on_the_cpu_a_step_of_hours_is_warned_of(self, monkeypatch):
        self.gpus(monkeypatch, 0)
        typed = ("workload=paper_100k", "engine.zero_stage=3", "compare.only=[ra_sp]", "launch.num_ranks=1")
        _, notes = choose_entries(config := compose(*typed), self.entries(config, *typed))
        assert notes[-1].startswith("!!! ")
        names(notes[-1], "62,593 TFLOP", "GPUs")
        hours = float(re.findall(r"about ([\d.]+) hours", notes[-1])[0])
        assert 62_593 / 0.03 < 3600 * hours < 62_593 / 0.01  # a CPU core has about 0.02 TFLOP/s

    def test_entries_of_more_ranks_than_gpus_are_left_out(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        config = compose("+experiment=strong_scaling")
        chosen, notes = choose_entries(config, self.entries(config, "+experiment=strong_scaling"))
        assert {name: num_ranks for name, (_, num_ranks) in chosen.items()} == {
            "ra_sp on 1": 1,
            "ra_sp on 2": 2,
            "ulysses on 2": 2,
        }
        some_line_names(notes, "ra_sp on 4", "launch.num_ranks=4", "2")

    @pytest.mark.parametrize("gpus", [0, 8])
    def test_entries_of_more_than_launch_num_ranks_are_left_out(self, monkeypatch, gpus):
        self.gpus(monkeypatch, gpus)
        typed = ["+experiment=weak_scaling", "launch.num_ranks=2"]
        chosen, notes = choose_entries(config := compose(*typed), self.entries(config, *typed))
        assert {name: num_ranks for name, (_, num_ranks) in chosen.items()} == {
            "ra_sp on 1": 1,
            "ra_sp on 2": 2,
            "ulysses on 2": 2,
        }
        some_line_names(notes, "ra_sp on 4", "launch.num_ranks=4", "2")
        lengths = {entry.data.sequence_length for entry, _ in chosen.values()}
        assert lengths == ({16384, 32768} if gpus else {1250, 2500})  # shrunk by the longest of those that run
        four = {"ra_sp on 4": self.entries(config, *typed)["ra_sp on 4"]}
        with refused(ConfigError, "ra_sp on 4", "launch.num_ranks=4", 2):
            choose_entries(config, four)

    def test_under_a_launcher_only_entries_of_its_number_of_ranks_fit(self, monkeypatch):
        self.gpus(monkeypatch, 1)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        typed = "+experiment=strong_scaling"
        chosen, notes = choose_entries(config := compose(typed), self.entries(config, typed))
        assert list(chosen) == ["ra_sp on 2", "ulysses on 2"]
        some_line_names(notes, "ra_sp on 1", "launch.num_ranks=1", "2")

    def test_if_none_fits_the_error_has_every_reason(self, monkeypatch):
        self.gpus(monkeypatch, 2)
        entries = {
            "three": compose("launch.num_ranks=3"),
            "ring": compose("parallelism.ring_degree=4"),
        }
        with pytest.raises(ConfigError) as caught:
            choose_entries(compose(), entries)
        _, three, ring = str(caught.value).splitlines()
        names(three, "three", "launch.num_ranks=3", 2)
        names(ring, "ring", "parallelism.ring_degree=4", "2 ranks", 1, "parallelism.ring_degree=2")
