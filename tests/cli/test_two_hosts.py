"""The main job over two hosts, by torchrun and as srun starts it; the cable between them is cut, and it goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.program import ENDS_WITHIN_S, SMALL, Finished, Program, Running
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


# A stand-in, for there is no SLURM here: what srun does with one task on each host, and its exit code.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 2
export SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_STEP_NODELIST={nodes}
SLURM_PROCID=0 ip netns exec {first} "${{@:2}}" & tasks=$!
SLURM_PROCID=1 ip netns exec {second} "${{@:2}}" & tasks="$tasks $!"
worst=0
for task in $tasks; do wait $task; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'


@contextlib.contextmanager
def by_sbatch(program: Program, hosts: Hosts, *arguments: str) -> Iterator[list[Running]]:
    """scripts/slurm.sbatch, as SLURM would start it on the first host."""
    tools = program.folder / "bin"
    tools.mkdir(exist_ok=True)
    srun = SRUN.format(nodes=",".join(hosts.addresses), first=hosts.names[0], second=hosts.names[1])
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with program.started(
        *arguments,
        name="shared",
        launcher=["bash", "-c", 'shift; exec bash scripts/slurm.sbatch "$@"', "sbatch"],  # it names train.py itself
        PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        GLOO_SOCKET_IFNAME=CABLE,
        SLURM_JOB_ID="77",
    ) as running:
        yield [running]


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in Finished(0, "", "", run_dir, 0).metrics]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory) -> list[float]:
    result = Program(tmp_path_factory.mktemp("one")).run(*JOB)
    assert result.exit_code == 0, result.stderr
    assert len(result.metrics) == 8
    return losses(result.run_dir)


@pytest.mark.parametrize("launch", [by_torchrun, by_sbatch])
def test_two_hosts_give_the_losses_of_one_bit_for_bit(program, hosts, on_one_host, launch):
    with launch(program, hosts, *JOB) as both:
        ended = [running.finish() for running in both]
    assert all(result.exit_code == 0 for result in ended), ended
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
    for result in ended:  # whichever message was on its way
        assert result.exit_code == 1
        assert re.search(rf"Timed out waiting {TIMEOUT_S}000ms for|HopError", result.stderr)
    assert seconds < 2 * TIMEOUT_S + ENDS_WITHIN_S
    last = max(int(path.name[5:]) for path in (shared / "checkpoints").glob("step_*"))
    job = [argument for argument in CUT_JOB if not argument.startswith("num_steps")]
    with by_torchrun(program, hosts, *job, f"num_steps={last + 2}") as both:
        ended = [running.finish() for running in both]
    assert [result.exit_code for result in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert re.search(f"^going on after step {last}$", ended[0].stdout, re.MULTILINE)


def test_a_slurm_job_that_is_told_to_end_saves_and_is_queued_again(program, hosts):
    with by_sbatch(program, hosts, *CUT_JOB) as [running]:
        running.until(lambda: re.search(r"step +4/", running.stdout))
        for process in running.family():
            if "train.py" in process.cmdline() and "python" in process.cmdline()[0]:
                process.send_signal(signal.SIGUSR1)
        result = running.finish()
        running.assert_nothing_is_left()
    assert result.exit_code == 143, result.stderr
    assert result.stdout.endswith("scontrol requeue 77\n")
    assert list((result.run_dir / "checkpoints").glob("step_*"))
