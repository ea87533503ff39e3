"""The rank grid: which degrees a configuration gets on a number of ranks. Pure integer arithmetic.

`conf.schema` refuses what is wrong on any number of ranks. What depends on that number is refused here, before ranks
start.
"""

from __future__ import annotations

import math

from conf.schema import Config, ConfigError, Degrees, divisors


def resolve_degrees(config: Config, num_ranks: int, ranks_per_host: int | None = None) -> Degrees:
    """The grid of `num_ranks`. Unset degrees fill the ranks: sequence, tensor and pipeline degrees first, then data.

    A hybrid's unset Ulysses degree is the largest that the key-value heads and a host's ranks allow. attention=auto
    counts as a ring here, until `recipes.planning.plan` chooses a method. tensor_pipeline gets two stages on four ranks
    or more, and tensor ranks for the rest.

    Raises:
        ConfigError: if the degrees contradict each other, the ranks, the heads or the attention method.
    """
    given = config.parallelism
    for name in Degrees._fields:
        degree = getattr(given, f"{name}_degree")
        if degree is not None and num_ranks % degree:
            legal = divisors(num_ranks)
            raise ConfigError(
                f"parallelism.{name}_degree={degree} does not divide the {num_ranks} ranks: use one of {legal} "
                f"(parallelism.{name}_degree={legal[-1]}) or another launch.num_ranks"
            )
    degrees = (
        _tensor_pipeline_degrees(config, num_ranks)
        if given.method == "tensor_pipeline"
        else _sequence_degrees(config, num_ranks, ranks_per_host)
    )
    product = math.prod(degrees)
    if product != num_ranks:
        grid = " x ".join(
            f"parallelism.{name}_degree={degree}"
            for name, degree in degrees._asdict().items()
            if degree > 1 or getattr(given, f"{name}_degree") is not None
        )
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


def _sequence_degrees(config: Config, num_ranks: int, ranks_per_host: int | None) -> Degrees:
    method, given, heads = config.attention.method, config.parallelism, config.model.num_kv_heads
    fixed = {  # degrees that are always 1
        "ring": ("ulysses",),
        "all_gather": ("ulysses",),
        "auto": ("ulysses",),
        "ulysses": ("ring",),
        "local": ("ring", "ulysses"),
    }
    for name in fixed.get(method, ()):
        if (degree := getattr(given, f"{name}_degree") or 1) > 1:
            reason, other = f"has no {name} ranks", "hybrid"
            if method == "local":
                reason, other = "sees only the tokens of one rank", name
            raise ConfigError(
                f"attention={method} {reason}, but parallelism.{name}_degree={degree}: use attention={other} or leave "
                "the degree unset"
            )
    data = given.data_degree
    ring = 1 if "ring" in fixed.get(method, ()) else given.ring_degree
    ulysses = 1 if "ulysses" in fixed.get(method, ()) else given.ulysses_degree
    if ulysses is None:
        share = max(1, num_ranks // (data or 1) // (ring or 1))
        per_host = math.gcd(share, ranks_per_host or share)
        ulysses = share
        if method == "hybrid" and ring is None:
            ulysses = max(degree for degree in divisors(per_host) if heads % degree == 0)
    if ring is None:
        ring = max(1, num_ranks // (data or 1) // ulysses)
    if data is None:
        data = max(1, num_ranks // ring // ulysses)
    return Degrees(data, ring, ulysses)


def _tensor_pipeline_degrees(config: Config, num_ranks: int) -> Degrees:
    given, engine = config.parallelism, config.engine
    for name, value, legal, reason in (
        ("attention", config.attention.method, "local", ", whose ranks hold all tokens of some heads"),
        ("engine.zero_stage", engine.zero_stage, 1, ", whose DeepSpeed engine supports only stage 1"),
        ("engine.recompute", engine.recompute, "none", ""),
        ("engine.offload_optimizer", str(engine.offload_optimizer).lower(), "false", ""),
        ("engine.tile_tokens", engine.tile_tokens or 0, 0, ", whose last stage computes all logits at once"),
        ("parallelism.ring_degree", given.ring_degree or 1, 1, ""),
        ("parallelism.ulysses_degree", given.ulysses_degree or 1, 1, ""),
    ):
        if value != legal:
            raise ConfigError(f"{name}={value} cannot go with parallelism=tensor_pipeline{reason}: use {name}={legal}")
    data, tensor, pipeline = given.data_degree, given.tensor_degree, given.pipeline_degree
    left = max(1, num_ranks // (data or 1) // (tensor or 1))
    if pipeline is None:
        pipeline = 1
        if tensor is not None and data is not None:
            pipeline = left
        elif tensor is None and left % 2 == 0 and left >= 4:
            pipeline = 2
    if tensor is None:
        tensor = max(1, left // pipeline)
    if data is None:
        data = max(1, num_ranks // tensor // pipeline)
    return Degrees(data, 1, 1, tensor, pipeline)


def _check_heads(config: Config, num_ranks: int, degrees: Degrees) -> None:
    """Raises ConfigError if the degrees do not divide the heads or the MLP, or exceed the layers."""
    model, method = config.model, config.attention.method
    heads = model.num_kv_heads
    if heads < degrees.ulysses or (method == "hybrid" and heads % degrees.ulysses):
        raise ConfigError(
            f"attention={method} with parallelism.ulysses_degree={degrees.ulysses} does not fit "
            f"model.num_kv_heads={heads}: "
            f"use attention=hybrid, a multiple of {degrees.ulysses} heads (model.num_kv_heads={degrees.ulysses}), "
            f"fewer ranks per sequence (parallelism.ulysses_degree={math.gcd(heads, num_ranks)}), or attention=ring, "
            "which takes any heads"
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
