"""The files of checkpoints: what each must hold, which is the newest that does, and which run it is of.

RUN_DIR/checkpoints has a folder per checkpoint, named after its step, with DeepSpeed's files, the random states of the
ranks, and a manifest of them all; and `latest`, which names the newest, for DeepSpeed's own tools. A folder that has
its name is complete: it was written under `writing` and renamed. Pure files, no torch: the launcher's parent looks
here. Above it is `checkpoint`, which writes and loads on all ranks, and `export`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config, ConfigError, flatten

CHECKPOINTS_DIR, WRITING_DIR = "checkpoints", "writing"
LATEST_FILE, MANIFEST_FILE = "latest", "manifest.json"
# fields that may differ when a run goes on: they do not change what it computes
FREE = (
    "logging.",
    "checkpoint.",
    "compare.",
    "max_length.",
    "sweep.",
    "launch.timeout_s",
    "launch.stall_factor",
    "launch.stall_s",
    "engine.on_bad_step",
    "engine.detect_anomaly",
    "engine.offload_activations",
    "attention.transport",
    "explain",
    "profile",
    "memory_snapshot",
    "breakdown",
)
# fields that say who computes what, and how much at once: sums come in another order, so results differ by rounding.
# All but the last two leave DeepSpeed's files as they are, for it cuts states over all data x sequence ranks
RESHARDABLE = (
    "attention.",
    "parallelism.data_degree",
    "parallelism.ring_degree",
    "parallelism.ulysses_degree",
    "engine.micro_batch_size",
    "engine.gradient_accumulation_steps",
    "engine.recompute",  # MLPs may come in tiles then
    "engine.tile_tokens",
    "engine.zero_stage",
    "launch.num_ranks",
)


class BrokenCheckpoint(Exception):
    """A checkpoint that is not as it was written; says what is wrong with which file."""


@dataclass(frozen=True)
class Fingerprint:
    """What a file must be."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint in numbers: where the run stood, whose it is, and what its files must be.

    Args:
        data_cursor: number of the training token that comes next (`data.pack.Corpus.training`).
        last_sequence_sha256: of the last sequence before it: the corpus must still have it there.
        elapsed_s: of the run so far.
        config: settled, as RUN_DIR/config.yaml has it.
        versions: of what computes, by name.
        files: by name in the checkpoint's folder.
    """

    step: int
    data_cursor: int
    last_sequence_sha256: str
    elapsed_s: float
    wandb_run_id: str
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, Fingerprint]


def step_name(step: int) -> str:
    """Of the folder of a checkpoint."""
    return f"step_{step:08d}"


def newest_first(run_dir: Path) -> list[Path]:
    """The folders of the run's checkpoints; none if it has no such folder."""
    folder = run_dir / CHECKPOINTS_DIR
    named = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def resume_hint(run_dir: Path) -> str:
    """For people: what there is to go on from."""
    checkpoints = newest_first(run_dir)
    return (
        f"{checkpoints[0].name} is whole, and the same command goes on from it"
        if checkpoints
        else "there is no checkpoint yet"
    )


def fingerprint(path: Path) -> Fingerprint:
    """Of the file as it is on the disk, once it is there for good."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return Fingerprint(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """With a checksum of its own."""
    content = asdict(manifest)
    text = json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n"
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises BrokenCheckpoint if it is not there or not what was written."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("sha256")
        if checksum != _checksum(content):
            raise BrokenCheckpoint(f"{path} is not what was written")
        files = {name: Fingerprint(**numbers) for name, numbers in content.pop("files").items()}
        return Manifest(**content, files=files)
    except OSError as error:
        raise BrokenCheckpoint(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # no JSON, or JSON of something else
        raise BrokenCheckpoint(f"{path} is not what was written") from error


def newest_readable(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest is what was written, its files unread; None if there is none."""
    for folder in newest_first(run_dir):
        with contextlib.suppress(BrokenCheckpoint):  # the ranks tell of it
            return folder, read_manifest(folder)
    return None


def steps_done(run_dir: Path) -> int:
    """Of the run, by its newest readable checkpoint; 0 without one."""
    newest = newest_readable(run_dir)
    return newest[1].step if newest else 0


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises BrokenCheckpoint if one of these files is not what the manifest says; reads them whole."""
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            raise BrokenCheckpoint(f"{path} is missing")
        if path.stat().st_size != expected.num_bytes:
            raise BrokenCheckpoint(f"{path} has {path.stat().st_size:,} bytes, not {expected.num_bytes:,}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise BrokenCheckpoint(f"{path} has another checksum than when it was written")


def publish(run_dir: Path, step: int, keep: int) -> None:
    """Give the complete checkpoint that lies in `writing` its name, move `latest`, and remove what is beyond `keep`.

    Those of later steps go too: they were broken, or this run would have gone on from them.
    """
    folder, name = run_dir / CHECKPOINTS_DIR, step_name(step)
    if (folder / name).exists():  # broken, too
        shutil.rmtree(folder / name)
    (folder / WRITING_DIR / name).rename(folder / name)
    new = folder / f"{LATEST_FILE}.new"
    new.write_text(name, encoding="utf-8")
    _sync(folder)
    new.replace(folder / LATEST_FILE)
    _sync(folder)
    shutil.rmtree(folder / WRITING_DIR)
    checkpoints = newest_first(run_dir)
    own = checkpoints.index(folder / name)
    for path in [*checkpoints[:own], *checkpoints[own + keep :]]:
        shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Have the names in the folder on the disk for good."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_resharded(manifest: Manifest, config: Config) -> bool:
    """Whether the ranks' parts of the states are others, so that DeepSpeed cannot load its own files."""
    before, stage = manifest.config, config.engine.zero_stage
    other_ranks = before["launch"]["num_ranks"] != config.launch.num_ranks
    return before["engine"]["zero_stage"] != stage or (stage > 0 and other_ranks)  # on stage 0 each rank has them all


def check_same_run(folder: Path, manifest: Manifest, config: Config) -> list[str]:
    """What is arranged otherwise, such as "attention.method ring -> ulysses", which changes rounding alone.

    Raises:
        ConfigError: naming the fields, if the settled configuration would compute something else, or if a step would
            take another number of sequences.
    """
    before, now = flatten(manifest.config), flatten(asdict(config))
    differing = [name for name in now if not name.startswith(FREE) and before.get(name) != now[name]]
    if config.optimizer.decay == "constant" and config.optimizer.warmup_fraction == 0 and "num_steps" in differing:
        differing.remove("num_steps")  # the learning rate does not depend on it
    rearranged = [name for name in differing if name.startswith(RESHARDABLE)]
    if config.parallelism.method == "sequence" and rearranged == differing:
        _check_batch(folder, before, now)
        _check_zero_stage(folder, before, now)
        return [f"{name} {before.get(name)} -> {now[name]}" for name in rearranged]
    if not differing:
        return []
    if config.parallelism.method == "sequence":
        differing = [name for name in differing if name not in rearranged]
    changes = "; ".join(f"{name} was {before.get(name)} and is {now[name]}" for name in differing)
    schedule = ""
    if "num_steps" in differing:
        schedule = " (the schedule of the learning rate ends with num_steps)"
    raise ConfigError(
        f"{folder} is of another run: {changes}{schedule}: type what that one was started with, or use another "
        "hydra.run.dir"
    )


def _check_zero_stage(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError for what neither DeepSpeed nor `whole` can cut anew."""
    old, new = before["engine.zero_stage"], now["engine.zero_stage"]
    if old != new and 0 in (old, new):
        raise ConfigError(
            f"{folder} is of engine.zero_stage={old}, and this would go on with {new}: from stages 1, 2 and 3 a run "
            f"goes on with any of the three, from stage 0 with 0 alone: type engine.zero_stage={old}, or use another "
            "hydra.run.dir"
        )


def _check_batch(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError unless a step takes as many sequences as before: the corpus's cursor counts in steps."""
    factors = ("parallelism.data_degree", "engine.micro_batch_size", "engine.gradient_accumulation_steps")
    old, new = (math.prod(settings[name] for name in factors) for settings in (before, now))
    if old != new:
        sums = [" x ".join(str(settings[name]) for name in factors) for settings in (before, now)]
        raise ConfigError(
            f"{folder} has {old} sequences per step (data ranks x micro-batch x accumulation: {sums[0]}), and this "
            f"would have {new} ({sums[1]}): type engine.train_batch_size={old}, and a parallelism.data_degree and an "
            f"engine.micro_batch_size whose product divides {old}"
        )
