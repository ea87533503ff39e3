"""Resuming with other methods, layouts, degrees, numbers of ranks and ZeRO stages.

`python -m tests.tools.elastic` prints, on the CPU, how far the losses are from those of an uninterrupted run.
`--json FILE` writes the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conf.schema import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelismConfig,
)
from recipes.export import export
from recipes.planning.plan import Plan
from tests.corpora import byte_corpus
from tests.pool import WorkerPool, parallel_groups

LENGTH, SAVED, NUM_STEPS = 21, 2, 5
CORPUS = byte_corpus(["ring attention " * 40, "DeepSpeed " * 50], LENGTH)
# losses of 3 steps are about 5. fp32: 8 units in the last place (2^-21 each from 4 to 8). One forward pass is off by 1
# or 2; Adam amplifies that, because it divides rounded gradients by their own size. bf16 rounds activations in other
# places: 4 times the largest difference seen, 2.7e-4
TOLERANCE = {"fp32": 8 * 2**-21, "bf16": 1.1e-3}

RING, CONTIGUOUS, ULYSSES, DATA = "ring", "contiguous", "ulysses", "data"


@dataclass(frozen=True)
class Grid:
    """How ranks share the work; with kind DATA there are two data ranks."""

    kind: str
    num_ranks: int
    zero_stage: int

    @property
    def data_degree(self) -> int:
        return 2 if self.kind == DATA else 1

    def __str__(self) -> str:
        ring_degree = self.num_ranks // self.data_degree
        of_data = f"data 2 x ring {ring_degree}" if ring_degree > 1 else "data 2"
        who = {DATA: of_data, CONTIGUOUS: "ring, contiguous"}.get(self.kind, self.kind)
        return f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}, {who}, stage {self.zero_stage}"

    def config(self, dtype: str) -> Config:
        method = {ULYSSES: "ulysses", DATA: "local" if self.num_ranks == 2 else "ring"}.get(self.kind, "ring")
        layout = "contiguous" if self.kind == CONTIGUOUS else "zigzag"
        return Config(
            # a bias has 66 numbers, which 4 ranks do not divide: stage 3 pads it
            model=ModelConfig(hidden_size=36, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=33, bias=True),
            attention=AttentionConfig(method=method, layout=layout),
            parallelism=ParallelismConfig(data_degree=self.data_degree),
            engine=EngineConfig(
                dtype=dtype, zero_stage=self.zero_stage, gradient_accumulation_steps=2 // self.data_degree
            ),
            data=DataConfig(sequence_length=LENGTH),
            checkpoint=CheckpointConfig(keep=3),
            num_steps=NUM_STEPS,
        )


TRANSITIONS = [
    # DeepSpeed's own files
    (Grid(RING, 2, 1), Grid(ULYSSES, 2, 1), "fp32"),
    (Grid(ULYSSES, 2, 0), Grid(DATA, 4, 0), "fp32"),
    (Grid(RING, 4, 0), Grid(DATA, 2, 0), "bf16"),
    # another number of ranks
    (Grid(RING, 1, 1), Grid(RING, 2, 1), "fp32"),
    (Grid(DATA, 4, 3), Grid(RING, 2, 3), "fp32"),
    (Grid(RING, 2, 3), Grid(RING, 4, 3), "fp32"),
    # another stage
    (Grid(RING, 2, 1), Grid(RING, 2, 3), "fp32"),
    (Grid(RING, 2, 3), Grid(CONTIGUOUS, 2, 2), "fp32"),
    (Grid(DATA, 2, 2), Grid(RING, 2, 1), "fp32"),
    # both, in half precision
    (Grid(RING, 4, 1), Grid(DATA, 2, 3), "bf16"),
    (Grid(DATA, 2, 3), Grid(ULYSSES, 4, 1), "bf16"),
    (Grid(RING, 2, 1), Grid(ULYSSES, 4, 2), "bf16"),
]


def train(grid: Grid, dtype: str, run_dir: Path) -> tuple[list[str], list[float]]:
    """On a rank: train from the newest checkpoint to the end. Saves after step SAVED, or if it resumes, at once.

    Returns:
        the printed lines about checkpoints, and the losses.
    """
    from recipes.checkpoint.manager import Checkpoints, choose_checkpoint
    from recipes.engine.build import build_engine, build_feed

    config, num_ranks = grid.config(dtype), grid.num_ranks
    plan = Plan(config, num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)
    plan.resolve_config()
    lines: list[str] = []
    resumed = choose_checkpoint(config, run_dir, lines.append)
    engine = build_engine(plan, parallel_groups(grid.data_degree, num_ranks // grid.data_degree))
    checkpoints = Checkpoints(config, run_dir, engine)
    if resumed:
        checkpoints.load(resumed)
        checkpoints.save(SAVED + 1, None, 0.0, "")
    steps = build_feed(plan, engine, CORPUS).steps(last_read=resumed.last_read if resumed else None)
    losses: list[float] = []
    for step in range(resumed.step + 1 if resumed else 1, NUM_STEPS + 1):
        batch = next(steps)
        losses.append(engine.train_step(batch.micro_batches).loss.item())
        if step == SAVED:
            checkpoints.save(step, batch.last, 0.0, "")
    engine.close()
    return lines, losses


def resume_on(pool: WorkerPool, run_dir: Path, before: Grid, after: Grid, dtype: str) -> dict[str, Any]:
    """Save on one grid, resume on another; returns a row of the table.

    Raises:
        AssertionError: if the loaded parameters are not bit-identical to the saved ones, or if losses differ by more
            than TOLERANCE from those of an uninterrupted run.
    """
    (_, uninterrupted), *_ = pool.run(train, before, dtype, run_dir, num_ranks=before.num_ranks)
    export(run_dir, run_dir / "saved.safetensors")
    ended = pool.run(train, after, dtype, run_dir, num_ranks=after.num_ranks)
    lines, losses = ended[0]
    assert lines[-1].startswith(f"resuming after step {SAVED}, resharded: ")
    export(run_dir, run_dir / "loaded.safetensors")
    saved, loaded = (load_file(run_dir / f"{name}.safetensors") for name in ("saved", "loaded"))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    difference = max(abs(a - b) for a, b in zip(losses, uninterrupted[SAVED:], strict=True))
    assert difference <= TOLERANCE[dtype], f"{before} -> {after}, {dtype}: losses differ by {difference}"
    return {
        "before": str(before),
        "after": str(after),
        "dtype": dtype,
        "difference": difference,
        "loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Resume with other ranks, ZeRO stages and methods.")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    pool, rows = WorkerPool("cpu"), []
    try:
        for before, after, dtype in TRANSITIONS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(resume_on(pool, Path(folder), before, after, dtype))
            print("{before} -> {after}, {dtype}: losses of {loss:.1f} differ by {difference:.1e}".format(**rows[-1]))
    finally:
        pool.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
