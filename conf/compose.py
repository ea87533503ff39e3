"""From Hydra's composition to the typed configuration. Every mistake becomes one line that says what to type."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra.conf import HydraConf
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf.schema import WANDB_MODES, Config, ConfigError, flatten

# Old names of fields. A field that gets a new name leaves its old one here.
RENAMED = {
    "attention.block": "attention.kernel",
    "data.path": "data.files",
    "compare.fit": "compare.downscale",
    "compare.parts_alone": "compare.roofline",
}
# Fields that no longer exist, with what to do instead.
REMOVED = {
    "compare.plot": "leave it out, entries on several numbers of ranks are drawn over these",
    "parallelism.sequence_sharded_norms": "leave it out, tensor ranks always shard the norms by sequence",
}
_FINETUNE = "type +experiment=finetune model.path=FOLDER_OR_HUB_NAME"
# What people type who know other tools, by the last part of the name, and what there is here.
FROM_OTHER_TOOLS = {
    ("pretrained", "path", "name_or_path", "model_name_or_path"): _FINETUNE,
    ("tokenizer", "tokenizer_name", "tokenizer_path"): "type data.tokenizer=FOLDER_OR_HUB_NAME: see docs/data.md",
    (
        "packing",
        "pack_documents",
        "pad_to_max_length",
    ): "type data.packing=best_fit, concatenate or none: see docs/data.md",
    ("tensorboard", "report_to"): "metrics go to wandb (offline without a login) and to RUN_DIR/metrics.jsonl",
    ("output_dir", "save_dir"): "type hydra.run.dir=FOLDER",
    ("resume", "resume_from", "resume_from_checkpoint"): "the same command with the same hydra.run.dir=FOLDER resumes",
    ("epochs", "num_epochs", "num_train_epochs"): "runs are counted in steps: type num_steps=N",
    ("max_steps", "train_iters"): "type num_steps=N",
    ("learning_rate", "lr"): "type optimizer.lr=...",
    (
        "seq_length",
        "seq_len",
        "max_seq_length",
        "max_seq_len",
        "max_length",
        "context_length",
    ): "type data.sequence_length=N",
    ("global_batch_size",): "type engine.train_batch_size=N",
    ("per_device_train_batch_size", "micro_batch_size_per_gpu"): "type engine.micro_batch_size=N",
    ("zero", "zero_optimization", "stage"): "type engine.zero_stage=0, 1, 2 or 3",
    ("bf16", "fp16", "precision"): "type engine.dtype=bf16, fp16 or fp32",
    ("gradient_checkpointing", "activation_checkpointing"): "type engine.recompute=selective or full",
    ("lora_rank", "lora_r", "r", "peft"): "type lora.rank=16, with model.path",
    ("rope_scaling",): "type model.rope='{rope_type:yarn,factor:4}', with model.path",
}
_ENTRIES = "compare.entries."  # followed by names that the user chooses
_ROPE = "model.rope."  # followed by names that transformers knows
_MIXTURE = "data.sources."  # followed by names of its sources, which schema checks
_FIELDS = flatten(asdict(Config()))


def _field_types(group: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each field by dotted name, such as {"optimizer.lr": float}."""
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(group).items():
        types |= _field_types(kind, f"{prefix}{name}.") if is_dataclass(kind) else {f"{prefix}{name}": kind}
    return types


_TYPES = _field_types(Config)
_DATACLASSES = {name.partition(".")[0] for name in _FIELDS if "." in name}
_GROUPS_WITH_DEFAULT = {*_DATACLASSES, "workload"} - {"sweep"}  # conf/config.yaml lists them, the others need a plus


def as_hydra_types_it(argument: str) -> str:
    """field=8.0 as field=8 where the field takes whole numbers, and field=None as field=null where it may be null.

    `wandb agent` writes values as Python does. field=~/x becomes the path that it means, because shells expand ~ only
    where a word begins. All other arguments are returned unchanged.
    """
    name, _, value = argument.partition("=")
    if value.startswith("~/"):
        return f"{name}={os.path.expanduser(value)}"
    kind = _TYPES.get(name)
    kinds = (kind, *get_args(kind))
    if value == "None" and type(None) in kinds:
        return f"{name}=null"
    if int in kinds and re.fullmatch(r"-?\d+\.0*", value):
        return f"{name}={value.partition('.')[0]}"
    return argument


def to_config(composed: DictConfig) -> Config:
    """The typed configuration.

    Raises:
        ConfigError: if a check of `schema` fails, for a field that the schema lacks, or a WANDB_MODE that wandb lacks.
    """
    check_fields(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(describe_error(error)) from error
    assert isinstance(config, Config)
    mode = os.environ.get("WANDB_MODE")
    if config.logging.wandb == "auto" and mode and mode not in WANDB_MODES:
        raise ConfigError(f"WANDB_MODE={mode} is no mode of wandb: use {', '.join(WANDB_MODES)}, or unset it")
    return config


def check_fields(composed: DictConfig) -> None:
    """Raises ConfigError for a field that the schema lacks, because Hydra accepts +data.nosuch=1."""
    container: Any = OmegaConf.to_container(composed)
    for name, value in flatten(container).items():
        if name not in _FIELDS and not name.startswith((_ENTRIES, _ROPE, _MIXTURE)):
            raise ConfigError(_unknown_field(name, value))


def compose_entries(config: Config, overrides: list[str]) -> dict[str, Config]:
    """The configuration of each entry, by name, under the overrides typed. Must run while Hydra is initialized.

    Raises:
        ConfigError: if an entry does not compose; names the entry.
    """
    compare, entries = config.compare, {}
    for name, own in compare.entries.items():
        if not compare.only or name in compare.only:
            try:
                entries[name] = to_config(hydra.compose("config", entry_overrides(overrides, own, compare.recipe)))
            except (ConfigError, CompactHydraException) as error:
                raise ConfigError(f"compare.entries.{name}: {describe_error(error)}") from error
    return entries


def entry_overrides(given: list[str], own: list[str], recipe: str) -> list[str]:
    """The overrides of one entry of a comparison: those given on the command line, replaced by the entry's own.

    Experiments are joined, not replaced: one may choose the workload and another the method.
    """
    experiments: list[str] = []
    by_field: dict[str, str] = {}
    # what is compared is attention over whole sequences, unless a mask is asked for
    for override in ("data.document_mask=false", *given, f"recipe={recipe}", *own):
        name, _, value = override.partition("=")
        if name == "+experiment":
            experiments += [option for option in value.strip("[]").split(",") if option not in experiments]
        else:
            by_field[name] = override
    return [*([f"+experiment=[{','.join(experiments)}]"] if experiments else []), *by_field.values()]


def check_multirun(hydra_config: HydraConf) -> None:
    """Raises ConfigError if a single run chooses +sweep=NAME and leaves a swept field open: -m was forgotten."""
    typed = [str(override) for override in hydra_config.overrides.task]
    given = {override.partition("=")[0].lstrip("+") for override in typed}
    swept = hydra_config.sweeper.get("params") or {}
    if left := [name for name in swept if name.lstrip("+") not in given]:
        raise ConfigError(
            f"this is one run, but {' and '.join(left)} would be swept: type python train.py -m {' '.join(typed)}"
        )


def check_files_typed_once(typed: list[str]) -> None:
    """Raises ConfigError if files are typed twice: Hydra drops the first, and shells make two of data.files={a,b}."""
    for name in ("data.files", "data.validation_files"):
        values = [override.partition("=")[2] for override in typed if override.startswith(f"{name}=")]
        if len(values) > 1:
            raise ConfigError(
                f"{' and '.join(f'{name}={value}' for value in values)}: only the last would be read, so type one of "
                f"them, or {name}=[{','.join(values)}]"
            )


def check_flags(arguments: list[str]) -> None:
    """Raises ConfigError for a setting that is typed as other tools take it, such as --num_steps 20."""
    of_other_tools = {name for names in FROM_OTHER_TOOLS for name in names}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if argument.startswith("--") and name in _FIELDS:
            example = "true" if _TYPES[name] is bool else "VALUE"
            raise ConfigError(f"{argument} has dashes, which settings lack: type {name}={value or example}")
        if argument.startswith("--") and name in of_other_tools:
            raise ConfigError(_unknown_field(name, value))


def describe_error(error: Exception) -> str:
    """An error of Hydra or OmegaConf in one line: the value, the rule and what to type. Other errors unchanged."""
    if not isinstance(error, (CompactHydraException, OmegaConfBaseException)):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        path = str(error.missing_cfg_file)  # the option may be OWNER/NAME of a hub; only Hydra's groups are nested
        group, _, option = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
        setting = group if group in _GROUPS_WITH_DEFAULT else f"+{group}"
        options = error.options or sorted(path.stem for path in Path(__file__).with_name(group).glob("*.yaml"))
        advice = _did_you_mean(option, options) + f"use {', '.join(f'{setting}={name}' for name in options)}"
        return f"{setting}={option} is not known: {advice}"
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        if name in _DATACLASSES and value.startswith("{"):  # nested parameters of a wandb sweep
            fields = [f"{name}.{key}" for key in re.findall(r"['\"](\w+)['\"] *:", value)]
            advice = f"write {' and '.join(fields)}, in a sweep's YAML as keys of parameters"
            return f"{error.override} sets several fields at once: {advice}"
        first, reason = error.message.splitlines()[0], error.message.splitlines()[-2]  # the last line is a link
        if reason.strip() == "^":
            reason = f"unexpected {first[reason.index('^')]}"
        example = "\"data.files=['a.txt','b.txt']\""
        if name == "generate.prompt":
            example = "\"generate.prompt='def main('\", or write it into a file, generate.prompt_file=prompts.jsonl"
        if _ENTRIES in error.override:
            example = "\"+compare.entries.mine=['+experiment=dp','engine.zero_stage=2']\""
        return f"{error.override} is not of the form field=value ({reason}): quote special characters, as in {example}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        name = str(cause.full_key)
        typed = re.search(rf"{re.escape(name)}=(.*)", str(error))
        setting, value = (typed[0], typed[1]) if typed else (name, "...")
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return _unknown_field(name, value)
        if name in _DATACLASSES:
            return f"{name} has no options, only fields: type {name}.FIELD=value"
        if "is not a ListConfig" in str(cause):
            return f"{setting} must be a list: type {name}=[{value}]"
        return f"{setting} is refused: {str(cause).splitlines()[0]}"
    if several := re.match(r"Ambiguous value for argument '([\w.]+)=(.*)'\n", str(error)):
        name, value = several.groups()
        takes_list = get_origin(kind := _TYPES.get(name)) is list or kind is Any
        advice = f"{name}=[{value}] for a list, or " if takes_list else ""
        return f"{name}={value} is several values: type {advice}python train.py -m ... for a run of each"
    if twice := re.match(r"Multiple values for (\w+)", str(error)):
        group = twice[1]
        advice = f"{group}=OPTION, without a plus" if group in _GROUPS_WITH_DEFAULT else f"+{group}=[ONE,OTHER]"
        return f"{group} is chosen twice: type {advice}"
    if plus := re.match(r"Could not override '\w+'\..* use \+(\S+)", str(error), re.DOTALL):
        return f"{plus[1]} has no default that it could replace, so it needs a plus: type +{plus[1]}"
    return " ".join(str(error).split())


def _unknown_field(name: str, value: Any) -> str:
    if name.startswith(_ENTRIES):
        return f"{name} is a new entry, so it needs a plus: type +{name}={value}"
    if name in REMOVED:
        return f"{name} no longer exists: {REMOVED[name]}"
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}: type {RENAMED[name]}={value}"
    for names, answer in FROM_OTHER_TOOLS.items():
        if name.rpartition(".")[2] in names:
            return f"there is no field {name}: {answer}"
    legal = [*_FIELDS, *(() if "." in name else _DATACLASSES)]  # of optimiser.lr=1 Hydra names the group alone
    return f"there is no field {name}: {_did_you_mean(name, legal)}python train.py --help lists all"


def _did_you_mean(typed: str, legal: Iterable[str]) -> str:
    alike = difflib.get_close_matches(typed, legal, cutoff=0.8)
    return f"did you mean {' or '.join(alike)}? " if alike else ""
