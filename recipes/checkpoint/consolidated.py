"""The weights of a checkpoint, unsharded, for what reads them without training on: exporting, evaluating, generating.

Needs no GPU and no ranks. Nothing is unpickled before the checksums match, and then only known classes.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from conf.schema import ConfigError
from recipes.checkpoint.manifest import (
    MANIFEST_FILE,
    BrokenCheckpoint,
    Manifest,
    check_files,
    newest_first,
    read_manifest,
)


def find_checkpoint(given: Path, check: Callable[[Manifest], None] = lambda _: None) -> tuple[Path, Manifest]:
    """The given checkpoint, or the newest intact one of the given run; prints which are broken.

    Args:
        check: called before the checkpoint's files are read.

    Raises:
        ConfigError: if there is none.
    """
    candidates = [given] if (given / MANIFEST_FILE).exists() else newest_first(given)
    if not candidates:
        raise ConfigError(
            f"{given} has no checkpoints: give a run dir, such as outputs/DATE/TIME, or a folder in its checkpoints/"
        )
    for folder in candidates:
        if os.environ.get("RANK", "0") == "0":
            print(f"reading {folder} ...", flush=True)
        try:
            manifest = read_manifest(folder)
            check(manifest)
            check_files(folder, manifest, _with_bar(manifest.files, "comparing checksums"))
            return folder, manifest
        except BrokenCheckpoint as error:
            print(f"checkpoint {folder.name} is broken: {error}", file=sys.stderr, flush=True)
    raise ConfigError(f"every checkpoint of {given} is broken")


def stored_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's fp32 weights with their names, unsharded one after the other, and the model's buffers.

    Of parameters that share a tensor there is the first, and with LoRA what trains. Verify the checksums first.

    Raises:
        ConfigError: for tensor x pipeline parallelism, whose ranks save sharded layers.
    """
    if manifest.config["parallelism"]["method"] == "tensor_pipeline":
        raise ConfigError(
            f"{folder} was saved with parallelism=tensor_pipeline, which shards layers: only the weights of runs with "
            "parallelism=sequence can be read"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from recipes.checkpoint.manager import only_known_classes
    from recipes.checkpoint.resharding import ConsolidatedState, mapped

    zero_stage = manifest.config["engine"]["zero_stage"]
    with only_known_classes():
        if zero_stage == 0:
            weights = _weights_of_stage_0(mapped(folder / "mp_rank_00_model_states.pt"))
            names, read = list(weights), weights.__getitem__
        else:
            states = ConsolidatedState(folder, zero_stage)
            names, read = [*states.names, *states.buffers], states.weight
    for name in _with_bar(names, "joining shards"):
        yield name, read(name).detach()


def consolidated_weights(folder: Path, manifest: Manifest, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Copies of `stored_weights` by name, rounded to `dtype`. Raises as that does."""
    return {name: _rounded(tensor, dtype) for name, tensor in stored_weights(folder, manifest)}


def _weights_of_stage_0(states: dict[str, Any]) -> dict[str, Tensor]:
    from recipes.engine.deepspeed_engine import MASTER_WEIGHT_NAMES

    weights = dict(states["module"])
    if MASTER_WEIGHT_NAMES in states:  # not in fp32, where the optimizer updates the model's own
        names = itertools.chain.from_iterable(states[MASTER_WEIGHT_NAMES])
        masters = itertools.chain.from_iterable(states["optimizer"]["fp32_groups"])
        weights |= zip(names, masters, strict=True)
    return weights


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, since safetensors refuses shared storage. Whole numbers stay as they are."""
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _with_bar(names: Iterable[str], what: str) -> Iterable[str]:
    """With a progress bar at a terminal, once it has taken two seconds."""
    return tqdm(names, what, delay=2, disable=None)
