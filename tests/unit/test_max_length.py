"""The search for the longest sequence, with ranks that only pretend to train."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import torch

from conf.schema import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    LaunchConfig,
    MaxLengthConfig,
    ModelConfig,
)
from recipes.benchmark.max_length import NO_MEMORY_FILE, PROBE_FILE, Probe, first_tokens, max_length
from recipes.launch import launcher
from recipes.run.errors import RunFailed

TOKEN_GIB, LAYER_TOKEN_GIB, FIXED_GIB, LAYER_GIB = 1e-4, 3e-4, 0.5, 0.25


def line_gib(layers: int, length: int) -> float:
    return FIXED_GIB + LAYER_GIB * layers + (TOKEN_GIB + LAYER_TOKEN_GIB * layers) * length


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Run the recipe where a probe peaks at peak_gib(layers, length), and has no memory beyond capacity_gib."""
    tried: list[tuple[int, int]] = []

    def run(peak_gib, capacity_gib=100.0, **settings):
        def start(task, num_ranks, run_dir):
            layers, length = task.config.model.num_layers, task.config.data.sequence_length
            tried.append((layers, length))
            peak = peak_gib(layers, length)
            if peak > capacity_gib:
                (run_dir / NO_MEMORY_FILE).write_text("no memory")
                raise RunFailed("a probe ran out of memory")
            row = {"peak_gib": peak, "step_time_s": 1.0, "flops": 1e9 * layers * length, "tokens_per_s": 5.0}
            (run_dir / PROBE_FILE).write_text(json.dumps({**row, "device": "toy", "memory_gib": 10.0}))
            return float("nan")

        monkeypatch.setattr(launcher, "start", start)
        config = Config(
            recipe="max_length", model=ModelConfig(num_layers=8), launch=LaunchConfig(num_ranks=2),
            max_length=MaxLengthConfig(**settings),
        )  # fmt: skip
        return max_length(config, tmp_path), json.loads((tmp_path / "max_length.json").read_text())

    return SimpleNamespace(run=run, tried=tried)


def test_five_probes_and_one_try(search):
    length, found = search.run(line_gib)
    # (9 - 0.5 - 8 x 0.25) GiB / 25e-4 GiB per token = 2600, in whole tiles of both ranks
    assert length == found["predicted_length"] == 2560
    assert found["limit_gib"] == 9.0
    assert search.tried == [(1, 1024), (1, 2048), (1, 4096), (2, 2048), (2, 4096), (8, 2560)]
    assert found["confirmed"]["length"] == 2560
    assert found["longest_by_layers"] == {"1": 20480, "2": 11264, "4": 5632, "8": 2560}


def test_explain_says_what_would_be_searched_and_starts_nothing(search, tmp_path, capsys):
    search.run(line_gib)
    probes = list(search.tried)
    capsys.readouterr()
    config = Config(
        recipe="max_length", explain=True, model=ModelConfig(num_layers=8), launch=LaunchConfig(num_ranks=2),
        max_length=MaxLengthConfig(memory_gib=40.0, confirm_s=60.0),
    )  # fmt: skip
    max_length(config, tmp_path)
    assert search.tried == probes
    said = capsys.readouterr().out
    assert said.startswith("a search for the longest sequence that tiny trains on 2 ranks")
    few, more = ([length for layers, length in probes[:5] if layers == n] for n in (1, 2))
    assert f"of 1 layer at L = {', '.join(f'{length:,}' for length in few)} " in said
    assert f"of 2 layers at {' and '.join(f'{length:,}' for length in more)}," in said
    for part in ("the longest L of 8 layers", "40 GiB per rank, max_length.memory_gib", "max_length.confirm_s=60 s"):
        assert part in said
    assert "tokens per step" not in said  # of training


def test_a_step_that_takes_too_long_is_not_tried(search, capsys):
    length, found = search.run(line_gib, confirm_s=0.0)
    assert (length, found["confirmed"], search.tried[-1]) == (2560, None, (2, 4096))
    assert "not tried: 2 steps should take" in capsys.readouterr().out


def test_probes_that_have_no_memory_are_made_shorter(search):
    length, _ = search.run(line_gib, capacity_gib=2.5, memory_gib=4.0, confirm_s=0.0)
    assert search.tried == [(1, 1024), (1, 2048), (1, 4096), (2, 2048), (2, 4096), (1, 512), (2, 1024)]
    assert length == 512  # (4 - 0.5 - 8 x 0.25) GiB / 25e-4 GiB per token = 600


def test_memory_that_does_not_follow_the_line_is_probed_further_then_given_up(search, capsys):
    with pytest.raises(RunFailed, match="no length can be predicted: L = 8,192 and 16,384 peak at"):
        search.run(lambda layers, length: 1 + layers * length**2 / 1e8)
    assert (1, 32768) in search.tried
    assert "so longer ones are probed" in capsys.readouterr().out


def test_a_try_without_memory_is_made_once_more_and_shorter(search, capsys):
    length, found = search.run(line_gib, capacity_gib=8.5, memory_gib=9.0)
    assert (length, search.tried[-2:]) == (2048, [(8, 2560), (8, 2048)])
    assert found["confirmed"]["length"] == 2048
    assert "L = 2,560 does not fit: the prediction was too high; trying 5 % less" in capsys.readouterr().out


@pytest.mark.parametrize("more", [1.02, 1.2])
def test_steps_that_take_more_than_was_given_are_not_confirmed(search, capsys, more):
    length, found = search.run(lambda layers, length: line_gib(layers, length) * (more if layers == 8 else 1))
    assert (length, search.tried[-2:]) == (2048, [(8, 2560), (8, 2048)])
    assert (found["confirmed"] is not None) == (more * line_gib(8, 2048) <= 9.0)
    said = capsys.readouterr().out
    assert f"L = 2,560 does not fit, it peaks at {more * line_gib(8, 2560):.3f} GiB: the prediction" in said
    assert ("L = 2,048 does not fit either" in said) == (found["confirmed"] is None)


def test_a_model_that_fits_at_no_length_is_refused(search):
    with pytest.raises(
        ConfigError, match=r"no length of 512 tokens or more fits: 8 layers without any take 2\.50 GiB per rank"
    ):
        search.run(line_gib, memory_gib=2.5)


def test_only_want_of_memory_is_a_probes_result(monkeypatch, tmp_path):
    probe = Probe(Config(attention=AttentionConfig(), data=DataConfig()))

    def fails(error):
        def measure(self, run_dir):
            raise error

        monkeypatch.setattr(Probe, "_measure", measure)

    fails(ValueError("another"))
    with pytest.raises(ValueError, match="another"):
        probe.run(tmp_path, io.StringIO())
    assert not (tmp_path / NO_MEMORY_FILE).exists()
    fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RunFailed, match="a probe ran out of memory: CUDA out of memory"):
        probe.run(tmp_path, io.StringIO())
    assert (tmp_path / NO_MEMORY_FILE).read_text() == "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"recompute": "selective"}, 16384),  # MLPs come in tiles of 12,288 tokens
        ({"recompute": "selective", "micro_batch_size": 2}, 8192),
        ({}, 4096),  # the loss in tiles of 2,048
        ({"tile_tokens": 0}, 4096),
    ],
)
def test_the_shortest_probe_has_the_tiles_that_longer_ones_have(engine, expected):
    config = Config(model=ModelConfig(mlp_size=14336, vocab_size=128256), engine=EngineConfig(**engine))
    assert first_tokens(config, on_gpu=True) == expected
