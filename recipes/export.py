"""python -m recipes.export RUN_OR_CHECKPOINT --output OUTPUT: the consolidated weights of a checkpoint.

A run with model.path gives a folder that transformers' from_pretrained loads, in the dtype of the run. With lora.rank
it gives the adapter, or with --merge the full model. Any other run gives a .safetensors file in fp32:
`recipes.model.transformer.Transformer.load_state_dict` takes its tensors, and its metadata has the configuration and
the step.

Needs no GPU and no ranks. Nothing is unpickled before the checksums match, and then only known classes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import ConfigError, DataConfig, LoraConfig, ModelConfig
from recipes.checkpoint.base_weights import base_weights
from recipes.checkpoint.consolidated import consolidated_weights, find_checkpoint
from recipes.checkpoint.manifest import Manifest, check_same_base

SUFFIX = ".safetensors"


def export(given: Path, output: Path, merge: bool = False) -> None:
    """Write the weights of a run or checkpoint to a file or a folder, completely or not at all.

    Args:
        merge: write the full model of a run with LoRA.

    Raises:
        ConfigError: if there is no intact checkpoint, it cannot be exported, or `output` does not fit it.
    """
    output = output.absolute()
    if not output.parent.is_dir():
        parent = output.parent
        raise ConfigError(f"--output {output}: there is no folder {parent}: type mkdir -p {shlex.quote(str(parent))}")
    folder, manifest = find_checkpoint(given, lambda manifest: _check_output(manifest, output, merge))
    write = _write_folder if _model_path(manifest) else _write_file
    with _complete(output) as new:
        what = write(new, folder, manifest, merge)
    print(f"{output}: {what}, after step {manifest.step}")


def _model_path(manifest: Manifest) -> str | None:
    return manifest.config["model"].get("path")


def _check_output(manifest: Manifest, output: Path, merge: bool) -> None:
    """Raises ConfigError if this run cannot be written there."""
    path, is_file = _model_path(manifest), output.suffix == SUFFIX
    if merge and not (path and manifest.config["lora"]["rank"]):
        raise ConfigError("--merge is for runs with lora.rank, and this one has trained all weights: leave it out")
    if path and is_file:
        raise ConfigError(
            f"--output {output}: a run with model.path={path} becomes a folder: type --output {output.with_suffix('')}"
        )
    if not path and not is_file:
        raise ConfigError(f"--output {output}: a run without model.path becomes a file: type --output {output}{SUFFIX}")
    if path and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output {output} is there and is no empty folder: give a new name, or delete it")


@contextlib.contextmanager
def _complete(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to. It is renamed to `output` after the block, or deleted if the block fails."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}): give another folder") from error
    with temporary as beside:
        new = Path(beside) / output.name
        yield new
        _let_others_read(new)
        new.replace(output)  # a folder replaces an empty one


def _let_others_read(new: Path) -> None:
    """Give each file the permissions of any new file: safetensors writes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (new, *new.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _write_file(new: Path, folder: Path, manifest: Manifest, merge: bool) -> str:
    weights = consolidated_weights(folder, manifest)
    if manifest.config["model"]["tied_head"]:  # the optimizer has only one of the two names
        weights["head.weight"] = weights["embedding.weight"].clone()
    save_file(weights, new, {"format": "pt", "step": str(manifest.step), "config": json.dumps(manifest.config)})
    return f"{_summary(weights)}, fp32"


def _write_folder(new: Path, folder: Path, manifest: Manifest, merge: bool) -> str:
    from data.tokenizer import save_tokenizer
    from recipes.model import save_pretrained
    from recipes.planning.plan import DTYPES

    model, dtype_name = manifest.config["model"], manifest.config["engine"]["dtype"]
    path, dtype, lora = model["path"], DTYPES[dtype_name], LoraConfig(**manifest.config["lora"])
    config = _transformers_config(path, model["rope"])
    weights = consolidated_weights(folder, manifest, torch.float32 if merge else dtype)
    what = f"{_summary(weights)}, {dtype_name}"
    print(f"writing {new.name} ...", flush=True)
    if not lora.rank:
        save_pretrained.save_model(new, path, config, weights, dtype)
    elif merge:
        base = save_pretrained.load_base(path, config, dtype)
        check_same_base(folder, manifest, base_weights(path), "leave out --merge, which gives the adapter")
        save_pretrained.save_merged(new, path, base, lora, weights)
        what = f"{path} with {what}, merged into it"
    else:
        save_pretrained.save_adapter(new, config, lora, weights)
        what = f"an adapter of {path}, {what}"
        if model["rope"]:
            print(f"it needs a base model with model.rope={model['rope']}, which an adapter cannot hold; --merge does")
    save_tokenizer(DataConfig(**manifest.config["data"]), new)
    return what


def _transformers_config(path: str, rope: Any) -> Any:
    """Of the model that the run was started with. Raises ConfigError if it is no longer there."""
    from recipes.model.pretrained import model_config
    from ring_attention import hf

    try:
        hf.register()
        return model_config(ModelConfig(path=path, rope=rope))
    except ValueError as error:
        raise ConfigError(f"the run's model.path={path}: {error}") from error


def _summary(weights: dict[str, Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in weights.values()):,} parameters in {len(weights)} tensors"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_or_checkpoint", type=Path, help="a run dir, or a folder in its checkpoints/")
    parser.add_argument(
        "--output", type=Path, required=True, help="a new folder; without model.path: a .safetensors file"
    )
    parser.add_argument("--merge", action="store_true", help="with lora.rank: the full model instead of the adapter")
    arguments = parser.parse_args()
    try:
        export(arguments.run_or_checkpoint, arguments.output, arguments.merge)
    except (ConfigError, SafetensorError, OSError) as error:  # the last two if the disk is full
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
