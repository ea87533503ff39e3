"""The one command: compose and check the configuration, then explain, launch, sweep, or join a launcher's ranks.

python train.py +experiment=ra_sp
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import hydra
except ModuleNotFoundError:  # only the library is installed
    sys.exit('error: recipes need more packages than the library: type pip install -e ".[recipes]" -c constraints.txt')
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from conf.compose import (
    as_hydra_types_it,
    check_files_typed_once,
    check_flags,
    check_multirun,
    compose_entries,
    describe_error,
    to_config,
)
from conf.degrees import accumulation_steps, resolve_degrees
from conf.schema import INFERENCE, LOSS_TASK, WITHOUT_MODEL, Config, ConfigError
from data.corpus import Corpus, open_corpus
from data.source import is_local
from data.store import check_without_download
from recipes.checkpoint.manifest import newest_readable
from recipes.launch import startup
from recipes.launch.environment import (
    RENDEZVOUS,
    adopt_external_ranks,
    adopt_submitit_tasks,
    check_accelerator,
    ranks_are_started,
    ranks_given,
)
from recipes.run.errors import Preempted, RunFailed
from recipes.run.lock import locked

if TYPE_CHECKING:
    from data.stream import StreamCorpus
    from recipes.planning.plan import Plan

# a rank that does not report a mistake exits so much later, because the launcher then ends the one that does
REFUSED_S = 5.0

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(composed: DictConfig) -> float | None:
    """Run one Hydra job, a run or a sweep's trial; returns the recipe's result, such as the validation loss."""
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    os.chdir(HydraConfig.get().runtime.cwd)  # relative paths are the user's, also with hydra.job.chdir=true
    try:
        if sweeps:
            adopt_submitit_tasks()
        else:
            check_multirun(HydraConfig.get())
        config = to_config(composed)
        if sweeps and config.logging.group is None:
            config.logging.group = f"sweep-{run_dir.parent.name}"
        # of a launcher's ranks, rank 0 locks once they are connected, so that all of them are refused
        with contextlib.nullcontext() if config.explain or ranks_are_started() else locked(run_dir):
            return execute(config, list(HydraConfig.get().overrides.task), run_dir)
    except (ConfigError, RunFailed) as error:
        if not sweeps:
            sys.exit(f"error: {error}")
        if HydraConfig.get().sweeper._target_ == "hydra_plugins.trials.Trials":
            raise  # the sweeper reports it
        print(f"error: {error}", file=sys.stderr, flush=True)  # now, because Hydra raises only when all jobs are done
        raise RunFailed(f"job {HydraConfig.get().job.num} of the sweep failed: see its message above") from None
    finally:
        is_first = os.environ.get("RANK", "0") == "0"  # tasks of one job share the folder
        if is_first and not any(run_dir.iterdir()):  # Hydra made it, and nothing ran
            run_dir.rmdir()


def execute(config: Config, overrides: list[str], run_dir: Path) -> float | None:
    """Explain or run the configured recipe, on new ranks or as a rank of an external launcher.

    Settings and data are checked first, because importing torch takes seconds.
    """
    check_accelerator()
    check_files_typed_once(overrides)
    if config.recipe == "evaluate":
        from recipes.evaluation.cells import resolve

        config = resolve(config)
    if config.recipe == "generate":
        from recipes.inference.prompts import check_files, with_prompts

        check_files(config, run_dir)
        config = with_prompts(_with_shape(_with_source(config)), run_dir)
    else:
        config = _with_shape(_with_source(config))
    if config.recipe == "compare":
        from recipes.benchmark import compare

        entries = {name: _with_shape(entry) for name, entry in compose_entries(config, overrides).items()}
        return compare.compare(config, entries, run_dir)
    if config.recipe == "max_length":
        from recipes.benchmark import max_length

        return max_length.max_length(config, run_dir)
    if config.recipe == "plan":
        from recipes.plan import plan

        return plan(config, overrides, run_dir)
    if config.recipe == "calibrate":
        from recipes.planning.cluster import calibration_file

        calibration_file(config, run_dir)  # refuses one that exists, before minutes of measuring
    if (given := ranks_given(config)) is not None:
        accumulation_steps(config, resolve_degrees(config, given))
    newest = newest_readable(run_dir) if config.recipe == "pretrain" else None
    is_finished = newest is not None and newest[1].step >= config.num_steps  # then its data may be gone
    reads_data = config.recipe not in (*WITHOUT_MODEL, "generate") and not is_finished
    if config.recipe == "evaluate":
        from recipes.evaluation.refusals import check

        check(config, run_dir)
        reads_data = LOSS_TASK in config.evaluate.tasks
    if config.evaluate.every_n_steps and not is_finished:
        from recipes.evaluation.refusals import check_tasks

        check_tasks(config)
    # what was not tokenized yet is tokenized now, before ranks start
    corpus = _open_data(config) if config.data.preview or (reads_data and not config.explain) else None
    if corpus and config.data.preview:
        if os.environ.get("RANK", "0") == "0":
            from data.preview import preview
            from data.tokenizer import open_tokenizer

            print(*preview(corpus, open_tokenizer(config.data), config.data.preview), sep="\n", flush=True)
        return None
    from recipes import registry
    from recipes.launch import launcher
    from recipes.planning.explain import explanation

    num_ranks = launcher.count_ranks(config)
    if config.explain:
        if os.environ.get("RANK", "0") != "0":
            return None
        plan = launcher.make_plan(config, num_ranks)
        print(*explanation(plan, run_dir), sep="\n", flush=True)
        if reads_data:
            corpus = _corpus_to_explain(config)
            print("", *([corpus] if isinstance(corpus, str) else _packing(plan, corpus)), sep="\n", flush=True)
    documents = corpus.digests() if isinstance(corpus, Corpus) else None
    if isinstance(corpus, str) and newest:
        documents = newest[1].documents  # not opened to explain: only the run can compare them
    if config.recipe == "pretrain":
        loss = launcher.result_if_finished(config, num_ranks, run_dir, documents)
        if loss is not None:
            return loss
    return None if config.explain else launcher.start(registry.RecipeTask(config, documents), num_ranks, run_dir)


def _corpus_to_explain(config: Config) -> Corpus | str:
    """What the run reads, or why it is not shown. Raises as `_open_data`, and downloads nothing."""
    folder = Path(config.model.path or "")
    is_own = config.model.path is not None and config.data.tokenizer == config.model.path and folder.is_dir()
    if config.explain_gpu and is_own and not any(folder.glob("tokenizer*")):
        return f"packing of documents: not shown, because {folder} has no tokenizer; data.tokenizer=FOLDER gives one"
    if not is_local(config.data):
        check_without_download(config.data, config.model.vocab_size)
        return "packing of documents: not shown, because data or tokenizer is no folder here; nothing was downloaded"
    corpus = _open_data(config)
    if not isinstance(corpus, Corpus):
        return "packing of documents: not shown, because data.stream=true reads them while training"
    return corpus


def _packing(plan: Plan, corpus: Corpus) -> list[str]:
    """How documents are packed and lie on ranks, as lines of text."""
    from data.report import packing_report
    from recipes.planning.packed_layouts import NUM_SEQUENCES, packed_layouts

    first = (pack.boundaries for pack in itertools.islice(corpus.training(), NUM_SEQUENCES))
    on_ranks = packed_layouts(plan, first)
    return [*packing_report(corpus, plan.sequences_per_step), *(["", *on_ranks] if on_ranks else [])]


def _open_data(config: Config) -> Corpus | StreamCorpus:
    """What the run reads. Raises CorpusError if it cannot be opened or is too short, and as `check_held_out`."""
    if not config.data.stream:
        from data.report import held_out_warning, roles_warnings

        corpus = open_corpus(config.data, config.model.vocab_size)
        warnings = roles_warnings(corpus)
        if config.recipe == "pretrain" and (warning := held_out_warning(corpus)):
            warnings.append(warning)
        elif config.recipe == "evaluate":
            from recipes.evaluation.held_out import check_held_out

            warnings += check_held_out(config, corpus)
        if os.environ.get("RANK", "0") == "0":
            for warning in warnings:
                print(f"{'!!!':>17}  {warning}", flush=True)
        return corpus
    from data.stream import open_stream

    stream = open_stream(config.data, config.model.vocab_size)
    stream.validation()  # reads its beginning
    return stream


def _with_source(config: Config) -> Config:
    """The configuration with the run or checkpoint that evaluate.model or generate.model names, for these recipes."""
    if config.recipe not in INFERENCE:
        return config
    from recipes.inference.source import resolve_source

    return resolve_source(config)


def _with_shape(config: Config) -> Config:
    """The configuration with the shape of the Hugging Face model at model.path, if there is one."""
    if config.model.path is None:
        return config
    from recipes.model.pretrained import resolve  # imports transformers

    return resolve(config)


def run_as_one_rank(arguments: list[str]) -> None:
    """Run as a rank of torchrun, deepspeed or srun, and exit. One rank per host reports a mistake."""
    try:
        exit_code = _run_as_one_rank(arguments)
    finally:
        if rendezvous := os.environ.get(RENDEZVOUS):  # used by this run alone, which ends with any of its ranks
            shutil.rmtree(rendezvous, ignore_errors=True)
    sys.stdout.flush()
    startup.exit_now(exit_code)


def _run_as_one_rank(arguments: list[str]) -> int:
    try:
        if flag := next((argument for argument in arguments if argument.startswith("-")), None):
            advice = "deepspeed --no_local_rank" if flag.startswith("--local") else f"python train.py {flag}"
            raise ConfigError(f"{flag} cannot be used in ranks that a launcher has started: use {advice}")
        with hydra.initialize(version_base="1.3", config_path="conf"):
            composed = hydra.compose("config", arguments, return_hydra_config=True)
            check_multirun(composed.hydra)
            with open_dict(composed):
                run_dir = Path(composed.hydra.run.dir).absolute()  # may refer to others of Hydra's settings
                del composed["hydra"]
            execute(to_config(composed), arguments, run_dir)
    except Preempted:
        return Preempted.EXIT_CODE
    except RunFailed as error:
        if not error.of_all_ranks:  # else rank 0 has printed it
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        if (mistake := _mistake(error)) is None:
            raise
        if os.environ["LOCAL_RANK"] != "0":
            time.sleep(REFUSED_S)
        if os.environ["LOCAL_RANK"] == "0" or isinstance(error, OSError):  # a file may fail on this rank alone
            print(f"error: {mistake}", file=sys.stderr, flush=True)
        return 1
    return 0


def _mistake(error: Exception) -> str | None:
    """What a user can do about it; None if the error is a fault of the program."""
    if isinstance(error, (ConfigError, RunFailed, CompactHydraException)):
        return describe_error(error)
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):  # Hydra's, for model=null
        return f"{error}: write GROUP=OPTION, such as model=tiny; python train.py --help lists all"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}: choose another run dir with hydra.run.dir=FOLDER"
    return None


def _stop(number: int, _: object) -> None:
    """On a signal while no rank trains: unwind, which ends the ranks."""
    raise Preempted(number=number)


if __name__ == "__main__":
    startup.skip_final_collection()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, and one line below prints it
    sys.argv[1:] = [as_hydra_types_it(argument) for argument in sys.argv[1:]]
    try:
        if adopt_external_ranks():
            run_as_one_rank(sys.argv[1:])
        else:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, _stop)
            check_flags(sys.argv[1:])
            run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if (mistake := _mistake(error)) is None:
            raise
        sys.exit(f"error: {mistake}")
