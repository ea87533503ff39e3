"""Plots of recipe=plan: tokens per second and memory of each method's fastest settings, over lengths and over GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from conf.schema import Config, ConfigError
from recipes.planning.cluster import Cluster
from recipes.planning.forecast import Forecast, planned_lengths
from recipes.planning.memory import MARGIN, changed
from recipes.planning.plan_report import method_name
from recipes.planning.search import SearchResult, search

LENGTHS_FILE, GPUS_FILE = "plan_over_lengths.png", "plan_over_gpus.png"
LENGTH_FACTORS, GPU_FACTORS = (0.25, 0.5, 1, 2, 4), (0.25, 0.5, 1, 2)

Places = dict[str, list[Forecast]]  # by the label on the x axis, what fits there, the fastest first


def over_lengths(config: Config, found: SearchResult, cluster: Cluster, typed: Sequence[str], run_dir: Path) -> Path:
    """Draw RUN_DIR/plan_over_lengths.png: this cluster, shorter and longer sequences of documents like these."""
    places: Places = {}
    for factor in LENGTH_FACTORS:
        if length := int(factor * config.data.sequence_length):
            at_length = changed(config, **{"data.sequence_length": length})
            at_length.documents = _repeated(planned_lengths(config), length)
            places[f"{length:,}"] = _shown(found) if factor == 1 else _searched(at_length, cluster, typed)
    return _draw(places, "tokens per sequence", cluster, run_dir / LENGTHS_FILE)


def over_gpus(config: Config, found: SearchResult, cluster: Cluster, typed: Sequence[str], run_dir: Path) -> Path:
    """Draw RUN_DIR/plan_over_gpus.png: this length, on fewer GPUs and on more hosts."""
    clusters = [scaled for factor in GPU_FACTORS if (scaled := scaled_cluster(cluster, factor))]
    places = {
        f"{one.hosts} x {one.gpus_per_host}": _shown(found) if one == cluster else _searched(config, one, typed)
        for one in clusters
    }
    return _draw(places, "hosts x GPUs of a host", cluster, run_dir / GPUS_FILE)


def scaled_cluster(cluster: Cluster, factor: float) -> Cluster | None:
    """With fewer or more hosts; less than one host is one with fewer GPUs. None if that is no whole number."""
    num_gpus = int(cluster.num_gpus * factor)
    if num_gpus < cluster.gpus_per_host:
        return dataclasses.replace(cluster, hosts=1, gpus_per_host=num_gpus) if num_gpus else None
    hosts, rest = divmod(num_gpus, cluster.gpus_per_host)
    return None if rest else dataclasses.replace(cluster, hosts=hosts)


def _repeated(lengths: tuple[int, ...], length: int) -> list[int] | None:
    """The documents again and again, up to a sequence's length; None for none."""
    if not lengths:
        return None
    repeated, left = [], length
    for size in itertools.cycle(lengths):
        repeated.append(min(size, left))
        left -= repeated[-1]
        if not left:
            return repeated
    raise AssertionError("a cycle has no end")


def _searched(config: Config, cluster: Cluster, typed: Sequence[str]) -> list[Forecast]:
    with contextlib.suppress(ConfigError):  # the degrees or the batch that the user gave do not go with these GPUs
        return _shown(search(config, cluster, typed))
    return []


def _shown(found: SearchResult) -> list[Forecast]:
    return found.ranked or found.unpredicted


def _draw(places: Places, axis: str, cluster: Cluster, path: Path) -> Path:
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = speed, mfu, memory = figure.subplots(1, 3)
    for method in dict.fromkeys(method_name(one) for fitting in places.values() for one in fitting):
        fastest = [next((one for one in fits if method_name(one) == method), None) for fits in places.values()]
        values = {
            speed: [one.tokens_per_s if one else math.nan for one in fastest],  # a gap where the method does not fit
            mfu: [one.mfu_pct if one else math.nan for one in fastest],
            memory: [one.needed_bytes / 2**30 if one else math.nan for one in fastest],
        }
        for axes, heights in values.items():
            axes.plot(heights, "o-", label=method)
    memory.axhline((1 - MARGIN) * cluster.memory_gib, color="gray", linestyle="--", label=f"{1 - MARGIN:.0%} of a GPU")
    speed.set(title="the fastest settings of each method that fit", ylabel="tokens/s, all GPUs", yscale="log")
    mfu.set(title="their MFU", ylabel="% of the data sheet's peak")
    is_bound = any(one.unpredicted for fits in places.values() for one in fits)
    memory.set(title=f"their memory{', a lower bound' if is_bound else ''}", ylabel="GiB per GPU")
    for axes in (mfu, memory):
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax)  # with room above: MFU is nearly level
    for axes in panels:
        axes.set_xticks(range(len(places)), [*places])
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
    memory.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the plots
    figure.savefig(path, dpi=120)
    return path
