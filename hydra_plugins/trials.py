"""Hydra's door to `recipes.sweep.runner`: the sweeper that `+sweep=NAME` chooses (conf/sweep/search.yaml) for `-m`.

It lies in this folder because Hydra 1.3 takes sweepers from `hydra_plugins` alone, and imports all that is there at
every start: nothing slow here. The folder has no __init__.py, since installed plugins have parts of that package, too.
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

# params are sweep overrides by field, such as {optimizer.lr: choice(1e-3,3e-3)}. Not a dataclass, which cannot be made
# while Hydra imports this file: the module is not in sys.modules yet.
CONFIG = {"_target_": "hydra_plugins.trials.Trials", "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="trials", node=CONFIG, provider="ring_attention")


class Trials(Sweeper):
    """Runs trials through the launcher that Hydra is configured with; what to run is `recipes.sweep.runner`'s to say."""

    def __init__(self, params: dict[str, str] | None) -> None:
        self._params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep.

        Args:
            arguments: what was typed; it replaces what hydra.sweeper.params says of the same field.

        Raises:
            ConfigError: for a sweep that cannot run, before any trial.
            RunFailed: if all trials failed.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        settings = OmegaConf.to_object(self.config.sweep)
        assert isinstance(settings, SweepConfig)
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError('+sweep=... needs Optuna: type pip install -e ".[sweep]" -c constraints.txt')
        if settings.num_parallel > 1 and self.config.hydra.launcher._target_.endswith(".BasicLauncher"):
            raise ConfigError(
                f"sweep.num_parallel={settings.num_parallel} needs jobs of their own, and this launcher runs one trial "
                "after the other: add hydra/launcher=submitit_slurm or hydra/launcher=submitit_local"
            )
        from recipes.sweep import runner  # Optuna and matplotlib: a bad configuration was refused before

        parser = OverridesParser.create(self.hydra_context.config_loader)
        typed = [*(f"{field}={values}" for field, values in self._params.items()), *arguments]
        runner.run_sweep(self.config, settings, parser.parse_overrides(typed), self._check, self._run_trial)

    def _check(self, overrides: list[str]) -> None:
        """Raises for a field or an option that there is not; what only some trials cannot do is a failure of theirs."""
        assert self.hydra_context is not None
        assert self.config is not None
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            del composed["hydra"]
        check_fields(composed)

    def _run_trial(self, overrides: list[str], number: int) -> JobReturn:
        self.validate_batch_is_legal([overrides])  # here, rather than in a job that has waited for its turn
        assert self.launcher is not None
        results: Any = self.launcher.launch([overrides], initial_job_idx=number)
        return results[0]
