"""wandb's page for the runs of this project, defined in code: the sections and charts of `catalog`.

Called by `dashboard`; needs an account. Its definition does not.
"""

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

NAME = "Ring attention"


def create(path: str) -> str:
    """Make the workspace in ENTITY/PROJECT and return its address.

    Raises:
        ConfigError: without a login, and where wandb does not take it.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", path):
        raise ConfigError(f"--wandb {path} is no project of wandb's: use --wandb ENTITY/PROJECT")
    with contextlib.redirect_stderr(io.StringIO()):  # wandb's own advice takes several lines
        try:
            has_login = wandb.login(prompt=False)
        except wandb.Error as error:
            raise ConfigError(
                f"wandb did not take the login ({error}): check the network, or type wandb login --relogin"
            ) from None
    if not has_login:
        raise ConfigError("there is no wandb login: type wandb login, or set WANDB_API_KEY")
    try:
        return define(*path.split("/")).save().url
    except (wandb.Error, ValueError, OSError) as error:
        raise ConfigError(f"wandb made no workspace in {path} ({error}): check the names and the network") from None


def define(entity: str, project: str) -> ws.Workspace:
    """The workspace, not saved yet."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name=section, panels=_panels(section), is_open=True) for section in SECTIONS],
    )


def _panels(section: str) -> list[PanelTypes]:
    panels: list[PanelTypes] = [_line(metric) for metric in METRICS if metric.section == section]
    own = [metric for metric in SUMMARY_METRICS if metric.section == section]
    for title, unit in (("where the time of a step goes", "%"), ("exposed communication per step", "ms")):
        names = [name for metric in own if metric.unit == unit for name in metric.logged_names]
        if names:
            panels.append(wr.BarPlot(title=f"{title} ({unit})", metrics=[*names]))
    return panels


def _line(metric: Metric) -> wr.LinePlot:
    return wr.LinePlot(
        title=metric.label, x="step", y=[*metric.logged_names], title_y=metric.unit or None, log_y=metric.log_scale
    )
