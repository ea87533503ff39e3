"""The one command: compose the configuration, check it, then explain, launch, or join ranks that are there already.

python train.py +experiment=ra_sp
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from conf.compose import check_multirun, compose_entries, describe_error, to_config
from conf.degrees import accumulation_steps, resolve_degrees
from conf.schema import Config, ConfigError
from data.source import is_local
from recipes.checkpoint.manifest import steps_done
from recipes.launch.environment import adopt_external_ranks, adopt_submitit_tasks, ranks_given
from recipes.run.errors import Preempted, RunFailed

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(composed: DictConfig) -> float | None:
    """One job of Hydra's: a run, or one of a sweep, whose value is the recipe's result, such as the validation loss."""
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        if sweeps:
            adopt_submitit_tasks()
        else:
            check_multirun(HydraConfig.get())
        config = to_config(composed)
        if sweeps and config.logging.group is None:
            config.logging.group = f"sweep-{run_dir.parent.name}"
        return execute(config, list(HydraConfig.get().overrides.task), run_dir)
    except (ConfigError, RunFailed) as error:
        if not sweeps:
            sys.exit(f"error: {error}")
        if HydraConfig.get().sweeper._target_ == "hydra_plugins.trials.Trials":
            raise  # the sweep tells of it
        print(f"error: {error}", file=sys.stderr, flush=True)  # now, for the sweep goes on; Hydra raises at its end
        raise RunFailed(f"job {HydraConfig.get().job.num} of the sweep failed: see its message above") from None
    finally:
        is_first = os.environ.get("RANK", "0") == "0"  # tasks of one job share the folder
        if is_first and not any(run_dir.iterdir()):  # Hydra has made it, and nothing was run
            run_dir.rmdir()


def execute(config: Config, overrides: list[str], run_dir: Path) -> float | None:
    """Explain or run what the configuration names, in ranks of our own or as one of those that are there."""
    if config.recipe == "compare":
        from recipes.benchmark import compare

        return compare.compare(config, compose_entries(config, overrides), run_dir)
    if config.recipe == "max_length":
        from recipes.benchmark import max_length

        return max_length.max_length(config, run_dir)
    if (given := ranks_given(config)) is not None:
        accumulation_steps(config, resolve_degrees(config, given))
    is_over = config.recipe == "pretrain" and steps_done(run_dir) >= config.num_steps  # its data may be gone
    reads_data = config.recipe != "bench_attention" and not is_over
    from data.pack import open_corpus  # NumPy

    if reads_data and not config.explain:
        open_corpus(config.data).check()
    from recipes import registry  # torch takes seconds to import: bad settings and bad data were refused before
    from recipes.launch import launcher
    from recipes.planning.explain import explanation

    num_ranks = launcher.count_ranks(config)
    if config.explain:
        if os.environ.get("RANK", "0") == "0":
            print(*explanation(launcher.make_plan(config, num_ranks), run_dir), sep="\n", flush=True)
        if reads_data and is_local(config.data):
            open_corpus(config.data).check()
        return None
    if config.recipe == "pretrain" and (loss := launcher.ended_before(config, num_ranks, run_dir)) is not None:
        return loss
    return launcher.start(registry.RecipeTask(config), num_ranks, run_dir)


def run_as_one_rank(arguments: list[str]) -> None:
    """What torchrun, deepspeed and srun start: the same, in ranks that exist. One per machine tells of a mistake."""
    try:
        flag = next((argument for argument in arguments if argument.startswith("-")), None)
        if flag is not None:
            advice = "deepspeed --no_local_rank" if flag.startswith("--local") else f"python train.py {flag}"
            raise ConfigError(f"{flag} cannot be used in ranks that a launcher has started: use {advice}")
        with hydra.initialize(version_base="1.3", config_path="conf"):
            composed = hydra.compose("config", arguments, return_hydra_config=True)
            check_multirun(composed.hydra)
            run_dir = Path(composed.hydra.run.dir).absolute()
            OmegaConf.set_readonly(composed, False)
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            execute(to_config(composed), arguments, run_dir)
    except (ConfigError, CompactHydraException) as error:
        sys.exit(f"error: {describe_error(error)}" if os.environ["LOCAL_RANK"] == "0" else 1)
    except Preempted:
        os._exit(Preempted.EXIT_CODE)  # all is closed, and Python's own end takes seconds
    except RunFailed as error:
        if not error.of_all_ranks:  # that is told
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: NCCL's own end can wait for a peer, which the launcher ends after this


def _end(*_: object) -> None:
    """Upon a signal, while no rank trains: unwinds, which ends the ranks."""
    raise Preempted


if __name__ == "__main__":
    atexit.register(gc.freeze)  # else Python looks through all that was imported for garbage at its end, for 0.8 s
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, so that one line says it here
    try:
        if adopt_external_ranks():
            run_as_one_rank(sys.argv[1:])
        else:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, _end)
            run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ConfigError, RunFailed, CompactHydraException) as error:
        sys.exit(f"error: {describe_error(error)}")
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of model=null
            raise
        sys.exit(f"error: {error}: write GROUP=OPTION, such as model=tiny; python train.py --help lists all")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.strerror}: {error.filename}: choose another run dir with hydra.run.dir=FOLDER")
