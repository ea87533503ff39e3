"""train.py with a loss that is NaN in one step, on one rank: `tests/tools/bad_loss.py BAD_STEP train.py ARGUMENTS...`.

Rank 0 takes seconds to close its wandb run, as over a slow network.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import registry

REPOSITORY = Path(__file__).resolve().parents[2]
BAD_STEP, BAD_RANK = "BAD_STEP", "1"
CLOSING_S = 2.0


@dataclass(frozen=True)
class BadLossTask(registry.RecipeTask):
    def run(self, run_dir: Path, console: TextIO) -> float:
        from torch import Tensor

        from data.shard import TokenBatch
        from recipes.engine.deepspeed_engine import TrainingEngine
        from recipes.monitor.reporter import Reporter

        true_loss_sum = TrainingEngine._loss_sum

        def loss_sum(engine: TrainingEngine, micro_batch: TokenBatch) -> Tensor:
            is_bad = engine.deepspeed.global_steps + 1 == int(os.environ[BAD_STEP]) and os.environ["RANK"] == BAD_RANK
            return true_loss_sum(engine, micro_batch) * (float("nan") if is_bad else 1.0)

        close = Reporter.__exit__

        def close_slowly(*arguments: Any) -> None:
            time.sleep(CLOSING_S)
            close(*arguments)

        with (
            mock.patch.object(TrainingEngine, "_loss_sum", loss_sum),
            mock.patch.object(Reporter, "__exit__", close_slowly),
        ):
            return super().run(run_dir, console)


if __name__ == "__main__":
    from tests.tools.bad_loss import BadLossTask as Task  # under a name that other processes can import

    os.environ[BAD_STEP] = sys.argv.pop(1)
    registry.RecipeTask = Task
    del sys.argv[0]
    runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
