"""One shortened run of the main job: its console, its files, and that both agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from conf.compose import to_config
from conf.schema import Config
from tests.cli.program import wandb
from tests.errors import names, some_line_names

NUMBER = r"[\d,]+(?:\.\d+)?"
TRAINING_LINE = re.compile(
    rf"step (?P<step>\d+)/6 \| loss (?P<loss>{NUMBER}) \| grad norm (?P<grad_norm>{NUMBER}) \| "
    rf"(?P<tokens_per_s>{NUMBER}) tok/s \| (?P<tokens_per_s_per_rank>{NUMBER}) tok/s/rank \| "
    rf"TPOT (?P<tpot_ms>{NUMBER}) ms \| MFU n/a \| step p50 (?P<step_time_p50_s>{NUMBER}) p95 "
    rf"(?P<step_time_p95_s>{NUMBER}) s \| peak (?P<peak_memory_gib>{NUMBER}) GiB \| ETA \d+:\d\d"
)


def command_after(text: str, words: str) -> str:
    """The path after a command in the run's last lines."""
    [path] = re.findall(rf"{words} (\S+)$", text, re.MULTILINE)
    return path


@pytest.fixture(scope="module")
def wandb_records(main_run, tmp_path_factory) -> list[dict]:
    run = command_after(main_run.stdout, "wandb leet")
    lines = wandb("leet", "inspect", "--json", run, home=tmp_path_factory.mktemp("home")).splitlines()
    return [json.loads(line) for line in lines]


def test_it_succeeds_with_an_empty_stderr(main_run):
    assert main_run.exit_code == 0, main_run.stderr
    assert main_run.stderr == ""


def test_the_banner_has_its_parts_in_order(main_run):
    rows = re.findall(r"^ +(\S.*?)  (\S.*)$", main_run.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "ranks", "tokens", "data", "model", "FLOPs per token", "attention", "attention kernel", "engine", "optimizer",
        "run dir",
    ]  # fmt: skip
    banner = dict(rows)
    names(banner["ranks"], "1 data x 4 ring", "CPU")
    names(banner["tokens"], 64, 256)
    names(banner["data"], "stdlib", "1,536")
    assert re.search(rf"{NUMBER} files.* {NUMBER} tokens.* \S+ epochs", banner["data"])
    names(banner["attention"], "ring", "zigzag", "p2p", "gloo")
    names(banner["engine"], "stage 1", "bf16")
    names(banner["optimizer"], "AdamW", "0.003", "10%", "cosine", "0.1")
    assert banner["run dir"] == str(main_run.run_dir)


def test_each_logged_step_is_one_line_with_the_numbers_of_the_metrics_file(main_run):
    lines = [TRAINING_LINE.fullmatch(line) for line in main_run.stdout.splitlines() if line.startswith("step ")]
    shown = [match.groupdict() for match in lines if match]
    assert [int(line["step"]) for line in shown] == [1, 2, 4, 6]
    logged = main_run.metrics
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    for line, metrics in zip(shown, logged, strict=True):
        for name in set(line) - {"step"}:
            value = line[name].replace(",", "")
            decimals = len(value.partition(".")[2])
            assert value == f"{metrics[f'train/{name}']:.{decimals}f}", name


def test_the_numbers_of_a_step_fit_together(main_run):
    last = main_run.metrics[-1]
    assert last["train/tokens_seen"] == 6 * 256
    assert last["train/tokens_per_s"] == pytest.approx(256 / last["train/step_time_p50_s"])
    assert last["train/tokens_per_s_per_rank"] == pytest.approx(last["train/tokens_per_s"] / 4)
    assert last["train/tpot_ms"] == pytest.approx(1000 * last["train/step_time_p50_s"] / 256)
    assert last["train/step_time_p95_s"] >= last["train/step_time_p50_s"]
    assert last["train/eta_s"] == 0
    assert [line for line in main_run.metrics if "validation/loss" in line] == [last]


def test_the_summary_has_the_losses_the_throughput_and_what_to_type_next(main_run):
    first, last = main_run.metrics[0], main_run.metrics[-1]
    losses = (first["train/loss"], last["train/loss"], last["validation/loss"])
    lines = main_run.stdout.splitlines()
    some_line_names(lines, "done", "6 steps", *(f"{loss:.4f}" for loss in losses))
    speed = rf"^median.* {NUMBER} tok/s, {NUMBER} tok/s/rank, .*{NUMBER} ms, {NUMBER} model TFLOP/s"
    assert re.search(speed, main_run.stdout, re.MULTILINE)
    some_line_names(lines, main_run.run_dir / "metrics.jsonl")
    assert command_after(main_run.stdout, "wandb leet") == command_after(main_run.stdout, "wandb sync")


def test_no_progress_bar_is_drawn_where_stdout_is_no_terminal(main_run):
    assert not set("\r\x1b█▏▌|") & set(main_run.stdout.replace(" | ", ""))


def test_the_resolved_configuration_is_saved_and_can_be_loaded(main_run):
    saved = OmegaConf.load(main_run.run_dir / "config.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(Config), saved)
    assert isinstance(merged, DictConfig)
    config = to_config(merged)
    assert (config.num_steps, config.data.sequence_length, config.model.mlp_size) == (6, 256, 384)
    assert (main_run.run_dir / "config.yaml").read_text().splitlines()[-1] == "# the transport that ran: p2p"
    assert "${" not in (main_run.run_dir / "config.yaml").read_text()


def test_every_rank_has_a_log(main_run):
    logs = sorted(path.name for path in (main_run.run_dir / "logs").iterdir())
    assert logs == [f"rank_{rank}.log" for rank in range(4)]


def test_the_wandb_run_is_inside_the_run_dir_and_the_commands_shown_open_it(main_run, tmp_path):
    run = Path(command_after(main_run.stdout, "wandb leet"))
    assert run.parent == main_run.run_dir / "wandb"
    assert (run.parent / "latest-run").resolve() == run
    summary = json.loads(wandb("leet", "inspect", "--summary", "--json", str(run), home=tmp_path))
    assert summary["state"] == "finished"
    assert summary["exit_code"] == 0
    last = main_run.metrics[-1]
    assert summary["summary"]["train/loss"]["last"] == last["train/loss"]
    assert summary["summary"]["validation/loss"]["min"] == last["validation/loss"]
    assert summary["config"]["data"]["sequence_length"] == 256
    assert summary["config"]["model"]["name"] == "tiny"
    assert str(run) in wandb("sync", "--dry-run", str(run), home=tmp_path)


def test_wandb_gets_one_record_per_logged_step_with_the_numbers_of_the_file(main_run, wandb_records):
    history = [record["history"]["item"] for record in wandb_records if record["type"] == "history"]
    sent = [{name: value for name, value in item.items() if not name.startswith("_")} for item in history]
    assert sent == [{name: value for name, value in line.items() if name != "elapsed_s"} for line in main_run.metrics]
