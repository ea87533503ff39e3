"""A line through measured peaks, and what is read off it."""

from __future__ import annotations

import re

import pytest

from recipes.benchmark.memory_fit import MemoryFit, NoFit, check_line

# 2 GiB, 1 per layer, and per token 1/1024 and 1/4096 for each layer
PEAKS = {(1, 1024): 4.25, (1, 2048): 5.5, (2, 1024): 5.5, (2, 2048): 7.0}


def test_four_peaks_give_the_four_coefficients():
    assert MemoryFit.through(PEAKS) == MemoryFit(2.0, 1.0, 1 / 1024, 1 / 4096)


def test_other_peaks_follow():
    fit = MemoryFit.through(PEAKS)
    assert fit.peak_gib(8, 4096) == 2 + 8 + 4 + 8
    assert (fit.without_tokens_gib(8), fit.per_token_gib(8)) == (10, 3 / 1024)


@pytest.mark.parametrize(
    ("num_layers", "limit_gib", "multiple", "length"),
    [
        (8, 22.0, 256, 4096),
        (8, 21.99, 256, 3840),
        (8, 22.0, 1000, 4000),
        (4, 22.0, 1, 8192),
        (8, 10.0, 1, 0),
        (8, 3.0, 1, 0),
    ],
)
def test_the_longest_fills_the_limit_and_no_more(num_layers, limit_gib, multiple, length):
    assert MemoryFit.through(PEAKS).longest(num_layers, limit_gib, multiple) == length


def test_a_layer_never_takes_less_than_nothing():
    fit = MemoryFit.through({(1, 1024): 4.0, (1, 2048): 5.0, (2, 1024): 3.8, (2, 2048): 4.7})
    assert (fit.per_layer, fit.per_token_layer) == (0.0, 0.0)
    assert fit.peak_gib(1, 2048) == 5.0


def test_memory_that_does_not_grow_with_the_length_predicts_nothing():
    with pytest.raises(NoFit, match=re.escape("the peak of 2 layers grows by 0.0200 GiB from L = 1,024 to 2,048")):
        MemoryFit.through({**PEAKS, (2, 2048): 5.52})


def test_three_lengths_on_a_line_pass():
    check_line({1024: 4.25, 2048: 5.5, 4096: 8.3})  # 8.0 by the line, within 5 %


@pytest.mark.parametrize("longest_gib", [9.0, 7.5])
def test_a_third_length_off_the_line_is_refused(longest_gib):
    expected = "L = 1,024 and 2,048 peak at 4.250 and 5.500 GiB, so L = 4,096 should peak at 8.000, but does at"
    with pytest.raises(NoFit, match=re.escape(f"{expected} {longest_gib:.3f}")):
        check_line({1024: 4.25, 2048: 5.5, 4096: longest_gib})
