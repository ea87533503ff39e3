"""Checkpoints on all ranks: written through DeepSpeed, verified, and loaded.

Every rank must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from conf.schema import Config, ConfigError
from data.corpus import LastRead, Pack
from recipes.checkpoint.base_weights import base_weights
from recipes.checkpoint.manifest import (
    CHECKPOINTS_DIR,
    WRITING_DIR,
    BaseWeights,
    BrokenCheckpoint,
    Documents,
    Manifest,
    best_checkpoint,
    check_files,
    check_same_base,
    check_same_run,
    fingerprint,
    is_resharded,
    move_aside,
    newest_first,
    publish,
    read_manifest,
    remove_unfinished,
    score_of,
    step_name,
    write_manifest,
)
from recipes.checkpoint.resharding import ConsolidatedState, load_into_engine
from recipes.engine.base import Engine
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, PREEMPTED_FILE

# the classes that DeepSpeed 0.19.8 pickles beside tensors and plain values
KNOWN_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
RANDOM_STATES_FILE = "random_states_rank_{}.pt"
WEIGHTS_ONLY, NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def only_known_classes() -> Iterator[None]:
    """In the block `torch.load` unpickles only tensors, plain values and KNOWN_CLASSES.

    Neither its arguments nor the user's TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD change that.
    """
    # torch refuses to load anything if both variables are set
    users = {name: os.environ.pop(name) for name in (WEIGHTS_ONLY, NOT_WEIGHTS_ONLY) if name in os.environ}
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(KNOWN_CLASSES):
            yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        os.environ.update(users)


def choose_checkpoint(
    config: Config, run_dir: Path, say: Callable[[str], None], documents: Documents = None
) -> Manifest | None:
    """The run's newest checkpoint whose checksums match; None if there are no checkpoints. Ranks share the reading.

    The configuration is resolved. `say` prints a line; rank 0's is used. Newer checkpoints are moved aside.
    `documents` are those that the run reads; None: unknown.

    Raises:
        ConfigError: on every rank, if all checkpoints are broken, or if the newest intact one belongs to another run.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    say = say if rank == 0 else lambda _: None
    folders = _gathered(newest_first(run_dir))[0]  # rank 0's
    for folder in folders:
        say(f"reading {folder} ...")
        manifest, problem = None, None
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest, sorted(manifest.files)[rank::num_ranks])
        except BrokenCheckpoint as error:
            problem = str(error)
        problem = next(filter(None, _gathered(problem)), None)
        if manifest and not problem:
            changes = check_same_run(folder, manifest, config, documents)
            resharded = f", resharded: {', '.join(changes)}" if changes else ""
            say(f"resuming after step {manifest.step}{resharded}{_changed_versions(manifest)}")
            for broken in folders[: folders.index(folder)] if rank == 0 else ():
                say(f"renamed {broken.name} to {move_aside(broken).name}")
            return manifest
        next_one = ", so the one before it is tried" if folder != folders[-1] else ""
        say(f"checkpoint {folder.name} is broken{next_one}: {problem}")
    if folders:
        raise ConfigError(
            f"every checkpoint in {run_dir / CHECKPOINTS_DIR} is broken: repeat the command if the disk could not be "
            "read for a while, rename that folder to start from the beginning, or use another hydra.run.dir"
        )
    return None


def _gathered(value: Any) -> list[Any]:
    """All ranks' values, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shared_base_weights(path: str) -> BaseWeights:
    """The digests of the model's files, which ranks share the reading of. Every rank must call it."""
    parts = _gathered(base_weights(path, dist.get_rank(), dist.get_world_size()))
    return None if None in parts else {name: digest for part in parts for name, digest in part.items()}


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "numpy", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _changed_versions(manifest: Manifest) -> str:
    now = _versions()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in manifest.versions.items() if old != now.get(name)]
    return f" with other versions, which may round differently: {', '.join(changed)}" if changed else ""


class Checkpoints:
    """The checkpoints of one run, whose configuration is resolved."""

    def __init__(self, config: Config, run_dir: Path, engine: Engine) -> None:
        self._config, self._run_dir, self._engine = config, run_dir, engine
        self.are_enabled = config.checkpoint.keep > 0
        self._leaves_out_frozen = config.lora.rank > 0  # the base model's weights, which model.path has
        self._base_weights: BaseWeights = None
        if config.lora.rank and config.model.path:
            self._base_weights = shared_base_weights(config.model.path)
        self.documents: Documents = None  # that the run reads, as the manifests have them; set once they are open
        self.best: Path | None = None  # the checkpoint of the best step so far
        self._best_score: list[float] = []
        if config.checkpoint.keep_best and (best := _gathered(best_checkpoint(run_dir))[0]):  # rank 0's
            self.best, self._best_score = best[0], best[1].score

    def is_best(self, step: int, metrics: Mapping[str, float | None]) -> bool:
        """Whether the step is the best so far by its metrics. It counts as such from now on, so it must be saved."""
        score = self._score(metrics)
        if score is None or score <= self._best_score:
            return False
        self.best, self._best_score = self._run_dir / CHECKPOINTS_DIR / step_name(step), score
        return True

    def _score(self, metrics: Mapping[str, float | None]) -> list[float] | None:
        """None if the best is not to be kept."""
        evaluates = self._config.evaluate.every_n_steps > 0
        return score_of(metrics, evaluates) if self._config.checkpoint.keep_best else None

    def save(
        self,
        step: int,
        last: Pack | None,
        elapsed_s: float,
        wandb_run_id: str,
        metrics: Mapping[str, float | None] | None = None,
        preempted: bool = False,
    ) -> None:
        """Write a checkpoint below `writing`, then rename it. Arguments are rank 0's, as in `Manifest`.

        `last` is the last sequence that was read; None if training goes on with the first. `metrics` are the step's.
        If the run ends after it because it is `preempted`, RUN_DIR/logs/preempted is written.
        """
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        writing, tag = self._run_dir / CHECKPOINTS_DIR / WRITING_DIR, step_name(step)
        folder = writing / tag
        if rank == 0:
            remove_unfinished(self._run_dir)
            folder.mkdir(parents=True)
        dist.barrier()
        torch.save(random_states(), folder / RANDOM_STATES_FILE.format(rank))
        # ends with a barrier, after which all files exist
        self._engine.deepspeed.save_checkpoint(
            writing,
            tag,
            self._engine.client_state,
            save_latest=False,
            exclude_frozen_parameters=self._leaves_out_frozen,
        )
        # one list for all ranks: on network disks their own may lack files of others, and nobody would hash those
        listings = _gathered({path.name for path in folder.iterdir()})
        names = sorted(set().union(*listings))
        if missing := set(map(RANDOM_STATES_FILE.format, range(num_ranks))).difference(listings[0]):
            raise RunFailed(
                f"{folder} has no {min(missing)}, which another rank has written: use hydra.run.dir on a disk that all "
                "hosts share",
                of_all_ranks=True,
            )
        parts = _gathered({name: fingerprint(folder / name) for name in names[rank::num_ranks]})
        if rank == 0:
            files = {name: print_ for part in parts for name, print_ in part.items()}
            last_read = LastRead(*last.position, last.sha256()) if last else None
            score = self._score(metrics or {})
            progress, settings = (step, last_read, elapsed_s, wandb_run_id), asdict(self._config)
            manifest = Manifest(*progress, settings, _versions(), files, score, self._base_weights, self.documents)
            write_manifest(folder, manifest)
            publish(self._run_dir, step, self._config.checkpoint.keep)
            if preempted:
                (self._run_dir / LOGS_DIR / PREEMPTED_FILE).write_text(f"{tag}\n", encoding="utf-8")
        dist.barrier()  # a rank that exits earlier would make launchers end the others

    def load(self, manifest: Manifest) -> None:
        """Load what `choose_checkpoint` has verified into a new engine, and restore this rank's random states.

        On another number of ranks or another ZeRO stage, every rank builds its shards from the files of all ranks.

        Raises:
            ConfigError: on every rank, if the base model of a run with LoRA is another one than before.
        """
        folder, tag = self._run_dir / CHECKPOINTS_DIR, step_name(manifest.step)
        check_same_base(folder / tag, manifest, self._base_weights, "use another hydra.run.dir")
        with only_known_classes():
            if is_resharded(manifest, self._config):
                states = ConsolidatedState(folder / tag, manifest.config["engine"]["zero_stage"])
                load_into_engine(states, self._engine.deepspeed, dict(self._engine.model.named_parameters()))
            else:
                path, _ = self._engine.deepspeed.load_checkpoint(
                    folder, tag=tag, load_module_strict=not self._leaves_out_frozen
                )
                assert path is not None, f"DeepSpeed has not loaded {folder / tag}"
            # with other ranks each keeps its own states: nothing is drawn once the weights are initialised
            if manifest.config["launch"]["num_ranks"] == self._config.launch.num_ranks:
                restore_random_states(torch.load(folder / tag / RANDOM_STATES_FILE.format(dist.get_rank())))


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's, PyTorch's and the GPU's generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
