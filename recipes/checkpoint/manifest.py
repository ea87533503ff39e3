"""The files of checkpoints: what each must hold, which checkpoint is the newest, and which run it belongs to.

RUN_DIR/checkpoints/step_N holds DeepSpeed's files, the ranks' random states and a manifest of them all. It is complete,
since it is written below `writing` and then renamed. `latest` names the newest, for DeepSpeed's own tools, and `best`
the best, for people. No torch here, because the launcher's parent reads manifests.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config, ConfigError, flatten
from data.corpus import LastRead
from recipes.run.run_dir import BOOKKEEPING, replace_file

CHECKPOINTS_DIR, WRITING_DIR = "checkpoints", "writing"
LATEST_FILE, BEST_FILE, MANIFEST_FILE = "latest", "best", "manifest.json"
# fields that may change on resume because they do not change the result
RESUME_SAFE = (
    *BOOKKEEPING,
    "evaluate.",
    *("data.token_store", "data.preview", "data.bad_rows"),
    *("launch.timeout_s", "launch.stall_", "launch.check_memory", "attention.transport"),
    *("engine.on_bad_step", "engine.detect_anomaly", "engine.offload_activations"),
)
# fields that may change on resume because they only change which rank computes what: sums are in another order, so
# results differ by rounding. DeepSpeed shards over all data x sequence ranks, so only the last two change its files.
RESHARDABLE = (
    "attention.",
    *("parallelism.data_degree", "parallelism.ring_degree", "parallelism.ulysses_degree"),
    *("engine.micro_batch_size", "engine.gradient_accumulation_steps"),
    *("engine.recompute", "engine.tile_tokens"),  # the former may tile the MLPs
    *("engine.zero_stage", "launch.num_ranks"),
)


# digests of the files of a base model by name, as `base_weights.base_weights`
BaseWeights = dict[str, str] | None
# digests of a run's documents by source, as `data.corpus.Corpus.digests`
Documents = dict[str, str] | None


class BrokenCheckpoint(Exception):
    """A checkpoint that is not as it was written; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint in numbers."""

    step: int
    last_read: LastRead | None  # None: training goes on with the first sequence
    elapsed_s: float  # time spent training so far
    wandb_run_id: str
    config: dict[str, Any]  # resolved, as in RUN_DIR/config.yaml
    versions: dict[str, str]  # of Python and the packages that compute
    files: dict[str, dict[str, Any]]  # fingerprints by name in the checkpoint's folder
    score: list[float] | None = None  # of its step, as `score_of`; None: nothing was measured, or the best is not kept
    base_weights: BaseWeights = None  # of a run with LoRA; None: unknown, or it trains all weights
    documents: Documents = None  # that it reads; None: unknown, as with data.stream


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def newest_first(run_dir: Path) -> list[Path]:
    """The folders of the run's checkpoints."""
    named = [path for path in (run_dir / CHECKPOINTS_DIR).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def score_of(metrics: Mapping[str, float | None], evaluates: bool) -> list[float] | None:
    """What the best step has most of, number by number. None if nothing was measured, or it is not finite.

    The accuracy of retrieval, and of equal ones the lower loss of its answers; without retrieval the lower loss.

    Args:
        metrics: of a step, by their logged names.
        evaluates: whether the run has evaluations, which then count instead of its validations.
    """
    score = [metrics.get("evaluation/accuracy"), metrics.get("evaluation/answer_loss")]
    if score[0] is None:
        score = [metrics.get("evaluation/loss" if evaluates else "validation/loss")]
    *accuracy, loss = (math.nan if value is None else value for value in score)
    return [*accuracy, -loss] if math.isfinite(loss) else None


def best_checkpoint(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The one with the highest score, the first of equal ones; its files are not read. None if none has a score."""
    best: tuple[Path, Manifest] | None = None
    for folder in reversed(newest_first(run_dir)):
        with contextlib.suppress(BrokenCheckpoint):  # the ranks report it
            manifest = read_manifest(folder)
            if manifest.score and (best is None or manifest.score > (best[1].score or [])):
                best = folder, manifest
    return best


def resume_hint(run_dir: Path) -> str:
    """For error messages: what the run can resume from."""
    checkpoints = newest_first(run_dir)
    return f"the same command resumes from {checkpoints[0].name}" if checkpoints else "there is no checkpoint yet"


def fingerprint(path: Path) -> dict[str, Any]:
    """The file's num_bytes and sha256, once it is on the disk for good."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"num_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = asdict(manifest)
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def read_manifest(folder: Path) -> Manifest:
    """Raises BrokenCheckpoint if the file is missing or not what was written."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _checksum(content):
            raise ValueError
        last_read = content.pop("last_read")
        return Manifest(**content, last_read=last_read and LastRead(*last_read))
    except OSError as error:
        raise BrokenCheckpoint(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # not JSON, or JSON of something else
        raise BrokenCheckpoint(f"{path} is not what was written") from error


def newest_readable(run_dir: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint with a valid manifest, its other files unread; None if there is none."""
    for folder in newest_first(run_dir):
        with contextlib.suppress(BrokenCheckpoint):  # the ranks report it
            return folder, read_manifest(folder)
    return None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read these files; raises BrokenCheckpoint if one cannot be read or is not what the manifest says."""
    for name in names:
        path, expected = folder / name, manifest.files[name]
        try:
            with path.open("rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes != expected["num_bytes"]:
                    raise BrokenCheckpoint(f"{path} has {num_bytes:,} bytes, not {expected['num_bytes']:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise BrokenCheckpoint(f"{path} has another checksum than when it was written")
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{path} is missing") from error
        except OSError as error:
            raise BrokenCheckpoint(f"{path}: {error.strerror}") from error


def remove_unfinished(run_dir: Path) -> None:
    """Remove what is left of a checkpoint that was not completed. No rank may be writing one."""
    shutil.rmtree(run_dir / CHECKPOINTS_DIR / WRITING_DIR, ignore_errors=True)


def publish(run_dir: Path, step: int, keep: int) -> None:
    """Rename the complete checkpoint in `writing`, update `latest` and `best`, and remove all but those `keep` newest.

    The best stays, if checkpoints have scores.
    """
    folder, name = run_dir / CHECKPOINTS_DIR, step_name(step)
    (folder / WRITING_DIR / name).rename(folder / name)
    _sync(folder)  # `latest` must not outlive a crash that the checkpoint does not
    replace_file(folder / LATEST_FILE, name)
    _sync(folder)
    shutil.rmtree(folder / WRITING_DIR)
    kept = newest_first(run_dir)[:keep]
    if best := best_checkpoint(run_dir):
        kept.append(best[0])
        replace_file(folder / BEST_FILE, best[0].name)
    for path in set(newest_first(run_dir)).difference(kept):
        shutil.rmtree(path)


def move_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that could not be read to NAME.broken, or NAME.broken-2 and so on; returns the new path.

    `newest_first` does not see it, and nothing removes it: the disk may have failed only for a while.
    """
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (checkpoint.with_name(f"{checkpoint.name}.broken{name}") for name in names)
    return checkpoint.rename(next(path for path in paths if not path.exists()))


def _sync(path: Path) -> None:
    """Put the file's content, or the folder's names, on the disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def is_resharded(manifest: Manifest, config: Config) -> bool:
    """Whether ranks need other shards than those in the checkpoint, which DeepSpeed cannot load itself."""
    before, stage = manifest.config, config.engine.zero_stage
    other_ranks = before["launch"]["num_ranks"] != config.launch.num_ranks
    return before["engine"]["zero_stage"] != stage or (stage > 0 and other_ranks)  # stage 0 shards nothing


def _is_path(name: str) -> bool:
    """Whether a field only says where documents are, so that it may change if they are the same."""
    return name.startswith("data.") and name.split(".")[-1] in ("files", "validation_files", "name")


def check_same_run(folder: Path, manifest: Manifest, config: Config, documents: Documents = None) -> list[str]:
    """The changed RESHARDABLE fields, such as "attention.method ring -> ulysses", which only change rounding.

    Args:
        documents: that this run reads; None: unknown.

    Raises:
        ConfigError: naming the fields, if the resolved configuration would compute something else; if the documents
            are others, if a step would take another number of sequences, or if the ZeRO stages cannot be resharded.
    """
    before, now = flatten(manifest.config), flatten(asdict(config))
    own = [name for name in before if name.startswith(("model.rope.", "data.sources."))]  # with names of their own
    names = [*now, *(name for name in own if name not in now)]
    differing = [name for name in names if not name.startswith(RESUME_SAFE) and before.get(name) != now.get(name)]
    if config.optimizer.decay == "constant" and config.optimizer.warmup_fraction == 0 and "num_steps" in differing:
        differing.remove("num_steps")  # the learning rate does not depend on it
    before_documents = manifest.documents if documents else None  # None: they cannot be compared
    if before_documents and before_documents == documents:
        differing = [name for name in differing if not _is_path(name)]
    reshardable = RESHARDABLE if config.parallelism.method == "sequence" else ()
    refused = [name for name in differing if not name.startswith(reshardable)]
    if refused:
        changes = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in refused)
        schedule = " (the schedule of the learning rate ends with num_steps)" if "num_steps" in refused else ""
        advice = "type what that run was started with, or use another hydra.run.dir"
        if any(map(_is_path, refused)):
            if before_documents:
                changes += " (other documents)"
            else:
                advice += "; if its files have moved, ln -s NEW_PATH OLD_PATH and type the old path"
        raise ConfigError(f"{folder} belongs to another run: {changes}{schedule}: {advice}")
    if documents and before_documents and before_documents != documents:
        changed = [name for name, digest in before_documents.items() if documents.get(name) != digest]
        raise ConfigError(
            f"{folder} belongs to a run on other documents: those of {' and '.join(changed)} have changed since: give "
            "the documents that it read, in the same order, or use another hydra.run.dir"
        )
    _check_batch(folder, before, now)
    old, new = before["engine.zero_stage"], now["engine.zero_stage"]
    if old != new and 0 in (old, new):
        raise ConfigError(
            f"{folder} was saved with engine.zero_stage={old} and cannot resume with {new}: stages 1, 2 and 3 resume "
            f"from each other, stage 0 only from itself: type engine.zero_stage={old}, or use another hydra.run.dir"
        )
    return [f"{name} {before.get(name)} -> {now[name]}" for name in differing]


def check_same_base(folder: Path, manifest: Manifest, now: BaseWeights, otherwise: str) -> None:
    """Raises ConfigError if the weights at model.path are not those beside which LoRA's were trained.

    A checkpoint of an older version does not know.

    Args:
        otherwise: what to do without them.
    """
    before, path = manifest.base_weights, manifest.config["model"].get("path")
    if before is None or before == now:
        return
    now = now or {}
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    raise ConfigError(
        f"{folder} belongs to another base model: LoRA's weights fit only the one beside which they were trained, but "
        f"{', '.join(changed)} of model.path={path} has changed since: put back what was there, or {otherwise}"
    )


def _check_batch(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError if a step would take another number of sequences."""
    factors = ("parallelism.data_degree", "engine.micro_batch_size", "engine.gradient_accumulation_steps")
    old, new = (math.prod(settings[name] for name in factors) for settings in (before, now))
    if old != new:
        products = [" x ".join(str(settings[name]) for name in factors) for settings in (before, now)]
        raise ConfigError(
            f"{folder} has {old} sequences per step (data ranks x micro-batch x accumulation: {products[0]}), and this "
            f"run would have {new} ({products[1]}): type engine.train_batch_size={old}, and a parallelism.data_degree "
            f"and an engine.micro_batch_size whose product divides {old}"
        )
