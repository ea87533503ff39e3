"""The arithmetic of an evaluation: buckets, cuts, cells and results that go on, its tables and its refusals."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from conf.schema import RETRIEVAL_TASKS, Config, ConfigError, DataConfig, Degrees, EvaluateConfig, ModelConfig
from data.corpus import IGNORED_LABEL, START, Pack
from data.packing import Piece
from recipes.evaluation import refusals
from recipes.evaluation.cells import Cell, depths, planned_cells, resolve
from recipes.evaluation.heatmap import draw, grid_of
from recipes.evaluation.positions import bucket_edges, bucket_of, cut_pack
from recipes.evaluation.puzzles import TASKS
from recipes.evaluation.remaining import remaining_s
from recipes.evaluation.report import summary, tables, training_metrics
from recipes.evaluation.results import Evaluation, read_evaluation, settings_of
from recipes.evaluation.scoring import pack_samples
from recipes.evaluation.tasks import Sample
from recipes.model.rope import reach
from recipes.planning.explain import banner
from recipes.planning.plan import Plan
from recipes.planning.refusal import evaluation_refusal
from recipes.run.run_dir import Row
from tests.corpora import store_of
from tests.errors import names, refused
from tests.families import tiny_config


def config_of(**evaluate) -> Config:
    return Config(recipe="evaluate", evaluate=EvaluateConfig(model="somewhere", **evaluate))


def test_the_metrics_of_an_evaluation_while_training():
    retrieval = [("a", 32, 1.0, 3.0), ("a", 32, 0.5, 2.0), ("b", 32, 0.25, 1.0), ("a", 64, 0.0, 6.0)]
    cells: list[Row] = [dict(zip(("task", "length", "accuracy", "answer_loss"), row, strict=True)) for row in retrieval]
    of_tasks = {"evaluation/accuracy/a/32": 0.75, "evaluation/accuracy/b/32": 0.25, "evaluation/accuracy/a/64": 0.0}
    means = {"evaluation/accuracy": 1 / 3, "evaluation/answer_loss": 3.0}
    assert training_metrics(cells, {"x": 1.0}) == means | of_tasks
    losses: list[Row] = [
        {"task": "loss", "source": name, "length": 64, "loss": loss} for name, loss in (("x", 2.0), ("y", 4.0))
    ]
    assert training_metrics(losses[:1], {"x": 1.0}) == {"evaluation/loss": 2.0}
    of_sources = {"evaluation/loss/x": 2.0, "evaluation/loss/y": 4.0}
    assert training_metrics(losses, {"x": 0.25, "y": 0.75}) == {"evaluation/loss": 3.5} | of_sources


def test_the_schema_has_the_names_of_the_tasks():
    assert [*TASKS] == [*RETRIEVAL_TASKS]


def test_buckets_double():
    assert bucket_edges(1) == [0, 256]
    assert bucket_edges(2048) == [0, 256, 512, 1024, 2048]
    assert bucket_edges(2049) == [0, 256, 512, 1024, 2048, 4096]
    positions = torch.tensor([0, 255, 256, 511, 512, 1023, 2047])
    assert bucket_of(positions, bucket_edges(2048)).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_a_cut_keeps_all_tokens_and_labels():
    stores = (store_of([range(10, 17), range(20, 23)]),)
    pack = Pack((Piece(0, 0, 6, True), Piece(0, 7, 10, False)), 10, START, START, stores)
    cut = cut_pack(pack, 4)
    assert cut.boundaries == (0, 4, 6, 9)
    tokens, labels = cut.read(0, 10)
    assert tokens.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22, 0]
    assert labels.tolist() == [11, 12, 13, 14, 15, 16, 21, 22, IGNORED_LABEL, IGNORED_LABEL]
    assert [array.tolist() for array in pack.read(0, 10)] == [tokens.tolist(), labels.tolist()]


def test_only_answers_of_packed_samples_are_labels():
    def sample(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Sample:
        return Sample("niah_single", 5, 0.5, prompt, answer, ())

    samples = [sample((1, 2), (3, 4)), sample((5, 6, 7, 8), (9,)), sample((1,), (2,))]
    first, second = pack_samples(samples, 2, 10)
    assert first.boundaries == (0, 4, 9)
    tokens, labels = first.read(0, 10)
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    none = IGNORED_LABEL
    assert labels.tolist() == [none, 3, 4, none, none, none, none, 9, none, none]
    assert second.boundaries == (0, 2)
    assert second.read(0, 3)[1].tolist() == [2, none, none]


def test_cells_are_the_loss_and_then_tasks_by_length_and_depth():
    config = resolve(config_of(tasks=["niah_single", "aggregation", "loss"], lengths=[64, 32], depths=3))
    assert config.data.sequence_length == 64
    assert config.evaluate.lengths == [32, 64]
    of_32 = [*(Cell("niah_single", 32, depth) for depth in (0.0, 0.5, 1.0)), Cell("aggregation", 32)]
    of_64 = [replace(cell, length=64) for cell in of_32]
    assert planned_cells(config) == [Cell("loss", 64, source="stdlib"), *of_32, *of_64]
    assert config.num_steps == 9
    assert depths(1) == [0.5]
    assert resolve(config_of()).evaluate.lengths == [2048]


def test_the_plan_says_that_the_loss_is_measured_at_the_longest_length(tmp_path: Path):
    config = resolve(config_of(tasks=["loss", "niah_single"], lengths=[64, 32]))
    lines = banner(Plan(config, 1, "cpu", "CPU", None, ranks_per_host=1), tmp_path)
    [evaluated] = [line.partition("  ")[2] for line in (line.strip() for line in lines) if line.startswith("data ")]
    loss, retrieval = evaluated.split("; ")
    names(loss, "loss", "data=stdlib", "64 tokens")
    assert "32" not in loss
    names(retrieval, "niah_single", "5 depths", "20 samples", "32, 64 tokens")


def test_an_evaluation_goes_on_where_its_file_ends(tmp_path: Path):
    config = resolve(config_of(lengths=[32]))
    assert read_evaluation(config, tmp_path) is None
    evaluation = Evaluation(settings_of(config), elapsed_s=2.5, wandb_run_id="abc")
    evaluation.add(Cell("niah_single", 32, 0.0), {"accuracy": 0.5})
    evaluation.add(Cell("aggregation", 32), {"accuracy": 0.25})
    evaluation.write(tmp_path)
    read = read_evaluation(config, tmp_path)
    assert read is not None
    assert read == evaluation
    assert (read.step, read.elapsed_s, read.wandb_run_id) == (2, 2.5, "abc")
    cells = [cell for cell in planned_cells(config) if read.has(cell)]
    assert cells == [Cell("niah_single", 32, 0.0), Cell("aggregation", 32)]
    assert read_evaluation(resolve(config_of(lengths=[32, 64])), tmp_path) == evaluation  # more cells of the same kind


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"seed": 1}, ["evaluate.seed=0", 1]),
        ({"samples": 7}, ["evaluate.samples=20", 7]),
        ({"context": 16}, ["evaluate.context=None", 16]),
    ],
)
def test_results_of_another_evaluation_are_refused(tmp_path: Path, changed: dict[str, int], parts: list[object]):
    Evaluation(settings_of(resolve(config_of()))).write(tmp_path)
    with refused(ConfigError, tmp_path / "evaluation.json", *parts, "hydra.run.dir"):
        read_evaluation(resolve(config_of(**changed)), tmp_path)


def test_of_another_model_with_another_tokenizer_the_model_is_named(tmp_path: Path):
    first, second = config_of(), config_of()
    second.evaluate.model, second.data.tokenizer = "elsewhere", "elsewhere"
    Evaluation(settings_of(resolve(first))).write(tmp_path)
    with refused(ConfigError, "evaluate.model=somewhere", "elsewhere", "hydra.run.dir"):
        read_evaluation(resolve(second), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": []}', '{"no": 1}'])
def test_a_damaged_file_of_results_is_refused(tmp_path: Path, text: str):
    (tmp_path / "evaluation.json").write_text(text)
    with refused(ConfigError, tmp_path / "evaluation.json", "hydra.run.dir"):
        read_evaluation(resolve(config_of()), tmp_path)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"tasks": ["niah"]}, ["evaluate.tasks=['niah']", "loss", "niah_single", "aggregation"]),
        ({"tasks": []}, ["evaluate.tasks=[]", "loss", "niah_single"]),
        ({"tasks": ["loss", "loss"]}, ["evaluate.tasks=['loss', 'loss']", "twice"]),
        (
            {"tasks": ["loss"], "lengths": [4096, 512, 1024]},
            ["evaluate.lengths=[4096, 512, 1024]", "evaluate.lengths=[4096]", "evaluate.context=1024"],
        ),
        ({"lengths": [512, 0]}, ["evaluate.lengths=[512, 0]", 0, 1]),
        ({"lengths": [512, 512]}, ["evaluate.lengths=[512, 512]", "twice"]),
        ({"depths": 0}, ["evaluate.depths=0", 1]),
        ({"samples": 0}, ["evaluate.samples=0", 1]),
        (
            {"tasks": ["niah_single"], "context": 64, "scoring": "generate"},
            ["evaluate.context=64", "evaluate.scoring=generate", "one_pass"],
        ),
    ],
)
def test_a_mistake_in_the_settings_is_refused(settings, parts):
    with refused(ConfigError, *parts):
        EvaluateConfig(**settings)


def test_a_length_that_does_not_hold_the_question_is_refused(tmp_path: Path):
    with refused(ConfigError, "variable_tracing", "length=64"):
        refusals.check(resolve(config_of(tasks=["loss", "variable_tracing"], lengths=[64, 4096])), tmp_path)
    refusals.check(resolve(config_of(tasks=["loss"], lengths=[64])), tmp_path)


def test_of_a_long_text_only_a_short_one_is_made_to_check_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made: list[int] = []
    monkeypatch.setattr(refusals, "make_samples", lambda *arguments: made.append(arguments[3]))
    refusals.check(resolve(config_of(tasks=["niah_single"], lengths=[10**9])), tmp_path)
    refusals.check(resolve(config_of(tasks=["niah_single"], lengths=[10**9, 300])), tmp_path)
    assert made == [8192, 300]


def test_a_length_beyond_memory_is_refused_with_ranks_and_a_length_that_may_fit():
    model, memory_bytes = ModelConfig(), 64 * 2**20
    given = resolve(replace(config_of(tasks=["niah_single"], lengths=[2**22]), model=model))
    message = evaluation_refusal(given, Degrees(1, 2, 1), memory_bytes, 2**21)
    names(message or "", "evaluate.lengths=[4194304]", "launch.check_memory=false")
    assert message is not None
    num_ranks = int(message.partition(" ranks or more")[0].rpartition(" ")[2])
    longest = int(message.partition("below ")[2].partition(" ")[0].replace(",", ""))
    assert evaluation_refusal(given, Degrees(1, num_ranks, 1), memory_bytes, math.ceil(2**22 / num_ranks)) is None
    assert evaluation_refusal(given, Degrees(1, num_ranks, 1), memory_bytes, 2**22 // (num_ranks - 1)) is not None
    assert evaluation_refusal(given, Degrees(1, 2, 1), memory_bytes, longest // 2) is None
    assert evaluation_refusal(given, Degrees(1, 2, 1), memory_bytes, longest // 2 + 1) is not None
    with refused(ConfigError, "evaluate.lengths=[4194304]"):
        Plan(given, 2, "cpu", "CPU", None, 2, memory_bytes)


def test_the_run_dir_of_a_training_run_is_refused(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    with refused(ConfigError, f"hydra.run.dir={tmp_path}", "evaluate.model"):
        refusals.check(resolve(config_of(tasks=["loss"])), tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    config = resolve(config_of(tasks=["niah_single"]))
    config.model.vocab_size = 200
    with refused(ConfigError, 257, "model.vocab_size=200"):
        refusals.check(config, tmp_path)


@pytest.mark.parametrize(
    ("length", "stretched_by", "parts"),
    [
        (2048, 1.0, []),
        (8192, 1.0, ["8,192", "2,048", "model.rope='{rope_type:yarn,factor:4}'"]),
        (9000, 2.0, ["9,000", "2,048 = 1,024 x 2", "model.rope='{rope_type:yarn,factor:9}'"]),
    ],
)
def test_lengths_beyond_the_rotary_embeddings_are_warned_of(length: int, stretched_by: float, parts: list[str]):
    model = ModelConfig()
    model.max_positions, model.stretched_by = 2048, stretched_by  # as `pretrained.resolve` reads them
    config = replace(config_of(), model=model, data=DataConfig(sequence_length=length))
    warning = Plan(config, 1, "cpu", "CPU", None, ranks_per_host=1).position_warning
    assert (warning is None) == (not parts)
    names(warning or "", *parts)
    for is_packed, what in ((True, "documents of up to"), (False, "sequences of")):
        data = replace(config.data, document_mask=is_packed)
        training = Plan(Config(model=model, data=data), 1, "cpu", "CPU", None, ranks_per_host=1)
        assert (training.position_warning is None) == (not parts)
        names(training.position_warning or "", *([what, *parts] if parts else []))


CELLS = [
    {"task": "niah_single", "length": 512, "depth": 0.0, "samples": 2, "accuracy": 1.0, "answer_loss": 0.5},
    {"task": "niah_single", "length": 512, "depth": 1.0, "samples": 2, "accuracy": 0.5, "answer_loss": 0.5},
    {"task": "niah_single", "length": 4096, "depth": 1.0, "samples": 2, "accuracy": 0.0, "answer_loss": 9.0},
    {"task": "aggregation", "length": 512, "samples": 2, "accuracy": 0.25, "answer_loss": 2.0},
    {
        "task": "loss",
        "length": 4096,
        "source": "stdlib",
        "loss": 1.5,
        "tokens": 40,
        "context": 64,
        "buckets": [
            {"start": 0, "stop": 256, "tokens": 30, "loss": 1.75, "loss_of_context": 2.0},
            {"start": 256, "stop": 512, "tokens": 5, "loss": 0.75, "loss_of_context": 1.0},
            {"start": 512, "stop": 1024, "tokens": 5, "loss": 0.75, "loss_of_context": 0.75001},
        ],
    },
]


def test_tables_have_means_by_task_and_by_depth():
    lines = [line.split() for line in tables(CELLS)]
    assert ["niah_single", "75.0", "0.0"] in lines
    assert ["aggregation", "25.0"] in lines
    assert ["0.00", "100.0"] in lines
    assert ["1.00", "50.0", "0.0"] in lines
    assert ["256", "-", "512", "5", "0.7500", "1.0000", "-0.2500"] in lines
    assert ["512", "-", "1,024", "5", "0.7500", "0.7500", "+0.0000"] in lines
    assert summary(CELLS) == {
        "accuracy/niah_single/512": 0.75,
        "accuracy/niah_single/4096": 0.0,
        "accuracy/aggregation/512": 0.25,
        "loss/stdlib/4096": 1.5,
    }
    assert tables([CELLS[-1]])[1].startswith("loss")


def test_the_heat_map_has_what_was_measured(tmp_path: Path):
    assert grid_of(CELLS[:3]) == ([512, 4096], [0.0, 1.0], [[1.0, None], [0.5, 0.0]])
    assert grid_of([CELLS[3]]) == ([512], [None], [[0.25]])
    path = draw(CELLS, "a model", tmp_path)
    assert path == tmp_path / "evaluation.png"
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert draw([CELLS[-1]], "a model", tmp_path) is None


def test_a_long_path_is_wrapped_in_the_title_of_the_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    titles: list[str] = []
    original = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, t, **more: (titles.append(t), original(self, t, **more))[1])
    model = "/runs/" + 10 * "a-long-name/"
    draw([CELLS[0]], model, tmp_path)
    assert "".join(titles[0].splitlines()[1:]) == model
    assert max(map(len, titles[0].splitlines())) < 50


def test_the_remaining_time_follows_the_cells_of_nearest_work():
    assert remaining_s([10.0, 100.0], [(10.0, 9.0)]) == pytest.approx(9 + 90)
    short = [(10.0, 9.0), (10.0, 1.0), (10.0, 1.0)]  # the first loads kernels
    assert remaining_s([10.0, 100.0], short) == pytest.approx(1 + 10)
    both = [*short, (100.0, 4.0)]  # long cells keep a device busier
    assert remaining_s([10.0, 10.0, 80.0, 200.0], both) == pytest.approx(2 + 0.04 * 280)
    assert remaining_s([], both) == 0


def test_the_settings_of_an_evaluation_are_json():
    settings = settings_of(resolve(config_of()))
    assert json.loads(json.dumps(settings)) == settings
    assert settings.keys() >= {f"data.{name}" for name in ("source", "packing", "tokenizer")}
    assert "data.sequence_length" not in settings
    assert asdict(Evaluation(settings))["cells"] == []


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, (512, 1.0)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, (2048, 4.0)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, (512, 4.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, (None, 1.0)),
    ],
)
def test_how_far_rotary_embeddings_reach(rope: dict[str, object], expected: tuple[int | None, float]):
    assert reach(tiny_config("qwen3", rope_parameters={"rope_theta": 1e4, **rope})) == expected


def test_a_model_whose_kept_keys_would_be_wrong_is_not_scored_by_decoding(tmp_path: Path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    tiny_config("llama", rope_parameters=rope).save_pretrained(tmp_path / "model")
    config = resolve(config_of(tasks=["niah_single"], lengths=[1024], scoring="generate"))
    config.model.path, config.model.vocab_size = str(tmp_path / "model"), 320
    with refused(ConfigError, "evaluate.scoring=generate", "rope_type=dynamic", "1,024", "evaluate.scoring=one_pass"):
        refusals.check(config, tmp_path)
    config.evaluate.scoring = "one_pass"
    refusals.check(config, tmp_path)


def test_rotary_embeddings_by_kind_of_layer_reach_as_far_as_the_furthest():
    theta = {"rope_type": "default", "rope_theta": 1e4}
    stretched = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 128}
    kinds = {"sliding_attention": theta, "full_attention": stretched}
    assert reach(tiny_config("gemma3_text", rope_parameters=kinds)) == (1024, 8.0)
