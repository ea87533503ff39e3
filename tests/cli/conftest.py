from __future__ import annotations

import pytest

from tests.cli.program import Finished, Program


@pytest.fixture
def program(tmp_path) -> Program:
    return Program(tmp_path)


@pytest.fixture(scope="session")
def main_run(tmp_path_factory) -> Finished:
    """The main job, shortened, on its default of 4 CPU ranks."""
    return Program(tmp_path_factory.mktemp("main")).run(
        "+experiment=ra_sp", "num_steps=6", "logging.every_n_steps=2", "data.sequence_length=256"
    )
