"""What recipe=plan says: the settings that were found, as text for people and as rows for RUN_DIR/plan.json."""

from __future__ import annotations

import collections
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from conf.schema import Config, ConfigError
from recipes.planning.cluster import Cluster
from recipes.planning.forecast import Forecast
from recipes.planning.memory import MARGIN, num_parameters
from recipes.planning.search import SearchResult
from recipes.run.text_table import text_table

NUM_PRINTED = 10  # rank grids, each with its fastest settings
NUM_REFUSED = 3
MAX_SIZES = 4  # of documents, listed one by one
MAX_COLUMNS = 120  # of a line of a command
# columns of a step's time, and the parts of `StepParts` in each
PARTS = {
    "products": ("products", "head"),
    "attention": ("attention",),
    "messages": ("messages", "gradients"),
    "optimizer": ("optimizer",),
    "bubble": ("bubble",),
    "other": ("elementwise", "host", "offloading"),
}


def report(result: SearchResult, config: Config, cluster: Cluster) -> Iterator[str]:
    """Lines of text.

    Raises:
        ConfigError: if nothing fits.
    """
    if not result.ranked and not result.unpredicted:
        raise _nothing_fits(result, config, cluster)
    best = (result.ranked or result.unpredicted)[0]
    yield f"{_model(config)}, {config.data.sequence_length:,} tokens per sequence, on {cluster}"
    yield from (f"  {line}" for line in _assumptions(best, cluster))
    yield (
        f"  tried {sum(map(len, (result.ranked, result.unpredicted, result.refused))):,} settings: "
        f"{len(result.ranked):,} fit; {len(result.unpredicted):,} may fit, but their memory is not predicted; "
        f"{len(result.refused):,} do not fit"
    )
    shown = best_of_grids(result.ranked or result.unpredicted)[:NUM_PRINTED]
    reasons = "; ".join(dict.fromkeys(one.unpredicted for one in shown if one.unpredicted))
    bound = f"; their memory is a lower bound ({reasons})" if reasons else ""
    yield f"\nthe fastest settings of each rank grid, the best {len(shown)} grids{bound}"
    yield from text_table([_header(), *(_cells(number, one) for number, one in enumerate(shown, 1))])
    yield "step and its parts are in seconds; messages are those that nothing hides"
    yield f"\nwhat to type, with the time for {config.plan.tokens:,.0f} tokens"
    for number, one in enumerate(shown, 1):
        tokens_per_day = 86400 * one.tokens_per_s
        yield f"{number:<2}  {tokens_per_day / 1e9:,.2f} G tokens per day, {gpu_hours(one, config):,.0f} GPU-hours"
        yield from typed_lines(one.command)
    if result.ranked and result.unpredicted:
        yield "\nnot ranked, because their memory is not predicted: the fastest of each kind, with a lower bound"
        yield from (f"  {_in_words(one)}: {_bound(one)}" for one in _of_each_reason(result.unpredicted))
    if result.refused:
        fastest = sorted(result.refused, key=lambda one: -one.tokens_per_s)
        yield f"\ndo not fit: {len(result.refused):,} settings, such as those that would be fastest"
        yield from (f"  {_in_words(one)}: {one.refusal}" for one in best_of_grids(fastest)[:NUM_REFUSED])


def typed_lines(command: str) -> Iterator[str]:
    """A command on lines of at most `MAX_COLUMNS`, as people break one: a backslash ends each line but the last.

    A word is never broken. One that is longer has a line to itself.
    """
    first, *words = map(shlex.quote, shlex.split(command))
    line = f"    {first}"
    for word in words:
        if len(f"{line} {word} \\") > MAX_COLUMNS:
            yield f"{line} \\"
            line = f"        {word}"
        else:
            line += f" {word}"
    yield line


def _nothing_fits(result: SearchResult, config: Config, cluster: Cluster) -> ConfigError:
    """Of a model or a sequence too large for the cluster."""
    least = result.refused[0]
    advice = "use more GPUs or such with more memory, a smaller model, or a shorter data.sequence_length"
    if least.state.built > least.limit_bytes >= least.state.total:
        advice = "use GPUs with more memory, or a model at model.path, which is never built in fp32"
    elif math.prod(least.degrees[:3]) > 1 and (stage := least.config.engine.zero_stage) < 3:  # no other was tried
        advice = f"type engine.zero_stage=3 instead of {stage}, {advice}"
    return ConfigError(
        f"{_model(config)} does not fit cluster={config.cluster}, {cluster.num_gpus} x {cluster.spec.device_name}, "
        f"in any of {len(result.refused):,} ways. The smallest needs, per GPU ({_in_words(least)}): {least.refusal}: "
        f"{advice}"
    )


def best_of_grids(forecasts: Iterable[Forecast]) -> list[Forecast]:
    """The first forecast of each method and rank grid."""
    first: dict[Any, Forecast] = {}
    for one in forecasts:
        first.setdefault((one.method, one.degrees), one)
    return list(first.values())


def gpu_hours(forecast: Forecast, config: Config) -> float:
    """For plan.tokens."""
    return config.plan.tokens / forecast.tokens_per_s / 3600 * forecast.cluster.num_gpus


def row(forecast: Forecast, config: Config) -> dict[str, Any]:
    """A forecast in numbers."""
    engine = forecast.config.engine
    return {
        "method": method_name(forecast), "degrees": forecast.degrees._asdict(), "kernel": forecast.kernel,
        "zero_stage": engine.zero_stage, "micro_batch_size": engine.micro_batch_size,
        "micro_batches": forecast.micro_batches, "recompute": engine.recompute, "offloaded": _offloaded(forecast),
        "tokens_per_step": forecast.step.tokens_per_step, "step_time_s": forecast.step.parts.total,
        "parts_s": dict(forecast.step.parts), "tokens_per_s": forecast.tokens_per_s, "mfu_pct": forecast.mfu_pct,
        "tokens_per_day": 86400 * forecast.tokens_per_s, "gpu_hours": gpu_hours(forecast, config),
        "memory_gib": forecast.needed_bytes / 2**30, "memory_is_lower_bound": forecast.unpredicted is not None,
        "host_memory_gib": forecast.host_bytes / 2**30, "refusal": forecast.refusal, "command": forecast.command,
    }  # fmt: skip


def method_name(forecast: Forecast) -> str:
    """The attention method, or tensor x pipeline."""
    return "tensor x pipeline" if forecast.degrees.tensor * forecast.degrees.pipeline > 1 else forecast.method


def _model(config: Config) -> str:
    return f"{config.model.path or config.model.name} with {num_parameters(config.model) / 1e9:,.3g} G parameters"


def _assumptions(best: Forecast, cluster: Cluster) -> Iterator[str]:
    """What the forecasts take for granted, beside what the cluster says of itself."""
    sequences = best.step.tokens_per_step // best.config.data.sequence_length
    if best.config.engine.train_batch_size is None:
        yield "the given accumulation steps leave the batch to the grid: steps differ in tokens"
    else:
        yield f"every step has {sequences:,} sequences, {best.step.tokens_per_step:,} tokens"
    if best.lengths:
        yield f"each sequence has {_counted(best.lengths)} tokens"
    else:
        yield "each sequence is one document; +documents=lognormal is a mix of many"
    yield (
        f"a GPU has {best.limit_bytes / 2**30:.1f} GiB for a step: CUDA, NCCL and fragmentation take {MARGIN:.0%}. "
        f"The attention kernel is {best.kernel}, with every package installed"
    )
    if cluster.hosts > 1:
        yield "no step was measured on several hosts: the link between them is as the cluster's file says"


def _counted(lengths: Sequence[int]) -> str:
    """(512, 512, 64) -> "3 documents of 64, 2 x 512"; of many sizes the range."""
    counts, documents = collections.Counter(lengths), f"{len(lengths):,} documents"
    if len(counts) > MAX_SIZES:
        return f"{documents} of {min(lengths):,} to {max(lengths):,}"
    sizes = (f"{count} x {size:,}" if count > 1 else f"{size:,}" for size, count in sorted(counts.items()))
    return f"{documents} of {', '.join(sizes)}"


def _header() -> list[str]:
    return [
        "",
        "method",
        "grid",
        "ZeRO",
        "micro-batch",
        "recompute",
        "offload",
        "tokens/s",
        "MFU",
        "GiB",
        "step",
        *PARTS,
    ]


def _cells(number: int, one: Forecast) -> list[str]:
    engine, parts = one.config.engine, dict(one.step.parts)
    return [
        str(number), method_name(one), _grid(one), str(engine.zero_stage),
        f"{engine.micro_batch_size} x {one.micro_batches}", engine.recompute, ", ".join(_offloaded(one)) or "-",
        f"{one.tokens_per_s:,.0f}", f"{one.mfu_pct:.1f}%", f"{one.needed_bytes / 2**30:.1f}",
        *(_seconds(value) for value in (one.step.parts.total, *(_sum(parts, names) for names in PARTS.values()))),
    ]  # fmt: skip


def _sum(parts: dict[str, float], names: Sequence[str]) -> float:
    return sum(parts[name] for name in names)


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _grid(one: Forecast) -> str:
    """Such as "data 2 x ring 4"."""
    return " x ".join(f"{name} {degree}" for name, degree in one.degrees._asdict().items() if degree > 1) or "1 GPU"


def _offloaded(one: Forecast) -> list[str]:
    names = ("activations", "optimizer", "parameters")
    return [name for name in names if getattr(one.config.engine, f"offload_{name}")]


def _in_words(one: Forecast) -> str:
    engine, offloaded = one.config.engine, _offloaded(one)
    host = f", {' and '.join(offloaded)} offloaded" if offloaded else ""
    return (
        f"{method_name(one)}, {_grid(one)}, ZeRO {engine.zero_stage}, micro-batch {engine.micro_batch_size}, "
        f"recompute {engine.recompute}{host}"
    )


def _bound(one: Forecast) -> str:
    return f"{one.tokens_per_s:,.0f} tokens/s, at least {one.needed_bytes / 2**30:.1f} GiB ({one.unpredicted})"


def _of_each_reason(forecasts: list[Forecast]) -> list[Forecast]:
    first: dict[str | None, Forecast] = {}
    for one in forecasts:
        first.setdefault(one.unpredicted, one)
    return list(first.values())
