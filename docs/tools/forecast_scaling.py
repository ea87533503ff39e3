"""Forecasts of training on up to 1,024 GPUs: strong and weak scaling, and where each attention method is fastest.

python -m docs.tools.forecast_scaling                   writes docs/results/forecast_scaling.json, in some minutes

`tables_scaling` makes the tables of docs/forecast.md from it, `draw_forecast` the plots.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from conf.schema import AttentionConfig, Config, DataConfig, Degrees, EngineConfig, ParallelismConfig
from docs.tools.markdown import RESULTS
from recipes.planning.auto_method import method_of
from recipes.planning.cluster import Cluster, parse_cluster
from recipes.planning.search import search
from recipes.planning.step_time import StepTime
from tests.tools.long_step import composed

FILE = "forecast_scaling.json"
MODELS = ("llama_8b", "llama_70b")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHORT, LONG, LONGEST = 131_072, 1_048_576, 10_485_760
TOKENS_PER_STEP = 4_194_304  # strong scaling; one sequence where it is longer
TOKENS_PER_GPU = 16_384  # weak scaling
# weak scaling with more sequences: GPUs of one sequence
GPUS_PER_SEQUENCE = {SHORT: SHORT // TOKENS_PER_GPU, LONG: LONG // TOKENS_PER_GPU}
MAP_LENGTHS = (32_768, SHORT, 4 * SHORT, LONG, 4 * LONG, LONGEST)
LINKS = (12.5, 25.0, 45.0, 90.0, 360.0)  # GB/s of one GPU between hosts
KV_HEADS = (1, 2, 4, 8, 16, 32)
LINK_MAP = (128, LONG)  # GPUs and length of the map over links between hosts
LINKS_WITHIN = (12.5, 25.0, 50.0, 100.0, 280.0)  # GB/s of one GPU in its host: PCIe to NVLink


def cluster_of(num_gpus: int) -> Cluster:
    return parse_cluster(f"{num_gpus // 8}x8xh100")


def best(model: str, length: int, num_gpus: int, sequences: int) -> dict[str, Any]:
    """The fastest training step that fits, by `recipes.planning.search`; `fits` false if none does."""
    batch = f"engine.train_batch_size={sequences}"
    typed = [f"model={model}", f"data.sequence_length={length}", batch, "engine.micro_batch_size=1"]
    typed += ["data.document_mask=false", "parallelism=sequence"]
    typed += ["engine.offload_optimizer=false", "engine.offload_parameters=false"]
    config, cluster = composed(" ".join(typed)), cluster_of(num_gpus)
    config.model.path = model  # a folder of weights; without one each GPU builds all of them, in fp32
    ranked = search(config, cluster, typed).ranked
    row = {"model": model, "length": length, "gpus": num_gpus, "sequences": sequences, "fits": bool(ranked)}
    if not ranked:
        return row
    first, engine = ranked[0], ranked[0].config.engine
    parts = {name: round(seconds, 4) for name, seconds in first.step.parts}
    return row | {
        "method": first.method,
        "degrees": {name: degree for name, degree in first.degrees._asdict().items() if degree > 1},
        "zero_stage": engine.zero_stage,
        "recompute": engine.recompute,
        "offload_activations": engine.offload_activations,
        "memory_gib": round(first.needed_bytes / 2**30, 1),
        "tokens_per_s": round(first.tokens_per_s, 1),
        "mfu_pct": round(first.mfu_pct, 1),
        "step_s": round(sum(parts.values()), 4),
        "parts_s": parts,
    }


def strong(model: str) -> Iterator[dict[str, Any]]:
    """The same batch on more GPUs."""
    for length in (SHORT, LONG, LONGEST):
        for num_gpus in GPUS:
            yield best(model, length, num_gpus, max(1, TOKENS_PER_STEP // length))


def weak_lengths(model: str) -> Iterator[dict[str, Any]]:
    """One sequence, as long as there are GPUs for it."""
    for num_gpus in GPUS:
        yield best(model, TOKENS_PER_GPU * num_gpus, num_gpus, 1)


def weak_batches(model: str) -> Iterator[dict[str, Any]]:
    """Sequences of one length, as many as there are GPUs for them."""
    for length, unit in GPUS_PER_SEQUENCE.items():
        for num_gpus in GPUS:
            if num_gpus >= unit:
                yield best(model, length, num_gpus, num_gpus // unit)


def speeds(length: int, cluster: Cluster, kv_heads: int | None = None) -> dict[str, Any]:
    """llama_8b, one sequence over all GPUs: tokens/s of a ring, of Ulysses and of the fastest hybrid, memory aside."""
    found: dict[str, Any] = {"length": length, "gpus": cluster.num_gpus, "tokens_per_s": {}, "ring_degree": {}}
    num_gpus = cluster.num_gpus
    ulysses = [degree for degree in (2**power for power in range(11)) if num_gpus % degree == 0]
    for degree in ulysses:
        step = one_sequence(length, cluster, Degrees(1, num_gpus // degree, degree), kv_heads)
        if step is not None and step.tokens_per_s > found["tokens_per_s"].get(step.method, 0.0):
            found["tokens_per_s"][step.method] = round(step.tokens_per_s, 1)
            found["ring_degree"][step.method] = step.degrees.ring
    return found


def one_sequence(length: int, cluster: Cluster, degrees: Degrees, kv_heads: int | None = None) -> StepTime | None:
    """None if the key-value heads do not allow the Ulysses degree."""
    model = composed("model=llama_8b").model
    if kv_heads is not None:
        model = dataclasses.replace(model, num_kv_heads=kv_heads)
    if model.num_kv_heads % degrees.ulysses:
        return None
    method = method_of(degrees)
    config = Config(
        model=model,
        engine=EngineConfig(micro_batch_size=1, zero_stage=3, recompute="selective"),
        attention=AttentionConfig(method=method),
        parallelism=ParallelismConfig(data_degree=1, ring_degree=degrees.ring, ulysses_degree=degrees.ulysses),
        data=DataConfig(sequence_length=length, document_mask=False),
    )
    return StepTime(config, degrees, method, "flash_attn_4", cluster)


def link_speeds(kv_heads: int, link: float) -> dict[str, Any]:
    """`speeds` for other key-value heads and another link between hosts."""
    num_gpus, length = LINK_MAP
    cluster = dataclasses.replace(cluster_of(num_gpus), link_between_gb_per_s=link)
    return {"kv_heads": kv_heads, "link": link} | speeds(length, cluster, kv_heads)


def host_speeds(length: int, link: float) -> dict[str, Any]:
    """`speeds` in one host with another link."""
    cluster = dataclasses.replace(cluster_of(8), link_within_gb_per_s=link)
    return {"link": link} | speeds(length, cluster)


SCALING = {"strong": strong, "weak_lengths": weak_lengths, "weak_batches": weak_batches}


def main() -> None:
    result = {
        "what": "forecasts, not measurements: training in bf16 on hosts of 8 H100s, conf/clusters/h100.yaml",
        **{name: [row for model in MODELS for row in rows(model)] for name, rows in SCALING.items()},
        "map": [speeds(length, cluster_of(gpus)) for length in MAP_LENGTHS for gpus in GPUS],
        "link_map": [link_speeds(kv_heads, link) for kv_heads in KV_HEADS for link in LINKS],
        "host_map": [host_speeds(length, link) for length in MAP_LENGTHS for link in LINKS_WITHIN],
    }
    text = json.dumps(result, indent=1)
    (RESULTS / FILE).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
