"""What the environment holds in confidence is in no file of a run, nor on its console, nor on the page of it.

Of runs that fail `test_ends` asks the same.
"""

from __future__ import annotations

from recipes.dashboard import cli
from tests.cli.secrets import SECRETS, assert_no_secrets


def test_secrets_of_the_environment_are_in_no_file_of_a_run(plain_run, monkeypatch):
    assert plain_run.exit_code == 0, plain_run.stderr
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    cli.main([str(plain_run.run_dir)])
    files = assert_no_secrets(plain_run.run_dir.parent)
    assert {".yaml", ".log", ".pt", ".wandb", ".jsonl", ".json", ".html", ".stdout", ".stderr"} <= {
        path.suffix for path in files
    }
