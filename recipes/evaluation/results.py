"""RUN_DIR/evaluation.json: what an evaluation has found so far. It is the only memory of one that goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import Config, ConfigError, flatten
from recipes.evaluation.cells import Cell
from recipes.run.run_dir import EVALUATION_FILE, Row, replace_file

# settings of the data that change no number: where tokens are kept, and the length, which is each cell's own
_NOT_COMPARED = ("data.token_store", "data.preview", "data.bad_rows", "data.sequence_length")


@dataclass
class Evaluation:
    """The cells that were measured, with their numbers, and the settings that all of them share."""

    settings: dict[str, Any]
    cells: list[Row] = field(default_factory=list)
    elapsed_s: float = 0.0
    wandb_run_id: str = ""

    @property
    def step(self) -> int:
        """How many cells were measured."""
        return len(self.cells)

    def has(self, cell: Cell) -> bool:
        return any(all(row.get(name) == value for name, value in cell.named().items()) for row in self.cells)

    def add(self, cell: Cell, numbers: Row) -> None:
        self.cells.append(cell.named() | numbers)

    def write(self, run_dir: Path) -> None:
        """Atomically: a killed evaluation leaves the file before or after a cell."""
        replace_file(run_dir / EVALUATION_FILE, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


def settings_of(config: Config) -> dict[str, Any]:
    """What all cells of one file must share, by dotted name. JSON gives back equal values."""
    of_data = {
        name: value for name, value in flatten({"data": asdict(config.data)}).items() if name not in _NOT_COMPARED
    }
    asked = config.evaluate
    given = {
        "evaluate.model": _absolute(asked.model),
        "model.rope": config.model.rope,
        "engine.dtype": config.engine.dtype,
        "evaluate.samples": asked.samples,
        "evaluate.seed": asked.seed,
        "evaluate.scoring": asked.scoring,
        "evaluate.context": asked.context,
    }
    return json.loads(json.dumps(given | of_data))


def read_evaluation(config: Config, run_dir: Path) -> Evaluation | None:
    """What the run dir has already; None if nothing.

    Raises:
        ConfigError: if it belongs to another evaluation.
    """
    path = run_dir / EVALUATION_FILE
    if not path.exists():
        return None
    try:
        evaluation = Evaluation(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(
            f"{path} is not what an evaluation writes ({error}): move it away, or use another hydra.run.dir"
        ) from error
    before, now = evaluation.settings, settings_of(config)
    for name in {**now, **before}:  # evaluate.model first: another tokenizer often follows from it
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{path} was measured with {name}={before.get(name)}, not {now.get(name)}: type {name}="
                f"{before.get(name)}, or use another hydra.run.dir"
            )
    return evaluation


def shared_evaluation(config: Config, run_dir: Path) -> Evaluation | None:
    """What rank 0 finds in the run dir, for all ranks. Every rank must call it; the parent has checked the file."""
    import deepspeed.comm as dist

    shared: list[Any] = [read_evaluation(config, run_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _absolute(model: str | None) -> str | None:
    """A folder's path from everywhere; a name on the hub as it is."""
    folder = Path(model or "").expanduser()
    return str(folder.resolve()) if model and folder.exists() else model
