"""What the environment holds in confidence is in no file of a run, nor on its console."""

from __future__ import annotations

from tests.cli.program import SMALL

SECRETS = {
    "WANDB_API_KEY": "planted0wandb0" + "0" * 26,
    "HF_TOKEN": "hf_planted0hub0token",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted0older0token",
    "AWS_SECRET_ACCESS_KEY": "planted0aws0secret",
}


def test_secrets_of_the_environment_are_in_no_file_of_a_run(program):
    result = program.run("+experiment=ra_sp", *SMALL, "num_steps=4", WANDB_MODE="offline", **SECRETS)
    assert result.exit_code == 0, result.stderr
    files = [path for path in program.folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".yaml", ".log", ".pt", ".wandb", ".jsonl", ".json"} <= kinds
    for name, secret in SECRETS.items():
        found = [path for path in files if secret.encode() in path.read_bytes()]
        assert not found, f"{name} is in {found}"
