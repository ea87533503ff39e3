"""python -m recipes.export RUN_OR_CHECKPOINT --output model.safetensors: the consolidated fp32 weights of a checkpoint.

`recipes.model.transformer.Transformer.load_state_dict` takes them; the file's metadata has the configuration and the
step. Needs no GPU and no ranks. Nothing is unpickled before the checksums match, and then only known classes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import ConfigError
from recipes.checkpoint.manifest import (
    MANIFEST_FILE,
    BrokenCheckpoint,
    Manifest,
    check_files,
    newest_first,
    read_manifest,
)


def find_checkpoint(given: Path) -> tuple[Path, Manifest]:
    """The given checkpoint, or the newest intact one of the given run; prints which are broken.

    Raises:
        ConfigError: if there is none.
    """
    candidates = [given] if (given / MANIFEST_FILE).exists() else newest_first(given)
    if not candidates:
        raise ConfigError(
            f"{given} has no checkpoints: give a run dir, such as outputs/DATE/TIME, or a folder in its checkpoints/"
        )
    for folder in candidates:
        print(f"reading {folder} ...", flush=True)
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest, manifest.files)
            return folder, manifest
        except BrokenCheckpoint as error:
            print(f"checkpoint {folder.name} is broken: {error}", file=sys.stderr, flush=True)
    raise ConfigError(f"every checkpoint of {given} is broken")


def consolidated_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The optimizer's fp32 weights by name, unsharded. Verify the checkpoint's checksums first.

    Raises:
        ConfigError: for tensor x pipeline parallelism, whose ranks save sharded layers.
    """
    if manifest.config["parallelism"]["method"] == "tensor_pipeline":
        raise ConfigError(
            f"{folder} was saved with parallelism=tensor_pipeline, which shards layers: only runs with "
            "parallelism=sequence can be exported"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from recipes.checkpoint.manager import only_known_classes
    from recipes.checkpoint.resharding import MASTER, ConsolidatedState
    from recipes.engine.deepspeed_engine import MASTER_WEIGHT_NAMES

    zero_stage = manifest.config["engine"]["zero_stage"]
    with only_known_classes():
        if zero_stage == 0:
            states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")
            weights = {name: tensor.float() for name, tensor in states["module"].items()}
            if MASTER_WEIGHT_NAMES in states:  # not in fp32, where the optimizer updates the model's own
                names = itertools.chain.from_iterable(states[MASTER_WEIGHT_NAMES])
                masters = itertools.chain.from_iterable(states["optimizer"]["fp32_groups"])
                weights |= zip(names, masters, strict=True)
        else:
            consolidated = ConsolidatedState(folder, zero_stage)
            weights = {name: consolidated.tensor(name, MASTER) for name in consolidated.names}
        if manifest.config["model"]["tied_head"]:  # the optimizer has only one of the two names
            weights["head.weight"] = weights["embedding.weight"]
        return {name: tensor.detach().clone() for name, tensor in weights.items()}  # safetensors refuses shared storage


def export(given: Path, output: Path) -> None:
    """Write the weights of a run or checkpoint to a file, completely or not at all.

    Raises:
        ConfigError: if there is no intact checkpoint, it cannot be exported, or the output's folder does not exist.
    """
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first")
    folder, manifest = find_checkpoint(given)
    weights = consolidated_weights(folder, manifest)
    metadata = {"format": "pt", "step": str(manifest.step), "config": json.dumps(manifest.config)}
    new = output.with_name(f"{output.name}.new")
    save_file(weights, new, metadata)
    new.replace(output)
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{output}: {num_parameters:,} parameters in {len(weights)} tensors, fp32, after step {manifest.step}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_or_checkpoint", type=Path, help="a run dir, or a folder in its checkpoints/")
    parser.add_argument("--output", type=Path, required=True, help="such as model.safetensors")
    arguments = parser.parse_args()
    try:
        export(arguments.run_or_checkpoint, arguments.output)
    except (ConfigError, SafetensorError) as error:  # the latter if the disk is full
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
