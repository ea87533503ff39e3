"""Tables as lines of text."""

from recipes.run.text_table import text_table


def test_columns_are_left_aligned_without_trailing_spaces():
    rows = [["method", "ms", "note"], ["ring", "1,234.5", ""], ["all_gather", "7", "slower"]]
    assert text_table(rows) == [
        "method      ms       note",
        "ring        1,234.5",
        "all_gather  7        slower",
    ]


def test_the_last_cell_of_a_shorter_row_spans_the_remaining_columns():
    rows = [["method", "ms", "MFU"], ["a longer name", "FAILED: out of memory"], ["ring", "5", "40 %"]]
    assert text_table(rows) == [
        "method         ms  MFU",
        "a longer name  FAILED: out of memory",
        "ring           5   40 %",
    ]
