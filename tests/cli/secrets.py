"""Secrets to set in the environment of runs, and the search for them in everything that runs write."""

from __future__ import annotations

from pathlib import Path

SECRETS = {
    "WANDB_API_KEY": "planted0wandb0" + "0" * 26,
    "HF_TOKEN": "hf_planted0hub0token",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted0older0token",
    "AWS_SECRET_ACCESS_KEY": "planted0aws0secret",
}
PLANTED = {**SECRETS, "WANDB_MODE": "offline"}  # with a key, wandb would log in


def assert_no_secrets(folder: Path) -> list[Path]:
    """Search all files below a folder and return them. `Running` writes a run's console to files there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for name, secret in SECRETS.items():
        found = [path for path in files if secret.encode() in path.read_bytes()]
        assert not found, f"{name} is in {found}"
    return files
