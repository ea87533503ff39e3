"""The main job on two hosts by torchrun, DeepSpeed's launcher and srun; the cable is cut, and the run resumes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.program import ENDS_WITHIN_S, PLAIN, Finished, Program, Running
from tests.errors import some_line_names
from tests.tools.two_hosts import CABLE, Hosts, two_hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason := why_not()), reason=reason)]

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
TIMEOUT_S = 10  # from the cut to the end; ranks may also start this far apart on a busy machine
JOB = [*PLAIN, "num_steps=1000000", "checkpoint.every_n_steps=5"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def torchrun(hosts: Hosts, host: int) -> list[str]:
    address = f"--master-addr={hosts.addresses[0]}"
    return [TORCHRUN, "--nnodes=2", f"--node-rank={host}", "--nproc-per-node=1", address, "--master-port=29500"]


def deepspeed(hosts: Hosts, host: int) -> list[str]:
    """What `deepspeed --hostfile=FILE --no_local_rank` has pdsh start on each host: DeepSpeed's PDSHRunner."""
    world = base64.urlsafe_b64encode(json.dumps({name: [0] for name in hosts.names}).encode()).decode()
    to_each = [f"--world_info={world}", f"--node_rank={host}"]
    address = [f"--master_addr={hosts.addresses[0]}", "--master_port=29500"]
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *to_each, *address, "--no_local_rank"]


@contextlib.contextmanager
def on_both(
    program: Program, hosts: Hosts, launcher: Callable[[Hosts, int], list[str]], *arguments: str
) -> Iterator[list[Running]]:
    """The launcher on both hosts, with a shared run dir."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                program.started(
                    *arguments,
                    f"hydra.run.dir={program.folder / 'shared'}",
                    name=f"host_{host}",
                    launcher=hosts.command(host, *launcher(hosts, host)),
                    GLOO_SOCKET_IFNAME=CABLE,
                    DS_ACCELERATOR="cpu",
                )
            )
            for host in (0, 1)
        ]


# There is no SLURM here: this does what srun does with one task per host, including its exit code. When a task fails it
# kills the other at once, the hardest case.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 2
export SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_STEP_NODELIST={nodes}
SLURM_PROCID=0 ip netns exec {first} "${{@:2}}" & tasks=$!
SLURM_PROCID=1 ip netns exec {second} "${{@:2}}" & tasks="$tasks $!"
worst=0
for task in $tasks; do
    wait -n $tasks; code=$?
    [ $code -gt $worst ] && worst=$code
    [ $code -gt 0 ] && kill -9 $tasks 2>/dev/null
done
exit $worst
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'


@contextlib.contextmanager
def by_sbatch(program: Program, hosts: Hosts, *arguments: str) -> Iterator[Running]:
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
        wandb=True,
        PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        GLOO_SOCKET_IFNAME=CABLE,
        SLURM_JOB_ID="77",
    ) as running:
        yield running


def assert_first_losses_are_of_one_host(run_dir: Path, plain_run: Finished) -> None:
    """Bit for bit, for as many steps as that run has."""
    expected = [line["train/loss"] for line in plain_run.metrics]
    assert len(expected) == 8
    assert losses(run_dir)[:8] == expected


def losses(run_dir: Path) -> list[float]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # complete ones
    return [json.loads(line)["train/loss"] for line in lines]


def test_two_hosts_of_torchrun_compute_as_one_end_when_the_cable_is_cut_and_resume(program, hosts, plain_run):
    shared = program.folder / "shared"
    with on_both(program, hosts, torchrun, *JOB, f"launch.timeout_s={TIMEOUT_S}") as both:
        both[0].until(lambda: len(losses(shared)) >= 8 and (shared / "checkpoints" / "step_00000005").exists())
        for running in both:
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
    assert "2 ring" in ended[0].stdout
    assert_first_losses_are_of_one_host(shared, plain_run)
    for result in ended:  # whichever message was on its way
        assert result.exit_code == 1
        assert re.search(rf"Timed out waiting {TIMEOUT_S}000ms for|TransferError", result.stderr)
    assert seconds < 2 * TIMEOUT_S + ENDS_WITHIN_S
    last = max(int(path.name[5:]) for path in (shared / "checkpoints").glob("step_*"))
    with on_both(program, hosts, torchrun, *JOB, f"num_steps={last + 2}") as both:
        ended = [running.finish() for running in both]
    assert [result.exit_code for result in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    some_line_names(ended[0].stdout.splitlines(), "resuming", f"step {last}")


def test_two_hosts_of_deepspeeds_launcher_compute_as_one(program, hosts, plain_run):
    with on_both(program, hosts, deepspeed, *PLAIN, "num_steps=8") as both:
        ended = [running.finish() for running in both]
    assert [result.exit_code for result in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert "2 ring" in ended[0].stdout
    assert_first_losses_are_of_one_host(program.folder / "shared", plain_run)


def tasks(running: Running) -> list[psutil.Process]:
    """The ranks that srun has started."""
    lines = [(process, process.cmdline()) for process in running.family()]
    return [process for process, line in lines if "train.py" in line and "python" in line[0]]


def test_two_hosts_of_slurm_compute_as_one_and_a_preempted_job_saves_and_requeues(program, hosts, plain_run):
    with by_sbatch(program, hosts, *JOB) as running:
        running.until(lambda: len(losses(running.run_dir)) >= 8)
        for task in tasks(running):
            task.send_signal(signal.SIGUSR1)
        result = running.finish()
        running.assert_nothing_is_left()
    assert "2 ring" in result.stdout
    assert_first_losses_are_of_one_host(result.run_dir, plain_run)
    assert result.exit_code == 143, result.stderr  # the largest: that of a task which srun kills is 137
    assert result.stdout.endswith("scontrol requeue 77\n")
    assert list((result.run_dir / "checkpoints").glob("step_*"))

    with by_sbatch(program, hosts, *JOB) as running:
        for task in running.until(lambda: len(found := tasks(running)) == 2 and found):
            task.send_signal(signal.SIGTERM)  # before it trains
        result = running.finish()
        running.assert_nothing_is_left()
    assert result.exit_code == 143, result.stderr
    assert "scontrol" not in result.stdout
