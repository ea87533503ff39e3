"""Checkpoints on all ranks: written through DeepSpeed, verified, loaded; and the signals that ask for the last one.

Every rank must make the same calls in the same order. What lies on the disk is `checkpoint_files`' to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import random
import shutil
import signal
from collections.abc import Callable, Iterator
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
from torch import Tensor

from conf.schema import Config, ConfigError
from data.pack import Corpus, Tokens
from recipes.checkpoint.manifest import (
    CHECKPOINTS_DIR,
    WRITING_DIR,
    BrokenCheckpoint,
    Manifest,
    check_files,
    check_same_run,
    fingerprint,
    is_resharded,
    newest_first,
    publish,
    read_manifest,
    step_name,
    write_manifest,
)
from recipes.checkpoint.resharding import ConsolidatedState, load_into_engine
from recipes.engine.base import Engine
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, PREEMPTED_FILE

# all that DeepSpeed 0.19.8 puts into its files beside tensors and plain values
KNOWN_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
VERSIONED = ("torch", "deepspeed", "numpy", "datasets")


@contextlib.contextmanager
def only_known_classes() -> Iterator[None]:
    """Whatever `torch.load` is told, a pickle in the block can make nothing but tensors and these classes."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(KNOWN_CLASSES):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def choose_checkpoint(config: Config, run_dir: Path, say: Callable[[str], None]) -> Manifest | None:
    """The newest checkpoint of the run that is whole, by checksums that ranks share the work of; None if there is none.

    Args:
        config: settled.
        say: tells people; called on rank 0 alone.

    Raises:
        ConfigError: on every rank, if there are checkpoints, but all are broken or of another run.
    """
    is_first = dist.get_rank() == 0
    shared: list[Any] = [newest_first(run_dir) if is_first else None]
    dist.broadcast_object_list(shared, src=0)
    for folder in shared[0]:
        if is_first:
            say(f"reading {folder} ...")
        manifest, problem = None, None
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])
        except BrokenCheckpoint as error:
            problem = str(error)
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
        if problem is None:
            assert manifest is not None
            rearranged = check_same_run(folder, manifest, config)
            if is_first:
                otherwise = f", arranged otherwise: {', '.join(rearranged)}" if rearranged else ""
                say(f"going on after step {manifest.step}{otherwise}{_other_versions(manifest)}")
            return manifest
        if is_first:
            next_one = ", so the one before it is tried" if folder != shared[0][-1] else ""
            say(f"checkpoint {folder.name} is broken{next_one}: {problem}")
    if shared[0]:
        raise ConfigError(
            f"no checkpoint in {run_dir / CHECKPOINTS_DIR} is whole: to start from the beginning delete that folder, "
            "or use another hydra.run.dir"
        )
    return None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def _other_versions(manifest: Manifest) -> str:
    now = _versions()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in manifest.versions.items() if old != now.get(name)]
    return f" with other versions, which may round otherwise: {', '.join(changed)}" if changed else ""


class TrainingData:
    """The sequences that come after a checkpoint, or from the start; remembers the last that was taken.

    Raises:
        ConfigError: if the corpus is not the one that the checkpoint had come through.
    """

    def __init__(self, corpus: Corpus, resumed: Manifest | None) -> None:
        self._last: Tokens | None = None
        self._sequences = corpus.training(0)
        if resumed and resumed.data_cursor:
            self._sequences = corpus.training(resumed.data_cursor - corpus.sequence_tokens)
            next(self)
            if self.last_sha256 != resumed.last_sequence_sha256:
                raise ConfigError(
                    f"the corpus is another than until step {resumed.step}: the sequence before training token number "
                    f"{resumed.data_cursor:,} is not the one that was there; use the same files, or another "
                    "hydra.run.dir"
                )

    def __iter__(self) -> Iterator[Tokens]:
        return self

    def __next__(self) -> Tokens:
        self._last = next(self._sequences)
        return self._last

    @property
    def last_sha256(self) -> str:
        """Of the sequence that was taken last."""
        assert self._last is not None
        return hashlib.sha256(self._last.tobytes()).hexdigest()


class Checkpoints:
    """Those of one run. Every rank must construct it and make the same calls.

    Args:
        config: settled.
    """

    def __init__(self, config: Config, run_dir: Path, engine: Engine) -> None:
        self._config, self._run_dir, self._engine = config, run_dir, engine

    @property
    def are_kept(self) -> bool:
        return self._config.checkpoint.keep > 0

    def are_due(self, step: int) -> bool:
        """Whether one is to be saved after this step of a run that goes on."""
        every = self._config.checkpoint.every_n_steps
        return self.are_kept and every > 0 and step % every == 0

    def save(
        self,
        step: int,
        data_cursor: int,
        last_sequence_sha256: str,
        elapsed_s: float,
        wandb_run_id: str,
        preempted: bool = False,
    ) -> None:
        """Write one aside, verify it, give it its name. Arguments are rank 0's and as in `Manifest`.

        Args:
            preempted: by a signal, and the run ends after it: RUN_DIR/logs/preempted says so from then on.
        """
        writing, name, rank = self._run_dir / CHECKPOINTS_DIR / WRITING_DIR, step_name(step), dist.get_rank()
        folder = writing / name
        if rank == 0:
            shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
        dist.barrier()
        torch.save(random_states(), folder / _random_states_file(rank))
        # DeepSpeed's barrier at its end says that all files are there
        self._engine.deepspeed.save_checkpoint(
            writing, tag=name, client_state=self._engine.client_state, save_latest=False
        )
        names = sorted(path.name for path in folder.iterdir())
        own = {name: fingerprint(folder / name) for name in names[rank :: dist.get_world_size()]}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        if rank == 0:
            files = {name: print_ for part in gathered for name, print_ in part.items()}
            missing = [name for name in map(_random_states_file, range(dist.get_world_size())) if name not in files]
            if missing:
                raise RunFailed(
                    f"{folder} has no {missing[0]}, which another rank has written: the run dir must be one folder for "
                    "all hosts: use hydra.run.dir on a disk that they share"
                )
            config, versions = asdict(self._config), _versions()
            write_manifest(
                folder,
                Manifest(step, data_cursor, last_sequence_sha256, elapsed_s, wandb_run_id, config, versions, files),
            )
            publish(self._run_dir, step, self._config.checkpoint.keep)
            if preempted:
                (self._run_dir / LOGS_DIR / PREEMPTED_FILE).write_text(f"{name}\n", encoding="utf-8")
        dist.barrier()  # a rank that ended before would make launchers end the others

    def load(self, manifest: Manifest) -> None:
        """Put the engine, which must be new, and this rank's random states where they were.

        On another number of ranks or another ZeRO stage every rank puts its part together from the files of all.

        Args:
            manifest: of `choose_checkpoint`, which has checked the files.
        """
        folder, name = self._run_dir / CHECKPOINTS_DIR, step_name(manifest.step)
        with only_known_classes():
            if is_resharded(manifest, self._config):
                states = ConsolidatedState(folder / name, manifest.config["engine"]["zero_stage"])
                load_into_engine(states, self._engine.deepspeed, dict(self._engine.model.named_parameters()))
            else:
                path, _ = self._engine.deepspeed.load_checkpoint(folder, tag=name)
                assert path is not None, f"DeepSpeed has not loaded {folder / name}"
            # other ranks keep their own: nothing is drawn after the weights are made
            if manifest.config["launch"]["num_ranks"] == self._config.launch.num_ranks:
                restore_random_states(torch.load(folder / name / _random_states_file(dist.get_rank())))


def _random_states_file(rank: int) -> str:
    return f"random_states_rank_{rank}.pt"


def random_states() -> dict[str, Any]:
    """Of this process's generators: Python's, NumPy's, PyTorch's and the GPU's; plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class StopRequest:
    """SIGTERM and SIGUSR1 as a wish to end after a checkpoint, from when this is made on; before, they end a rank.

    Schedulers send them to one rank or to all, at no common step. So each step's message of the loss carries how many
    ranks want to end, and the ranks look at what the step before brought, which was sent to the host meanwhile: that
    makes no host wait for the step that was just enqueued.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: tuple[Tensor, torch.Event | None] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._want)

    def _want(self, *_: object) -> None:
        self.wanted = True

    def agreed(self, num_stop_requests: Tensor) -> bool:
        """Whether all are to end after this step, on every rank the same.

        Args:
            num_stop_requests: of this step: `StepResult.num_stop_requests`.
        """
        before, self._before = self._before, _sent_to_host(num_stop_requests)
        if before is None:
            return False
        number, arrives = before
        if arrives is not None:
            arrives.synchronize()
        return number.item() > 0


def _sent_to_host(number: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Where it will be once the event is over: a device tensor's `item` waits for all that was enqueued after it."""
    if not number.is_cuda:
        return number, None
    there = torch.empty_like(number, device="cpu", pin_memory=True)
    there.copy_(number, non_blocking=True)
    return there, torch.cuda.current_stream().record_event()
