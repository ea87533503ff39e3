"""The model that recipe=evaluate and recipe=generate read: of a run, of a checkpoint, or of Hugging Face.

The launcher's parent calls `resolve_source`, so that a missing or broken checkpoint is refused before ranks start.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from conf.schema import Config, ConfigError, LoraConfig, ModelConfig
from recipes.checkpoint.consolidated import find_checkpoint, stored_weights
from recipes.checkpoint.manifest import CHECKPOINTS_DIR, MANIFEST_FILE, check_same_base, read_manifest
from recipes.model.model_folder import ADAPTER_FILE
from recipes.run.run_dir import CONFIG_FILE as RUN_CONFIG_FILE

HF_CONFIG_FILE = "config.json"


def resolve_source(config: Config) -> Config:
    """The configuration with which `build_engine` builds the model that the recipe's own setting names.

    The setting is the `model` of the group that is named like the recipe, such as generate.model: a run dir, of which
    the newest intact checkpoint counts, a checkpoint, or a Hugging Face model. Unset, it is model.path. Of a run come
    model, lora, engine.dtype and, unless it is typed, data.tokenizer. The returned setting is the checkpoint's folder
    or the Hugging Face model, as `load_weights` takes it. Weights are not sharded: engine.zero_stage becomes 0.

    Raises:
        ConfigError: if the setting names no model, or every checkpoint is broken.
    """
    resolved = copy.deepcopy(config)
    group = getattr(resolved, resolved.recipe)
    setting = f"{resolved.recipe}.model"
    resolved.engine.zero_stage, resolved.engine.recompute, resolved.engine.offload_activations = 0, "none", False
    if group.model is None:
        group.model = resolved.model.path
        return resolved
    given = Path(group.model).expanduser()
    if given.is_dir() and ((given / MANIFEST_FILE).exists() or (given / CHECKPOINTS_DIR).is_dir()):
        folder, manifest = find_checkpoint(given)
        group.model = str(folder.resolve())
        of_run = manifest.config
        model = of_run["model"]
        # the shape of a Hugging Face model is read from it again
        given_shape = {name: model[name] for name in ("path", "rope")} if model.get("path") else model
        resolved.model = ModelConfig(**given_shape)
        resolved.lora, resolved.engine.dtype = LoraConfig(**of_run["lora"]), of_run["engine"]["dtype"]
        resolved.data.tokenizer = resolved.data.tokenizer or of_run["data"]["tokenizer"]
        return resolved
    if given.is_file() or (given.is_dir() and not (given / HF_CONFIG_FILE).exists()) or _looks_local(group.model):
        what = "is no model" if given.exists() else "is not there"
        if (given / RUN_CONFIG_FILE).exists():
            what = "has no checkpoint yet"
        if (given / ADAPTER_FILE).exists():
            what = "is an adapter, which python -m recipes.export RUN_DIR --merge --output FOLDER makes a model of"
        raise ConfigError(
            f"{setting}={group.model} {what}: give a run dir, such as outputs/DATE/TIME, a folder in its checkpoints/, "
            f"or a Hugging Face model, a folder with {HF_CONFIG_FILE} or OWNER/NAME on the hub"
        )
    resolved.model = ModelConfig(path=group.model)
    return resolved


def _looks_local(given: str) -> bool:
    """Whether a name that is no folder was meant as one, rather than as a model on the hub."""
    return not Path(given).expanduser().is_dir() and (given.startswith((".", "/", "~")) or given.count("/") != 1)


@torch.no_grad()
def load_weights(model: nn.Module, source: str) -> int | None:
    """Put a checkpoint's weights into the built model, in its dtype. Every rank reads the files by itself.

    Args:
        model: an engine's, built with what `resolve_source` returns.
        source: the setting that it returns. There is nothing to do for a Hugging Face model, which has its weights.

    Returns:
        The step after which the checkpoint was written; None for a Hugging Face model.

    Raises:
        ConfigError: on every rank, if the base model of a run with LoRA has changed since.
    """
    folder = Path(source)
    if not (folder / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(folder)
    if manifest.base_weights is not None:
        from recipes.checkpoint.manager import shared_base_weights

        now = shared_base_weights(manifest.config["model"]["path"])
        check_same_base(folder, manifest, now, "give the checkpoint of another run")
    targets, loaded = model.state_dict(keep_vars=True), set()
    for name, tensor in stored_weights(folder, manifest):
        targets[name].data.copy_(tensor)
        loaded.add(id(targets[name]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in loaded]
    assert not missing, f"{folder} has no {', '.join(missing)}"
    return manifest.step
