"""Secrets of the environment are in no file of a run, not on its console and not on its page.

`test_ends` checks the same for runs that fail.
"""

from __future__ import annotations

import pytest

from recipes.dashboard.__main__ import main
from tests.cli.secrets import SECRETS, assert_no_secrets

pytestmark = pytest.mark.slow


def test_secrets_of_the_environment_are_in_no_file_of_a_run(plain_run, monkeypatch):
    assert plain_run.exit_code == 0, plain_run.stderr
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    main([str(plain_run.run_dir)])
    files = assert_no_secrets(plain_run.run_dir.parent)
    assert {".yaml", ".log", ".pt", ".wandb", ".jsonl", ".json", ".html", ".stdout", ".stderr"} <= {
        path.suffix for path in files
    }
