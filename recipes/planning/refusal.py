"""Why a model does not fit the ranks' memory, and overrides with which it does. Pure functions of the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from conf.schema import Config, Degrees
from recipes.planning.memory import changed, gib, num_parameters, state_bytes

MAX_RANKS = 2**16  # that a remedy suggests


def refusal(config: Config, degrees: Degrees, memory_bytes: int, host_ranks: int | None) -> str | None:
    """Why ranks with `memory_bytes` cannot hold the model, and what to type; None if they can.

    Args:
        host_ranks: how many ranks share a host's memory; None if each has its own, as on GPUs.
    """
    state, num_ranks = state_bytes(config, degrees), math.prod(degrees)
    if state.needed <= memory_bytes:
        return None
    grid = f"engine.zero_stage={config.engine.zero_stage} on {num_ranks} rank{'s' if num_ranks > 1 else ''}"
    if config.parallelism.method == "tensor_pipeline":
        grid = f"{degrees.data} data x {degrees.tensor} tensor x {degrees.pipeline} pipeline ranks"
    remedies = _remedies(config, degrees, memory_bytes, host_ranks)
    lines = [
        f"model {config.model.name} with {num_parameters(config.model) / 1e6:,.2f} M parameters does not fit: "
        f"{grid} needs, per rank and without activations,",
        f"  {state} > {gib(memory_bytes)} GiB, the memory of one rank",
        "  use " + "\n  or ".join(remedies) if remedies else "  no override makes it fit: use a smaller model",
    ]
    return "\n".join(lines)


def _remedies(config: Config, degrees: Degrees, memory_bytes: int, host_ranks: int | None) -> list[str]:
    """What to type, each with the memory it needs: on these ranks if possible, else on more; a smaller model."""

    def first_fitting(trials: Iterable[tuple[dict[str, Any], Degrees]], before: str = "", after: str = "") -> list[str]:
        for changes, trial_degrees in trials:
            needed = state_bytes(changed(config, **changes), trial_degrees).needed
            if needed <= memory_bytes:
                typed = " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
                return [f"{(before + typed).removesuffix(', and ')}{after}: {gib(needed)} GiB"]
        return []

    engine, ranks, stage_3 = config.engine, math.prod(degrees), {"engine.zero_stage": 3}
    remedies = []
    if config.parallelism.method == "sequence" and not (remedies := first_fitting([(stage_3, degrees)])):
        while ranks < MAX_RANKS and not remedies:
            ranks *= 2
            hosts = f", on {math.ceil(ranks / host_ranks)} hosts like this one" if host_ranks else ""
            more = Degrees(ranks, 1, 1)  # states do not depend on which ranks share a sequence
            before = f"{ranks} ranks with as much memory each{hosts}, and "
            remedies = first_fitting([({}, more), (stage_3, more)], before)
        if host_ranks is None and config.recipe == "pretrain" and not engine.offload_optimizer:
            stages = range(max(1, engine.zero_stage), 4)
            changes = ({} if stage == engine.zero_stage else {"engine.zero_stage": stage} for stage in stages)
            offloads = ((change | {"engine.offload_optimizer": True}, degrees) for change in changes)
            remedies += first_fitting(offloads, after=", the optimizer states on the host")
    layers = range(config.model.num_layers - 1, degrees.pipeline - 1, -1)
    smaller = (({"model.num_layers": num_layers}, degrees) for num_layers in layers)
    return remedies + first_fitting(smaller, "a smaller model, such as ")
