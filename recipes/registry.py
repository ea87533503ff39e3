"""Recipes by name. To add one, write its function, a line in `registry`, and its name in `conf.schema.RECIPES`."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from conf.schema import Config
from recipes.checkpoint.manifest import Documents
from recipes.launch.launcher import shared_plan
from recipes.launch.memory_errors import out_of_memory_explained
from recipes.run.run_dir import CONFIG_FILE


def registry() -> dict[str, Callable[..., float]]:
    """What ranks run, by `recipe=NAME`. Only ranks call this, because it imports DeepSpeed."""
    from recipes.benchmark.bench_attention import bench_attention
    from recipes.calibrate import calibrate
    from recipes.evaluate import evaluate
    from recipes.forward import forward
    from recipes.generate import generate
    from recipes.pretrain import pretrain

    return {
        "pretrain": pretrain,
        "forward": forward,
        "bench_attention": bench_attention,
        "evaluate": evaluate,
        "generate": generate,
        "calibrate": calibrate,
    }


@dataclass(frozen=True)
class RecipeTask:
    """The recipe that the configuration names, as a `Task` of all ranks."""

    config: Config
    documents: Documents = None  # that the run reads; None: unknown

    def run(self, run_dir: Path, console: TextIO) -> float:
        from recipes.monitor.reporter import Reporter

        plan = shared_plan(self.config)
        is_first = os.environ["RANK"] == "0"
        options: dict[str, Any] = {}
        if self.config.recipe == "pretrain":
            from recipes.checkpoint.manager import choose_checkpoint

            say = functools.partial(print, file=console, flush=True)
            options["resumed"] = choose_checkpoint(plan.config, run_dir, say, self.documents)
        if self.config.recipe == "evaluate":
            from recipes.evaluation.results import shared_evaluation

            options["resumed"] = shared_evaluation(plan.config, run_dir)
        if is_first:
            OmegaConf.save(OmegaConf.structured(plan.config), run_dir / CONFIG_FILE)
        with (
            out_of_memory_explained(plan, run_dir),
            Reporter(plan, run_dir, console, **options) if is_first else contextlib.nullcontext() as reporter,
        ):
            return registry()[self.config.recipe](plan, run_dir, reporter, **options)
