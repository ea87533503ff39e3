"""The search for the longest sequence, with ranks that only pretend to train."""

from __future__ import annotations

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
import torch

from conf.schema import Config, ConfigError, EngineConfig, LaunchConfig, MaxLengthConfig, ModelConfig
from recipes.benchmark.max_length import (
    MAX_ATTEMPTS,
    NO_MEMORY,
    PROBE_FILE,
    Probe,
    _at_longest,
    duration,
    max_length,
)
from recipes.launch import launcher
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed
from tests.errors import names, refused, some_line_names

LIMIT_GIB = 0.25
ATTEMPTS = [8704, 8192, 7680, 7168]  # each 5 % below the one before, then a multiple of 256 tokens on both ranks


def max_length_config(explain: bool = False, engine: EngineConfig | None = None, **settings) -> Config:
    return Config(
        recipe="max_length",
        explain=explain,
        model=ModelConfig(num_layers=8),
        launch=LaunchConfig(num_ranks=2),
        engine=engine or EngineConfig(),
        max_length=MaxLengthConfig(**{"memory_gib": LIMIT_GIB, **settings}),
    )


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Run the recipe where training at a length peaks at peak_gib(length), and the device has capacity_gib."""
    tried: list[int] = []

    def run(peak_gib=lambda length: 0.2, capacity_gib=100.0, **settings):
        def start(task, num_ranks, run_dir):
            assert (num_ranks, task.config.num_steps, task.config.recipe) == (2, 2, "pretrain")
            tried.append(task.config.data.sequence_length)
            peak = peak_gib(tried[-1])
            if peak > capacity_gib:
                (run_dir / f"{NO_MEMORY}1").write_text("no memory")
                raise RunFailed("out of memory")
            (run_dir / PROBE_FILE).write_text(json.dumps({"peak_gib": peak, "tokens_per_s": 5.0}))
            return float("nan")

        monkeypatch.setattr(launcher, "start", start)
        return max_length(max_length_config(**settings), tmp_path)

    return SimpleNamespace(
        run=run, tried=tried, result=lambda: json.loads((tmp_path / "max_length.json").read_text()), folder=tmp_path
    )


def test_the_predicted_length_is_trained_once(search, capsys):
    length = search.run()
    found = search.result()
    assert search.tried == [length] == [found["predicted_length"]] == ATTEMPTS[:1]
    assert found["limit_gib"] == LIMIT_GIB
    assert found["confirmed"] == found["attempts"][0] == {"length": length, "peak_gib": 0.2, "tokens_per_s": 5.0}
    some_line_names(capsys.readouterr().out.splitlines(), "8,704", "5 tok/s", "0.200 GiB")


def test_the_length_fits_the_host_that_activations_are_offloaded_to(capsys):
    config = max_length_config(engine=EngineConfig(recompute="full", offload_activations=True))
    config.recipe, config.launch.check_memory = "pretrain", False
    plan = Plan(config, 2, "cuda", "NVIDIA H100", (9, 0), 2, memory_bytes=2**36)
    assert _at_longest(plan, 64.0, 512).config.data.sequence_length > 2**20
    assert "host" not in capsys.readouterr().out
    hidden_bytes = 2 * config.model.hidden_size  # of a token of a layer; 6 of 8 layers are offloaded, from 2 ranks
    host = dataclasses.replace(plan, host_memory_bytes=round(2 * 6 * 2**19 * hidden_bytes / 0.9) + 1)
    assert _at_longest(host, 64.0, 512).config.data.sequence_length == 2**20
    assert "limited by 1.50 GiB of the host's memory" in capsys.readouterr().out


def test_a_host_that_holds_no_optimizer_is_named():
    config = max_length_config(engine=EngineConfig(zero_stage=1, offload_optimizer=True))
    config.recipe, config.launch.check_memory = "pretrain", False
    plan = Plan(config, 2, "cuda", "NVIDIA H100", (9, 0), 2, memory_bytes=2**36, host_memory_bytes=2**20)
    with refused(ConfigError, "offloading takes", "engine.offload_optimizer=false"):
        _at_longest(plan, 64.0, 512)


def test_the_prediction_fills_the_limit(search):
    search.run()
    found = search.result()
    config = max_length_config()
    config.recipe, config.num_steps = "pretrain", 2
    plan = launcher.make_plan(config, 2)
    lengths = [found["predicted_length"], found["predicted_length"] + 512]
    steps = [dataclasses.replace(plan.step_memory, local_tokens=length // 2) for length in lengths]
    peaks = [step.peak.total / 2**30 for step in steps]
    assert peaks[0] == found["predicted_peak_gib"] <= LIMIT_GIB < peaks[1]
    assert found["curve"][-1] == {"length": lengths[0], "peak_gib": peaks[0]}
    assert [point["peak_gib"] for point in found["curve"]] == sorted(point["peak_gib"] for point in found["curve"])


def test_explain_predicts_and_trains_nothing(search, capsys):
    search.run(explain=True)
    assert search.tried == list(search.folder.iterdir()) == []
    text = capsys.readouterr().out
    [warning] = [line for line in text.splitlines() if "!!!" in line]
    names(warning, "CPU", "GPUs")
    names(text, "8,704", "2 steps", "memory", "peak")


def test_explain_gpu_gives_the_memory(tmp_path, capsys):
    config = max_length_config(explain=True, memory_gib=None)
    max_length(dataclasses.replace(config, explain_gpu="h100"), tmp_path)
    assert f"8 layers on 2 x NVIDIA H100 80GB HBM3; {0.9 * 79.2:.2f} GiB per rank" in capsys.readouterr().out


def test_slow_steps_are_not_trained(search, capsys):
    assert search.run(confirm_s=0.0) == ATTEMPTS[0]
    assert (search.tried, search.result()["confirmed"]) == ([], None)
    some_line_names(capsys.readouterr().out.splitlines(), "max_length.confirm_s=0")


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (7199, "7199 s"), (9000, "2.5 hours"), (17296032, "200 days")]
)
def test_long_times_are_in_hours_or_days(seconds, text):
    assert duration(seconds) == text


def test_a_time_above_confirm_s_is_named(search, capsys):
    search.run(confirm_s=0.001)
    some_line_names(capsys.readouterr().out.splitlines(), "max_length.confirm_s=0.001")


def test_an_attempt_that_runs_out_of_memory_is_followed_by_a_shorter_one(search, capsys):
    assert search.run(lambda length: 0.2 * length / ATTEMPTS[1], capacity_gib=0.2) == ATTEMPTS[1]
    assert search.tried == ATTEMPTS[:2]
    assert search.result()["attempts"][0] == {"length": ATTEMPTS[0], "error": "no memory"}
    some_line_names(capsys.readouterr().out.splitlines(), "8,704", "out of memory")


def test_the_limit_holds_for_confirmed_lengths(search, capsys):
    assert search.run(lambda length: LIMIT_GIB * length / ATTEMPTS[1]) == ATTEMPTS[1]
    assert search.tried == ATTEMPTS[:2]
    assert search.result()["confirmed"]["length"] == ATTEMPTS[1]
    some_line_names(capsys.readouterr().out.splitlines(), "8,704", "0.266 GiB")  # 0.25 x 8704 / 8192


def test_attempts_are_bounded(search):
    with refused(RunFailed, "8,704", "8,192", "7,680", "7,168", "0.25 GiB"):
        search.run(lambda length: 1.0)
    assert search.tried == ATTEMPTS
    assert len(ATTEMPTS) == MAX_ATTEMPTS
    assert search.result()["confirmed"] is None


def test_an_attempt_that_fails_for_another_reason_ends_the_search(search):
    def fails(length: int) -> float:
        raise RunFailed("rank 1 failed")

    with pytest.raises(RunFailed, match="rank 1 failed"):
        search.run(fails)


def test_a_model_that_fits_at_no_length_is_refused(search):
    with refused(ConfigError, "512", "0.03"):
        search.run(memory_gib=0.03)


def test_an_unsupported_configuration_is_refused(search):
    with refused(ConfigError, "accumulation", "2"):
        search.run(engine=EngineConfig(gradient_accumulation_steps=2))


def test_a_probe_reports_only_running_out_of_memory(monkeypatch, tmp_path):
    probe = Probe(Config())
    monkeypatch.setenv("RANK", "0")

    def fails(error):
        def measure(self, run_dir):
            raise error

        monkeypatch.setattr(Probe, "_measure", measure)

    fails(ValueError("another"))
    with pytest.raises(ValueError, match="another"):
        probe.run(tmp_path, io.StringIO())
    assert list(tmp_path.iterdir()) == []
    fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        probe.run(tmp_path, io.StringIO())
    assert (tmp_path / f"{NO_MEMORY}0").read_text() == "CUDA out of memory. Tried to allocate 2 GiB"
