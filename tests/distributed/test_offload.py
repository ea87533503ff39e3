"""ZeRO-Offload: training with optimizer states or weights on the host equals one process without offload."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.schema import Config
from tests.distributed.parity import Cell, run_cell
from tests.distributed.test_checkpoint import configuration, two_starts
from tests.errors import names
from tests.pool import WorkerPool
from tests.tools.elastic import RING, TOLERANCE, Grid, resume_on

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell("fp32", stage, 2, 1, 2, 29, offload_optimizer=True) for stage in (1, 2)),
        Cell("fp32", 3, 2, 1, 2, 29, offload_optimizer=True, offload_parameters=True),
        Cell("fp32", 3, 2, 1, 2, 29, offload_parameters=True),
        Cell("bf16", 1, 2, 1, 2, 29, offload_optimizer=True),
        Cell("bf16", 1, 1, 1, 1, 29, offload_optimizer=True),  # nothing to sum
        Cell("bf16", 3, 2, 1, 1, 29, offload_optimizer=True, offload_parameters=True),
    ],
    ids=str,
)
def test_training_with_offload_equals_one_process(pool: WorkerPool, cell: Cell):
    outcome = run_cell(pool, cell)
    assert outcome.passes, outcome


def test_offloaded_states_are_saved_and_loaded(pool: WorkerPool, tmp_path: Path):
    config = configuration(3, "bf16", tied_head=False)
    config.engine.offload_optimizer = config.engine.offload_parameters = True
    (told, losses, _), *_ = pool.run(two_starts, config, tmp_path, num_ranks=2)
    names(told[3], "step 2")
    assert losses[1] == losses[0][2:]


class OffloadedGrid(Grid):
    def config(self, dtype: str) -> Config:
        config = super().config(dtype)
        config.engine.offload_optimizer = True
        return config


def test_offloaded_states_resume_on_other_ranks_and_another_zero_stage(pool: WorkerPool, tmp_path: Path):
    before, after = OffloadedGrid(RING, 2, 1), OffloadedGrid(RING, 4, 3)
    assert resume_on(pool, tmp_path, before, after, "fp32")["difference"] <= TOLERANCE["fp32"]
