"""Random states, data after a checkpoint, pickles, stop requests, metrics rows, and what export refuses."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import Config, ConfigError, LoraConfig, ModelConfig
from recipes.checkpoint.manager import (
    NOT_WEIGHTS_ONLY,
    WEIGHTS_ONLY,
    only_known_classes,
    random_states,
    restore_random_states,
)
from recipes.checkpoint.manifest import Manifest, write_manifest
from recipes.export import consolidated_weights, export, find_checkpoint
from recipes.launch.stopping import StopRequest
from recipes.monitor.reporter import drop_rows_after
from tests.errors import refused

LENGTH = 7


def draws() -> list[float]:
    return [random.random(), np.random.normal(), torch.randn(()).item()]


def test_random_states_come_back_through_a_file_without_classes(tmp_path):
    np.random.normal()  # leaves a second number for later
    torch.save(random_states(), tmp_path / "states.pt")
    expected = draws()
    draws()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draws() == expected


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


@pytest.mark.parametrize("users", [{}, {WEIGHTS_ONLY: "1"}, {NOT_WEIGHTS_ONLY: "1"}], ids=["none", "safe", "unsafe"])
def test_a_pickle_cannot_run_code_whatever_the_user_has_set(tmp_path, capfd, monkeypatch, users):
    for name in (WEIGHTS_ONLY, NOT_WEIGHTS_ONLY):
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    torch.save({"state": Evil()}, tmp_path / "evil.pt")
    torch.save({"state": torch.ones(2)}, tmp_path / "good.pt")
    with only_known_classes():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)  # as DeepSpeed calls it
        assert torch.load(tmp_path / "good.pt", weights_only=False)["state"].tolist() == [1, 1]
    assert capfd.readouterr().out == ""
    assert {name: os.environ[name] for name in (WEIGHTS_ONLY, NOT_WEIGHTS_ONLY) if name in os.environ} == users


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_stop_request_that_all_ranks_act_on_a_step_later(number):
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        request = StopRequest()
        assert not request.is_received
        signal.raise_signal(number)
        assert request.is_received
        none, one = torch.tensor(0.0), torch.tensor(1.0)
        assert [request.is_agreed(count) for count in (none, one, none, none)] == [False, False, True, False]
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def test_later_rows_and_a_truncated_row_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "x": 0.1}\n{"step": 20, "x": 2}\n'
    path.write_bytes(kept + b'\0\0\xff\nnull\n{"step": 40, "x": 3}\n{"step": 60, "x"')
    drop_rows_after(path, 20)
    assert path.read_bytes() == kept


def test_export_needs_an_intact_checkpoint(tmp_path):
    with refused(ConfigError, tmp_path, "outputs/DATE/TIME", "checkpoints/"):
        find_checkpoint(tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000100"
    folder.mkdir(parents=True)
    with refused(ConfigError, tmp_path, "broken"):
        find_checkpoint(tmp_path)


def test_an_export_needs_a_folder(tmp_path):
    output = tmp_path / "no" / "x.safetensors"
    with refused(ConfigError, f"--output {output}", f"folder {output.parent}"):
        export(tmp_path, output)


def saved_by(run_dir: Path, **settings) -> Path:
    """A checkpoint without weights of a run with these settings of the model and LoRA."""
    folder = run_dir / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    lora = LoraConfig(rank=settings.pop("lora_rank", 0))
    write_manifest(folder, Manifest(3, None, 0.0, "", asdict(Config(model=ModelConfig(**settings), lora=lora)), {}, {}))
    return run_dir


def test_outputs_that_do_not_fit_the_run_are_refused(tmp_path):
    own, pretrained = saved_by(tmp_path / "own"), saved_by(tmp_path / "pretrained", path="owner/model")
    lora = saved_by(tmp_path / "lora", path="owner/model", lora_rank=4)
    with refused(ConfigError, f"--output {tmp_path / 'x'}", f"--output {tmp_path / 'x.safetensors'}"):
        export(own, tmp_path / "x")
    with refused(ConfigError, f"--output {tmp_path / 'x.safetensors'}", "owner/model", f"--output {tmp_path / 'x'}"):
        export(pretrained, tmp_path / "x.safetensors")
    for run_dir in (own, pretrained):
        with refused(ConfigError, "--merge", "lora.rank"):
            export(run_dir, tmp_path / "x", merge=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for run_dir in (pretrained, lora):
        with refused(ConfigError, f"--output {full}", "empty"):
            export(run_dir, full)
    assert {path.name for path in tmp_path.iterdir()} == {"own", "pretrained", "lora", "full"}


def test_an_output_where_nobody_can_write_is_named(tmp_path):
    output = Path("/proc/exported")  # root can write to any other folder
    with refused(ConfigError, f"--output {output}", "cannot be written"):
        export(saved_by(tmp_path, path="owner/model"), output)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    run_dir = saved_by(tmp_path / "run", path=str(tmp_path / "gone"))
    with refused(ConfigError, f"model.path={tmp_path / 'gone'}", "config.json"):
        export(run_dir, tmp_path / "x")
    own = saved_by(tmp_path / "own")
    with pytest.raises(FileNotFoundError):  # the checkpoint has no files
        export(own, tmp_path / "x.safetensors")
    shutil.rmtree(own)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sharded_layers_are_not_exported(tmp_path):
    config = {"parallelism": {"method": "tensor_pipeline"}}
    with refused(ConfigError, "parallelism=tensor_pipeline"):
        consolidated_weights(tmp_path, Manifest(3, None, 0.0, "", config, {}, {}))


def test_keep_zero_disables_checkpoints_and_less_is_refused():
    config = Config()
    assert config.checkpoint.keep > 0
    config.checkpoint.keep = -1
    with refused(ConfigError, "checkpoint.keep=-1", 0):
        config.checkpoint.__post_init__()
