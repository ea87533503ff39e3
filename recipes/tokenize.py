"""python -m recipes.tokenize SETTINGS...: makes the token stores of a run before it, as on a machine without GPUs.

SETTINGS are those of train.py, such as data=jsonl data.files='texts/*.jsonl.gz' data.tokenizer=FOLDER. Only those of
the data matter, and model.path, whose tokenizer is used. Prints one line per store. A store that is there is kept.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException

from conf.compose import as_hydra_types_it, describe_error, to_config
from conf.schema import Config, ConfigError, source_configs
from data.corpus import validation_name
from data.report import roles_warning
from data.store import OpenedStore, open_counted, validation_configs

CONF = Path(__file__).resolve().parents[1] / "conf"


def tokenize(config: Config) -> None:
    """Make the stores of all sources and validation sources. Raises ConfigError if one cannot be made."""
    if config.data.stream:
        raise ConfigError("data.stream=true keeps no tokens on disk, so there is nothing to make: leave it out")
    if config.model.path is not None and config.data.tokenizer is None:
        folder = Path(config.model.path).expanduser()
        config.data.tokenizer = str(folder.resolve()) if folder.exists() else config.model.path
    sources = source_configs(config.data).items()
    validation = validation_configs(config.data).items()
    for name, source in [*sources, *((validation_name(name), source) for name, source in validation)]:
        tokenizer = "tokens" if source.source == "megatron" else f"tokenizer {source.tokenizer or 'bytes'}"
        opened = open_counted(source, name, _say)
        print(f"{name}: {tokenizer}, {_summary(opened)}", flush=True)
        if warning := roles_warning(name, opened.counts.unknown_roles):
            print(f"!!! {warning}", flush=True)


def _summary(opened: OpenedStore) -> str:
    counts, seconds = opened.counts, max(opened.counts.seconds, 1e-3)
    skipped = f"{counts.num_skipped:,} rows skipped, {counts.num_empty:,} empty"
    made = f"made in {seconds:.1f} s, {counts.num_tokens / seconds:,.0f} tokens/s" if opened.is_new else "was there"
    return f"{counts.num_documents:,} documents, {counts.num_tokens:,} tokens, {skipped}; {opened.folder} {made}"


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print((__doc__ or "").strip())
        return
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        if flag := next((argument for argument in arguments if argument.startswith("-")), None):
            raise ConfigError(f"{flag} is not known: give settings as for train.py, such as data=stdlib")
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", [as_hydra_types_it(argument) for argument in arguments])
        tokenize(to_config(composed))
    except (ConfigError, CompactHydraException) as error:
        sys.exit(f"error: {describe_error(error)}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1:])
