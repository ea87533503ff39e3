"""What identifies the base model of a run with LoRA, in folders and of the hub, and when another one is refused."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from safetensors.torch import save_file

from conf.schema import Config, ConfigError, LoraConfig, ModelConfig
from recipes.checkpoint.base_weights import base_weights
from recipes.checkpoint.manifest import Manifest, check_same_base
from recipes.model.model_folder import INDEX_FILE, WEIGHTS_FILE, weight_files
from tests.errors import refused

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def base(folder: Path, *names: str) -> Path:
    """A folder with a tensor of zeros in each file, and an index if they are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in names:
        save_file({name: torch.zeros(64)}, folder / name)
    if len(names) > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    return folder


def change(file: Path) -> None:
    """One byte of the last tensor, with the same size and time stamp."""
    stat, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + b"\x01")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def manifest_with(folder: Path, before: dict[str, str] | None) -> Manifest:
    settings = asdict(Config(model=ModelConfig(path=str(folder)), lora=LoraConfig(rank=4)))
    return Manifest(3, None, 0.0, "", settings, {}, {}, None, before)


@pytest.mark.parametrize("names", [(WEIGHTS_FILE,), SHARDS], ids=["one file", "shards"])
def test_a_changed_byte_is_refused_by_the_name_of_its_file(tmp_path: Path, names: tuple[str, ...]):
    folder = base(tmp_path / "model", *names)
    before = base_weights(str(folder))
    assert before is not None
    assert list(before) == list(names)
    for name in ("config.json", "README.md", "other.safetensors"):  # no weights that are loaded
        (folder / name).write_text('{"use_cache": false}')
    manifest = manifest_with(folder, before)
    check_same_base(tmp_path, manifest, base_weights(str(folder)), "use another hydra.run.dir")
    change(folder / names[-1])
    with refused(ConfigError, tmp_path, f"model.path={folder}", names[-1], "use another hydra.run.dir"):
        check_same_base(tmp_path, manifest, base_weights(str(folder)), "use another hydra.run.dir")
    check_same_base(tmp_path, manifest_with(folder, None), base_weights(str(folder)), "")  # of an older version


def test_ranks_share_the_reading(tmp_path: Path):
    folder = str(base(tmp_path / "model", *SHARDS))
    parts = [base_weights(folder, rank, 3) or {} for rank in range(3)]
    assert [len(part) for part in parts] == [1, 1, 0]
    assert parts[0] | parts[1] == base_weights(folder)


def test_of_two_formats_the_one_that_transformers_loads_counts(tmp_path: Path):
    folder = base(tmp_path / "model", *SHARDS)
    assert [file.name for file in weight_files(folder)] == list(SHARDS)
    save_file({"a": torch.zeros(1)}, folder / WEIGHTS_FILE)
    assert [file.name for file in weight_files(folder)] == [WEIGHTS_FILE]


def test_a_new_revision_on_the_hub_is_another_base_only_with_other_weights(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)

    def revision(letter: str) -> Path:
        folder = base(cached / "snapshots" / (letter * 40), WEIGHTS_FILE)
        (cached / "refs" / "main").write_text(letter * 40)
        return folder

    revision("a")
    before = base_weights("owner/name")
    newer = revision("b")
    assert base_weights("owner/name") == before
    change(newer / WEIGHTS_FILE)
    assert base_weights("owner/name") != before
    (newer / WEIGHTS_FILE).rename(newer / "pytorch_model.bin")
    assert base_weights("owner/name") is None
