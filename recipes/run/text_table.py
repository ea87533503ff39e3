"""Tables as lines of text, for consoles and logs."""

from __future__ import annotations


def text_table(rows: list[list[str]]) -> list[str]:
    """The rows as lines with aligned columns: cells left-aligned, two spaces between columns, no trailing spaces.

    Args:
        rows: the first is the header. A row may have fewer cells; its last cell then spans the remaining columns.
    """
    num_columns = len(rows[0])
    widths = [0] * num_columns
    for row in rows:
        for column, cell in enumerate(row if len(row) == num_columns else row[:-1]):
            widths[column] = max(widths[column], len(cell))
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
