"""The order of a comparison's measurements, and the file of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.benchmark.rounds import Measurement, append_result, best_size, next_measurement, read_results


def done(entry: str, number: int, size: int = 1, tokens_per_s: float = 100.0) -> dict[str, Any]:
    return {"entry": entry, "micro_batch_size": size, "round": number, "tokens_per_s": tokens_per_s}


def failed(entry: str, number: int, size: int = 1) -> dict[str, Any]:
    return {"entry": entry, "micro_batch_size": size, "round": number, "error": "out of memory"}


def measurements(
    sizes: dict[str, list[int]], rounds: int, speeds: dict[tuple[str, int], float], results: list[dict[str, Any]]
) -> list[tuple[str, int, int]]:
    """The measurements after `results`, as (entry, micro-batch size, round). One without a speed fails."""
    results, measured = list(results), []
    while (chosen := next_measurement(sizes, rounds, results)) is not None:
        measured.append((chosen.entry, chosen.micro_batch_size, chosen.round))
        assert len(measured) < 100, "it does not end"
        speed = speeds.get((chosen.entry, chosen.micro_batch_size))
        given = chosen.entry, chosen.round, chosen.micro_batch_size
        results.append(failed(*given) if speed is None else done(*given, speed))
    return measured


class TestNextMeasurement:
    def test_sizes_are_tried_first_and_rounds_alternate_with_the_fastest(self):
        speeds = {("a", 1): 10.0, ("a", 2): 30.0, ("a", 4): 20.0, ("b", 1): 5.0, ("b", 2): 4.0, ("b", 4): 3.0}
        assert measurements({"a": [1, 2, 4], "b": [1, 2, 4]}, 2, speeds, []) == [
            ("a", 1, 0), ("a", 2, 0), ("a", 4, 0), ("b", 1, 0), ("b", 2, 0), ("b", 4, 0),
            ("a", 2, 1), ("b", 1, 1), ("a", 2, 2), ("b", 1, 2),
        ]  # fmt: skip

    def test_no_larger_size_is_tried_after_one_that_failed(self):
        speeds = {("a", 1): 10.0, ("b", 1): 1.0, ("b", 2): 2.0, ("b", 4): 3.0}
        assert measurements({"a": [1, 2, 4], "b": [1, 2, 4]}, 1, speeds, []) == [
            ("a", 1, 0), ("a", 2, 0), ("b", 1, 0), ("b", 2, 0), ("b", 4, 0), ("a", 1, 1), ("b", 4, 1),
        ]  # fmt: skip

    def test_an_entry_whose_smallest_size_failed_has_no_round(self):
        measured = measurements({"a": [1, 2], "b": [1, 2]}, 2, {("b", 1): 2.0, ("b", 2): 1.0}, [])
        assert measured == [("a", 1, 0), ("b", 1, 0), ("b", 2, 0), ("b", 1, 1), ("b", 1, 2)]

    def test_a_single_size_is_not_tried(self):
        assert measurements({"a": [4], "b": [1]}, 2, {("a", 4): 1.0, ("b", 1): 1.0}, []) == [
            ("a", 4, 1), ("b", 1, 1), ("a", 4, 2), ("b", 1, 2),
        ]  # fmt: skip

    def test_an_entry_that_failed_in_a_round_is_not_measured_again(self):
        assert measurements({"a": [1], "b": [1], "c": [1]}, 3, {("a", 1): 1.0, ("c", 1): 1.0}, []) == [
            ("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("a", 1, 2), ("c", 1, 2), ("a", 1, 3), ("c", 1, 3),
        ]  # fmt: skip

    def test_after_a_size_failed_in_a_round_the_next_fastest_gets_all_rounds(self):
        sizes, speeds = {"a": [1, 2, 4], "b": [1]}, {("a", 1): 10.0, ("a", 2): 20.0, ("b", 1): 1.0}
        tried = [done("a", 0, 1, 10.0), done("a", 0, 2, 20.0), done("a", 0, 4, 30.0)]
        results = [*tried, done("a", 1, 4), done("b", 1), failed("a", 2, 4)]
        assert measurements(sizes, 2, speeds, results) == [("a", 2, 1), ("a", 2, 2), ("b", 1, 2)]
        results = [*results, failed("a", 1, 2), failed("a", 1, 1)]
        assert measurements(sizes, 2, speeds, results) == [("b", 1, 2)]

    def test_a_failure_after_the_steps_were_timed_only_costs_the_breakdown(self):
        tried = [done("a", 0, 1, 10.0), done("a", 0, 2, 20.0)]
        results = [*tried, done("a", 1, 2), done("a", 2, 2), failed("a", 2, 2)]
        assert next_measurement({"a": [1, 2]}, 2, results) is None
        assert best_size([1, 2], "a", results) == 2

    def test_a_size_that_is_no_longer_a_candidate_is_not_chosen(self):
        results = [done("a", 0, 1, 10.0), done("a", 0, 2, 20.0), done("a", 0, 4, 30.0)]
        assert next_measurement({"a": [1, 2]}, 1, results) == Measurement("a", 2, 1)

    def test_it_resumes_after_earlier_results(self):
        speeds = {("a", 1): 10.0, ("a", 2): 30.0, ("b", 1): 5.0, ("b", 2): 4.0}
        sizes = {"a": [1, 2], "b": [1, 2]}
        all_of_them = measurements(sizes, 2, speeds, [])
        for so_far in range(len(all_of_them) + 1):
            results = [done(entry, number, size, speeds[entry, size]) for entry, size, number in all_of_them[:so_far]]
            assert measurements(sizes, 2, speeds, results) == all_of_them[so_far:]

    def test_more_rounds_and_a_new_entry_only_add_what_is_missing(self):
        results = [done("a", 1), done("a", 2)]
        assert measurements({"a": [1], "b": [1]}, 3, {("a", 1): 1.0, ("b", 1): 1.0}, results) == [
            ("b", 1, 1), ("b", 1, 2), ("a", 1, 3), ("b", 1, 3),
        ]  # fmt: skip

    def test_nothing_is_left_when_all_is_done(self):
        assert next_measurement({"a": [1]}, 1, [done("a", 1)]) is None
        assert next_measurement({"a": [1]}, 2, [done("a", 1)]) == Measurement("a", 1, 2)
        assert next_measurement({"a": [1]}, 2, [failed("a", 1)]) is None


def test_the_best_size_is_the_fastest_that_was_tried_and_worked():
    results = [done("a", 0, 1, 10.0), done("a", 0, 2, 30.0), failed("a", 0, 4), done("b", 0, 4, 99.0)]
    assert best_size([1, 2, 4], "a", results) == 2
    assert best_size([1, 2, 4], "a", [*results, done("a", 1, 1, 1000.0)]) == 2  # rounds do not count
    assert best_size([8], "a", results) == 8
    assert best_size([1, 2], "c", results) is None
    assert best_size([1, 2], "d", [failed("d", 0, 1)]) is None


def test_a_line_cut_off_by_a_crash_is_ignored_and_measured_again(tmp_path: Path):
    append_result(tmp_path, done("a", 1))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"entry": "a", "round": 2, "tok')
    assert read_results(tmp_path) == [done("a", 1)]
    append_result(tmp_path, done("a", 2))
    assert read_results(tmp_path) == [done("a", 1), done("a", 2)]
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b"\0\xff\nnull\n")  # blocks that a crash of the host left unwritten
    assert read_results(tmp_path) == [done("a", 1), done("a", 2)]
