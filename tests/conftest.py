import atexit
import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import fork_server
from tests.cli.program import PYTHON, Finished, Program, Running
from tests.pool import WorkerPool

FOLDERS = ("unit", "gpu", "distributed", "cli")  # the fastest tests first
FORKING = ("distributed", "cli")  # whose tests fork processes


def pytest_configure() -> None:
    # `nohup pytest &` and some CI runners ignore Ctrl-C, and programs inherit that. Tests send it to programs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # as in train.py
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cache = tempfile.TemporaryDirectory()  # one token store for all tests, and none in the user's home
    os.environ["XDG_CACHE_HOME"] = cache.name
    atexit.register(cache.cleanup)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers alone and in every run, so failures can be repeated."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def early_fork_server(request: pytest.FixtureRequest) -> None:
    """It imports beside the unit tests, which use one core."""
    if any(item.path.parent.name in FORKING for item in request.session.items):
        fork_server.start()


@pytest.fixture(scope="session", autouse=True)
def main_job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running | None]:
    """The main job, if a test wants its run. It runs beside the unit tests, too."""
    if not any("main_run" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    program = Program(tmp_path_factory.mktemp("main"))
    short = ["num_steps=6", "logging.every_n_steps=2", "data.sequence_length=256"]
    with program.started("+experiment=ra_sp", *short, launcher=PYTHON, wandb=True) as running:
        yield running


@pytest.fixture(scope="session")
def main_run(main_job: Running) -> Finished:
    """A short run of the main job on the default of 4 CPU ranks, started as users do."""
    return main_job.finish()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of random weights and a tokenizer of 2,048 tokens, as of the Hugging Face hub."""
    from scripts.make_tiny_llama import make

    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    make(folder)  # test_make_tiny_llama.py starts the script as people do, which takes seconds to import
    return folder


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
    items.sort(key=lambda item: FOLDERS.index(item.path.relative_to(Path(__file__).parent).parts[0]))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay until the end: no collection looks at their millions of objects again


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and how to run it."""
    left_out = terminalreporter.stats.get("deselected", [])
    num_slow = sum(bool(item.get_closest_marker("slow")) for item in left_out)
    num_skipped = len(terminalreporter.stats.get("skipped", []))
    if num_slow:
        terminalreporter.write_line(f'left out: {num_slow} slow tests; add -m "slow or not slow" to run all')
    if len(left_out) > num_slow:
        terminalreporter.write_line(f"left out: {len(left_out) - num_slow} other tests; leave -m out to run them")
    if num_skipped:
        terminalreporter.write_line(f"skipped: {num_skipped} tests, most of which need GPUs; -rs says why")
