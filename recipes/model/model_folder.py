"""Whether the files of a Hugging Face model are there and complete, before anything loads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_FILE = "adapter_config.json"


def check_config(folder: Path) -> None:
    """Raises ValueError unless the folder has a configuration."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give one with {CONFIG_FILE}, or a name on the hub, OWNER/NAME")
    if not (folder / CONFIG_FILE).is_file() and (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder} is an adapter: give a whole model, as python -m recipes.export RUN_DIR --merge --output FOLDER "
            "writes it"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}: give the folder that save_pretrained or the hub's download wrote"
        )
    _json_object(folder / CONFIG_FILE)


def check_folder(folder: Path) -> int:
    """The number of values in the folder's weights.

    Raises:
        ValueError: unless the folder has a configuration and complete weights in safetensors files.
    """
    check_config(folder)
    return sum(map(_num_values, weight_files(folder)))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from the folder. Raises ValueError if their index is damaged."""
    if (folder / WEIGHTS_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = _json_object(folder / INDEX_FILE)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / INDEX_FILE} has no weight_map: download it again")
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def check_hub(name: str) -> None:
    """Raises ValueError if the hub does not know the model or cannot be reached, unless HF_HUB_OFFLINE is set."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)  # from_pretrained retries for 23 s
    except Exception as error:  # also those of the HTTP client, which depends on the hub's version
        raise ValueError(
            f"no such folder is here, and the hub does not give it ({one_line(error)}): give a folder with "
            f"{CONFIG_FILE}, a name that the hub has, OWNER/NAME, or set HF_HUB_OFFLINE=1 to use what was downloaded "
            "before"
        ) from error


def one_line(error: Exception) -> str:
    """The start of a message of another library."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: download it again")
    return content


def _num_values(path: Path) -> int:
    """By the header of a safetensors file, which also says how long the file must be."""
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.bin")))
        advice = f"there is only {others}: convert it with save_pretrained" if others else "download it again"
        raise ValueError(f"{path} is missing: {advice}")
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): download it again") from error
