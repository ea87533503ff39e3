"""`recipe=compare`: several entries on the same ranks, one of which fails; and each compared recipe by itself."""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from recipes.monitor.metric_registry import PARTS
from tests.cli.program import ENDS_WITHIN_S, Finished, Program, logged_names
from tests.errors import names, some_line_names

pytestmark = pytest.mark.slow

SAME = [
    "data.sequence_length=128", "data.validation_sequences=1", "launch.num_ranks=2", "engine.train_batch_size=2",
    "engine.dtype=fp32",
]  # fmt: skip


def comparison(corpus: Path) -> list[str]:
    """Two rounds of three entries, one of which fails while it reads its data."""
    entries = {
        "ring": ["+experiment=ra_sp"],
        "broken": ["+experiment=ra_sp", "data=hub", f"data.name={corpus}"],
        "tensor": ["+experiment=tp_pp"],
    }
    # ~compare removes the group's entries; Python writes lists with the quotes that Hydra needs
    own = [f"+compare.entries.{name}={overrides}" for name, overrides in entries.items()]
    return ["recipe=compare", "~compare", *own, "compare.rounds=2", "compare.steps_per_round=1", *SAME]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Program:
    """Where the comparison runs."""
    folder = tmp_path_factory.mktemp("compare")
    write_corpus(folder / "corpus")
    return Program(folder)


def write_corpus(corpus: Path) -> None:
    corpus.mkdir()
    (corpus / "a.jsonl").write_text(json.dumps({"text": "two sequences of text, " * 13}) + "\n")


@pytest.fixture(scope="module")
def compared(place) -> Finished:
    """The corpus of the broken entry is there before ranks start, and gone when it is measured."""
    corpus = place.folder / "corpus"
    with place.started(*comparison(corpus), wandb=True) as running:
        running.until(lambda: "starting 2 ranks" in running.stdout)
        shutil.rmtree(corpus)
        finished = running.finish()
    write_corpus(corpus)
    return finished


@pytest.fixture(scope="module")
def saved(compared) -> dict[str, Any]:
    """RUN_DIR/comparison.json."""
    return json.loads((compared.run_dir / "comparison.json").read_text())


def results_of(run: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.run_dir / "results.jsonl").read_text().splitlines()]


def table(run: Finished) -> list[str]:
    """The lines of the table and of the breakdown."""
    return run.stdout.partition("\nmethod")[2].partition("\nTPS: ")[0].splitlines()


def test_it_succeeds_although_an_entry_fails(compared):
    assert compared.exit_code == 0, compared.stderr
    assert compared.stderr == ""


def test_rounds_measure_all_entries_and_new_ranks_continue_after_a_failure(compared):
    rows = results_of(compared)
    kinds = ("error", "parts", "step_times_s")
    assert [(row["entry"], row["round"], next(kind for kind in kinds if kind in row)) for row in rows] == [
        ("ring", 1, "step_times_s"), ("broken", 1, "error"), ("tensor", 1, "step_times_s"),
        ("ring", 2, "step_times_s"), ("ring", 2, "parts"), ("tensor", 2, "step_times_s"), ("tensor", 2, "parts"),
    ]  # fmt: skip
    assert compared.stdout.count("starting 2 ranks") == 2
    assert not (compared.run_dir / "current_measurement.json").exists()


def test_the_table_has_all_entries_and_equal_losses(compared):
    header, *rows = table(compared)
    ring, broken, tensor = rows[:3]
    *_, loss, transport = re.split(r"  +", header.strip())
    assert (loss, transport) == ("loss", "transport")
    assert ring.split()[-1] == "p2p"
    assert re.match(r"ring    2 ring    1      [\d,]+ \([\d,]+ - [\d,]+\) .* \+0\.0 % ", ring)
    assert re.match(r"tensor  2 tensor  1      [\d,]+ \([\d,]+ - [\d,]+\) .* [+-]\d+\.\d % ", tensor)
    assert re.match(r"broken  FAILED: data\.name=\S+/corpus ", broken)
    losses = [float(re.findall(r"\d\.\d{4}", line)[-1]) for line in (ring, tensor)]
    assert losses[0] == pytest.approx(losses[1], abs=1.5e-4)


def test_the_breakdown_table_has_the_entries_that_were_measured(compared):
    header, ring, tensor = table(compared)[5:8]
    assert header.split() == ["time", "of", "a", "step,", "%", *PARTS]
    assert [ring.split()[0], tensor.split()[0]] == ["ring", "tensor"]
    for line in (ring, tensor):
        assert sum(map(float, line.split()[1:])) == pytest.approx(100, abs=0.5)


def test_the_numbers_are_medians_over_the_rounds_with_their_spread(compared, saved):
    rows = {row["entry"]: row for row in saved["rows"]}
    assert list(rows) == ["ring", "broken", "tensor"]
    for name in ("ring", "tensor"):
        times_s = [s for row in results_of(compared) if row["entry"] == name for s in row.get("step_times_s", [])]
        speeds = [2 * 128 / time_s for time_s in times_s]
        assert len(speeds) == rows[name]["num_steps"] == 2
        assert rows[name]["tokens_per_s"] == pytest.approx(statistics.median(speeds))
        assert rows[name]["tokens_per_s_min"] == pytest.approx(min(speeds))
        assert rows[name]["tokens_per_s_max"] == pytest.approx(max(speeds))
        assert rows[name]["tokens_per_s_per_rank"] == pytest.approx(statistics.median(speeds) / 2)
    change = 100 * (rows["tensor"]["tokens_per_s"] / rows["ring"]["tokens_per_s"] - 1)
    assert (rows["ring"]["change_pct"], rows["tensor"]["change_pct"]) == (0, pytest.approx(change))
    assert rows["ring"]["first_loss"] == pytest.approx(rows["tensor"]["first_loss"], rel=1e-5)
    names(rows["broken"]["error"], "data.name", "corpus")
    assert (saved["recipe"], saved["baseline"], rows["ring"]["sequence_length"]) == ("forward", "ring", 128)
    assert saved["configs"]["tensor"]["parallelism"]["method"] == "tensor_pipeline"
    assert saved["measurements"] == results_of(compared)


def test_the_figure_is_written_as_png_and_svg(compared):
    assert (compared.run_dir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (compared.run_dir / "comparison.svg").read_text()


def test_the_offline_wandb_run_has_the_table(compared, saved):
    [run] = (compared.run_dir / "wandb").glob("offline-run-*")
    assert f"wandb sync {run}\n" in compared.stdout
    [path] = run.glob("files/media/table/*.json")
    logged = json.loads(path.read_text())
    rows = [dict(zip(logged["columns"], values, strict=True)) for values in logged["data"]]
    assert [row["tokens_per_s"] for row in rows] == [row.get("tokens_per_s") for row in saved["rows"]]
    assert [row["error"] for row in rows] == [row.get("error") for row in saved["rows"]]


def test_the_same_command_again_measures_nothing_and_prints_the_same_table(compared, place):
    before, result_lines = table(compared), (compared.run_dir / "results.jsonl").read_text()
    again = place.run(*comparison(place.folder / "corpus"))
    assert again.exit_code == 0, again.stderr
    assert "starting" not in again.stdout
    assert table(again) == before
    assert (again.run_dir / "results.jsonl").read_text() == result_lines


def test_results_of_another_comparison_are_refused_and_kept(place, compared, saved):
    for explain in ("false", "true"):
        typed = ("recipe=compare", "compare.only=[dp]", *SAME, f"hydra.run.dir={compared.run_dir}")
        run = place.run(*typed, f"explain={explain}")
        assert run.exit_code == 1
        [error] = run.stderr.splitlines()
        names(error, "error", compared.run_dir, "ring", "hydra.run.dir")
    assert json.loads((compared.run_dir / "comparison.json").read_text()) == saved


def test_a_mistake_in_an_entry_names_it(program):
    run = program.run("recipe=compare", "+compare.entries.mine=['model.hiden_size=3']")
    [error] = run.stderr.splitlines()
    names(error, "error", "compare.entries.mine", "model.hiden_size", "model.hidden_size")
    run = program.run("recipe=compare", "+compare.entries.mine=['+experiment=rings']")
    [error] = run.stderr.splitlines()
    names(error, "error", "compare.entries.mine", "+experiment=rings", "+experiment=ra_sp")


def test_explain_prints_the_plans_and_starts_nothing(place):
    result = place.run(*comparison(place.folder / "corpus"), "explain=true", name="explained")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.findall(r"^(\w+)\n +ranks  (.*), on CPU$", result.stdout, re.MULTILINE) == [
        ("ring", "1 data x 2 ring"),
        ("broken", "1 data x 2 ring"),
        ("tensor", "1 data x 2 tensor x 1 pipeline"),
    ]
    assert not result.ranks_were_started
    assert not result.run_dir.exists()


def test_explain_reports_a_corpus_that_is_too_short(place):
    result = place.run(
        "recipe=compare", "compare.only=[ra_sp]", *SAME, "data.validation_sequences=1000000", "explain=true"
    )
    assert "\nra_sp\n" in result.stdout
    names(result.stderr, "error", "1000000", "data.sequence_length", "data.validation_sequences")


@pytest.fixture(scope="module")
def trained(place) -> Finished:
    """Tensor parallel, 3 steps."""
    return place.run("+experiment=tp_pp", *SAME, "num_steps=3", "logging.every_n_steps=1", name="trained")


def test_tensor_ranks_train(trained):
    assert (trained.exit_code, trained.stderr) == (0, "")
    some_line_names(trained.stdout.splitlines(), "ranks", "1 data x 2 tensor x 1 pipeline", "CPU")
    assert [line["step"] for line in trained.metrics] == [1, 2, 3]
    losses = [line["train/loss"] for line in trained.metrics]
    assert losses[2] < losses[0] < 6
    assert trained.metrics[-1]["validation/loss"] < losses[0]
    assert trained.metrics[-1]["train/tokens_seen"] == 3 * 2 * 128
    summary = json.loads((trained.run_dir / "summary.json").read_text())
    assert sum(summary[f"parts/{part}_pct"] for part in PARTS) == pytest.approx(100)


def test_forward_passes_alone_have_the_loss_of_training_and_the_parts_of_a_step(place, trained):
    result = place.run("recipe=forward", "+experiment=ra_sp", *SAME, "num_steps=3", name="forward")
    assert (result.exit_code, result.stderr) == (0, "")
    first, last = result.metrics
    assert (first["step"], last["step"]) == (1, 3)
    measured = logged_names("forward", conditions=("a ring",))
    assert set(first) == measured
    assert set(last) == measured
    summary = json.loads((result.run_dir / "summary.json").read_text())
    parts = {f"parts/{part}_pct" for part in PARTS} | {"parts/exposed_communication_ms"}
    overall = {"tokens_per_s", "tokens_per_s_per_rank", "tpot_ms", "model_tflops_per_rank"}
    assert set(summary) == parts | overall
    assert sum(summary[f"parts/{part}_pct"] for part in PARTS) == pytest.approx(100)
    assert last["forward/tokens_per_s"] == pytest.approx(2 * 128 / last["forward/step_time_p50_s"])
    assert last["forward/tokens_per_s"] > 0
    # the same model, seed and batch on a ring as on tensor ranks
    assert first["forward/loss"] == pytest.approx(trained.metrics[0]["train/loss"], rel=1e-5)
    assert last["forward/loss"] != first["forward/loss"]  # another batch


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_comparison_prints_how_to_resume_it(place, number, code):
    entries = ["~compare", "+compare.entries.ring=['+experiment=ra_sp']", "compare.rounds=1000", "breakdown=false"]
    with place.started("recipe=compare", *entries, *SAME, name=f"interrupted_{code}") as running:
        running.until(lambda: "measurement 1/1000" in running.stdout)
        running.family()
        running.process.send_signal(number)
        result = running.finish(ENDS_WITHIN_S)
        running.assert_nothing_is_left()
    assert (result.exit_code, result.stderr) == (code, "")
    names(result.stdout.splitlines()[-1], f"hydra.run.dir={result.run_dir}")


def test_the_roofline_is_an_entry_beside_the_methods(place):
    ring = "+compare.entries.ring=['+experiment=ra_sp']"
    settings = ["compare.roofline=true", "compare.rounds=1", "compare.recipe=pretrain", "breakdown=false"]
    run = place.run("recipe=compare", "~compare", ring, *settings, *SAME, name="roofline")
    assert (run.exit_code, run.stderr) == (0, "")
    ring, bound = json.loads((run.run_dir / "comparison.json").read_text())["rows"]
    assert (ring["entry"], bound["entry"], bound["grid"]) == ("ring", "roofline", "each rank alone")
    assert ring["roofline_pct"] == pytest.approx(100 * ring["tokens_per_s"] / bound["tokens_per_s"])
    assert bound["roofline_pct"] == pytest.approx(100)  # 100 * x / x
    assert 0 < ring["tokens_per_s"] < bound["tokens_per_s"]
    assert "roofline  each rank alone" in run.stdout
