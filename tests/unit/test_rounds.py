"""Whose turn it is in a comparison, after which results."""

from __future__ import annotations

from typing import Any

from recipes.benchmark.rounds import Measurement, best_size, next_measurement


def done(entry: str, number: int, size: int = 1, tokens_per_s: float = 100.0) -> dict[str, Any]:
    return {"entry": entry, "micro_batch_size": size, "round": number, "tokens_per_s": tokens_per_s}


def failed(entry: str, number: int, size: int = 1) -> dict[str, Any]:
    return {"entry": entry, "micro_batch_size": size, "round": number, "error": "out of memory"}


def all_turns(
    sizes: dict[str, list[int]], rounds: int, speeds: dict[tuple[str, int], float], results: list[dict[str, Any]]
) -> list[tuple[str, int, int]]:
    """The turns that follow `results`, as (entry, micro-batch size, round); one without a speed fails."""
    results, turns = list(results), []
    while (turn := next_measurement(sizes, rounds, results)) is not None:
        turns.append((turn.entry, turn.micro_batch_size, turn.round))
        assert len(turns) < 100, "no end"
        speed = speeds.get((turn.entry, turn.micro_batch_size))
        given = turn.entry, turn.round, turn.micro_batch_size
        results.append(failed(*given) if speed is None else done(*given, speed))
    return turns


class TestNextTurn:
    def test_sizes_are_tried_first_and_the_rounds_alternate_with_the_fastest(self):
        speeds = {("a", 1): 10.0, ("a", 2): 30.0, ("a", 4): 20.0, ("b", 1): 5.0, ("b", 2): 4.0, ("b", 4): 3.0}
        assert all_turns({"a": [1, 2, 4], "b": [1, 2, 4]}, 2, speeds, []) == [
            ("a", 1, 0), ("a", 2, 0), ("a", 4, 0), ("b", 1, 0), ("b", 2, 0), ("b", 4, 0),
            ("a", 2, 1), ("b", 1, 1), ("a", 2, 2), ("b", 1, 2),
        ]  # fmt: skip

    def test_a_size_that_failed_stops_larger_ones_of_that_entry(self):
        speeds = {("a", 1): 10.0, ("b", 1): 1.0, ("b", 2): 2.0, ("b", 4): 3.0}
        assert all_turns({"a": [1, 2, 4], "b": [1, 2, 4]}, 1, speeds, []) == [
            ("a", 1, 0), ("a", 2, 0), ("b", 1, 0), ("b", 2, 0), ("b", 4, 0), ("a", 1, 1), ("b", 4, 1),
        ]  # fmt: skip

    def test_an_entry_whose_smallest_size_failed_has_no_round(self):
        turns = all_turns({"a": [1, 2], "b": [1, 2]}, 2, {("b", 1): 2.0, ("b", 2): 1.0}, [])
        assert turns == [("a", 1, 0), ("b", 1, 0), ("b", 2, 0), ("b", 1, 1), ("b", 1, 2)]

    def test_a_single_size_is_not_tried(self):
        assert all_turns({"a": [4], "b": [1]}, 2, {("a", 4): 1.0, ("b", 1): 1.0}, []) == [
            ("a", 4, 1), ("b", 1, 1), ("a", 4, 2), ("b", 1, 2),
        ]  # fmt: skip

    def test_an_entry_that_failed_in_a_round_has_no_more_turns(self):
        assert all_turns({"a": [1], "b": [1], "c": [1]}, 3, {("a", 1): 1.0, ("c", 1): 1.0}, []) == [
            ("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("a", 1, 2), ("c", 1, 2), ("a", 1, 3), ("c", 1, 3),
        ]  # fmt: skip

    def test_a_size_that_failed_in_a_round_gives_way_to_the_next_fastest_which_has_all_rounds(self):
        sizes, speeds = {"a": [1, 2, 4], "b": [1]}, {("a", 1): 10.0, ("a", 2): 20.0, ("b", 1): 1.0}
        tried = [done("a", 0, 1, 10.0), done("a", 0, 2, 20.0), done("a", 0, 4, 30.0)]
        results = [*tried, done("a", 1, 4), done("b", 1), failed("a", 2, 4)]
        assert all_turns(sizes, 2, speeds, results) == [("a", 2, 1), ("a", 2, 2), ("b", 1, 2)]
        results = [*results, failed("a", 1, 2), failed("a", 1, 1)]
        assert all_turns(sizes, 2, speeds, results) == [("b", 1, 2)]

    def test_a_failure_after_the_time_was_taken_costs_only_the_parts(self):
        tried = [done("a", 0, 1, 10.0), done("a", 0, 2, 20.0)]
        results = [*tried, done("a", 1, 2), done("a", 2, 2), failed("a", 2, 2)]
        assert next_measurement({"a": [1, 2]}, 2, results) is None
        assert best_size([1, 2], "a", results) == 2

    def test_a_size_that_is_no_candidate_any_more_is_not_taken(self):
        results = [done("a", 0, 1, 10.0), done("a", 0, 2, 20.0), done("a", 0, 4, 30.0)]
        assert next_measurement({"a": [1, 2]}, 1, results) == Measurement("a", 2, 1)

    def test_it_resumes_where_earlier_results_end(self):
        speeds = {("a", 1): 10.0, ("a", 2): 30.0, ("b", 1): 5.0, ("b", 2): 4.0}
        sizes = {"a": [1, 2], "b": [1, 2]}
        whole = all_turns(sizes, 2, speeds, [])
        for so_far in range(len(whole) + 1):
            results = [done(entry, number, size, speeds[entry, size]) for entry, size, number in whole[:so_far]]
            assert all_turns(sizes, 2, speeds, results) == whole[so_far:]

    def test_more_rounds_and_a_new_entry_do_only_what_lacks(self):
        results = [done("a", 1), done("a", 2)]
        assert all_turns({"a": [1], "b": [1]}, 3, {("a", 1): 1.0, ("b", 1): 1.0}, results) == [
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
