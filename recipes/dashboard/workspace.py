"""A wandb workspace with the sections and charts of `metric_registry`. Only saving it needs an account."""

from __future__ import annotations

import contextlib
import io
import re

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2.interface import PanelTypes

from conf.schema import ConfigError
from recipes.monitor.metric_registry import METRICS, SECTIONS, SUMMARY_METRICS, Metric


def create(path: str) -> str:
    """Make the workspace in ENTITY/PROJECT and return its address.

    Raises:
        ConfigError: without a login, or if wandb refuses the login or the workspace.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", path):
        raise ConfigError(f"--wandb {path} is not a wandb project: use --wandb ENTITY/PROJECT")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # wandb prints several lines of advice
            has_login = wandb.login(prompt=False)
        if has_login:
            return define(*path.split("/")).save().url
    except (wandb.Error, ValueError, OSError) as error:
        raise ConfigError(
            f"wandb refused a workspace in {path} ({error}): check the names, the network and the login"
        ) from None
    raise ConfigError("there is no wandb login: type wandb login, or set WANDB_API_KEY")


def define(entity: str, project: str) -> ws.Workspace:
    """The workspace, before it is saved."""
    sections = [ws.Section(name=section, panels=_panels(section), is_open=True) for section in SECTIONS]
    return ws.Workspace(entity=entity, project=project, name="Ring attention", sections=sections)


def _panels(section: str) -> list[PanelTypes]:
    panels: list[PanelTypes] = [_line(metric) for metric in METRICS if metric.section == section]
    summary = [metric for metric in SUMMARY_METRICS if metric.section == section]
    for title, unit in (("time of a step by part", "%"), ("exposed communication per step", "ms")):
        names = [name for metric in summary if metric.unit == unit for name in metric.logged_names]
        if names:
            panels.append(wr.BarPlot(title=f"{title} ({unit})", metrics=[*names]))
    return panels


def _line(metric: Metric) -> wr.LinePlot:
    unit = f" ({metric.unit})" if metric.unit else ""
    return wr.LinePlot(
        title=metric.title + unit,
        x="step",
        y=[*metric.logged_names],
        title_y=metric.unit or None,
        log_y=metric.log_scale,
    )
