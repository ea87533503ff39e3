"""The main job over two hosts, by torchrun and as srun starts it; the cable between them is cut, and it goes on."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.program import SMALL, Finished, Program, Running
from tests.two_hosts import CABLE, Hosts, two_hosts, why_not

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
TIMEOUT_S = 6
JOB = ["+experiment=ra_sp", *SMALL, "num_steps=8", "logging.every_n_steps=1", "breakdown=false"]
CUT_JOB = [
    *JOB[:-3],
    "num_steps=1000000",
    "logging.every_n_steps=2",
    "checkpoint.every_n_steps=5",
    "optimizer.decay=constant",
    "optimizer.warmup_fraction=0",
    f"launch.timeout_s={TIMEOUT_S}",
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


@contextlib.contextmanager
def by_torchrun(program: Program, hosts: Hosts, *arguments: str) -> Iterator[list[Running]]:
    """torchrun on both hosts; the run dir is on a disk that they share."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                program.started(
                    *arguments,
                    f"hydra.run.dir={program.folder / 'shared'}",
                    name=f"host_{host}",
                    launcher=hosts.command(
                        host,
                        TORCHRUN,
                        "--nnodes=2",
                        f"--node-rank={host}",
                        "--nproc-per-node=1",
                        f"--master-addr={hosts.addresses[0]}",
                        "--master-port=29500",
                    ),
                    GLOO_SOCKET_IFNAME=CABLE,
                )
            )
            for host in (0, 1)
        ]


@contextlib.contextmanager
def by_srun(program: Program, hosts: Hosts, *arguments: str) -> Iterator[list[Running]]:
    """What `srun --nodes=2 --ntasks-per-node=1` does; there is no SLURM here, nor names for hosts."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                program.started(
                    *arguments,
                    f"hydra.run.dir={program.folder / 'shared'}",
                    name=f"host_{host}",
                    launcher=hosts.command(host, sys.executable),
                    GLOO_SOCKET_IFNAME=CABLE,
                    SLURM_JOB_ID="77",
                    SLURM_PROCID=str(host),
                    SLURM_LOCALID="0",
                    SLURM_STEP_NUM_TASKS="2",
                    SLURM_STEP_TASKS_PER_NODE="1(x2)",
                    SLURM_STEP_NODELIST=",".join(hosts.addresses),
                )
            )
            for host in (0, 1)
        ]


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in Finished(0, "", "", run_dir, 0).metrics]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory) -> list[float]:
    result = Program(tmp_path_factory.mktemp("one")).run(*JOB)
    assert result.exit_code == 0, result.stderr
    assert len(result.metrics) == 8
    return losses(result.run_dir)


@pytest.mark.parametrize("launch", [by_torchrun, by_srun])
def test_two_hosts_give_the_losses_of_one_bit_for_bit(program, hosts, on_one_host, launch):
    with launch(program, hosts, *JOB) as both:
        ended = [running.finish() for running in both]
    assert [result.exit_code for result in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert losses(program.folder / "shared") == on_one_host
    assert "2 ring" in ended[0].stdout


def test_a_cut_cable_ends_both_hosts_with_the_cause_and_the_same_command_goes_on(program, hosts):
    shared = program.folder / "shared"
    with by_torchrun(program, hosts, *CUT_JOB) as both:
        for running in both:
            both[0].until(lambda: (shared / "checkpoints" / "step_00000005").exists())
            running.family()
        hosts.cut()
        cut = time.monotonic()
        try:
            ended = [running.finish(TIMEOUT_S + 60) for running in both]
        finally:
            hosts.mend()
        seconds = time.monotonic() - cut
        for running in both:
            running.assert_nothing_is_left()
    print(seconds, ended)
    assert all(result.exit_code == 1 for result in ended)
    for result in ended:
        assert "error: " in result.stderr
    assert seconds < 2 * TIMEOUT_S + 30
    last = max(int(path.name[5:]) for path in (shared / "checkpoints").glob("step_*"))
    job = [argument for argument in CUT_JOB if not argument.startswith("num_steps")]
    with by_torchrun(program, hosts, *job, f"num_steps={last + 2}") as both:
        ended = [running.finish() for running in both]
    assert [result.exit_code for result in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert re.search(f"^going on after step {last}$", ended[0].stdout, re.MULTILINE)
