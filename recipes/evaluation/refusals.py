"""What the launcher's parent refuses before ranks start: another evaluation's results, tasks that cannot be made."""

from __future__ import annotations

from pathlib import Path

from conf.schema import LOSS_TASK, Config, ConfigError, DataConfig
from data.tokenizer import open_tokenizer, tokenizer_problem
from recipes.checkpoint.manifest import CHECKPOINTS_DIR
from recipes.evaluation.cells import NUM_SPARE, lengths_of, planned_cells
from recipes.evaluation.results import read_evaluation
from recipes.evaluation.tasks import make_samples, read_hay
from recipes.model.rope import decoding_problem

TEXT_SOURCES = ("stdlib", "text_files")
LONG_ENOUGH = 8192  # tokens: a question that so many hold fits longer texts, too, which take longer to make


def check(config: Config, run_dir: Path) -> None:
    """Look at the run dir, and check the tasks.

    Raises:
        ConfigError: if the run dir is a training run's or another evaluation's, or as `check_tasks`.
    """
    if (run_dir / CHECKPOINTS_DIR).exists():
        raise ConfigError(
            f"hydra.run.dir={run_dir} holds a training run, whose settings and summary would be replaced: give that as "
            "evaluate.model, and another hydra.run.dir"
        )
    read_evaluation(config, run_dir)
    check_tasks(config)


def check_tasks(config: Config) -> None:
    """Make a sample of each task at the shortest length.

    Raises:
        ConfigError: if the tokenizer or the length cannot make a task, or the model cannot decode at these lengths.
    """
    tasks = [task for task in config.evaluate.tasks if task != LOSS_TASK]
    if not tasks:
        return
    if config.evaluate.scoring == "generate" and config.model.path:
        _check_decoding(config)
    tokenizer, hay = open_tokenizer(config.data), read_hay(hay_source(config.data))
    if problem := tokenizer_problem(tokenizer, config.model.vocab_size):
        raise ConfigError(problem)
    depth_of = {cell.task: cell.depth for cell in planned_cells(config)}
    length = min(LONG_ENOUGH, *lengths_of(config))
    for task in tasks:
        make_samples(task, tokenizer, hay, length, depth_of[task], 1, config.evaluate.seed)


def _check_decoding(config: Config) -> None:
    from recipes.model.pretrained import model_config  # imports transformers

    longest = max(config.evaluate.lengths)
    if decoding_problem(model_config(config.model).get_text_config(), longest + NUM_SPARE):
        raise ConfigError(
            f"evaluate.scoring=generate cannot go with rope_type=dynamic of {config.model.path} at {longest:,} tokens: "
            "the keys that are kept would need other frequencies with each token; use evaluate.scoring=one_pass"
        )


def hay_source(data: DataConfig) -> DataConfig:
    """Whose texts hide the needles: those of the data, or the standard library's where data has no plain texts."""
    return data if data.source in TEXT_SOURCES else DataConfig()
