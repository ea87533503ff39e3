"""Which environments make a process a rank of an external launcher."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch

from conf.schema import Config, ConfigError, LaunchConfig
from recipes.launch.environment import (
    RENDEZVOUS,
    adopt_external_ranks,
    check_accelerator,
    make_private_folder,
    ranks_given,
)
from tests.errors import names, refused

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[003-007,9]",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}


def adopted(environment: dict[str, str]) -> dict[str, str] | None:
    """The environment afterwards, or None if this is no rank of a launcher's."""
    with mock.patch.dict(os.environ, environment, clear=True):
        return dict(os.environ) if adopt_external_ranks() else None


def test_a_step_of_srun_becomes_torchruns_variables():
    assert adopted(STEP) == STEP | {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node003",
        "MASTER_PORT": "23001",
    }


def test_the_launchers_ranks_count_and_another_number_is_refused():
    with mock.patch.dict(os.environ, TORCHRUN, clear=True):
        assert [ranks_given(Config(launch=LaunchConfig(num_ranks=typed))) for typed in (None, 4)] == [4, 4]
        with refused(ConfigError, "launch.num_ranks=8", 4):
            ranks_given(Config(launch=LaunchConfig(num_ranks=8)))


def test_steps_and_jobs_have_ports_of_their_own():
    """Of the same step of another job, and of another step of the same job."""
    others = STEP | {"SLURM_JOB_ID": "1234568"}, STEP | {"SLURM_STEP_ID": "3"}
    ports = [environment["MASTER_PORT"] for step in (STEP, *others) if (environment := adopted(step))]
    assert len(set(ports)) == 3
    assert all(20000 <= int(port) < 30000 for port in ports)  # below the ports that Linux hands out


def test_a_step_on_one_node_knows_its_local_ranks():
    environment = adopted(STEP | {"SLURM_STEP_TASKS_PER_NODE": "8"})
    assert environment is not None
    assert environment["LOCAL_WORLD_SIZE"] == "8"


def test_a_step_on_one_node_has_a_file_rendezvous_per_start_unless_the_user_gives_an_address():
    step = STEP | {"SLURM_STEP_TASKS_PER_NODE": "8", "TMPDIR": "/tmp"}
    first, again, addressed = (
        adopted(step),
        adopted(step | {"SLURM_RESTART_COUNT": "1"}),
        adopted(step | {"MASTER_ADDR": "a"}),
    )
    assert first is not None
    assert again is not None
    assert addressed is not None
    assert re.fullmatch(r"/.+/ring_attention_\d+_1234567_2_0", first[RENDEZVOUS])
    assert again[RENDEZVOUS] == first[RENDEZVOUS][:-1] + "1"
    assert RENDEZVOUS not in addressed


class TestPrivateFolder:
    def test_a_folder_of_ones_own_is_taken(self, tmp_path):
        folder = tmp_path / "meeting"
        make_private_folder(folder)
        make_private_folder(folder)  # another rank
        assert folder.lstat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
    def test_a_folder_that_others_may_use_is_refused(self, tmp_path, mode):
        (tmp_path / "meeting").mkdir()
        (tmp_path / "meeting").chmod(mode)
        with refused(ConfigError, tmp_path / "meeting", "drwx------", "TMPDIR", "MASTER_ADDR"):
            make_private_folder(tmp_path / "meeting")

    def test_another_users_folder_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "meeting").mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
        with refused(ConfigError, tmp_path / "meeting", tmp_path.stat().st_uid, os.getuid()):
            make_private_folder(tmp_path / "meeting")

    def test_a_link_is_refused(self, tmp_path):
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (tmp_path / "meeting").symlink_to(tmp_path / "elsewhere")
        with refused(ConfigError, tmp_path / "meeting", "lrwxrwxrwx"):
            make_private_folder(tmp_path / "meeting")

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "meeting").touch(mode=0o600)
        with refused(ConfigError, tmp_path / "meeting", "-rw-------"):
            make_private_folder(tmp_path / "meeting")


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node[003-007,9]", "node003"),
        ("node[9,003-007]", "node9"),
        ("gpu1", "gpu1"),
        ("a,b", "a"),
        ("gpu-1.cluster,gpu-2.cluster", "gpu-1.cluster"),
        ("rack[1-2]n[3-4]-ib,login", "rack1n3-ib"),
    ],
)
def test_the_master_address_is_the_first_host_of_the_nodelist(nodelist, first):
    environment = adopted(STEP | {"SLURM_STEP_NODELIST": nodelist})
    assert environment is not None
    assert environment["MASTER_ADDR"] == first


def test_the_users_address_is_kept():
    environment = adopted(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert environment is not None
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1, an interactive shell
        {"WORLD_SIZE": "8"},
    ],
)
def test_other_processes_start_their_own_ranks(environment):
    assert adopted(environment) is None


def test_ranks_of_torchrun_and_deepspeed_are_recognised():
    assert adopted(TORCHRUN) == TORCHRUN
    assert adopted(TORCHRUN | {"LOCAL_SIZE": "4"}) == TORCHRUN | {"LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}


def test_an_incomplete_environment_is_an_error():
    launchers = ("torchrun", "deepspeed --no_local_rank", "srun")
    with pytest.raises(ConfigError) as caught:
        adopted({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"})
    names(str(caught.value), "RANK=1", "LOCAL_RANK", "MASTER_PORT", *launchers)
    assert "MASTER_ADDR" not in str(caught.value)  # it is set


class TestAccelerator:
    """DS_ACCELERATOR, which chooses DeepSpeed's device."""

    @pytest.mark.parametrize("given", ["xpu", "", "CPU"])
    def test_other_devices_are_refused(self, monkeypatch, given):
        monkeypatch.setenv("DS_ACCELERATOR", given)
        with pytest.raises(ConfigError) as caught:
            check_accelerator()
        assert all(part in str(caught.value) for part in (f"DS_ACCELERATOR={given} ", "cuda", "cpu"))

    @pytest.mark.parametrize("num_gpus", [0, 1])
    def test_cuda_needs_a_gpu(self, monkeypatch, num_gpus):
        monkeypatch.setenv("DS_ACCELERATOR", "cuda")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        if num_gpus:
            check_accelerator()
        else:
            with pytest.raises(ConfigError, match=r"^DS_ACCELERATOR=cuda .*cpu"):
                check_accelerator()

    def test_cpu_hides_gpus(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        check_accelerator()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

    def test_unset_keeps_the_gpus_there_are(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        check_accelerator()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
