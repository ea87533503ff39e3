"""The one command: compose the configuration, check it, then explain, launch, or join ranks that are there already.

python train.py +experiment=ra_sp
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from conf.schema import Config, ConfigError
from recipes.ranks import RunFailed, adopt_external_ranks

ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """The typed configuration; its checks run here."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(composed: DictConfig) -> float | None:
    """One job of Hydra's: a run, or one of a sweep, whose value is the final validation loss."""
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = to_config(composed)
        from recipes import launch  # torch takes seconds to import: refuse a bad configuration before

        if sweeps and config.logging.group is None:
            config.logging.group = f"sweep-{run_dir.parent.name}"
        num_ranks = launch.count_ranks(config)
        if config.explain:
            print(*launch.make_plan(config, num_ranks).explanation(run_dir), sep="\n")
            return None
        launch.check_corpus(config)
        return launch.launch(config, num_ranks, run_dir)
    except (ConfigError, RunFailed) as error:
        if sweeps:  # the sweep goes on and Hydra exits with an error at its end
            raise CompactHydraException(str(error)) from None
        sys.exit(f"error: {error}")


def run_as_one_rank(overrides: list[str]) -> None:
    """What torchrun, deepspeed and srun start: the same, but in ranks that exist. Only rank 0 tells of a mistake."""
    from recipes import launch

    is_first = os.environ["RANK"] == "0"
    if any(argument in ("-m", "--multirun") for argument in overrides):
        sys.exit("error: -m cannot run in ranks that exist: sweep with python train.py -m" if is_first else 1)

    def compose() -> tuple[Config, Path]:
        with hydra.initialize(version_base="1.3", config_path="conf"):
            composed = hydra.compose("config", overrides, return_hydra_config=True)
            run_dir = Path(composed.hydra.run.dir).absolute()
            OmegaConf.set_readonly(composed, False)
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            return to_config(composed), run_dir

    try:
        launch.join(compose)
    except (ConfigError, CompactHydraException) as error:
        sys.exit(f"error: {error}" if is_first else 1)


if __name__ == "__main__":
    try:
        if adopt_external_ranks():
            run_as_one_rank(sys.argv[1:])
        else:
            run()
    except KeyboardInterrupt:
        sys.exit(130)
