"""Hydra's entry point to `recipes.sweep.runner`: the sweeper of `-m +sweep=NAME` (conf/sweep/search.yaml).

Hydra 1.3 finds sweepers only in `hydra_plugins` and imports all of it at every start, so nothing slow is imported here.
The folder has no __init__.py because installed plugins share that package.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from conf.compose import check_fields
from conf.schema import ConfigError, SweepConfig

# params are sweep overrides by field, such as {optimizer.lr: choice(1e-3,3e-3)}. Not a dataclass: while Hydra imports
# this file the module is not in sys.modules, which dataclasses need.
CONFIG = {"_target_": "hydra_plugins.trials.Trials", "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="trials", node=CONFIG, provider="ring_attention")


class Trials(Sweeper):
    """Runs the trials that `recipes.sweep.runner` chooses, through Hydra's launcher."""

    def __init__(self, params: dict[str, str] | None) -> None:
        self._params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._config = hydra_context.config_loader, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep of the typed overrides, which replace hydra.sweeper.params of the same field.

        Raises:
            ConfigError: before any trial, if the sweep cannot run.
            RunFailed: if all trials failed.
        """
        settings = OmegaConf.to_object(self._config.sweep)
        assert isinstance(settings, SweepConfig)
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError('+sweep=... needs Optuna: type pip install -e ".[sweep]" -c constraints.txt')
        if settings.num_parallel > 1 and self._config.hydra.launcher._target_.endswith(".BasicLauncher"):
            raise ConfigError(
                f"sweep.num_parallel={settings.num_parallel} needs a launcher that runs jobs in parallel: add "
                "hydra/launcher=submitit_slurm or hydra/launcher=submitit_local"
            )
        from recipes.sweep import runner  # slow: imports Optuna and matplotlib

        typed = [*(f"{field}={values}" for field, values in self._params.items()), *arguments]
        overrides = OverridesParser.create(self._loader).parse_overrides(typed)
        runner.run_sweep(self._config, settings, overrides, self._check, self._run_trial)

    def _check(self, overrides: list[str]) -> None:
        """Raises for unknown fields and options. What only some trials cannot run is a failure of those trials."""
        composed = self._loader.load_sweep_config(self._config, overrides)
        with open_dict(composed):
            del composed["hydra"]
        check_fields(composed)

    def _run_trial(self, overrides: list[str], number: int) -> JobReturn:
        self._check(overrides)  # before the job is queued
        results: Any = self._launcher.launch([overrides], initial_job_idx=number)
        return results[0]
