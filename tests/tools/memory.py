"""Peak memory of a training step, predicted and counted: `python -m tests.tools.memory` prints both per setting.

On the CPU, through the real engine, it counts every storage that an operator allocates until it is freed. It does not
see what a kernel allocates inside. `--json FILE` writes the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import AttentionConfig, Config, DataConfig, EngineConfig, ModelConfig
from data.shard import TokenBatch
from recipes.planning.plan import Plan
from tests.pool import WorkerPool, parallel_groups

MODEL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_size": 384,
}
GPT = {"mlp": "gelu", "norm": "layernorm", "bias": True, "tied_head": True, "num_kv_heads": 4}


@dataclass(frozen=True)
class Setting:
    dtype: str
    zero_stage: int
    num_ranks: int = 1
    local_length: int = 1024
    method: str = "ring"
    recompute: str = "none"
    micro_batch_size: int = 1
    tile_tokens: int | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        config = Config(
            model=ModelConfig(**{**MODEL, **self.model}),
            attention=AttentionConfig(method=self.method),
            engine=EngineConfig(
                dtype=self.dtype,
                zero_stage=self.zero_stage,
                recompute=self.recompute,
                micro_batch_size=self.micro_batch_size,
                tile_tokens=self.tile_tokens,
            ),
            data=DataConfig(sequence_length=self.num_ranks * self.local_length),
        )
        return Plan(config, self.num_ranks, "cpu", "CPU", None, ranks_per_host=self.num_ranks)

    @property
    def predicted(self) -> tuple[str, float]:
        """The name of the peak, and its bytes."""
        peak = self.plan.step_memory.peak
        return peak.name, peak.total


SETTINGS = [
    Setting("fp32", 0),
    Setting("fp32", 1, model={"vocab_size": 2048}),
    Setting("fp32", 2, num_ranks=2, model={"mlp_size": 1024}),
    Setting("fp32", 3, num_ranks=2),
    Setting("fp32", 1, recompute="selective"),
    Setting("fp32", 1, num_ranks=2, recompute="full", model=GPT),
    Setting("bf16", 0, local_length=64),
    Setting("bf16", 0, num_ranks=2, model=GPT),
    Setting("bf16", 1),
    Setting("bf16", 1, num_ranks=4, local_length=512),
    Setting("bf16", 1, num_ranks=2, method="all_gather", micro_batch_size=2),
    Setting("bf16", 1, recompute="full"),
    Setting("bf16", 2, num_ranks=2, recompute="selective"),
    Setting("bf16", 2, local_length=64, model={"hidden_size": 256}),
    Setting("bf16", 1, tile_tokens=256, model={"vocab_size": 4096}),
    Setting("fp32", 1, num_ranks=2, tile_tokens=128, model={"vocab_size": 4096}),
    Setting("bf16", 1, tile_tokens=128, local_length=2048, model={"mlp_size": 1536}),
    Setting(
        "fp32", 3, num_ranks=2, recompute="selective", tile_tokens=512, local_length=2048, model={"mlp_size": 1536}
    ),
    Setting("bf16", 1, num_ranks=2, recompute="full", tile_tokens=128, local_length=2048),
    Setting("fp32", 2, num_ranks=2, recompute="selective", tile_tokens=128, local_length=2048, model=GPT),
    Setting("fp32", 1, num_ranks=2, model={"num_heads": 8, "mlp_size": 128}),
    Setting("bf16", 1, num_ranks=4, recompute="selective", tile_tokens=128),
    Setting("bf16", 3, num_ranks=2, method="ulysses", model={"num_layers": 6}),
    Setting("bf16", 3, num_ranks=2, local_length=64, model={"hidden_size": 256, "num_layers": 4, "mlp_size": 1024}),
    Setting(
        "bf16",
        1,
        num_ranks=4,
        recompute="selective",
        tile_tokens=64,
        model={"num_heads": 16, "num_kv_heads": 16, "mlp_size": 128},
    ),
]


class StorageCount(TorchDispatchMode):
    """Bytes of the CPU storages that are alive, earlier ones included, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> StorageCount:
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                self._count(thing)
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def count_step(setting: Setting) -> int:
    """Peak bytes of this rank in its second step. Every rank must call it."""
    from recipes.engine.build import build_engine

    plan = setting.plan
    engine = build_engine(plan, parallel_groups(plan.degrees.data, plan.degrees.sequence))
    length, layout = plan.config.data.sequence_length, plan.layout
    tokens = torch.arange(setting.micro_batch_size * length).reshape(-1, length) % 257
    own = layout.shard(tokens, engine.sequence_rank, dim=1)
    batch = TokenBatch(own, layout.positions(engine.sequence_rank).unsqueeze(0), own)
    engine.train_step([batch])
    with StorageCount() as count:
        engine.train_step([batch])
    engine.close()
    return count.peak


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a training step, predicted and counted, on the CPU.")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    pool, rows = WorkerPool("cpu"), []
    for setting in SETTINGS:
        counted = max(pool.run(count_step, setting, num_ranks=setting.num_ranks))
        point, predicted = setting.predicted
        row = {**vars(setting), "moment": point, "predicted": predicted, "counted": counted}
        rows.append({**row, "error_pct": 100 * (predicted / counted - 1)})
        print(f"{rows[-1]['error_pct']:+6.2f} %  {predicted / 2**20:8.2f} MiB  {point:25} {setting}", flush=True)
    pool.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
