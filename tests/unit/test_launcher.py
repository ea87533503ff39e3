"""What the launcher refuses on a machine without GPUs, which rank it blames, and the SLURM batch file."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.schema import AttentionConfig, Config, ConfigError, DataConfig, EngineConfig, LaunchConfig, ModelConfig
from recipes.launch import launcher, processes
from recipes.launch.failure import Outcome, explain_failure
from recipes.launch.launcher import count_ranks, make_plan
from recipes.launch.processes import launch, signals_deferred, starting
from recipes.run.errors import STOP_SIGNALS, Preempted, RunFailed
from recipes.run.heartbeat import Heartbeat
from tests.errors import is_named, names, refused


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_four_ranks_are_the_default_on_the_cpu():
    assert count_ranks(Config()) == 4
    assert count_ranks(Config(launch=LaunchConfig(num_ranks=3))) == 3


@pytest.mark.parametrize(
    ("config", "named", "choices"),
    [
        (Config(engine=EngineConfig(dtype="fp16")), "engine.dtype=fp16", "engine.dtype=bf16 engine.dtype=fp32"),
        (Config(attention=AttentionConfig(kernel="cudnn")), "attention.kernel=cudnn", "attention.kernel=auto"),
        (
            Config(attention=AttentionConfig(transport="copy_engine")),
            "attention.transport=copy_engine",
            "attention.transport=p2p",
        ),
    ],
    ids=["fp16", "cudnn", "copy_engine"],
)
def test_what_needs_a_gpu_is_refused_on_the_cpu(config: Config, named: str, choices: str):
    with refused(ConfigError, named, *choices.split()):
        count_ranks(config)


def test_a_plan_on_gpus_knows_their_memory_and_the_hosts(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=2**37)
    for name, value in {
        "is_available": True,
        "device_count": 8,
        "current_device": 0,
        "get_device_properties": gpu,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(launcher, "usable_memory_bytes", lambda: 2**40)
    config = Config(attention=AttentionConfig(kernel="mem_efficient"))
    plan = make_plan(config, 16)  # a launcher's ranks that know no LOCAL_WORLD_SIZE
    assert (plan.memory_bytes, plan.host_memory_bytes, plan.ranks_per_host) == (2**37, 2**40, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make_plan(config, 16).ranks_per_host == 4


def test_a_plan_for_gpus_elsewhere_has_the_host_memory_of_their_file():
    plan = make_plan(Config(explain=True, explain_gpu="h100", launch=LaunchConfig(num_ranks=16)), 16)
    assert (plan.ranks_per_host, plan.host_memory_bytes) == (8, 2000 * 2**30)


def test_more_ranks_than_cores_can_start_soon_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr("recipes.launch.processes.os.sched_getaffinity", lambda _: {0, 1})
    names(starting(9, tmp_path), "9 ranks", "2 CPU cores", "launch.num_ranks=4")
    assert "CPU cores" not in starting(8, tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 64)
    assert "CPU cores" not in starting(64, tmp_path)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused(ConfigError, "launch.num_ranks=4", "launch.num_ranks=2", "CUDA_VISIBLE_DEVICES="):
        count_ranks(Config(launch=LaunchConfig(num_ranks=4)))


def test_a_cluster_that_cannot_be_read_is_refused_before_ranks_start(monkeypatch):
    """On GPUs, too, where only ranks make a plan."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused(ConfigError, "cluster=missing.yaml", "8xh200"):
        count_ranks(Config(attention=AttentionConfig("auto"), cluster="missing.yaml"))


@pytest.mark.parametrize(
    ("exit_codes", "first_seen", "reported", "blamed", "cause"),
    [
        ([0, -9, 0], 1, [], 1, "SIGKILL"),
        ([1, -9, 0], 0, [(0, "peer is gone")], 1, "SIGKILL"),  # its peer was seen first
        ([-6, 1, 0], 1, [(1, "the cause")], 1, "the cause"),  # NCCL's watchdog aborts a survivor
        ([-6, 0, 0], 0, [], 0, "SIGABRT"),
        ([1, 1, 0], 0, [(1, "the cause"), (0, "peer is gone")], 1, "the cause"),
        ([-15, 0, 1], 0, [(2, "peer is gone")], 0, "SIGTERM"),
        ([0, 7, 0], 1, [], 1, "7"),
        ([0, -40, 0], 1, [], 1, "40"),
    ],
)
def test_the_rank_that_failed_first_is_blamed(tmp_path, exit_codes, first_seen, reported, blamed, cause):
    outcomes = [Outcome(rank, error=f"rank {rank} failed:\n{error}") for rank, error in reported]
    message = explain_failure(exit_codes, first_seen, outcomes, tmp_path)
    names(message, f"rank {blamed}", cause, tmp_path / "logs" / f"rank_{blamed}.log")
    assert not any(is_named(message, f"rank {rank}") for rank in range(3) if rank != blamed)
    assert "peer is gone" not in message  # of a rank that suffered
    for remedy in ("dmesg", "explain=true"):  # of the OOM killer
        assert is_named(message, remedy) == (cause == "SIGKILL")


def test_a_killed_rank_is_named_with_its_position_and_a_stall_with_all_ranks(tmp_path):
    (tmp_path / "logs").mkdir()
    Heartbeat(tmp_path, 1).update("part", "validation after step 4")
    message = explain_failure([0, -9], 1, [], tmp_path)
    names(message.splitlines()[0], "rank 1", "SIGKILL", "validation after step 4")
    (tmp_path / "logs" / "stall.txt").write_text("step 7 was not done\nrank 0\nrank 1\n")
    assert explain_failure([0, 1], 1, [], tmp_path) == "step 7 was not done\nrank 0\nrank 1"


@pytest.mark.parametrize("code", [-9, 7, 1], ids=["SIGKILL", "exit code", "timed out"])
def test_a_rank_that_could_not_say_what_to_do_is_followed_by_what_resumes(tmp_path, code):
    outcomes = [Outcome(0, error="rank 0 failed:\nRuntimeError: Timed out waiting 1ms")] if code == 1 else []
    names(explain_failure([code, 0], 0, outcomes, tmp_path).splitlines()[-1], "no checkpoint")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    last = explain_failure([code, 0], 0, outcomes, tmp_path).splitlines()[-1]
    assert last == "the same command resumes from step_00000010"
    own = explain_failure([1, 0], 0, [Outcome(0, error="a mistake; what to do")], tmp_path)
    assert "resumes" not in own


def test_a_refusal_by_the_ranks_is_shown_alone(tmp_path):
    refused = [Outcome(rank, error="that does not fit", refused=True) for rank in (1, 0)]
    assert explain_failure([1, 1], 1, refused, tmp_path) == "that does not fit"


def test_a_model_too_large_for_the_ranks_is_refused(monkeypatch):
    pages = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("recipes.launch.host_memory.os.sysconf", pages.__getitem__)
    large = Config(model=ModelConfig(hidden_size=4096, mlp_size=16384), launch=LaunchConfig(num_ranks=2))
    parts = ("tiny", "407.92 M", "engine.zero_stage=1", "2 ranks", "3.80 GiB", "2.00 GiB")
    with refused(ConfigError, *parts, "4 ranks", "2 hosts", "engine.zero_stage=3", "1.71 GiB"):
        count_ranks(large)
    large.launch.check_memory = False
    assert count_ranks(large) == 2


def test_a_step_too_large_for_the_ranks_is_refused(monkeypatch):
    pages = {"SC_PHYS_PAGES": 2**18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("recipes.launch.host_memory.os.sysconf", pages.__getitem__)
    long = Config(data=DataConfig(sequence_length=10**6), launch=LaunchConfig(num_ranks=2))
    with pytest.raises(ConfigError, match=r"^a step needs [\d.]+ GiB .* there are 0\.5: use .*sequence_length=\d+"):
        count_ranks(long)
    long.launch.check_memory = False
    assert count_ranks(long) == 2


def test_overdue_transfers_are_shown_if_the_watchdog_ended_a_rank(tmp_path):
    (tmp_path / "logs").mkdir()
    transfer = (
        "TransferError: forward K,V after ring step 1: ring rank 1 of 4, receiving from ring rank 0 (global rank 0)"
    )
    (tmp_path / "logs" / "rank_1.log").write_text(f"noise\n{transfer}\nterminate called\n")
    (tmp_path / "logs" / "rank_0.log").write_text("noise\n")
    message = explain_failure([0, -6, 0, 0], 1, [], tmp_path)
    first, second, *_ = message.splitlines()
    names(first, "rank 1", "SIGABRT")
    assert second == transfer  # as its log has it


def test_a_signal_while_ranks_start_takes_effect_afterwards():
    steps = []

    def start() -> None:
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("started")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert steps == ["started"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


TASK: Any = None  # of ranks that do something else


def started(monkeypatch, code: str) -> None:
    """Let `launch` start two ranks that execute this code alone, without the seconds that imports take."""

    def start_processes(_, arguments, num_ranks, **__):
        children = [multiprocessing.get_context("fork").Process(target=exec, args=(code,)) for _ in range(num_ranks)]
        handled = [signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS]  # a fork inherits handlers
        for child in children:
            child.start()
        for number, handler in zip(STOP_SIGNALS, handled, strict=True):
            signal.signal(number, handler)
        return SimpleNamespace(processes=children)

    monkeypatch.setattr("recipes.launch.processes.mp.start_processes", start_processes)


def test_no_half_written_checkpoint_is_left_once_all_ranks_have_ended(tmp_path, monkeypatch):
    """It may be what fills the disk, so that not even the next start could write."""
    writing = tmp_path / "checkpoints" / "writing" / "step_00000004"
    started(monkeypatch, f"import os; os.makedirs({str(writing)!r}, exist_ok=True); os._exit(1)")
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(RunFailed, match="step_00000002"):
        launch(TASK, 2, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_half_written_checkpoint_of_a_killed_run_is_gone_before_ranks_start(tmp_path, monkeypatch):
    writing = tmp_path / "checkpoints" / "writing" / "step_00000004"
    writing.mkdir(parents=True)
    started(monkeypatch, f"import os; os._exit(3 if os.path.exists({str(writing.parent)!r}) else 4)")
    with pytest.raises(RunFailed, match="exited with code 4"):
        launch(TASK, 2, tmp_path)


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("when", ["while ranks start", "before they train"])
def test_a_signal_before_the_first_step_is_one_line_with_what_resumes(tmp_path, monkeypatch, capsys, number, when):
    def stop(received: int, _: object) -> None:  # as train.py
        raise Preempted(number=received)

    started(monkeypatch, "import time; time.sleep(60)")
    where, name = (processes.mp, "start_processes") if when == "while ranks start" else (processes, "first_to_fail")
    original = getattr(where, name)

    def signalled(*arguments, **options):
        signal.raise_signal(number)
        return original(*arguments, **options)

    monkeypatch.setattr(where, name, signalled)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Preempted):
            launch(TASK, 2, tmp_path)
    finally:
        signal.signal(number, before)
    _, said = capsys.readouterr().out.splitlines()
    names(said, number.name, "no checkpoint", tmp_path)


def test_a_signal_whose_checkpoint_is_saved_is_told_by_rank_0_alone(tmp_path, monkeypatch, capsys):
    saved = tmp_path / "logs" / "preempted"
    saved.parent.mkdir()
    started(monkeypatch, f"import os; open({str(saved)!r}, 'w').close(); os._exit({Preempted.EXIT_CODE})")
    with pytest.raises(Preempted):
        launch(TASK, 2, tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1  # the line of the start


@pytest.mark.parametrize(
    "typed",
    [[], ["hydra.run.dir=my run"], ["++hydra.run.dir='my run'"]],
    ids=["default run dir", "typed run dir", "quoted run dir"],
)
@pytest.mark.parametrize("left", [False, True], ids=["first start", "after a preemption"])
@pytest.mark.parametrize(
    ("saves", "code", "said"),
    [
        (False, 0, ""),
        (False, 1, ""),
        (False, 143, ""),  # ended by SIGTERM before it trained
        (True, 143, "requeue 7\n"),
        (True, 137, "requeue 7\n"),  # SLURM killed what was left of it
    ],
)
def test_the_batch_file_requeues_only_a_preempted_run_that_has_saved(tmp_path, typed, left, saves, code, said):
    marker = tmp_path / ("my run" if typed else "runs/7") / "logs" / "preempted"
    marker.parent.mkdir(parents=True)
    if left:
        marker.touch()
    srun = f"{f'touch {shlex.quote(str(marker))}; ' if saves else ''}exit {code}"
    for name, script in (("srun", srun), ("scontrol", "echo $*")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = Path(__file__).resolve().parents[2] / "scripts" / "slurm.sbatch"
    command = ["bash", script, *typed]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=10)
    assert (result.returncode, result.stdout) == (code, said)
