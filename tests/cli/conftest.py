from __future__ import annotations

import pytest

from tests.cli.program import PLAIN, Finished, Program
from tests.cli.secrets import PLANTED


@pytest.fixture
def program(tmp_path) -> Program:
    return Program(tmp_path)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory) -> Finished:
    """Eight steps of the main job on two ranks, at a constant learning rate, with secrets in the environment."""
    return Program(tmp_path_factory.mktemp("plain")).run(*PLAIN, "num_steps=8", launcher=None, wandb=False, **PLANTED)
