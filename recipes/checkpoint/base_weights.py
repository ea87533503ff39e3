"""Digests of a base model's files. Checkpoints of runs with LoRA leave its weights out, so they must not change.

The digests are of all bytes: they find every change, also one that leaves size and time stamps as they were. The model
has just been loaded from the files, so reading them again takes about 2 s per GB on one slow core. They do not find a
change of config.json. Weights that are saved again in other shards count as changed although they are equal.
"""

from __future__ import annotations

from pathlib import Path

from data.digests import chunk_digests, digest_of
from recipes.checkpoint.manifest import BaseWeights
from recipes.model.model_folder import CONFIG_FILE, weight_files


def base_weights(path: str, rank: int = 0, num_ranks: int = 1) -> BaseWeights:
    """The digests of this rank's share of the weights' files, by name. None if a name on the hub has no safetensors.

    Args:
        path: model.path, whose model was loaded before, so that all of it is on this machine.
    """
    from transformers.utils import cached_file

    config_file = cached_file(path, CONFIG_FILE, local_files_only=True)  # of the hub the revision that was loaded
    assert config_file is not None
    files = [file for file in weight_files(Path(config_file).parent) if file.is_file()]
    if not files:
        return None
    return {file.name: digest_of(chunk_digests(file, file.stat().st_size)) for file in files[rank::num_ranks]}
