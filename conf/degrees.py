"""The rank grid: which degrees a configuration gets on a number of ranks. Pure integer arithmetic.

`conf.schema` refuses what is wrong on any number of ranks; here is what depends on that number.
"""

from __future__ import annotations

import math
from typing import Any

from conf.schema import Config, ConfigError, Degrees, one_divisor


def resolve_degrees(config: Config, num_ranks: int, ranks_per_host: int | None = None) -> Degrees:
    """The grid of `num_ranks`. Unset degrees fill the ranks: sequence, tensor and pipeline degrees first, then data.

    A hybrid's unset Ulysses degree is the largest that the key-value heads and a host's ranks allow. attention=auto
    counts as a ring here, until `recipes.planning.plan` chooses a method. tensor_pipeline gets two stages on four ranks
    or more, and tensor ranks for the rest.

    Raises:
        ConfigError: if the degrees contradict each other, the ranks, the heads or the attention method.
    """
    given = {name: getattr(config.parallelism, f"{name}_degree") for name in Degrees._fields}
    for name, degree in given.items():
        if degree is not None and num_ranks % degree:
            raise ConfigError(
                f"parallelism.{name}_degree={degree} does not divide the {num_ranks} ranks: use "
                f"{one_divisor(num_ranks)}, such as parallelism.{name}_degree={num_ranks}, or another launch.num_ranks"
            )
    if config.parallelism.method == "tensor_pipeline":
        chosen = _choose_tensor_pipeline(config, given, num_ranks)
    else:
        chosen = _choose_sequence(config, given, num_ranks, ranks_per_host)
    for name in ("ulysses", "ring", "pipeline", "tensor", "data"):
        if chosen[name] is None:
            chosen[name] = _ranks_left(num_ranks, chosen)
    degrees = Degrees(**chosen)
    if (product := math.prod(degrees)) != num_ranks:
        shown = [name for name, degree in chosen.items() if degree > 1 or given[name] is not None]
        grid = " x ".join(f"parallelism.{name}_degree={chosen[name]}" for name in shown)
        raise ConfigError(
            f"{grid} is {product} ranks, but there are {num_ranks}: leave one of them unset, or "
            f"launch.num_ranks={product}"
        )
    _check_heads(config, num_ranks, degrees)
    return degrees


def accumulation_steps(config: Config, degrees: Degrees) -> int:
    """Micro-batches per step.

    Raises:
        ConfigError: if engine.train_batch_size is not a multiple of one micro-batch on every data rank.
    """
    engine = config.engine
    if engine.train_batch_size is None:
        return engine.gradient_accumulation_steps
    steps, rest = divmod(engine.train_batch_size, degrees.data * engine.micro_batch_size)
    if rest:
        raise ConfigError(
            f"engine.train_batch_size={engine.train_batch_size} is no multiple of {degrees.data} data ranks x "
            f"engine.micro_batch_size={engine.micro_batch_size}: use "
            f"engine.train_batch_size={(steps + 1) * degrees.data * engine.micro_batch_size}"
        )
    return steps


def resolve_config(config: Config, degrees: Degrees, num_ranks: int) -> None:
    """Write the resolved degrees, accumulation steps and ranks into the configuration, for the record of a run."""
    for name, degree in degrees._asdict().items():
        setattr(config.parallelism, f"{name}_degree", degree)
    engine = config.engine
    engine.gradient_accumulation_steps, engine.train_batch_size = accumulation_steps(config, degrees), None
    config.launch.num_ranks = num_ranks


def _ranks_left(num_ranks: int, degrees: dict[str, Any]) -> int:
    """What the degrees that are set leave to one that is unset."""
    return max(1, num_ranks // math.prod(degree or 1 for degree in degrees.values()))


def _choose_sequence(
    config: Config, given: dict[str, Any], num_ranks: int, ranks_per_host: int | None
) -> dict[str, Any]:
    """`given` with the degrees that the method fixes, and a hybrid's Ulysses degree."""
    method = config.attention.method
    fixed = {"ulysses": ("ring",), "hybrid": (), "local": ("ring", "ulysses")}.get(method, ("ulysses",))
    for name in fixed:
        if (given[name] or 1) > 1:
            raise ConfigError(
                f"attention={method} has no {name} ranks: leave out parallelism.{name}_degree={given[name]}, or use "
                f"attention={name if method == 'local' else 'hybrid'}"
            )
    chosen = given | dict.fromkeys((*fixed, "tensor", "pipeline"), 1)
    if method == "hybrid" and given["ring"] is None and given["ulysses"] is None:
        share = _ranks_left(num_ranks, chosen)
        chosen["ulysses"] = math.gcd(share, ranks_per_host or share, config.model.num_kv_heads)
    return chosen


def _choose_tensor_pipeline(config: Config, given: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """`given` with a number of stages, unless they must fill the ranks."""
    engine = config.engine
    for name, value, legal, reason in (
        ("attention", config.attention.method, "local", ", whose ranks hold all tokens of some heads"),
        ("engine.zero_stage", engine.zero_stage, 1, ", whose DeepSpeed engine supports only stage 1"),
        ("engine.recompute", engine.recompute, "none", ""),
        ("engine.offload_optimizer", str(engine.offload_optimizer).lower(), "false", ""),
        ("engine.tile_tokens", engine.tile_tokens or 0, 0, ", whose last stage computes all logits at once"),
        ("parallelism.ring_degree", given["ring"] or 1, 1, ""),
        ("parallelism.ulysses_degree", given["ulysses"] or 1, 1, ""),
    ):
        if value != legal:
            raise ConfigError(f"{name}={value} cannot go with parallelism=tensor_pipeline{reason}: use {name}={legal}")
    chosen = given | {"ring": 1, "ulysses": 1}
    if given["pipeline"] is None and (given["tensor"] is None or given["data"] is None):
        left = _ranks_left(num_ranks, chosen)
        chosen["pipeline"] = 2 if given["tensor"] is None and left % 2 == 0 and left >= 4 else 1
    return chosen


def _check_heads(config: Config, num_ranks: int, degrees: Degrees) -> None:
    """Raises ConfigError if the degrees do not divide the heads or the MLP, or exceed the layers."""
    model, method = config.model, config.attention.method
    heads = model.num_kv_heads
    if heads < degrees.ulysses or (method == "hybrid" and heads % degrees.ulysses):
        more_heads = "" if model.path else f"model.num_kv_heads={degrees.ulysses}, "
        raise ConfigError(
            f"attention={method} with parallelism.ulysses_degree={degrees.ulysses} does not fit "
            f"model.num_kv_heads={heads}: use attention=hybrid, {more_heads}"
            f"parallelism.ulysses_degree={math.gcd(heads, num_ranks)}, or attention=ring, which takes any heads"
        )
    for name, size in (("num_kv_heads", heads), ("mlp_size", model.mlp_size)):
        if size % degrees.tensor:
            raise ConfigError(
                f"parallelism.tensor_degree={degrees.tensor} does not divide model.{name}={size}: use "
                f"parallelism.tensor_degree={math.gcd(size, num_ranks)}, or +experiment=ra_sp, which shards tokens"
            )
    if degrees.pipeline > model.num_layers:
        raise ConfigError(
            f"parallelism.pipeline_degree={degrees.pipeline} is more than model.num_layers={model.num_layers}: a stage "
            f"has at least one layer, so use parallelism.pipeline_degree={math.gcd(model.num_layers, num_ranks)}"
        )
