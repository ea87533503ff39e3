"""What a rank must hold before any activation, by arithmetic, and what to type where it cannot.

Below `plan`, which refuses with it. Pure functions of the configuration; sizes in bytes, shown in GiB.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from conf.schema import Config, Degrees, ModelConfig

MOST_RANKS = 2**16  # that are thought of
LOGITS_BYTES = 2**30  # that exist at once, if nothing is said
MLP_BYTES = 2**31  # of an MLP's hidden activations and their gradients that exist at once, if nothing is said
LAYERS_ON_DEVICE = 2  # whose kept tensors are there at any time with engine.offload_activations: see `recipes.model.activation_offload`
TILE_MULTIPLE = 256  # tokens: matrix products like round numbers


def num_parameters(model: ModelConfig) -> int:
    """Trainable parameters of `recipes.model.transformer.Transformer`."""
    return _embeddings(model) + _norm(model) + model.num_layers * _layer(model)


def layer_matmul_parameters(model: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim * model.hidden_size
    return attention + (3 if model.mlp == "swiglu" else 2) * model.mlp_size * model.hidden_size


def _norm(model: ModelConfig) -> int:
    return model.hidden_size * (1 if model.norm == "rmsnorm" else 2)


def _layer(model: ModelConfig) -> int:
    biases = 0
    if model.bias:
        qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        biases = qkv_size + 2 * model.hidden_size + model.mlp_size * (2 if model.mlp == "swiglu" else 1)
    return layer_matmul_parameters(model) + biases + 2 * _norm(model)


def _embeddings(model: ModelConfig) -> int:
    """The embedding and the head."""
    return model.vocab_size * model.hidden_size * (1 if model.tied_head else 2)


class StateBytes(NamedTuple):
    """Of the rank that holds most: a lower bound of what it needs, without activations and buckets.

    Args:
        built: the weights as they are built, in fp32, before DeepSpeed casts them and ZeRO cuts them; gone by then.
    """

    weights: float
    gradients: float
    optimizer: float
    built: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def needed(self) -> float:
        return max(self.total, self.built)

    def __str__(self) -> str:
        parts = f"weights {gib(self.weights)} + gradients {gib(self.gradients)} + optimizer {gib(self.optimizer)}"
        before = f"; before that, to build them in fp32, {gib(self.built)} GiB" if self.built > self.total else ""
        return f"{parts} = {gib(self.total)} GiB{before}"


def bucket_size(num_parameters: int) -> int:
    """Numbers that DeepSpeed reduces at once. It allocates whole buckets, also for a small model."""
    return min(500_000_000, num_parameters)


def tile_tokens(config: Config, local_tokens: int) -> int:
    """Of how many of a rank's `local_tokens` tokens per micro-batch logits exist at once, where not of all; else 0."""
    return _tile(config, local_tokens, LOGITS_BYTES // (4 * config.model.vocab_size))  # the loss has them in fp32


def mlp_tile_tokens(config: Config, local_tokens: int) -> int:
    """Of how many of them an MLP's hidden activations exist at once, where not of all; else 0.

    Tiles are computed again in the backward pass. Where layers are computed again anyway, and in forward passes, that
    takes no product more: there it is done past a size if nothing is said.
    """
    if config.engine.tile_tokens is None and config.recipe == "pretrain" and config.engine.recompute == "none":
        return 0
    return _tile(config, local_tokens, MLP_BYTES // mlp_bytes(config))


def mlp_bytes(config: Config) -> int:
    """Per token: an MLP's hidden activations and their gradients."""
    widths = 6 if config.model.mlp == "swiglu" else 4  # gate, up and their product; what goes into GELU and comes out
    return widths * config.model.mlp_size * (4 if config.engine.dtype == "fp32" else 2)


def kept_layer_bytes(config: Config) -> int:
    """Per token: what is kept of a layer that is computed again."""
    return sum(_kept_tensors(config))


def host_bytes(config: Config, local_tokens: int) -> int:
    """What engine.offload_activations moves of a micro-batch: pinned memory comes in powers of two."""
    tensors = [2 ** math.ceil(math.log2(per_token * local_tokens)) for per_token in _kept_tensors(config)]
    return max(0, config.model.num_layers - LAYERS_ON_DEVICE) * sum(tensors)


def _kept_tensors(config: Config) -> list[int]:
    """Per token: a layer's input and, if recompute is selective, attention's output and lse."""
    model, size = config.model, 4 if config.engine.dtype == "fp32" else 2
    attention = [size * model.num_heads * model.head_dim, 4 * model.num_heads]
    return [size * model.hidden_size, *(attention if config.engine.recompute == "selective" else [])]


def banner_rows(config: Config, local_tokens: int) -> list[tuple[str, str]]:
    """What is done in tiles, and what is moved to the host, as rows of a banner."""
    given, of = config.engine.tile_tokens, f"at a time, of {local_tokens:,} per rank and micro-batch"
    rows = []
    if tile := tile_tokens(config, local_tokens):
        rows.append(("loss", f"logits of {tile:,} tokens {of}"))
    if tile := mlp_tile_tokens(config, local_tokens):
        whole = f"those of all would take {gib(mlp_bytes(config) * local_tokens)} GiB with their gradients"
        reason = whole if given is None else f"engine.tile_tokens={given}"
        rows.append(("MLP", f"hidden activations of {tile:,} tokens {of} ({reason})"))
    if config.engine.offload_parameters:
        rows.append(("offload", "weights on the host but where they are needed"))
    if config.recipe != "pretrain":
        return rows
    if config.engine.offload_optimizer:
        rows.append(("offload", "the optimizer's state and its step on the host"))
    if config.engine.offload_activations:
        what = "layers' inputs" + (" and attention's results" if config.engine.recompute == "selective" else "")
        moved = f"{gib(host_bytes(config, local_tokens))} GiB per rank of the host's memory"
        if config.model.num_layers <= LAYERS_ON_DEVICE:
            moved = f"none, for those of the last {LAYERS_ON_DEVICE} layers stay on the device"
        rows.append(("offload", f"{what} of a micro-batch: {moved}"))
    return rows


def _tile(config: Config, local_tokens: int, most: int) -> int:
    """What was said, else a round number of at most `most` tokens, and of half of them; 0 for all of them.

    A tile of nearly all would have its own tensors beside what is kept of all, and save nothing.
    """
    if config.parallelism.method == "tensor_pipeline":
        return 0
    tokens = config.engine.tile_tokens
    if tokens is None:
        tokens = max(1, most // TILE_MULTIPLE * TILE_MULTIPLE or most)
        if tokens < local_tokens:
            tokens = min(tokens, math.ceil(local_tokens / 2 / TILE_MULTIPLE) * TILE_MULTIPLE)
    return tokens if tokens < local_tokens else 0


def gib(size: float) -> str:
    """Bytes as a number of GiB, without the unit."""
    size /= 2**30
    return f"{size:,.2f}" if size >= 1 else f"{size:.2g}"


def state_bytes(config: Config, degrees: Degrees) -> StateBytes:
    """Weights, gradients and optimizer state per rank, without those that lie on the host.

    Each ZeRO stage divides one more of them by all ranks: the optimizer state (where that is on the host, the gradients
    with it), the gradients, the weights. Tensor and pipeline ranks cut the layers, but not the embedding and the head,
    of which a stage that is not the only one has one (norms and biases are counted as if cut); their optimizer state is
    divided by the data ranks (ZeRO-1). Without training there are weights alone.
    """
    model, engine, num_ranks = config.model, config.engine, math.prod(degrees)
    weight_size = 4 if engine.dtype == "fp32" else 2
    gradient_size = 4 if engine.zero_stage >= 1 else weight_size
    optimizer_size = 8 if engine.dtype == "fp32" else 12  # two Adam moments and, in half precision, fp32 weights
    if config.parallelism.method == "tensor_pipeline":
        layers = math.ceil(model.num_layers / degrees.pipeline) * _layer(model) / degrees.tensor
        ends = _embeddings(model) if degrees.pipeline == 1 else model.vocab_size * model.hidden_size
        parameters, cuts = layers + _norm(model) + ends, (1, 1, degrees.data)
    else:
        parameters = num_parameters(model)
        first_stages = 3, 1 if engine.offload_optimizer else 2, 1  # that divide weights, gradients, optimizer state
        cuts = tuple(num_ranks if engine.zero_stage >= stage else 1 for stage in first_stages)
    if engine.offload_optimizer:
        optimizer_size = 0
        if engine.zero_stage == 3 or engine.dtype == "fp32":  # else DeepSpeed 0.19.8 sums gradients on the device
            gradient_size = 0
    if engine.offload_parameters:
        weight_size = 0
    if config.recipe == "forward":
        return StateBytes(parameters * weight_size / cuts[0], 0, 0, built=parameters * 4)
    sizes = (weight_size, gradient_size, optimizer_size)
    return StateBytes(*(parameters * size / cut for size, cut in zip(sizes, cuts, strict=True)), built=parameters * 4)


def refusal(config: Config, degrees: Degrees, memory_bytes: int, host_ranks: int | None) -> str | None:
    """Why ranks with `memory_bytes` cannot hold the model, and overrides with which they could; None if they can.

    Args:
        host_ranks: how many ranks share a host's memory; None if each has its own, as on GPUs.
    """
    state, num_ranks = state_bytes(config, degrees), math.prod(degrees)
    if state.needed <= memory_bytes:
        return None
    grid = f"engine.zero_stage={config.engine.zero_stage} on {num_ranks} rank{'s' if num_ranks > 1 else ''}"
    if config.parallelism.method == "tensor_pipeline":
        grid = f"{degrees.data} data x {degrees.tensor} tensor x {degrees.pipeline} pipeline ranks"
    return "\n".join(
        [
            f"model {config.model.name} with {num_parameters(config.model) / 1e6:,.2f} M parameters does not fit: "
            f"{grid} needs, per rank and without activations,",
            f"  {state} > {gib(memory_bytes)} GiB, the memory of one rank",
            *(
                _remedies(config, degrees, memory_bytes, host_ranks)
                or ["  nothing to type makes it fit: use a smaller model"]
            ),
        ]
    )


def _remedies(config: Config, degrees: Degrees, memory_bytes: int, host_ranks: int | None) -> list[str]:
    """What to type, each with what it would need: on these ranks if that is possible, else on more; a smaller model."""
    num_ranks, lines, on_these = math.prod(degrees), [], False
    for ranks in _doubled(num_ranks):
        fitting = [
            (changes, needed)
            for changes, trial_degrees in _layouts(config, ranks)
            if (needed := state_bytes(changed(config, **changes), trial_degrees).needed) <= memory_bytes
        ]
        if fitting:
            changes, needed = fitting[0]
            typed = _typed(changes)
            on_these = ranks == num_ranks
            if on_these:
                lines = [f"  use {typed}: {gib(needed)} GiB"]
            else:
                hosts = "" if host_ranks is None else f", on {math.ceil(ranks / host_ranks)} hosts like this one"
                typed = f", and {typed}" if typed else ""
                lines = [f"  use {ranks} ranks with as much memory each{hosts}{typed}: {gib(needed)} GiB"]
            break
    if host_ranks is None and not on_these:
        lines += _on_host(config, degrees, memory_bytes, "or" if lines else "use")
    fewer, more = degrees.pipeline, config.model.num_layers  # layers that might fit, and that do not
    if state_bytes(changed(config, **{"model.num_layers": fewer}), degrees).needed <= memory_bytes:
        while more - fewer > 1:
            middle = (fewer + more) // 2
            fits = state_bytes(changed(config, **{"model.num_layers": middle}), degrees).needed <= memory_bytes
            fewer, more = (middle, more) if fits else (fewer, middle)
        needed = state_bytes(changed(config, **{"model.num_layers": fewer}), degrees).needed
        other = "or" if lines else "use"
        return [*lines, f"  {other} a smaller model, such as model.num_layers={fewer}: {gib(needed)} GiB"]
    return lines


def _on_host(config: Config, degrees: Degrees, memory_bytes: int, use: str) -> Iterator[str]:
    """A line that says how these ranks would do with the optimizer's state on the host, if they would."""
    engine = config.engine
    if config.recipe != "pretrain" or config.parallelism.method != "sequence" or engine.offload_optimizer:
        return
    for stage in range(max(1, engine.zero_stage), 4):
        changes: dict[str, Any] = {} if stage == engine.zero_stage else {"engine.zero_stage": stage}
        changes["engine.offload_optimizer"] = True
        needed = state_bytes(changed(config, **changes), degrees).needed
        if needed <= memory_bytes:
            yield f"  {use} {_typed(changes)}, the optimizer's state on the host: {gib(needed)} GiB"
            return


def _typed(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())


def _doubled(num_ranks: int) -> Iterator[int]:
    while num_ranks <= MOST_RANKS:
        yield num_ranks
        num_ranks *= 2


def _layouts(config: Config, num_ranks: int) -> Iterator[tuple[dict[str, Any], Degrees]]:
    """Ways to lay the model over the ranks, as fields to change; those that cut it least come first."""
    model, engine = config.model, config.engine
    if config.parallelism.method != "tensor_pipeline":
        degrees = Degrees(num_ranks, 1, 1)  # which of the ranks share a sequence makes no difference
        yield {}, degrees
        if engine.zero_stage < 3:
            yield {"engine.zero_stage": 3}, degrees
        return
    grids = [
        (tensor, pipeline)
        for tensor in range(1, math.gcd(num_ranks, model.num_kv_heads, model.mlp_size) + 1)
        for pipeline in range(1, model.num_layers + 1)
        if model.num_kv_heads % tensor == model.mlp_size % tensor == num_ranks % (tensor * pipeline) == 0
    ]
    for tensor, pipeline in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
        degrees = Degrees(num_ranks // (tensor * pipeline), 1, 1, tensor, pipeline)
        changes = {"parallelism.tensor_degree": tensor, "parallelism.pipeline_degree": pipeline}
        if config.parallelism.data_degree not in (None, degrees.data):
            changes["parallelism.data_degree"] = degrees.data
        if engine.train_batch_size is None or engine.train_batch_size % (degrees.data * engine.micro_batch_size) == 0:
            yield changes, degrees


def changed(config: Config, **fields: Any) -> Config:
    """A copy with other values, by names such as engine.zero_stage."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        group, field = name.split(".")
        setattr(getattr(config, group), field, value)
    return config
