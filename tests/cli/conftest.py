from __future__ import annotations

import pytest

from tests.cli.program import PLAIN, PYTHON, Finished, Program
from tests.cli.secrets import PLANTED


@pytest.fixture
def program(tmp_path) -> Program:
    return Program(tmp_path)


@pytest.fixture(scope="session")
def main_run(tmp_path_factory) -> Finished:
    """A short run of the main job on the default of 4 CPU ranks, started as users do."""
    return Program(tmp_path_factory.mktemp("main")).run(
        "+experiment=ra_sp",
        "num_steps=6",
        "logging.every_n_steps=2",
        "data.sequence_length=256",
        launcher=PYTHON,
        wandb=True,
    )


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory) -> Finished:
    """Eight steps of the main job on two ranks, at a constant learning rate, with secrets in the environment."""
    return Program(tmp_path_factory.mktemp("plain")).run(*PLAIN, "num_steps=8", launcher=None, wandb=False, **PLANTED)
