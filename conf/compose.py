"""From Hydra's composition to the typed configuration; a mistake becomes one line that says what to type.

Its neighbours are `schema`, which has the fields and their checks, and `train.py`, which shows the line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    OmegaConfBaseException,
    ValidationError,
)

from conf.schema import Config, ConfigError


def to_config(composed: DictConfig) -> Config:
    """The typed configuration.

    Raises:
        ConfigError: from the checks of `schema`, and for a field that it lacks: Hydra lets `+data.nosuch=1` pass.
    """
    check_fields(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(describe_error(error)) from error
    assert isinstance(config, Config)
    return config


def check_fields(composed: DictConfig) -> None:
    """Raises ConfigError for a field that the schema lacks."""
    for name in _field_names(OmegaConf.to_container(composed)):
        if name not in _FIELD_NAMES:
            raise ConfigError(_unknown_field(name))


def compose_entries(config: Config, overrides: list[str]) -> dict[str, Config]:
    """The configurations of a comparison's entries, by name, within Hydra's composition of what was typed.

    Raises:
        ConfigError: that names the entry, if it does not compose.
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
    """What one entry of a comparison is composed of: what was typed, where its own do not replace it.

    Experiments add up: those typed choose the workload, say, the entry's own the method.
    """
    experiments: list[str] = []
    kept: dict[str, str] = {}
    for override in (*given, f"recipe={recipe}", *own):
        name, _, value = override.partition("=")
        if name == "+experiment":
            experiments += [option for option in value.strip("[]").split(",") if option not in experiments]
        else:
            kept[name] = override
    return [*([f"+experiment=[{','.join(experiments)}]"] if experiments else []), *kept.values()]


def check_multirun(hydra_config: HydraConf) -> None:
    """Raises ConfigError for +sweep=NAME in a single run that leaves open what NAME sweeps: -m was forgotten."""
    typed = [str(override) for override in hydra_config.overrides.task]
    given = {override.partition("=")[0].lstrip("+") for override in typed}
    swept = hydra_config.sweeper.get("params") or {}
    if left := [name for name in swept if name.lstrip("+") not in given]:
        raise ConfigError(
            f"this is one run, but {' and '.join(left)} would be swept: type python train.py -m {' '.join(typed)}"
        )


def describe_error(error: Exception) -> str:
    """Hydra's CompactHydraException, or OmegaConf's error, in one line: the value, the rule and what to type.

    Errors of this project say that already and are given back as they are.
    """
    if not isinstance(error, (CompactHydraException, OmegaConfBaseException)):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        plus = "" if group in _DEFAULT_GROUPS else "+"  # groups without a default are added
        return (
            f"{plus}{group}={option} is not known: use {', '.join(f'{plus}{group}={name}' for name in error.options)}"
        )
    if isinstance(error, MissingConfigException) and (name := re.search("Could not load '(.+?)/(.+?)'", str(error))):
        return f"{name[1]}={name[2]} is not known: python train.py --help lists what there is"
    if isinstance(error, OverrideParseException):
        example = "data.files='[a.txt,b.txt]'"
        if "compare.entries" in error.override:
            example = "\"+compare.entries.mine=['+experiment=dp','engine.zero_stage=2']\""
        return (
            f"{error.override} is not of the form field=value ({error.message.splitlines()[-2]}): "
            f"quote what the shell or Hydra takes apart, such as {example}"
        )
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return _unknown_field(str(cause.full_key))
    if str(error).startswith("Could not delete from config"):
        return _unknown_field(str(error).split("'")[1])
    if isinstance(cause, (ValidationError, ConfigTypeError)):
        if cause.full_key in _GROUP_NAMES:
            return f"{cause.full_key} has no options to choose from, only fields: {cause.full_key}.FIELD=value"
        setting = str(error).rpartition(" ")[2]  # Error merging override num_steps=abc
        if "is not a ListConfig" in str(cause):
            return f"{setting} must be a list: {_as_list(setting)}"
        return f"{setting} is refused: {cause.msg.splitlines()[0] if cause.msg else cause}"
    if str(error).startswith("Ambiguous value for argument"):
        setting = str(error).split("'")[1]
        return f"{setting} has several values: for a sweep type python train.py -m, for a list {_as_list(setting)}"
    if "No match in the defaults list" in str(error):
        group = str(error).split("'")[1]
        return f"{group} has no default to replace: write +{group}=OPTION"
    if str(error).startswith("Multiple values for"):
        group = str(error).split()[3].rstrip(".")
        if group not in _DEFAULT_GROUPS:
            return f"+{group} is there twice: write +{group}=[ONE,OTHER]"
        return f"{group} has an option already, so it takes no +: write {group}=OPTION"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return " ".join(str(error).split())


def _as_list(setting: str) -> str:
    name, _, values = setting.partition("=")
    return f"{name}=[{values}]"


def _unknown_field(name: str) -> str:
    if name.startswith(tuple(f"{field}." for field in _FREE)):
        return f"{name} is new, so it takes a +: write +{name}=[...]"
    if name in REMOVED:
        return f"{name} is gone: {REMOVED[name]}"
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}: type {RENAMED[name]}=..."
    alike = difflib.get_close_matches(name, _FIELD_NAMES, n=3)
    advice = f"did you mean {' or '.join(alike)}? " if alike else ""
    return f"there is no field {name}: {advice}python train.py --help lists all"


def _field_names(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _FREE:
            yield from _field_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


RENAMED = {
    "attention.block": "attention.kernel",
    "compare.fit": "compare.downscale",
    "compare.parts_alone": "compare.roofline",
}
REMOVED = {
    "parallelism.sequence_sharded_norms": "tensor ranks always shard norms by sequence, so leave it out",
}
_FREE = ("compare.entries",)  # dictionaries with keys of the user's own
_FIELD_NAMES = list(_field_names(asdict(Config())))
_GROUP_NAMES = {name.partition(".")[0] for name in _FIELD_NAMES if "." in name}
_DEFAULT_GROUPS = {*_GROUP_NAMES, "workload"} - {"sweep"}  # those that conf/config.yaml lists
