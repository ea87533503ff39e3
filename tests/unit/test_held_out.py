"""An evaluation of a run measures no loss of documents that the run trained on, and says where settings differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from conf.schema import Config, ConfigError, DataConfig, EvaluateConfig
from data.corpus import LastRead, open_corpus
from recipes.checkpoint.manifest import Manifest, write_manifest
from recipes.evaluation.held_out import check_held_out
from tests.errors import names, refused

LENGTH = 64
Check = Callable[..., list[str]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of texts of 8 to 200 bytes."""
    generator, folder = random.Random(0), tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        text = "".join(generator.choices("abcdef ", k=generator.randrange(8, 200)))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


@pytest.fixture
def run(texts: Path, tmp_path: Path) -> DataConfig:
    """The data of a run that holds out 4 x 64 tokens, and has read two sequences."""
    return DataConfig(
        source="text_files",
        files=f"{texts}/*.txt",
        token_store=str(tmp_path / "tokens"),
        sequence_length=LENGTH,
        validation_sequences=4,
    )


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks an evaluation with these data settings of a run with those."""

    def checked(
        run: DataConfig, now: DataConfig, tasks: tuple[str, ...] = ("loss",), knows_documents: bool = False
    ) -> list[str]:
        last_read = second_sequence(replace(run, stream=False))
        digests = open_corpus(run).digests() if knows_documents else None
        settings = asdict(Config(data=run))
        write_manifest(tmp_path, Manifest(2, last_read, 0.0, "", settings, {}, {}, documents=digests))
        return evaluated(tmp_path, now, tasks)

    return checked


def second_sequence(run: DataConfig) -> LastRead:
    packs = open_corpus(run).training()
    last = [next(packs) for _ in range(2)][-1]
    return LastRead(*last.position, last.sha256())


def evaluated(folder: Path, now: DataConfig, tasks: tuple[str, ...] = ("loss",)) -> list[str]:
    evaluate = EvaluateConfig(model=str(folder), tasks=list(tasks))
    return check_held_out(Config(recipe="evaluate", data=now, evaluate=evaluate), open_corpus(now))


def test_the_documents_of_the_run_are_evaluated_without_a_word(check: Check, run: DataConfig):
    assert check(run, run) == []
    assert check(run, replace(run, validation_sequences=2)) == []
    assert check(run, replace(run, sequence_length=2 * LENGTH, validation_sequences=2)) == []


def test_more_tokens_than_the_run_held_out_are_refused_with_a_number_that_fits(check: Check, run: DataConfig):
    longer = replace(run, sequence_length=2 * LENGTH)
    parts = [
        "data.validation_sequences=4 x 64",
        "4 x 128",
        "data.validation_sequences=2",
        "data.validation_files=FILES",
    ]
    with refused(ConfigError, "256 of the 512 tokens", *parts):
        check(run, longer)
    assert check(run, longer, tasks=("niah_single",)) == []


@pytest.mark.parametrize("shuffle_seed", range(8))
def test_the_rest_of_a_document_that_the_run_cut_is_refused(check: Check, run: DataConfig, shuffle_seed: int):
    """The longer sequence holds the document whole: so many tokens are held out, but not the same."""
    run = replace(run, packing="best_fit", shuffle_seed=shuffle_seed)
    trained = {piece[1:3] for pack in next_epoch(run) for piece in pack.pieces}
    now = replace(run, sequence_length=4 * LENGTH, validation_sequences=1)
    measured = [piece for pack in open_corpus(now).validation()["text_files"] for piece in pack.pieces]
    shares = any(piece.start < stop and start < piece.stop for piece in measured for start, stop in trained)
    if shares:
        with refused(ConfigError, "data.validation_sequences=4 x 64", "1 x 256", "evaluate.lengths=[64]"):
            check(run, now)
    else:
        assert check(run, now) == []


def next_epoch(run: DataConfig) -> list[Any]:
    """All packs of an epoch of training."""
    packs = []
    for pack in open_corpus(run).training():
        packs.append(pack)
        if pack.cursor.epoch:
            break
    return packs


def test_another_order_of_documents_is_refused(check: Check, run: DataConfig):
    with refused(ConfigError, "data.shuffle_seed=1", "data.shuffle_seed=0", "data.validation_files=FILES"):
        check(run, replace(run, shuffle_seed=1))
    with refused(ConfigError, f"data.files='{str(run.files).replace('*', '1*')}'", f"data.files='{run.files}'"):
        check(run, replace(run, files=str(run.files).replace("*", "1*")))


def test_documents_of_a_stream_are_refused(check: Check, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = (json.dumps({"text": f"{number} " * 50}) for number in range(20))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    run = DataConfig(source="hub", name=str(folder), token_store=str(tmp_path / "tokens"), sequence_length=LENGTH)
    assert check(run, run) == []
    with refused(ConfigError, f"data.name={folder}", "data.stream=true", "data.validation_split=SPLIT"):
        check(replace(run, stream=True), run)


def test_documents_that_have_changed_are_refused(check: Check, run: DataConfig, texts: Path, tmp_path: Path):
    assert check(run, run) == []
    for number in range(30):
        (texts / f"{number:02}.txt").unlink()
    with refused(ConfigError, "changed", "data.validation_files=FILES"):
        evaluated(tmp_path, run)


def test_documents_that_have_changed_are_refused_also_where_the_last_sequence_has_not(
    check: Check, run: DataConfig, texts: Path, tmp_path: Path
):
    assert check(run, run, knows_documents=True) == []
    last = second_sequence(run)
    for text in sorted(texts.iterdir()):  # one that is not in it is changed
        before = text.read_text()
        text.write_text("x" * len(before))
        if second_sequence(run) == last:
            break
        text.write_text(before)
    assert second_sequence(run) == last
    with refused(ConfigError, "changed", "text_files", "data.validation_files=FILES"):
        evaluated(tmp_path, run)


def test_documents_of_the_run_are_known_wherever_their_files_are(
    check: Check, run: DataConfig, texts: Path, tmp_path: Path
):
    assert check(run, run, knows_documents=True) == []
    texts.rename(tmp_path / "moved")
    moved = replace(run, files=f"{tmp_path}/moved/*.txt")
    assert evaluated(tmp_path, moved) == []
    with refused(ConfigError, "data.shuffle_seed=1", "data.shuffle_seed=0"):
        evaluated(tmp_path, replace(moved, shuffle_seed=1))
    with refused(ConfigError, "trained", "data.validation_files=FILES"):
        evaluated(tmp_path, replace(moved, validation_files=moved.files))


@pytest.mark.parametrize("is_saved", [False, True])
def test_chats_of_the_run_are_known_in_files_and_in_a_data_set(
    check: Check, run: DataConfig, tmp_path: Path, tiny_llama: Path, is_saved
):
    turns = [{"role": role, "content": "abc " * 40} for role in ("user", "assistant")]
    rows = [{"messages": [*turns[:1], {**turns[1], "content": f"{number}"}]} for number in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    run = replace(run, source="chat", files=str(tmp_path / "a.jsonl"), tokenizer=str(tiny_llama))
    now = replace(run, files=None, name=str(tmp_path / "saved"))
    if is_saved:
        run, now = now, run
    assert check(run, now, knows_documents=True) == []
    with refused(ConfigError, "data.shuffle_seed=1", "data.shuffle_seed=0"):
        evaluated(tmp_path, replace(now, shuffle_seed=1))


def test_documents_to_validate_on_are_known_wherever_their_files_are(check: Check, run: DataConfig, tmp_path: Path):
    (tmp_path / "own.txt").write_text("def " * 200)
    run = replace(run, validation_files=str(tmp_path / "own.txt"))
    assert check(run, run, knows_documents=True) == []
    (tmp_path / "own.txt").rename(tmp_path / "moved.txt")
    assert evaluated(tmp_path, replace(run, validation_files=str(tmp_path / "moved.txt"))) == []


def test_a_run_with_documents_of_its_own_to_validate_on(check: Check, run: DataConfig, tmp_path: Path):
    (tmp_path / "own.txt").write_text("abc " * 100)
    (tmp_path / "other.txt").write_text("def " * 100)
    with_own = replace(run, validation_files=str(tmp_path / "own.txt"))
    assert check(with_own, replace(with_own, sequence_length=2 * LENGTH)) == []
    with refused(ConfigError, "held out none", f"data.validation_files={tmp_path / 'own.txt'}"):
        check(with_own, run)
    trained = f"{str(run.files)[:-5]}00.txt"
    with refused(ConfigError, f"data.validation_files={trained}", "data.validation_files=FILES"):
        check(with_own, replace(run, validation_files=trained))
    (warning,) = check(with_own, replace(run, validation_files=str(tmp_path / "other.txt")))
    names(warning, f"data.files={tmp_path / 'other.txt'}", f"data.validation_files={tmp_path / 'own.txt'}")


def test_a_source_of_a_mixture_is_compared_with_that_of_the_run(check: Check, run: DataConfig, tmp_path: Path):
    (tmp_path / "own.txt").write_text("abc " * 200)
    sources = {
        "a": {"source": "text_files", "files": run.files, "weight": 0.5},
        "b": {"source": "text_files", "files": str(tmp_path / "own.txt"), "weight": 0.5},
    }
    mixture = replace(run, source="mixture", files=None, sources=sources)
    assert check(mixture, mixture) == []
    assert check(mixture, run) == []
    with refused(ConfigError, "512 tokens of a", "data.validation_sequences=2"):
        check(mixture, replace(mixture, sequence_length=2 * LENGTH))


def test_other_documents_and_settings_than_the_runs_are_said(check: Check, run: DataConfig, tmp_path: Path):
    (tmp_path / "other.txt").write_text("abc " * 200)
    (warning,) = check(run, replace(run, files=str(tmp_path / "other.txt")))
    names(warning, f"data.files={tmp_path / 'other.txt'}", f"data=text_files data.files='{run.files}'")
    (warning,) = check(run, replace(run, packing="best_fit", document_mask=False))
    names(warning, "data.packing=best_fit data.document_mask=false")
    names(warning, "data.packing=concatenate data.document_mask=true")
    assert check(run, replace(run, shuffle_window=8)) == []  # concatenate has no windows


def test_of_a_run_whose_documents_are_gone_nobody_can_tell(check: Check, run: DataConfig, texts: Path, tmp_path: Path):
    assert check(run, run) == []
    texts.rename(tmp_path / "moved")
    (warning,) = evaluated(tmp_path, replace(run, files=f"{tmp_path}/moved/*.txt"))
    names(warning, f"data.files={run.files}")
