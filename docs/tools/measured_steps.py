"""Every training and forward step of docs/results that was measured on GPUs, as a configuration and a time.

Left out, as no steps of their own: rooflines, and steps of seconds of work that include the compilation of kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from conf.degrees import resolve_degrees
from conf.schema import AttentionConfig, Config, DataConfig, Degrees, EngineConfig, ModelConfig, ParallelismConfig
from docs.tools.markdown import DOCS, RESULTS, load
from docs.tools.tables_speed import INTERRUPTED, final
from recipes.benchmark.comparison_report import summarize
from recipes.planning.cluster import Cluster, parse_cluster
from tests.tools.long_step import composed

CLUSTERS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100"}
KERNELS = {512: "ffpa"}  # by head size; others had flash_attn_4
METHODS = {"ra": "ring", "ulysses": "ulysses", "hybrid": "hybrid", "all": "all_gather"}  # by the entry's first word
LONG_STEPS = ("million_H200.json", "half_million_H100.json", "long_steps_2xH200.json")  # of one step, the first


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was measured.

    Args:
        group: the file it is from: steps of one file took turns on the same GPUs.
        is_first: whether it was the first step of its run.
        reduced_once: whether it is of an older program, whose ZeRO-1 reduced gradients once in a step. Today's does in
            each micro-batch, so that a rank need not hold all sums.
    """

    group: str
    name: str
    config: Config
    degrees: Degrees
    method: str
    kernel: str
    cluster: Cluster
    seconds: float
    is_first: bool = False
    reduced_once: bool = False


def measured_steps() -> list[MeasuredStep]:
    """All of them, in the order of files and rows."""
    return [*_of_comparisons(), *_of_settings(), *_of_runs()]


def tried_steps() -> list[MeasuredStep]:
    """Of comparisons, one round with each micro-batch that was tried and not chosen."""
    steps = []
    for group, row, own, recipe in _compared():
        for micro_batch, tokens_per_s in (row.get("tried") or {}).items():
            if tokens_per_s and int(micro_batch) != row["micro_batch_size"]:
                ms = 1e3 * row["sequences_per_step"] * row["sequence_length"] / tokens_per_s
                tried = {**row, "micro_batch_size": int(micro_batch), "step_time_ms": ms}
                steps.append(_of_row(group, tried, own, recipe))
    return steps


def _of_comparisons() -> Iterator[MeasuredStep]:
    for group, row, own, recipe in _compared():
        yield _of_row(group, row, own, recipe)


def _compared() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """The rows of comparisons: file, row, configuration of its entry, recipe."""
    for path in sorted(RESULTS.glob("*.json*")):
        result = load(path.name)
        configs, rows, model = {}, [], ""
        if path.name in INTERRUPTED:
            rows = summarize(result, *INTERRUPTED[path.name])
            model = "paper_100k"
        elif isinstance(result, dict) and "baseline" in result and result["rows"][0].get("device") != "cpu":
            rows, configs, model = result["rows"], result.get("configs", {}), result["model"]
        trains = "pretrain" in path.name or path.name.startswith("huggingface")
        for row in rows:
            if "error" not in row and row["entry"] != "parts alone":
                own = configs.get(row["entry"], {"model": _shape(model), "engine": {"dtype": _dtype(model)}})
                yield path.name, row, own, "pretrain" if trains else "forward"


def _of_row(group: str, row: dict[str, Any], own: dict[str, Any], recipe: str) -> MeasuredStep:
    degrees = Degrees(*[int((re.search(rf"(\d+) {name}", row["grid"]) or [0, 1])[1]) for name in Degrees._fields])
    word = re.split(r"[_ ]", row["entry"])[0]
    model = model_of(own["model"])
    micro = row["micro_batch_size"]
    accumulation = row["sequences_per_step"] // (degrees.data * micro)
    given = {**own["engine"], "train_batch_size": None, "micro_batch_size": micro}
    engine = _known(EngineConfig, given | {"gradient_accumulation_steps": accumulation})
    config = Config(
        recipe=recipe,
        model=model,
        engine=engine,
        attention=AttentionConfig(method=METHODS.get(word, "local")),
        parallelism=ParallelismConfig(
            method="tensor_pipeline" if degrees.tensor * degrees.pipeline > 1 else "sequence",
            **{f"{name}_degree": value for name, value in degrees._asdict().items()},
        ),
        data=DataConfig(sequence_length=row["sequence_length"], document_mask=False),
    )
    kernel = row.get("kernel") or kernel_of(model)
    name = f"{row['entry']}, micro-batch {micro}"
    device = row.get("device", "NVIDIA H200")
    seconds, cluster = row["step_time_ms"] / 1e3, cluster_of(device)
    return MeasuredStep(
        group,
        name,
        config,
        degrees,
        config.attention.method,
        kernel,
        cluster,
        seconds,
        reduced_once=not group.startswith("huggingface"),
    )


def _of_settings() -> Iterator[MeasuredStep]:
    """Of tests.tools.long_step: of three steps the fastest; of the longest sequences the only one."""
    for name in ("tools_H100.json", "tools_expandable_H100.json", *LONG_STEPS):
        for row in load(name):
            yield of_setting(name, row["setting"], row, "flash_attn_4", name in LONG_STEPS)
    result = load("max_length_H200.json")
    confirmed = result["confirmed"]
    setting = f"model=llama_8b model.num_layers={confirmed['num_layers']} data.sequence_length={confirmed['length']}"
    yield of_setting("max_length_H200.json", setting, {**confirmed, "num_ranks": 1}, "flash_attn_4", False)


def _of_runs() -> Iterator[MeasuredStep]:
    """Of the shape of Llama 3.2 1B, whose kernels were cuDNN's."""
    for length in (32_768, 65_536):
        name = f"llama_1b_{length}_2xH200.jsonl"
        speeds = [row["train/tokens_per_s"] for row in load(name) if row["step"] >= 8 and "train/tokens_per_s" in row]
        setting = f"+experiment=ra_sp model=llama_1b data.sequence_length={length} engine.zero_stage=3"
        row = {"num_ranks": 2, "device": "NVIDIA H200", "step_time_s": length / statistics.median(speeds)}
        yield of_setting(name, setting, row, "cudnn", False)


def of_setting(group: str, setting: str, row: dict[str, Any], kernel: str, is_first: bool) -> MeasuredStep:
    """A row of tests.tools.long_step."""
    config, num_ranks = _composed(setting), row["num_ranks"]
    degrees = resolve_degrees(config, num_ranks)
    method = config.attention.method if num_ranks > 1 else "local"
    cluster = cluster_of(row["device"])
    seconds = row["step_time_s"]
    return MeasuredStep(
        group, final(setting.replace("+", "")), config, degrees, method, kernel, cluster, seconds, is_first
    )


_composed = functools.cache(composed)  # a quarter of a second each, and some settings were measured twice


def _shape(model: str) -> dict[str, Any]:
    fields: Any = OmegaConf.to_container(OmegaConf.load(DOCS.parent / "conf" / "model" / f"{model}.yaml"))
    return fields


def _dtype(model: str) -> str:
    return "fp16" if model == "paper_10k" else "bf16"


def model_of(fields: dict[str, Any]) -> ModelConfig:
    """A model's shape, also that of a Hugging Face model, whose folder is not here."""
    names = itertools.takewhile(lambda name: name != "path", (spec.name for spec in dataclasses.fields(ModelConfig)))
    return ModelConfig(**{name: fields[name] for name in names if name in fields})


def kernel_of(model: ModelConfig) -> str:
    """The kernel that measured most, where a result does not name it."""
    return KERNELS.get(model.head_dim, "flash_attn_4")


def cluster_of(device: str) -> Cluster:
    return parse_cluster(CLUSTERS[device])


def _known(group: Any, given: dict[str, Any]) -> Any:
    """A group of settings from those of an older program."""
    names = {spec.name for spec in dataclasses.fields(group)}
    return group(**{name: value for name, value in given.items() if name in names})
