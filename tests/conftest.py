from collections.abc import Iterator

import pytest
import torch

from tests.pool import WorkerPool


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers alone and in every run, so failures can be repeated."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """CPU ranks."""
    pool = WorkerPool("cpu")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu_pool() -> Iterator[WorkerPool]:
    """GPU ranks."""
    pool = WorkerPool("cuda")
    yield pool
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
