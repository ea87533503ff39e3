"""The entries of a comparison that run on this machine, and notes on what was changed or left out."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import NamedTuple

import torch

from conf.degrees import resolve_degrees
from conf.schema import Config, ConfigError, Degrees
from recipes.benchmark import downscale
from recipes.benchmark.comparison_report import CPU_WARNING
from recipes.launch import launcher
from recipes.launch.environment import ranks_are_started, ranks_given
from ring_attention.transport import choose_transport


class Entry(NamedTuple):
    """A configuration, and the number of ranks it runs on."""

    config: Config
    num_ranks: int

    @property
    def degrees(self) -> Degrees:
        return resolve_degrees(self.config, self.num_ranks)

    @property
    def micro_batch_sizes(self) -> list[int]:
        """The sizes that divide the batch, ascending."""
        batch, data_degree = self.config.engine.train_batch_size, self.degrees.data
        sizes = sorted(set(self.config.compare.micro_batch_sizes))
        return [size for size in sizes if batch is None or batch % (data_degree * size) == 0] or [1]


def choose_entries(config: Config, composed: dict[str, Config]) -> tuple[dict[str, Entry], list[str]]:
    """Copies of the entries that run on this machine, with their final batch, downscaled if configured; and notes.

    Raises:
        ConfigError: if none fits, or one that compare.only names does not.
    """
    on_gpu = torch.cuda.device_count() > 0
    entries, left_out = _fitting(config, composed, on_gpu)
    missing = [name for name in config.compare.only if name not in entries]
    if not entries:
        raise ConfigError("\n".join(["none of the entries fits:", *left_out]))
    if missing:
        advice = "which cannot run here: take it out, or use other ranks:"
        raise ConfigError("\n".join([f"compare.only has {', '.join(missing)}, {advice}", *left_out]))
    _set_batches(config, composed, entries, on_gpu)
    notes = [] if on_gpu else [f"!!! {CPU_WARNING}"]
    notes += _change_notes(config, composed, entries)
    notes += [f"left out: {line}" for line in left_out]
    if config.compare.baseline and config.compare.baseline not in entries:
        notes.append(f"baseline: {next(iter(entries))}, because {config.compare.baseline} is left out")
    if not on_gpu:
        warnings = [launcher.make_plan(*entry).slow_step_warning for entry in entries.values()]
        notes += dict.fromkeys(f"!!! {warning}" for warning in warnings if warning)
    return entries, notes


def _fitting(config: Config, composed: dict[str, Config], on_gpu: bool) -> tuple[dict[str, Entry], list[str]]:
    """The entries that fit the ranks, without duplicates, downscaled if configured; and why others are left out."""
    available = ranks_given(config) or torch.cuda.device_count()
    entries: dict[str, Entry] = {}
    left_out, same_as, fitting = [], {}, {}
    for name, own in composed.items():
        needed = own.launch.num_ranks or available
        if available and (needed != available if ranks_are_started() else needed > available):
            left_out.append(f"{name}: it needs launch.num_ranks={needed}, and there are {available}")
        else:
            fitting[name] = copy.deepcopy(own)
    longest = max((own.data.sequence_length for own in fitting.values()), default=0)
    for name, own in fitting.items():
        if config.compare.downscale:
            own.engine.train_batch_size = None  # until `_set_batches`
            if not on_gpu:
                downscale.downscale_to_cpu(own, longest)
        try:
            entry = Entry(own, launcher.count_ranks(own))
        except ConfigError as error:
            left_out.append(f"{name}: {error}")
            continue
        first = same_as.setdefault(_what_runs(entry), name)
        if first == name:
            entries[name] = entry
        else:
            left_out.append(f"{name}: on {entry.num_ranks} ranks the same as {first}")
    return entries, left_out


def _set_batches(config: Config, composed: dict[str, Config], entries: dict[str, Entry], on_gpu: bool) -> None:
    """Give entries of equal length and ranks one batch, except those whose own is configured and not downscaled."""
    alike_by_kind = collections.defaultdict(list)
    for entry in entries.values():
        alike_by_kind[entry.num_ranks, entry.config.data.sequence_length].append((entry.config, entry.degrees))
    for name, entry in entries.items():
        own, configured = entry.config.engine, composed[name].engine.train_batch_size
        alike = alike_by_kind[entry.num_ranks, entry.config.data.sequence_length]
        if config.compare.downscale:
            own.train_batch_size = downscale.common_batch(alike, configured, on_gpu)
        elif configured is None:
            own.train_batch_size = downscale.smallest_batch(alike, on_gpu) * own.gradient_accumulation_steps
            own.gradient_accumulation_steps = 1


def _change_notes(config: Config, composed: dict[str, Config], entries: dict[str, Entry]) -> list[str]:
    """A line for each changed field, which names its entries unless it is changed in all."""
    changed = collections.defaultdict(list)
    for name, entry in entries.items():
        for change in downscale.changes(composed[name], entry.config):
            changed[change].append(name)
    notes = []
    for change, names in changed.items():
        notes.append(f"changed: {change}" + ("" if len(names) == len(entries) else f" ({', '.join(names)})"))
    if config.compare.downscale and notes:
        notes.append("to keep the sizes as typed: compare.downscale=false")
    return notes


def _what_runs(entry: Entry) -> str:
    """Equal for entries that compute the same: their settings, with the resolved method and degrees."""
    settings, degrees = dataclasses.asdict(entry.config), entry.degrees
    attention = settings["attention"]
    if attention["transport"] == "auto":
        attention["transport"] = choose_transport("cuda" if torch.cuda.device_count() else "cpu")
    if degrees.sequence == 1:
        attention["method"] = "local"
    elif attention["method"] == "hybrid" and 1 in (degrees.ring, degrees.ulysses):
        attention["method"] = "ring" if degrees.ulysses == 1 else "ulysses"
    settings["parallelism"] = (entry.config.parallelism.method, degrees)
    del settings["launch"]
    return repr(settings)


def roofline_entry(entries: dict[str, Entry]) -> Entry:
    """The entry that compare.roofline=true adds, like the others but with one micro-batch size.

    Raises:
        ConfigError: if entries differ in the model, the length or the number of ranks.
    """
    kinds = {(repr(own.model), own.data.sequence_length, num_ranks) for own, num_ranks in entries.values()}
    if len(kinds) > 1:
        raise ConfigError(
            "compare.roofline=true needs entries of one model, one data.sequence_length and one launch.num_ranks: use "
            "compare.roofline=false, or name such entries in compare.only"
        )
    first, num_ranks = next(iter(entries.values()))
    own = copy.deepcopy(first)
    own.compare.micro_batch_sizes = [own.engine.micro_batch_size]
    return Entry(own, num_ranks)
