"""`train.execute` where no rank starts: refusals before torch is imported, finished runs, explain=true."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from conf.schema import (
    AttentionConfig,
    CompareConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    LaunchConfig,
    ModelConfig,
)
from data.corpus import Corpus
from data.source import CorpusError
from recipes.checkpoint.manifest import read_manifest, write_manifest
from tests.errors import names, refused, some_line_names
from tests.unit.test_manifest import published, resolved

ROOT = Path(train.__file__).parent
TOO_SHORT = ("6 tokens", "18,432", "8 validation sequences", "data.sequence_length=2048")
TWO_RANKS = LaunchConfig(num_ranks=2)


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def tiny(tmp_path) -> DataConfig:
    """A corpus of 6 tokens."""
    (tmp_path / "tiny.txt").write_text("tiny\n")
    return DataConfig(source="text_files", files=str(tmp_path / "tiny.txt"))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("data=DataConfig(source='text_files', files='tiny.txt')", TOO_SHORT),
        ("recipe='forward', data=DataConfig(source='text_files', files='tiny.txt')", TOO_SHORT),
        ("data=DataConfig(source='text_files', files='.')", ["data.files=.", "data.files='./*.txt'"]),
        ("data=DataConfig(source='hub', name='nobody/nothing')", ["data.name=nobody/nothing", "data=stdlib"]),
        (
            "launch=LaunchConfig(num_ranks=4), parallelism=ParallelismConfig(ring_degree=3)",
            ["parallelism.ring_degree=3", "4 ranks", "parallelism.ring_degree=4"],
        ),
    ],
)
def test_settings_and_data_are_refused_before_torch_is_imported(tmp_path, settings, parts):
    (tmp_path / "tiny.txt").write_text("tiny\n")
    code = f"""
import sys
from pathlib import Path
from conf.schema import Config, ConfigError, DataConfig, LaunchConfig, ParallelismConfig
from train import execute
try:
    execute(Config({settings}), [], Path("run"))
except ConfigError as error:
    print("torch" in sys.modules, error)
"""
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    imported, _, message = result.stdout.partition(" ")
    assert imported == "False", result.stdout + result.stderr
    names(message, *parts)


@pytest.mark.parametrize("explain", [False, True])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tiny_llama, explain):
    config = Config(data=DataConfig(tokenizer=str(tiny_llama)), launch=TWO_RANKS, explain=explain)
    with refused(CorpusError, "2,048 tokens", "model.vocab_size=257", "model.vocab_size=2048"):
        train.execute(config, [], tmp_path)


@pytest.mark.parametrize("recipe", ["pretrain", "compare", "max_length"])
def test_an_unsupported_device_is_refused(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ConfigError, match=r"^DS_ACCELERATOR=xpu "):
        train.execute(Config(recipe=recipe, compare=CompareConfig(entries={"one": []})), [], tmp_path)


def test_a_finished_run_does_not_need_its_data(tmp_path, tiny):
    config = Config(data=tiny, launch=TWO_RANKS)
    published(tmp_path, config.num_steps, config=resolved(config))
    (tmp_path / "summary.json").write_text(json.dumps({"validation_loss": 2.5}))
    (tmp_path / "tiny.txt").unlink()
    assert train.execute(config, [], tmp_path) == 2.5


@pytest.mark.parametrize("recipe", ["pretrain", "forward"])
def test_explain_reports_a_bad_corpus_last(tmp_path, tiny, capsys, recipe):
    config = Config(data=tiny, launch=TWO_RANKS, explain=True, recipe=recipe)
    with refused(CorpusError, *TOO_SHORT):
        train.execute(config, [], tmp_path)
    assert "parameters: " in capsys.readouterr().out


def test_of_a_launchers_ranks_one_prints_the_preview(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("text " * 100)
    data = DataConfig("text_files", files=str(tmp_path / "a.txt"), preview=1, sequence_length=40)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        train.execute(Config(data=data, launch=TWO_RANKS), [], tmp_path)
        assert ("sequence 1" in capsys.readouterr().out) is (rank == "0")


def test_explain_downloads_no_data(tmp_path, capsys):
    config = Config(data=DataConfig(source="hub", name="nobody/nothing"), launch=TWO_RANKS, explain=True)
    assert train.execute(config, [], tmp_path) is None
    assert "parameters: " in capsys.readouterr().out
    config.data.name = str(tmp_path / "set")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_text('{"text": "tiny\\n"}\n')
    with refused(CorpusError, *TOO_SHORT):
        train.execute(config, [], tmp_path)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"tokenizer": "/no/such"}, ["data.tokenizer=/no/such", "OWNER/NAME"]),
        ({"source": "hub", "name": "./such"}, ["data.name=./such", "data=stdlib"]),
        ({"source": "hub", "name": "folder", "stream": True}, TOO_SHORT),
        ({"source": "hub", "name": "OWNER/NAME", "tokenizer": "llama"}, ["2,048 tokens", "model.vocab_size=257"]),
    ],
)
def test_explain_refuses_data_in_the_words_of_the_run(tmp_path, tiny_llama, monkeypatch, settings, parts):
    """As far as nothing needs to be downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "llama").symlink_to(tiny_llama)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_text('{"text": "tiny\\n"}\n')
    messages = []
    for explain in (True, False):
        with pytest.raises(CorpusError) as caught:
            train.execute(Config(data=DataConfig(**settings), launch=TWO_RANKS, explain=explain), [], tmp_path / "run")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    names(messages[0], *parts)


def test_explain_refuses_files_though_the_tokenizer_is_on_the_hub(tmp_path):
    data = DataConfig(source="text_files", files=str(tmp_path), tokenizer="OWNER/NAME")
    with refused(CorpusError, f"data.files='{tmp_path}/*.txt'"):
        train.execute(Config(data=data, launch=TWO_RANKS, explain=True), [], tmp_path)


def test_explain_refuses_the_run_dir_of_another_run(tmp_path):
    published(tmp_path, 5, config=resolved(Config()))
    config = Config(seed=1, launch=TWO_RANKS, explain=True)
    with refused(ConfigError, "seed was 0 and is 1", "hydra.run.dir"):
        train.execute(config, [], tmp_path)


def test_explain_does_not_refuse_files_that_have_moved_where_it_opens_none(tmp_path):
    """The run knows them by their documents. Here the tokenizer is on the hub."""
    for name in ("old", "new"):
        (tmp_path / name).write_text("text " * 1000)
    run = DataConfig(source="text_files", files=str(tmp_path / "old"), tokenizer="OWNER/NAME")
    folder = published(tmp_path, 5, config=resolved(Config(data=run)))
    write_manifest(folder, replace(read_manifest(folder), documents={"text_files": "abc"}))
    moved = replace(run, files=str(tmp_path / "new"))
    train.execute(Config(data=moved, launch=TWO_RANKS, explain=True), [], tmp_path)
    with refused(ConfigError, "seed was 0 and is 1"):
        train.execute(Config(data=moved, seed=1, launch=TWO_RANKS, explain=True), [], tmp_path)


def test_explain_refuses_to_measure_documents_that_a_run_trained_on(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.held_out.check_held_out", held_out_of_another_run)
    (tmp_path / "a.txt").write_text("text " * 1000)
    data = DataConfig("text_files", files=str(tmp_path / "a.txt"))
    evaluate = EvaluateConfig(model=str(tiny_llama), tasks=["loss"], lengths=[64])
    config = Config(recipe="evaluate", evaluate=evaluate, data=data, launch=TWO_RANKS, explain=True)
    with refused(ConfigError, "data.validation_sequences=2"):
        train.execute(config, [], tmp_path)


def held_out_of_another_run(config: Config, corpus: Corpus) -> list[str]:
    assert corpus.config.sequence_length == config.data.sequence_length == 64
    raise ConfigError("type data.validation_sequences=2")


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"engine": EngineConfig(dtype="fp16")}, "engine.dtype=fp16 needs a GPU"),
        ({"attention": AttentionConfig(transport="copy_engine")}, "attention.transport=copy_engine needs GPUs"),
    ],
)
def test_explain_says_what_this_machine_lacks(tmp_path, capsys, settings, refusal):
    train.execute(Config(explain=True, launch=TWO_RANKS, **settings), [], tmp_path)
    assert f"a run is refused: {refusal}" in capsys.readouterr().out
    hardware = {"explain_gpu": "h100", "launch": LaunchConfig(num_ranks=64)}
    train.execute(Config(explain=True, **hardware, **settings), [], tmp_path)
    text = capsys.readouterr().out
    assert "a run is refused" not in text
    assert "1 data x 64 ring, on NVIDIA H100" in text


@pytest.mark.parametrize("num_gpus", [0, 2])
def test_explain_gpu_replaces_the_hardware_here(tmp_path, capsys, monkeypatch, num_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    hybrid = AttentionConfig("hybrid")
    model = ModelConfig(num_heads=64, num_kv_heads=64, hidden_size=256)
    hardware = {"explain_gpu": "b200", "launch": LaunchConfig(num_ranks=64)}
    train.execute(Config(explain=True, attention=hybrid, model=model, **hardware), [], tmp_path)
    text = capsys.readouterr().out
    assert "64 x NVIDIA B200, 8 per host" in text
    assert "1 data x 8 ring x 8 ulysses" in text  # Ulysses within a host
    assert "transport copy_engine over symmetric memory and NCCL" in text
    assert " of 178.30 GiB, the memory of one rank" in text


def test_explain_gpu_needs_of_a_model_its_configuration_alone(tmp_path, capsys, tiny_llama):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_llama / "config.json", folder)
    model = ModelConfig(path=str(folder))
    (tmp_path / "text.txt").write_text("Sequences too long for one GPU. " * 10_000)
    data = DataConfig(source="text_files", files=str(tmp_path / "text.txt"))
    explained = Config(explain=True, explain_gpu="h100", model=model, data=data, launch=LaunchConfig(num_ranks=8))
    train.execute(copy.deepcopy(explained), [], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    some_line_names(lines, "1,311,872")
    some_line_names(lines, "packing", folder, "data.tokenizer=FOLDER")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    train.execute(explained, [], tmp_path)
    some_line_names(capsys.readouterr().out.splitlines(), "data.packing=concatenate")


def test_explain_downloads_no_tokenizer(monkeypatch):
    """Nor does it say that a model on the hub has none."""

    def load(name: str) -> None:
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setattr("data.tokenizer._load", load)
    name = "OWNER/NAME"
    settings = {"model": ModelConfig(path=name), "data": DataConfig(tokenizer=name)}
    config = Config(explain=True, explain_gpu="h100", launch=LaunchConfig(num_ranks=8), **settings)
    reason = train._corpus_to_explain(config)
    assert isinstance(reason, str)
    names(reason, "not shown", "is no folder here")


def test_explain_says_whose_memory_ranks_on_the_cpu_share(tmp_path, capsys):
    train.execute(Config(explain=True, launch=LaunchConfig(num_ranks=8)), [], tmp_path)
    assert re.search(r"the CPU here, whose [\d.]+ GiB 8 ranks share; explain_gpu=", capsys.readouterr().out)


def test_explain_of_bench_attention_reads_no_data(tmp_path, tiny, capsys):
    train.execute(Config(data=tiny, launch=TWO_RANKS, explain=True, recipe="bench_attention"), [], tmp_path)
    assert "attention kernel" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "is_file", "is_told"), [("0", False, True), ("1", False, False), ("1", True, True)])
def test_a_file_that_fails_on_one_rank_alone_is_told(monkeypatch, capsys, rank, is_file, is_told):
    def fails(*_: object) -> None:
        raise FileNotFoundError(2, "No such file", "the_file") if is_file else ConfigError("the_file")

    monkeypatch.setattr(train, "execute", fails)
    monkeypatch.setattr(train, "REFUSED_S", 0.0)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert train._run_as_one_rank([]) == 1
    assert ("error: " in capsys.readouterr().err) == is_told
