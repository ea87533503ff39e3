"""What rank 0 logs, and which wandb mode it chooses."""

from __future__ import annotations

import io
import json
from unittest import mock

import pytest
import wandb
import yaml
from wandb.errors import AuthenticationError

from conf.schema import Config, LoggingConfig
from recipes.checkpoint.manifest import Manifest
from recipes.monitor.reporter import Reporter
from recipes.planning.plan import Plan
from tests.errors import names


def opened(
    folder, monkeypatch, resumed: Manifest | None = None, **logging
) -> tuple[Reporter, io.StringIO, mock.MagicMock]:
    """A reporter, its console, and a mock of the `wandb.init` that it calls."""
    init = mock.MagicMock()
    monkeypatch.setattr(wandb, "init", init)
    console = io.StringIO()
    plan = Plan(Config(logging=LoggingConfig(**logging)), 4, "cpu", "CPU", None, ranks_per_host=4)
    return Reporter(plan, folder, console, resumed), console, init


def test_the_configuration_names_the_transport_that_ran(tmp_path, monkeypatch):
    reporter, _, init = opened(tmp_path, monkeypatch)
    with reporter:
        (tmp_path / "config.yaml").write_text("num_steps: 3\n")
        reporter.log_transport("p2p", "no access")
    text = (tmp_path / "config.yaml").read_text()
    names(text.splitlines()[-1], "p2p", "no access")
    assert yaml.safe_load(text) == {"num_steps": 3}
    init.return_value.config.update.assert_called_once_with({"transport_used": "p2p"}, allow_val_change=True)


def test_every_row_is_valid_json_even_after_the_loss_has_diverged(tmp_path, monkeypatch):
    reporter, _, _ = opened(tmp_path, monkeypatch)
    with reporter:
        reporter.log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/mfu_pct": None})
        reporter.log(2, {"train/loss": 1.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first.pop("elapsed_s") >= 0
    assert first == {"step": 1, "train/loss": None, "train/grad_norm": None}
    assert second["train/loss"] == 1.5


@pytest.mark.parametrize(("login", "mode"), [(True, "online"), (False, "offline")])
def test_auto_is_online_only_with_a_login(tmp_path, monkeypatch, login, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **_: login)
    reporter, _, init = opened(tmp_path, monkeypatch)
    with reporter:
        assert init.call_args.kwargs["mode"] == mode


def test_auto_is_offline_with_a_message_if_the_server_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", mock.Mock(side_effect=AuthenticationError("no route")))
    reporter, console, init = opened(tmp_path, monkeypatch)
    with reporter:
        assert init.call_args.kwargs["mode"] == "offline"
    names(console.getvalue(), "wandb", "offline", "no route")


def test_auto_follows_wandbs_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    reporter, _, init = opened(tmp_path, monkeypatch)
    with reporter:
        assert init.call_args.kwargs["mode"] == "disabled"


def test_an_exception_ends_the_wandb_run_as_failed(tmp_path, monkeypatch):
    reporter, _, init = opened(tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="broken"), reporter:
        raise RuntimeError("broken")
    init.return_value.finish.assert_called_once_with(exit_code=1)


def test_rows_of_earlier_runs_move_to_their_own_files(tmp_path, monkeypatch):
    for loss in (1.0, 2.0, 3.0):
        reporter, console, _ = opened(tmp_path, monkeypatch)
        with reporter:
            reporter.log(1, {"train/loss": loss})
    [line] = console.getvalue().splitlines()
    names(line, "metrics.jsonl", "metrics.earlier-2.jsonl")
    for name, loss in (("metrics.earlier-1", 1.0), ("metrics.earlier-2", 2.0), ("metrics", 3.0)):
        assert json.loads((tmp_path / f"{name}.jsonl").read_text())["train/loss"] == loss


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_resumed_run_logs_its_earlier_rows_again_offline(tmp_path, monkeypatch, mode):
    """`wandb sync` puts the newest folder in the place of earlier ones of the same id; a server has their rows."""
    rows = [{"step": step, "train/loss": float(step), "elapsed_s": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = Manifest(2, None, 1.0, "id7", {}, {}, {})
    reporter, _, init = opened(tmp_path, monkeypatch, resumed, wandb=mode)
    init.return_value.offline = mode == "offline"
    with reporter:
        reporter.log(3, {"train/loss": 4.0})
    assert init.call_args.kwargs["id"] == "id7"
    assert init.call_args.kwargs["resume"] == (None if mode == "offline" else "allow")
    logged = [call.args[0] for call in init.return_value.log.call_args_list]
    earlier = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}] if mode == "offline" else []
    assert logged == [*earlier, {"step": 3, "train/loss": 4.0}]
