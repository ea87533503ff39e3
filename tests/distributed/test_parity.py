"""A covering subset of the parity table: every ZeRO stage in both dtypes, every other option with several of them.

Of it, fp32 on every stage and with every method is not slow.
"""

import pytest

from tests.distributed.parity import Cell, full_table, run_cell
from tests.pool import WorkerPool

COVERING = [  # dtype, stage, ring, data, accumulation, length
    Cell("fp32", 0, 4, 1, 2, 29),
    Cell("fp32", 1, 2, 2, 1, 29),
    Cell("fp32", 2, 4, 1, 1, 32, layout="contiguous"),
    Cell("fp32", 2, 2, 2, 2, 29),
    Cell("fp32", 3, 4, 1, 2, 32),
    Cell("fp32", 3, 2, 2, 2, 29),
    Cell("fp32", 3, 1, 2, 1, 29),
    Cell("fp32", 0, 1, 1, 2, 32),
    Cell("bf16", 0, 2, 2, 1, 32),
    Cell("bf16", 1, 4, 1, 2, 29),
    Cell("bf16", 1, 1, 2, 2, 32),
    Cell("bf16", 2, 2, 1, 1, 29),
    Cell("bf16", 1, 1, 1, 1, 29),  # nothing to sum
    Cell("bf16", 1, 1, 1, 2, 29),
    Cell("bf16", 1, 2, 1, 1, 29),
    Cell("bf16", 2, 1, 3, 2, 29),  # a division by 3 would round
    Cell("bf16", 3, 4, 1, 1, 29),
    Cell("bf16", 3, 2, 2, 2, 32, layout="contiguous"),
    Cell("fp32", 0, 2, 2, 2, 29, model="gpt"),
    Cell("fp32", 1, 2, 1, 1, 32, model="gpt"),
    Cell("fp32", 3, 4, 1, 1, 29, model="gpt"),
    Cell("bf16", 0, 2, 1, 2, 29, model="gpt"),
    Cell("bf16", 3, 2, 2, 1, 32, model="gpt"),
    Cell("fp32", 1, 1, 2, 2, 29, method="ulysses", ulysses_degree=2),
    Cell("bf16", 3, 1, 1, 1, 32, method="ulysses", ulysses_degree=2),
    Cell("fp32", 3, 2, 1, 2, 29, method="hybrid", ulysses_degree=2),
    Cell("bf16", 0, 2, 1, 1, 29, method="hybrid", ulysses_degree=2, layout="contiguous"),
    Cell("fp32", 0, 2, 2, 1, 29, method="all_gather"),
    Cell("bf16", 2, 4, 1, 2, 29, method="all_gather"),
    Cell("fp32", 2, 1, 4, 1, 29, method="dp"),
    Cell("fp32", 1, 1, 1, 2, 29, method="tp_pp", tensor_degree=2),
    Cell("fp32", 1, 1, 2, 1, 29, model="gpt", method="tp_pp", tensor_degree=2),
    Cell("fp32", 1, 1, 1, 3, 32, method="tp_pp", tensor_degree=2),
    Cell("fp32", 1, 1, 1, 3, 29, model="gpt", method="tp_pp", pipeline_degree=2),
    Cell("fp32", 1, 1, 1, 3, 29, method="tp_pp", tensor_degree=2, pipeline_degree=2),
    Cell("bf16", 1, 1, 1, 3, 29, method="tp_pp", tensor_degree=2),
    Cell("bf16", 1, 1, 1, 3, 32, method="tp_pp", tensor_degree=2),
    Cell("bf16", 1, 1, 2, 2, 29, method="tp_pp", pipeline_degree=2),
]


def is_slow(cell: Cell) -> bool:
    return cell.dtype == "bf16" or (cell.model == "gpt" and cell.method != "tp_pp")


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[pytest.mark.slow] if is_slow(cell) else [], id=str(cell)) for cell in COVERING],
)
def test_training_on_ranks_equals_one_process(pool: WorkerPool, cell: Cell):
    outcome = run_cell(pool, cell)
    assert outcome.passes, outcome


def test_the_full_table_has_every_combination():
    tensor_pipeline = 6 * 2 * 2 * 2  # grids; lengths; dtypes; models
    on_cpu = 3 * 2 * 2 * 4 * 2 * 2 + 5 * 2 * 4 * 2 + 2 * 4 + tensor_pipeline
    assert len(set(full_table("cpu"))) == on_cpu
    assert len(set(full_table("cuda"))) == on_cpu + (2 * 2 * 4 * 2 * 2 + 2 * 4 * 2)
