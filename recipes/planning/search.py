"""The settings that are fastest on a cluster: all that are legal, those that fit by their tokens per second.

What the user gave stays: what was typed, and what an experiment set to another value than the default. The rest is
searched: the method, the degrees, ZeRO's stage, the micro-batch, recomputation and offloading. Candidates have equally
many sequences in a step, so that their tokens per second compare.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from conf.degrees import accumulation_steps, resolve_degrees
from conf.schema import Config, ConfigError, Degrees, EngineConfig, PlanConfig, one_divisor
from recipes.planning.auto_method import method_of
from recipes.planning.cluster import Cluster
from recipes.planning.forecast import Forecast, planned_lengths
from recipes.planning.plan import kernel_choice

TOKENS_PER_STEP = 2**22  # about as many, unless the user gives the batch
MICRO_BATCH_TOKENS = 2**15  # of one GPU: larger micro-batches of several sequences make no kernel faster
# The values of engine.NAME, the least costly first: of equally fast candidates the first is ranked first. Stage 2 is
# tried only if it is given, because this engine shards the sums of gradients on stage 1, too.
ENGINE: dict[str, tuple[Any, ...]] = {
    "zero_stage": (1, 3, 0),
    "recompute": ("none", "selective", "full"),
    "offload_activations": (False, True),
    "offload_optimizer": (False, True),
    "offload_parameters": (False, True),
}
TENSOR_PIPELINE: dict[str, tuple[Any, ...]] = {name: values[:1] for name, values in ENGINE.items()}  # it has no others


@dataclass(frozen=True)
class SearchResult:
    """All candidates.

    Args:
        ranked: those that fit, the fastest first.
        unpredicted: those that fit by a lower bound, because their memory is not predicted; the fastest first.
        refused: those that do not fit, the one that needs least memory first.
    """

    ranked: list[Forecast]
    unpredicted: list[Forecast]
    refused: list[Forecast]


def search(config: Config, cluster: Cluster, typed: Sequence[str] = ()) -> SearchResult:
    """Try all legal settings on all GPUs of a cluster.

    Args:
        config: what the user gave, of any recipe.
        typed: the overrides of the command line, which stay as they are.

    Raises:
        ConfigError: if no settings are legal: degrees, heads, batch or kernel contradict each other.
    """
    kernel, _ = kernel_choice(config, "cuda", cluster.spec.capability, is_elsewhere=True)
    lengths = planned_lengths(config)
    config = _to_train(config)
    given = given_names(config, typed)
    if lengths:  # tensor and pipeline ranks have no document masks
        given |= {"parallelism.method"}
    if sequences := sequences_per_step(config, cluster.num_gpus, given):
        config.engine.train_batch_size = sequences
    refusals: list[ConfigError] = []
    forecasts = [
        Forecast(candidate, degrees, candidate.attention.method, kernel, cluster, lengths, tuple(typed))
        for candidate, degrees in _candidates(config, cluster, given, refusals)
    ]
    if not forecasts:
        if not refusals:
            raise _no_grid(config, cluster, given)
        [(most, _)] = collections.Counter(map(str, refusals)).most_common(1)  # others are of some grids only
        raise ConfigError(most)
    fitting = [forecast for forecast in forecasts if forecast.fits]
    fitting.sort(key=lambda forecast: -forecast.tokens_per_s)
    return SearchResult(
        [forecast for forecast in fitting if not forecast.unpredicted],
        [forecast for forecast in fitting if forecast.unpredicted],
        # building a model in fp32 takes equally much whatever the settings are: then the states decide
        sorted((one for one in forecasts if not one.fits), key=lambda one: (one.needed_bytes, one.state.total)),
    )


def given_names(config: Config, typed: Iterable[str]) -> frozenset[str]:
    """Names such as engine.zero_stage that are typed, or whose values are not the defaults.

    attention=auto leaves the method open, and degrees are searched if they are unset.
    """
    names = {override.partition("=")[0].lstrip("+") for override in typed}
    names |= {f"{group}.method" for group in ("attention", "parallelism") if group in names}
    default = Config()
    for group in ("attention", "parallelism", "engine"):
        ours, theirs = getattr(config, group), getattr(default, group)
        fields = (spec.name for spec in dataclasses.fields(ours))
        names |= {f"{group}.{name}" for name in fields if getattr(ours, name) != getattr(theirs, name)}
    return frozenset(names - ({"attention.method"} if config.attention.method == "auto" else set()))


def sequences_per_step(config: Config, num_gpus: int, given: frozenset[str]) -> int | None:
    """The sequences of a step of every candidate; None if accumulation steps are given, which leave it to the degrees.

    Of about TOKENS_PER_STEP tokens, so that each GPU has a power of two of them, or else some GPUs share one.
    """
    engine = config.engine
    if engine.train_batch_size is not None or "engine.gradient_accumulation_steps" in given:
        return engine.train_batch_size
    unit = engine.micro_batch_size if "engine.micro_batch_size" in given else 1
    wanted = max(1, TOKENS_PER_STEP // (unit * config.data.sequence_length))
    if wanted >= num_gpus:
        return unit * num_gpus * 2 ** ((wanted // num_gpus).bit_length() - 1)
    return unit * max(divisor for divisor in range(1, wanted + 1) if num_gpus % divisor == 0)


def _to_train(config: Config) -> Config:
    """A copy that trains, without what belongs to recipe=plan."""
    config = copy.deepcopy(config)
    config.recipe, config.cluster, config.documents, config.plan = "pretrain", None, None, PlanConfig()
    return config


def _candidates(
    config: Config, cluster: Cluster, given: frozenset[str], refusals: list[ConfigError]
) -> Iterator[tuple[Config, Degrees]]:
    """Legal ones; why others are not goes to `refusals`."""
    engines = {
        "sequence": [*_engines(config.engine, given, ENGINE)],
        "tensor_pipeline": [*_engines(config.engine, given, TENSOR_PIPELINE)],
    }
    for grid in _grids(config, cluster.num_gpus, given):
        sizes = [config.engine.micro_batch_size]
        if "engine.micro_batch_size" not in given:
            sizes = [1, *_larger_micro_batches(grid, cluster.num_gpus)]
        for engine, size in itertools.product(engines[grid.parallelism.method], sizes):
            candidate = copy.copy(grid)
            candidate.engine = copy.copy(engine)
            candidate.engine.micro_batch_size = size
            try:
                degrees = resolve_degrees(candidate, cluster.num_gpus, cluster.gpus_per_host)
                accumulation_steps(candidate, degrees)
                candidate.__post_init__()
            except ConfigError as error:
                refusals.append(error)
            else:
                yield candidate, degrees


def _no_grid(config: Config, cluster: Cluster, given: frozenset[str]) -> ConfigError:
    degrees = (
        (f"parallelism.{name}_degree", getattr(config.parallelism, f"{name}_degree")) for name in Degrees._fields
    )
    wanted = [f"{name}={degree}" for name, degree in degrees if degree is not None]
    wanted += [f"attention={config.attention.method}"] if "attention.method" in given else []
    return ConfigError(
        f"no grid of the cluster's {cluster.num_gpus} GPUs has {' and '.join(wanted)}: leave one of them out"
    )


def _engines(
    engine: EngineConfig, given: frozenset[str], values_by_name: dict[str, tuple[Any, ...]]
) -> Iterator[EngineConfig]:
    """The engine's settings but the micro-batch."""
    names = [name for name in values_by_name if f"engine.{name}" not in given]
    for values in itertools.product(*(values_by_name[name] for name in names)):
        changes = dict(zip(names, values, strict=True))
        with contextlib.suppress(ConfigError):  # of settings that cannot go together
            yield dataclasses.replace(engine, **changes)


def _larger_micro_batches(config: Config, num_gpus: int) -> Iterator[int]:
    """Sequences of a micro-batch: powers of two above 1 that divide the batch, up to MICRO_BATCH_TOKENS."""
    data, batch, size = config.parallelism.data_degree or 1, config.engine.train_batch_size, 2
    while size * config.data.sequence_length * data <= MICRO_BATCH_TOKENS * num_gpus:
        if batch is None or batch % (data * size) == 0:
            yield size
        size *= 2


def _grids(config: Config, num_gpus: int, given: frozenset[str]) -> Iterator[Config]:
    """Configurations with all degrees set.

    Raises:
        ConfigError: for a given degree that does not divide the GPUs.
    """
    wanted = {name: getattr(config.parallelism, f"{name}_degree") for name in Degrees._fields}
    for name, degree in wanted.items():
        if degree is not None and num_gpus % degree:
            raise ConfigError(
                f"parallelism.{name}_degree={degree} does not divide the {num_gpus} GPUs of the cluster: use "
                f"{one_divisor(num_gpus)}"
            )
    for degrees in _all_degrees(num_gpus):
        if any(degree not in (None, degrees._asdict()[name]) for name, degree in wanted.items()):
            continue
        parallelism = "tensor_pipeline" if degrees.tensor * degrees.pipeline > 1 else "sequence"
        method = _method(config.attention.method if "attention.method" in given else None, degrees)
        if method is None or ("parallelism.method" in given and parallelism != config.parallelism.method):
            continue
        grid = copy.copy(config)
        grid.attention = dataclasses.replace(config.attention, method=method)
        set_degrees = {f"{name}_degree": degree for name, degree in degrees._asdict().items()}
        grid.parallelism = dataclasses.replace(config.parallelism, method=parallelism, **set_degrees)
        if parallelism == "tensor_pipeline" and "data.document_mask" not in given and not config.data.stages:
            grid.data = dataclasses.replace(config.data, document_mask=False)  # as parallelism=tensor_pipeline says
        yield grid


def _all_degrees(num_gpus: int) -> Iterator[Degrees]:
    """Of ring and Ulysses ranks, then of tensor and pipeline ranks."""
    divisors = [number for number in range(1, num_gpus + 1) if num_gpus % number == 0]
    splits = [(data, ring) for data in divisors for ring in divisors if num_gpus // data % ring == 0]
    for data, ring in splits:
        yield Degrees(data, ring, num_gpus // data // ring)
    for data, tensor in splits:
        if data < num_gpus:
            yield Degrees(data, 1, 1, tensor, num_gpus // data // tensor)


def _method(given: str | None, degrees: Degrees) -> str | None:
    """The attention method of these degrees; None if that is not the given one."""
    own = method_of(degrees)
    if given == "all_gather" and own == "ring":
        return given
    if given is None or own == given:
        return own
    return given if own == "local" and degrees.tensor * degrees.pipeline == 1 else None
