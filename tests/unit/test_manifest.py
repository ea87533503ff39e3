"""Checkpoint files: verification, retention, and which configurations may resume from them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from conf.degrees import resolve_config, resolve_degrees
from conf.schema import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    flatten,
)
from data.corpus import LastRead
from recipes.checkpoint.manifest import (
    BEST_FILE,
    CHECKPOINTS_DIR,
    LATEST_FILE,
    MANIFEST_FILE,
    WRITING_DIR,
    BrokenCheckpoint,
    Manifest,
    best_checkpoint,
    check_files,
    check_same_run,
    fingerprint,
    is_resharded,
    move_aside,
    newest_first,
    publish,
    read_manifest,
    score_of,
    step_name,
    write_manifest,
)
from recipes.launch.launcher import result_if_finished
from tests.errors import is_named, names, refused


def resolved(config: Config, num_ranks: int = 2) -> Config:
    config = copy.deepcopy(config)
    resolve_config(config, resolve_degrees(config, num_ranks), num_ranks)
    return config


def write(run_dir: Path, step: int, config: Config | None = None, score: list[float] | None = None) -> Path:
    """A checkpoint of two files, as it is before it is published."""
    folder = run_dir / CHECKPOINTS_DIR / WRITING_DIR / step_name(step)
    folder.mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"weights" * 100)
    (folder / "b.pt").write_bytes(b"")
    files = {name: fingerprint(folder / name) for name in ("a.pt", "b.pt")}
    settings = asdict(config or resolved(Config()))
    write_manifest(folder, Manifest(step, LastRead(0, step, "abc"), 1.5, "id", settings, {"torch": "2"}, files, score))
    return folder


def published(
    run_dir: Path, step: int, keep: int = 2, config: Config | None = None, score: list[float] | None = None
) -> Path:
    write(run_dir, step, config, score)
    publish(run_dir, step, keep)
    return run_dir / CHECKPOINTS_DIR / step_name(step)


def test_a_manifest_survives_a_round_trip_and_its_files_are_intact(tmp_path):
    folder = published(tmp_path, 5)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.wandb_run_id, manifest.elapsed_s) == (5, "id", 1.5)
    assert manifest.last_read == LastRead(0, 5, "abc")
    assert manifest.config == asdict(resolved(Config()))
    assert manifest.files["a.pt"]["num_bytes"] == 700
    check_files(folder, manifest, manifest.files)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = published(tmp_path, 5)
    manifest = read_manifest(folder)
    (folder / "a.pt").unlink()
    (folder / "a.pt").mkdir()  # as any other error of a disk: opening it raises OSError
    with refused(BrokenCheckpoint, folder / "a.pt"):
        check_files(folder, manifest, manifest.files)


@pytest.mark.parametrize(
    ("content", "parts"),
    [(b"", [0, 700]), (b"weights" * 99 + b"weightS", ["checksum"]), (None, ["missing"])],
    ids=["truncated", "flipped", "missing"],
)
def test_a_changed_file_is_named(tmp_path: Path, content: bytes | None, parts: list[object]):
    folder = published(tmp_path, 5)
    (folder / "a.pt").unlink() if content is None else (folder / "a.pt").write_bytes(content)
    manifest = read_manifest(folder)
    with refused(BrokenCheckpoint, folder / "a.pt", *parts):
        check_files(folder, manifest, manifest.files)
    check_files(folder, manifest, ["b.pt"])  # another rank's share


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace('"step": 5', '"step": 6')])
def test_a_changed_manifest_is_named(tmp_path, damage):
    path = published(tmp_path, 5) / MANIFEST_FILE
    path.write_text(damage(path.read_text()))
    with refused(BrokenCheckpoint, path):
        read_manifest(path.parent)
    path.unlink()
    with refused(BrokenCheckpoint, path, "No such file or directory"):
        read_manifest(path.parent)


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    for step in (5, 90, 100_000_000):
        published(tmp_path, step, keep=2)
    assert [path.name for path in newest_first(tmp_path)] == ["step_100000000", "step_00000090"]
    assert (tmp_path / CHECKPOINTS_DIR / LATEST_FILE).read_text() == "step_100000000"
    assert not (tmp_path / CHECKPOINTS_DIR / WRITING_DIR).exists()


def test_the_best_is_kept_beside_the_newest(tmp_path):
    scores = {10: [0.25, -3.0], 20: [0.75, -2.0], 30: None, 40: [0.75, -2.0], 50: [0.5, -1.0], 60: [0.75, -1.5]}
    kept = {}
    for step, score in scores.items():
        published(tmp_path, step, keep=1, score=score)
        kept[step] = [int(path.name.removeprefix("step_")) for path in newest_first(tmp_path)]
    assert kept == {10: [10], 20: [20], 30: [30, 20], 40: [40, 20], 50: [50, 20], 60: [60]}
    assert (tmp_path / CHECKPOINTS_DIR / BEST_FILE).read_text() == "step_00000060"
    published(tmp_path, 70, keep=2)
    (tmp_path / CHECKPOINTS_DIR / "step_00000060" / MANIFEST_FILE).write_text("{}")
    assert best_checkpoint(tmp_path) is None  # no intact one has a score


def test_a_manifest_of_an_older_version_has_no_score(tmp_path):
    folder = published(tmp_path, 5)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    del content["score"], content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(json.dumps(content | {"sha256": digest}))
    assert read_manifest(folder).score is None


@pytest.mark.parametrize(
    ("metrics", "evaluates", "score"),
    [
        ({"evaluation/accuracy": 0.5, "evaluation/answer_loss": 2.0, "evaluation/loss": 3.0}, True, [0.5, -2.0]),
        ({"evaluation/loss": 3.0, "validation/loss": 4.0}, True, [-3.0]),
        ({"validation/loss": 4.0}, True, None),  # of a step without an evaluation
        ({"validation/loss": 4.0}, False, [-4.0]),
        ({"evaluation/accuracy": 0.0, "evaluation/answer_loss": math.nan}, True, None),
        ({}, False, None),
    ],
)
def test_the_score_of_a_step(metrics: dict[str, float | None], evaluates: bool, score: list[float] | None):
    assert score_of(metrics, evaluates) == score


def test_an_unpublished_checkpoint_does_not_count(tmp_path):
    write(tmp_path, 5)
    assert newest_first(tmp_path) == []


def test_a_checkpoint_that_could_not_be_read_is_moved_aside_and_never_removed(tmp_path):
    for number in (1, 2):
        name = step_name(30) + {1: ".broken", 2: ".broken-2"}[number]
        aside = move_aside(published(tmp_path, 30))
        assert aside == tmp_path / CHECKPOINTS_DIR / name
        assert newest_first(tmp_path) == []
        check_files(aside, read_manifest(aside), ["a.pt", "b.pt"])  # the disk may have failed only for a while
    published(tmp_path, 30, keep=1)
    published(tmp_path, 40, keep=1)
    assert {path.name for path in (tmp_path / CHECKPOINTS_DIR).glob("step_*")} == {
        step_name(40),
        f"{step_name(30)}.broken",
        f"{step_name(30)}.broken-2",
    }


def test_another_configuration_is_refused_by_field(tmp_path):
    folder = published(tmp_path, 5)
    other = resolved(Config(model=ModelConfig(num_layers=4), optimizer=OptimizerConfig(lr=1e-3), num_steps=600))
    with pytest.raises(ConfigError) as caught:
        check_same_run(folder, read_manifest(folder), other)
    text = str(caught.value)
    names(text, folder, "hydra.run.dir")
    names(text, "model.num_layers", 2, 4, "optimizer.lr", 0.003, 0.001, "num_steps", 300, 600)
    named = [field for field in flatten(asdict(Config())) if is_named(text, field)]
    assert sorted(named) == ["model.num_layers", "num_steps", "optimizer.lr"]


def test_another_tokenizer_is_another_run(tmp_path):
    folder = published(tmp_path, 5)
    other = resolved(Config(data=DataConfig(tokenizer="owner/model")))
    with refused(ConfigError, folder, "data.tokenizer", None, "owner/model", "hydra.run.dir"):
        check_same_run(folder, read_manifest(folder), other)


@pytest.mark.parametrize("before", [None, {"rope_type": "yarn", "factor": 4}])
def test_other_rotary_embeddings_are_another_run(tmp_path, before):
    config = Config(model=ModelConfig(path="owner/model", rope=before))
    folder = published(tmp_path, 5, config=resolved(config))
    other = resolved(Config(model=ModelConfig(path="owner/model", rope=None if before else {"factor": 4})))
    with refused(ConfigError, folder, "model.rope.factor", None, 4):
        check_same_run(folder, read_manifest(folder), other)


@pytest.fixture
def texts(tmp_path) -> DataConfig:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a text")
    return DataConfig(source="text_files", files=f"{tmp_path}/old/*.txt")


def test_files_that_have_moved_are_the_same_run_if_their_documents_are(tmp_path, texts):
    moved = resolved(Config(data=replace(texts, files=f"{tmp_path}/new/*.txt")))
    folder = published(tmp_path, 5, config=resolved(Config(data=texts)))
    manifest = replace(read_manifest(folder), documents={"text_files": "abc"})
    assert check_same_run(folder, manifest, moved, {"text_files": "abc"}) == []
    with refused(ConfigError, folder, "data.files", texts.files, moved.data.files, "other documents"):
        check_same_run(folder, manifest, moved, {"text_files": "def"})
    moved.data.shuffle_seed = 1
    with pytest.raises(ConfigError, match=r"run: data.shuffle_seed was 0 and is 1: type"):
        check_same_run(folder, manifest, moved, {"text_files": "abc"})


def test_where_nobody_knows_the_documents_files_that_have_moved_must_be_linked(tmp_path, texts):
    """As in a stream, and in a checkpoint of before manifests had digests."""
    moved = resolved(Config(data=replace(texts, files=f"{tmp_path}/new/*.txt")))
    folder = published(tmp_path, 5, config=resolved(Config(data=texts)))
    manifest = read_manifest(folder)
    for before, now in ((None, {"text_files": "abc"}), ({"text_files": "abc"}, None)):
        with refused(ConfigError, "data.files", texts.files, moved.data.files, "ln -s NEW_PATH OLD_PATH"):
            check_same_run(folder, replace(manifest, documents=before), moved, now)


def test_documents_that_have_changed_are_another_run(tmp_path, texts):
    config = resolved(Config(data=texts))
    folder = published(tmp_path, 5, config=config)
    manifest = replace(read_manifest(folder), documents={"a": "abc", "a, validation": "def"})
    assert check_same_run(folder, manifest, config, {"a": "abc", "a, validation": "def"}) == []
    with refused(ConfigError, folder, "a, validation", "hydra.run.dir"):
        check_same_run(folder, manifest, config, {"a": "abc", "a, validation": "xyz"})


def test_other_weights_of_a_mixture_are_another_run_and_named_once(tmp_path):
    def mixture(a: float) -> Config:
        sources = {name: {"source": "stdlib", "weight": weight} for name, weight in (("a", a), ("b", 1 - a))}
        return resolved(Config(data=DataConfig(source="mixture", sources=sources)))

    folder = published(tmp_path, 5, config=mixture(0.5))
    with pytest.raises(ConfigError) as caught:
        check_same_run(folder, read_manifest(folder), mixture(0.25))
    assert str(caught.value).count("data.sources.a.weight was 0.5 and is 0.25") == 1


def test_resume_safe_fields_may_change(tmp_path):
    folder = published(tmp_path, 5)
    other = resolved(Config(logging=LoggingConfig(every_n_steps=7, tags=["x"]), breakdown=False, profile=True))
    other.launch.timeout_s, other.checkpoint.keep = 30.0, 9
    other.data.bad_rows = "skip"  # as the error of a bad row tells people to
    check_same_run(folder, read_manifest(folder), other)


def test_other_degrees_on_as_many_ranks_resume_with_an_equal_batch(tmp_path):
    ring = resolved(Config(engine=EngineConfig(gradient_accumulation_steps=2)))
    folder = published(tmp_path, 5, config=ring)
    replicas = resolved(Config(parallelism=ParallelismConfig(data_degree=2)))
    assert check_same_run(folder, read_manifest(folder), replicas) == [
        "parallelism.data_degree 1 -> 2",
        "parallelism.ring_degree 2 -> 1",
        "engine.gradient_accumulation_steps 2 -> 1",
    ]
    replicas.engine.micro_batch_size = 3
    settings = ("engine.train_batch_size=2", "parallelism.data_degree", "engine.micro_batch_size")
    with refused(ConfigError, folder, "2 sequences", "1 x 1 x 2", 6, "2 x 3 x 1", *settings):
        check_same_run(folder, read_manifest(folder), replicas)


def test_tile_tokens_may_change_even_if_the_checkpoint_has_no_such_field(tmp_path):
    folder = published(tmp_path, 5)
    manifest, other = read_manifest(folder), resolved(Config(engine=EngineConfig(tile_tokens=64)))
    assert check_same_run(folder, manifest, other) == ["engine.tile_tokens None -> 64"]
    del manifest.config["engine"]["tile_tokens"]
    assert check_same_run(folder, manifest, other) == ["engine.tile_tokens None -> 64"]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_other_ranks_and_zero_stages_resume(tmp_path, zero_stage):
    folder = published(tmp_path, 5)
    other = resolved(Config(engine=EngineConfig(zero_stage=zero_stage)), num_ranks=4)
    assert check_same_run(folder, read_manifest(folder), other) == [
        "parallelism.ring_degree 2 -> 4",
        f"engine.zero_stage 1 -> {zero_stage}",
        "launch.num_ranks 2 -> 4",
    ]


@pytest.mark.parametrize(("zero_stage", "num_ranks", "expected"), [(1, 2, False), (1, 4, True), (3, 2, True)])
def test_ranks_and_stage_decide_whether_states_are_resharded(tmp_path, zero_stage, num_ranks, expected):
    manifest = read_manifest(published(tmp_path, 5))
    config = resolved(Config(engine=EngineConfig(zero_stage=zero_stage)), num_ranks)
    assert is_resharded(manifest, config) == expected


@pytest.mark.parametrize(("before", "after"), [(0, 1), (3, 0)])
def test_stage_0_resumes_only_from_itself(tmp_path, before, after):
    folder = published(tmp_path, 5, config=resolved(Config(engine=EngineConfig(zero_stage=before))))
    with refused(ConfigError, folder, f"engine.zero_stage={before}", after):
        check_same_run(folder, read_manifest(folder), resolved(Config(engine=EngineConfig(zero_stage=after))))


def test_tensor_pipeline_resumes_only_on_as_many_ranks(tmp_path):
    config = Config(
        attention=AttentionConfig(method="local"),
        parallelism=ParallelismConfig("tensor_pipeline"),
        data=DataConfig(document_mask=False),
    )
    folder = published(tmp_path, 5, config=resolved(config))
    with refused(ConfigError, folder, "launch.num_ranks", 2, 4):
        check_same_run(folder, read_manifest(folder), resolved(config, num_ranks=4))


def test_num_steps_may_grow_if_the_learning_rate_does_not_depend_on_it(tmp_path):
    config = resolved(Config(optimizer=OptimizerConfig(decay="constant", warmup_fraction=0)))
    folder = published(tmp_path, 5, config=config)
    check_same_run(folder, read_manifest(folder), replace(config, num_steps=600))


class TestBeforeRanksStart:
    def test_a_run_with_steps_to_do_has_no_result(self, tmp_path):
        assert result_if_finished(Config(), 2, tmp_path) is None
        published(tmp_path, 100)
        assert result_if_finished(Config(), 2, tmp_path) is None

    def test_a_broken_manifest_is_left_to_the_ranks(self, tmp_path):
        (published(tmp_path, 300) / MANIFEST_FILE).write_text("{}")
        assert result_if_finished(Config(), 2, tmp_path) is None

    def test_other_ranks_resume(self, tmp_path):
        published(tmp_path, 100)
        assert result_if_finished(Config(), 4, tmp_path) is None

    def test_another_run_is_refused(self, tmp_path):
        published(tmp_path, 100)
        with refused(ConfigError, "model.num_layers", 2, 4, "hydra.run.dir"):
            result_if_finished(Config(model=ModelConfig(num_layers=4)), 2, tmp_path)

    def test_a_finished_run_gives_its_result(self, tmp_path, capsys):
        published(tmp_path, 300)
        (tmp_path / "summary.json").write_text(json.dumps({"validation_loss": 2.5}))
        assert result_if_finished(Config(), 2, tmp_path) == 2.5
        names(capsys.readouterr().out, "300 steps", tmp_path, "hydra.run.dir")
