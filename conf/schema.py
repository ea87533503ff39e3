"""Every setting of a run: one dataclass per group, one line per field, and the checks that need no hardware.

Imports no project code and nothing slow, so that a bad configuration is refused within a second. What depends on the
number of ranks is checked by `degrees.resolve_degrees`.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

KERNELS = ("auto", "flash_attn_4", "ffpa", "cudnn", "aten_flash", "mem_efficient", "cpu_flash", "reference")
METHODS = ("ring", "ulysses", "hybrid", "all_gather", "local", "auto")
TRANSPORTS = ("auto", "p2p", "copy_engine")
# GPUs that explain_gpu may name; recipes/planning/throughput.py has their numbers
GPUS = ("h200", "h200_nvl", "h100", "h100_nvl", "h100_pcie", "a100_80gb", "a100_40gb", "l40s", "b200")
RECIPES = (
    "pretrain",
    "forward",
    "compare",
    "bench_attention",
    "max_length",
    "evaluate",
    "generate",
    "plan",
    "calibrate",
)
INFERENCE = ("evaluate", "generate")  # recipes of a trained model, which the group of the same name says
WITHOUT_MODEL = ("bench_attention", "calibrate")  # recipes that build no model
LOSS_TASK = "loss"
# of recipe=evaluate; recipes/evaluation/puzzles.py makes them
RETRIEVAL_TASKS = (
    *("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"),
    *("variable_tracing", "aggregation"),
)
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # of WANDB_MODE, by wandb.Settings
# What a sweep can optimize: a name of RUN_DIR/summary.json, its direction, and the recipes that measure it.
OBJECTIVES = {
    "validation_loss": ("minimize", ("pretrain",)),
    "tokens_per_s": ("maximize", ("pretrain", "forward")),
    "model_tflops_per_rank": ("maximize", ("pretrain", "forward")),
}


class ConfigError(ValueError):
    """A setting that cannot work. Says the value, the rule and what to type; shown without a traceback."""


def choice(*choices: Any, default: Any = None) -> Any:
    """A field that takes one of `choices`; the default is the first unless given."""
    return field(default=choices[0] if default is None else default, metadata={"choices": choices})


def number(default: Any, minimum: float, below: float = math.inf) -> Any:
    """A field that takes a number from `minimum` on, below `below`. A default of None stays legal."""
    return field(default=default, metadata={"minimum": minimum, "below": below})


class _Checked:
    """A group of settings, checked by what `choice` and `number` declare and by its `problems`."""

    _prefix = ""  # of the group's fields in overrides and errors, such as "model."

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls._prefix = prefix

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, declared = getattr(self, spec.name), spec.metadata
            setting = f"{self._prefix}{spec.name}={value}"
            if "choices" in declared and value not in declared["choices"]:
                legal = ", ".join(str(option) for option in declared["choices"] if option is not None)
                raise ConfigError(f"{setting} is not known: use {legal}")
            if "minimum" in declared and value is not None and not declared["minimum"] <= value < declared["below"]:
                upper = f" and below {declared['below']}" if value >= declared["below"] else ""
                raise ConfigError(f"{setting} must be at least {declared['minimum']}{upper}")
        for problem in self.problems():
            raise ConfigError(problem)

    def problems(self) -> Iterator[str]:
        """What is wrong with settings that are legal one by one."""
        yield from ()


@dataclass
class ModelConfig(_Checked, prefix="model."):
    """The shape of the transformer, or a Hugging Face model. The sequence length and the dtype are set elsewhere."""

    name: str = "tiny"
    num_layers: int = number(2, minimum=1)
    hidden_size: int = number(128, minimum=1)
    num_heads: int = number(4, minimum=1)
    num_kv_heads: int = number(2, minimum=1)  # fewer than num_heads: grouped-query attention
    head_dim: int = number(32, minimum=1)
    mlp_size: int = number(384, minimum=1)
    mlp: str = choice("swiglu", "gelu")
    norm: str = choice("rmsnorm", "layernorm")
    norm_eps: float = number(1e-5, minimum=0)
    vocab_size: int = number(257, minimum=1)  # at least the tokenizer's tokens: bytes have 256 and the separator
    tied_head: bool = False  # the output head shares the embedding's weight
    bias: bool = False  # in every linear layer except the head
    rope_theta: float = number(10000.0, minimum=1)
    init_std: float = number(0.02, minimum=0)
    path: Optional[str] = None  # a Hugging Face model to train: a folder or a name on the hub. It sets the shape above
    rope: Any = None  # with path: other rotary embeddings, such as {rope_type: yarn, factor: 4} or {rope_theta: 1e6}
    # what else path has; read from it, not typed
    num_weights: Optional[int] = None
    num_trained: Optional[int] = None  # of LoRA's matrices
    num_experts: int = 1
    experts_per_token: int = 1
    window: Optional[int] = None  # tokens that a query sees in windowed layers
    num_window_layers: int = 0
    softcap: Optional[float] = None  # of attention scores
    max_positions: Optional[int] = None  # tokens that its rotary embeddings are made for, stretched; None: no limit
    stretched_by: float = 1.0  # the factor in max_positions

    def problems(self) -> Iterator[str]:
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        names = [name for name in defaults if name not in ("name", "path", "rope")]
        if self.path == "":
            yield "model.path= is empty: type model.path=FOLDER_OR_HUB_NAME"
        if self.path is None and self.name == "huggingface":
            yield (
                "model=huggingface needs model.path=FOLDER_OR_HUB_NAME: python scripts/make_tiny_llama.py FOLDER makes "
                "a small model to try"
            )
        if self.path is None:
            names = names[names.index("num_weights") :]
            if self.rope is not None:
                yield (
                    f"model.rope={self.rope} needs model.path=FOLDER_OR_HUB_NAME, also in place of evaluate.model and "
                    "generate.model; for the recipe's own transformer use model.rope_theta"
                )
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                what = "is read from model.path" if self.path is None else f"contradicts model.path={self.path}"
                yield f"model.{name}={value} {what}: leave it out"
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            yield f"model.num_kv_heads={kv_heads} does not divide model.num_heads={heads}: use {one_divisor(heads)}"
        if self.head_dim % 2:
            yield f"model.head_dim={self.head_dim} must be even: rotary embeddings rotate pairs of values"


@dataclass
class LoraConfig(_Checked, prefix="lora."):
    """Train small matrices beside the frozen weights of model.path (LoRA, by peft)."""

    rank: int = number(0, minimum=0)  # 0: train all weights
    alpha: float = number(32.0, minimum=0)  # the product of the matrices counts alpha / rank times
    target_modules: Any = None  # names of linear layers, such as [q_proj,v_proj]; unset: all of them but the head

    def problems(self) -> Iterator[str]:
        names = self.target_modules
        if names is None:
            return
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            yield f"lora.target_modules={names} must be a list of names: type lora.target_modules=[q_proj,v_proj]"
        if not self.rank:
            yield f"lora.target_modules={names} has no effect without lora.rank: add lora.rank=16, or leave it out"


@dataclass
class AttentionConfig(_Checked, prefix="attention."):
    """How attention is computed over the ranks that share a sequence."""

    method: str = choice(*METHODS)  # auto: the fastest by forecast; explain=true shows it
    layout: str = choice("zigzag", "contiguous", "balanced")  # what each rank holds; balanced: by the documents
    transport: str = choice(*TRANSPORTS)  # p2p (NCCL, gloo), copy_engine (NVIDIA GPUs of one host), auto: by the device
    kernel: str = choice(*KERNELS)  # auto: the fastest that supports the device, dtype and head size
    intra_host_gb_per_s: Optional[float] = number(None, 0.001)  # for forecasts: a rank's link in its host
    inter_host_gb_per_s: Optional[float] = number(None, 0.001)  # for forecasts: a rank's link between hosts


class Degrees(NamedTuple):
    """The rank grid: the product is the number of ranks."""

    data: int
    ring: int
    ulysses: int
    tensor: int = 1
    pipeline: int = 1

    @property
    def sequence(self) -> int:
        """Number of ranks that share the tokens of one sequence."""
        return self.ring * self.ulysses


@dataclass
class ParallelismConfig(_Checked, prefix="parallelism."):
    """The rank grid. Unset degrees are chosen so that the grid fills all ranks."""

    method: str = choice("sequence", "tensor_pipeline")  # what unset degrees are spent on
    data_degree: Optional[int] = number(None, minimum=1)  # replicas, each with its own sequences
    ring_degree: Optional[int] = number(None, minimum=1)  # ranks of a ring; hybrid: Ulysses groups per ring
    ulysses_degree: Optional[int] = number(None, minimum=1)  # ulysses, hybrid: ranks that share a sequence's heads
    tensor_degree: Optional[int] = number(None, minimum=1)  # tensor_pipeline: ranks that share each layer's weights
    pipeline_degree: Optional[int] = number(None, minimum=1)  # tensor_pipeline: pipeline stages

    def problems(self) -> Iterator[str]:
        for name, degree in (("tensor_degree", self.tensor_degree), ("pipeline_degree", self.pipeline_degree)):
            if self.method == "sequence" and (degree or 1) > 1:
                yield f"parallelism.{name}={degree} needs parallelism=tensor_pipeline: +experiment=tp_pp"


@dataclass
class EngineConfig(_Checked, prefix="engine."):
    """DeepSpeed's engine, and the batch of one step."""

    dtype: str = choice("bf16", "fp16", "fp32")  # fp16: with a dynamic loss scale
    zero_stage: int = choice(0, 1, 2, 3, default=1)
    micro_batch_size: int = number(1, minimum=1)  # sequences of one forward pass, per data rank
    gradient_accumulation_steps: int = number(1, minimum=1)
    train_batch_size: Optional[int] = number(None, minimum=1)  # sequences per step, all ranks; unset: by accumulation
    gradient_clipping: float = number(1.0, minimum=0)  # largest gradient norm; 0: off
    recompute: str = choice("none", "selective", "full")  # activation checkpointing; selective: all but attention
    offload_activations: bool = False  # what recompute saves lies in host memory; copies overlap compute
    offload_optimizer: bool = False  # optimizer state and update on the host (ZeRO-Offload); ZeRO stages 1 to 3
    offload_parameters: bool = False  # weights in host memory until they are needed; ZeRO stage 3
    tile_tokens: Optional[int] = number(None, minimum=0)  # tokens per tile of MLP and head; 0: no tiles; unset: auto
    on_bad_step: str = choice("stop", "skip")  # if the loss or a gradient is not finite; skip: drop the batch
    deterministic: bool = False  # use deterministic kernels only; slower
    detect_anomaly: bool = False  # name the forward operation whose gradient is NaN; slow

    def problems(self) -> Iterator[str]:
        if self.offload_activations and self.recompute == "none":
            yield "engine.offload_activations=true needs recomputation: use engine.recompute=selective, or full"
        if self.offload_optimizer and self.zero_stage == 0:
            yield "engine.offload_optimizer=true cannot go with engine.zero_stage=0: use 1, 2 or 3"
        if self.offload_parameters and self.zero_stage != 3:
            yield f"engine.offload_parameters=true needs engine.zero_stage=3, not stage {self.zero_stage}"
        if self.dtype == "fp16" and self.zero_stage == 0:
            # DeepSpeed would not scale the loss, but unscale the gradients
            yield "engine.dtype=fp16 cannot go with engine.zero_stage=0: use engine.zero_stage=1"
        if self.train_batch_size is not None and self.gradient_accumulation_steps != 1:
            yield f"engine.train_batch_size={self.train_batch_size} sets engine.gradient_accumulation_steps: omit it"


@dataclass
class OptimizerConfig(_Checked, prefix="optimizer."):
    """AdamW, with linear warm-up and decay to min_lr_ratio * lr at the last step."""

    lr: float = number(3e-3, minimum=0)
    beta1: float = number(0.9, minimum=0, below=1)
    beta2: float = number(0.95, minimum=0, below=1)
    eps: float = number(1e-8, minimum=0)
    weight_decay: float = number(0.1, minimum=0)  # not applied to norms, biases and embeddings
    warmup_fraction: float = number(0.1, minimum=0, below=1)  # of num_steps
    decay: str = choice("cosine", "linear", "constant")
    min_lr_ratio: float = number(0.1, minimum=0)

    def problems(self) -> Iterator[str]:
        if self.min_lr_ratio > 1:
            yield f"optimizer.min_lr_ratio={self.min_lr_ratio} must be at most 1"


SOURCES = ("stdlib", "text_files", "jsonl", "parquet", "hub", "megatron", "chat", "mixture")
# what a setting of `data` needs as source
_ONLY_FOR = {
    "files": ("text_files", "jsonl", "parquet", "megatron", "chat"),
    "validation_files": ("text_files", "jsonl", "parquet", "megatron", "chat"),
    "name": ("hub", "chat"),
    "subset": ("hub", "chat"),
    "split": ("hub", "chat"),
    "validation_split": ("hub", "chat"),
    "text_field": ("jsonl", "parquet", "hub"),
    "messages_field": ("chat",),
    "stream": ("hub",),
    "sources": ("mixture",),
}
# of one source of a mixture
SOURCE_FIELDS = ("source", *(name for name in _ONLY_FOR if name not in ("stream", "sources")))


@dataclass
class DataConfig(_Checked, prefix="data."):
    """The documents, and how they become sequences."""

    source: str = choice(*SOURCES)  # stdlib: the source code of Python's own library
    files: Any = None  # a glob or a list of globs; megatron: of .bin files, with .idx beside them
    name: Optional[str] = None  # hub, chat: name of a data set, or a folder that load_dataset or load_from_disk reads
    subset: Optional[str] = None  # hub, chat: configuration of the data set
    split: str = "train"  # hub, chat: split
    text_field: str = "text"  # jsonl, parquet, hub: the column that holds the text
    messages_field: str = "messages"  # chat: the column of messages; rows of prompt and completion need no name
    sources: Any = None  # mixture: {NAME: {source: jsonl, files: ..., weight: 0.7}, ...}; weights are shares of tokens
    validation_files: Any = None  # as files; unset: the first validation_sequences are held out
    validation_split: Optional[str] = None  # as split
    bad_rows: str = choice("stop", "skip")  # a row that cannot be read: stop, or skip and count it
    tokenizer: Optional[str] = None  # a folder, a tokenizer.json or a hub name; unset: tokens are bytes
    token_store: Optional[str] = None  # folder for tokens on disk; unset: ~/.cache/ring_attention/tokens
    stream: bool = False  # hub: tokenize while training, and store nothing
    sequence_length: int = number(2048, minimum=1)  # tokens per sequence, over all ranks that share it
    stages: Any = None  # [[first step, tokens], ...]: sequences that grow while training, at last to sequence_length
    packing: str = choice("concatenate", "best_fit", "none")  # best_fit: few splits, some padding; none: one document
    long_documents: str = choice("split", "drop")  # those with more tokens than a sequence
    shuffle_window: int = number(16384, minimum=1)  # documents that best_fit packs together
    shuffle_seed: int = 0  # order of the documents
    document_mask: bool = True  # no token sees another document, and positions restart with each
    validation_sequences: int = number(8, minimum=1)  # held out from training, of each source
    overfit_one_batch: bool = False  # train on the first batch only, to check that learning works
    preview: int = number(0, minimum=0)  # print so many sequences, with what is trained marked, and stop

    def problems(self) -> Iterator[str]:
        for name in ("name", "files", "validation_files", "tokenizer"):
            if re.search(r"://[^/]*@", str(getattr(self, name))):  # the value may hold a password: do not print it
                yield f"data.{name} is a URL with a login, which the run would save: use HF_TOKEN for what is private"
        if self.tokenizer == "bytes" and not os.path.exists(self.tokenizer):  # as messages call it; the hub has none
            yield (
                "data.tokenizer=bytes is no tokenizer: leave it out for tokens that are bytes, or with model.path for "
                "the model's own tokenizer"
            )
        for name, sources in _ONLY_FOR.items():
            value = getattr(self, name)
            if self.source not in sources and value != getattr(DataConfig, name):
                needed = " or ".join(f"data={source}" for source in sources)
                yield f"data.{name}={value} needs {needed}, but this is data={self.source}: leave one of them out"
        if self.source == "hub" and not self.name:
            yield "data=hub needs a data set: data.name=OWNER/NAME or a local folder"
        if self.source == "chat" and (self.files is None) == (self.name is None):
            yield "data=chat needs either files, data.files='chats/*.jsonl', or a data set, data.name=OWNER/NAME"
        if self.source in ("text_files", "jsonl", "parquet", "megatron") and not self.files:
            yield f"data={self.source} needs files: data.files='{EXAMPLES[self.source]}' or data.files=[a.txt,b.txt]"
        for name in ("files", "validation_files"):
            yield from _files_problems(f"data.{name}", getattr(self, name))
        if self.validation_split is not None and self.name is None:
            yield f"data.validation_split={self.validation_split} needs data.name: for files use data.validation_files"
        if self.source == "mixture":
            yield from _mixture_problems(self)
        if self.stages is not None:
            yield from _stages_problems(self)


def _stages_problems(data: DataConfig) -> Iterator[str]:
    setting, example = f"data.stages={data.stages}", "data.stages='[[1,8192],[500,32768]]'"
    rows = data.stages if isinstance(data.stages, list) else []
    are_pairs = all(isinstance(row, list) and [type(value) for value in row] == [int, int] for row in rows)
    if len(rows) < 2 or not are_pairs:
        yield f"{setting} must be two or more pairs of a first step and a sequence length, such as {example}"
        return
    steps, lengths = ([row[column] for row in rows] for column in (0, 1))
    if steps[0] != 1:
        yield f"{setting} must begin with step 1, such as {example}"
    for name, values in (("steps", steps), ("lengths", lengths)):
        if values[0] < 1 or any(later <= value for value, later in itertools.pairwise(values)):
            yield f"{setting}: the {name} {values} must be above 0 and grow, such as {example}"
    if lengths[-1] != data.sequence_length:
        yield (
            f"{setting} ends with sequences of {lengths[-1]} tokens, but data.sequence_length={data.sequence_length}: "
            f"type data.sequence_length={lengths[-1]}"
        )
    if data.long_documents == "drop":
        yield f"{setting} splits documents in its shorter stages: leave out data.long_documents=drop"
    for name in ("stream", "overfit_one_batch"):
        if getattr(data, name):
            yield f"{setting} cannot go with data.{name}=true: leave one of them out"


EXAMPLES = {
    "text_files": "texts/*.txt",
    "jsonl": "texts/*.jsonl",
    "parquet": "texts/*.parquet",
    "megatron": "a.bin",
    "chat": "chats/*.jsonl",
}


def _files_problems(setting: str, files: Any) -> Iterator[str]:
    if files is None:
        return
    patterns = [files] if isinstance(files, str) else files
    if not patterns or not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        yield f"{setting}={files} must be a glob or a list of globs: {setting}='texts/*.txt' or {setting}=[a.txt,b.txt]"
        return
    for pattern in patterns:
        if not glob.glob(pattern, recursive=True):
            where = "" if os.path.isabs(pattern) else f" in {os.getcwd()}"
            yield f"{setting}={pattern} matches no file{where}: give a path or a glob"


def _mixture_problems(data: DataConfig) -> Iterator[str]:
    example = "data.sources={a: {source: jsonl, files: a.jsonl, weight: 0.7}, b: {source: stdlib, weight: 0.3}}"
    if not isinstance(data.sources, dict) or not data.sources:
        yield f"data=mixture needs sources with weights, such as {example}"
        return
    for name, entry in data.sources.items():
        if not isinstance(entry, dict) or "source" not in entry or "weight" not in entry:
            yield f"data.sources.{name}={entry} needs a source and a weight, as in {example}"
            return
        if unknown := sorted(entry.keys() - {*SOURCE_FIELDS, "weight"}):
            yield f"data.sources.{name}.{unknown[0]} is not known: use {', '.join(SOURCE_FIELDS)} and weight"
            return
        for key in entry.keys() - {"files", "validation_files", "weight"}:
            if entry[key] is not None and not isinstance(entry[key], str):
                yield f"data.sources.{name}.{key}={entry[key]} must be text: type {key}: '{entry[key]}'"
                return
        if entry["source"] == "mixture":
            yield f"data.sources.{name} is a mixture itself: list its sources here"
            return
        weight = entry["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            yield f"data.sources.{name}.weight={weight} must be a number above 0: the source's share of the tokens"
            return
    total = math.fsum(entry["weight"] for entry in data.sources.values())
    if abs(total - 1) > 1e-6:
        yield f"the weights of data.sources add up to {total:g}, not 1: they are the shares of the tokens"
    source_configs(data)  # checks each as a source of its own


def source_configs(data: DataConfig) -> dict[str, DataConfig]:
    """The settings of each source of a mixture, by name; of any other source itself, by the source's name.

    Raises:
        ConfigError: if one is wrong; names the source.
    """
    if data.source != "mixture":
        return {data.source: data}
    configs = {}
    for name, entry in data.sources.items():
        own = {key: value for key, value in entry.items() if key != "weight"}
        try:
            configs[name] = dataclasses.replace(data, sources=None, **own)
        except ConfigError as error:
            raise ConfigError(f"data.sources.{name}: {error}") from error
    return configs


@dataclass
class LoggingConfig(_Checked, prefix="logging."):
    """Console, metrics file and wandb."""

    every_n_steps: int = number(20, minimum=1)
    validate_every_n_steps: int = number(0, minimum=0)  # 0: only at the end
    wandb: str = choice("auto", "online", "offline", "disabled")  # auto: online with a login, offline without
    project: str = "ring-attention"
    group: Optional[str] = None  # wandb group; sweeps default to sweep-FOLDER
    tags: list[str] = field(default_factory=list)


@dataclass
class CheckpointConfig(_Checked, prefix="checkpoint."):
    """Checkpoints of recipe=pretrain in RUN_DIR/checkpoints. The same command with hydra.run.dir=RUN_DIR resumes."""

    every_n_steps: int = number(100, minimum=0)  # 0: only after the last step and on preemption (SIGTERM, SIGUSR1)
    keep: int = number(2, minimum=0)  # how many of the newest checkpoints to keep; 0: save none
    keep_best: bool = False  # save and keep the best step, too: by evaluate.every_n_steps, else by the validation loss

    def problems(self) -> Iterator[str]:
        if self.keep_best and not self.keep:
            yield "checkpoint.keep_best=true cannot go with checkpoint.keep=0, which saves none: use checkpoint.keep=1"


@dataclass
class LaunchConfig(_Checked, prefix="launch."):
    """The ranks, and when a run that hangs is ended."""

    num_ranks: Optional[int] = number(None, minimum=1)  # unset: one per GPU, 4 on the CPU; ignored under torchrun, srun
    check_memory: bool = True  # refuse what needs more memory than a rank has, by prediction; false: start all the same
    timeout_s: float = number(600.0, minimum=1)  # a collective that takes longer ends the run
    stall_factor: float = number(20.0, minimum=0)  # so does a step of this multiple of the median step time; 0: off
    stall_s: float = number(60.0, minimum=1)  # but never before this time

    def problems(self) -> Iterator[str]:
        if 0 < self.stall_factor < 2:
            yield f"launch.stall_factor={self.stall_factor} must be at least 2, or 0 to switch it off"


@dataclass
class CompareConfig(_Checked, prefix="compare."):
    """recipe=compare: several configurations on the same hardware, measured in alternating rounds."""

    entries: dict[str, list[str]] = field(default_factory=dict)  # name: its overrides, such as [+experiment=dp]
    only: list[str] = field(default_factory=list)  # names of entries to measure; empty: all
    baseline: str = ""  # the entry that changes are relative to; empty: the first
    recipe: str = choice("forward", "pretrain")  # what is measured
    rounds: int = number(3, minimum=1)  # each round measures every entry once, so that drift affects all alike
    steps_per_round: int = number(2, minimum=1)  # timed steps, after one warm-up step
    micro_batch_sizes: list[int] = field(default_factory=lambda: [1])  # sizes to try; each entry uses its fastest
    downscale: bool = False  # reduce the batch to step_time_s per step; on the CPU, the model and length too
    step_time_s: float = number(4.0, minimum=1)  # estimated step time that downscale aims for
    roofline: bool = False  # also measure matrix products and attention alone: the fastest step these ranks allow

    def problems(self) -> Iterator[str]:
        for name, value in [("baseline", self.baseline), *(("only", entry) for entry in self.only)]:
            if self.entries and value not in ("", *self.entries):
                yield f"compare.{name}={value} is no entry: use {', '.join(self.entries)}"
        if min(self.micro_batch_sizes, default=0) < 1:
            sizes = self.micro_batch_sizes
            yield f"compare.micro_batch_sizes={sizes} must be numbers of at least 1: use compare.micro_batch_sizes=[1]"


@dataclass
class MaxLengthConfig(_Checked, prefix="max_length."):
    """recipe=max_length: the longest sequence that this configuration can train."""

    memory_gib: Optional[float] = number(None, 0.001)  # per rank; unset: 90 % of the GPU; CPU: a share, less 1 GiB
    confirm_s: float = number(600.0, minimum=0)  # train two steps at the length found unless they take longer; 0: never


@dataclass
class CalibrateConfig(_Checked, prefix="calibrate."):
    """recipe=calibrate: the speeds of this host's devices and links, for forecasts."""

    output: Optional[str] = None  # the cluster file to write, such as mine.yaml; unset: RUN_DIR/cluster.yaml

    def problems(self) -> Iterator[str]:
        if self.output is None:
            return
        folder = os.path.dirname(self.output) or "."
        if not self.output.endswith((".yaml", ".yml")):
            yield f"calibrate.output={self.output} must end in .yaml: type calibrate.output=mine.yaml"
        elif os.path.isdir(self.output) or not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            yield f"calibrate.output={self.output} cannot be written: type a file in a folder that exists and is yours"


@dataclass
class PlanConfig(_Checked, prefix="plan."):
    """recipe=plan: the fastest settings on a cluster that need not be here, by arithmetic."""

    tokens: float = number(1e12, minimum=1)  # a budget, for which GPU-hours are printed


@dataclass
class EvaluateConfig(_Checked, prefix="evaluate."):
    """recipe=evaluate: the loss by position, and retrieval from long contexts by length and depth."""

    model: Optional[str] = None  # a run dir, one of its checkpoints, or a Hugging Face model; unset: model.path
    tasks: list[str] = field(default_factory=lambda: [LOSS_TASK, *RETRIEVAL_TASKS])  # loss: by position, of data
    lengths: list[int] = field(default_factory=list)  # of retrieval; the longest sets data.sequence_length; empty: that
    depths: int = number(5, minimum=1)  # places of the needle, from the start of the text to its end; 1: the middle
    samples: int = number(20, minimum=1)  # of each task, length and depth
    seed: int = 0  # of the samples
    scoring: str = choice(
        "one_pass", "generate"
    )  # one_pass: all tokens of the answer are the likeliest; generate: slow
    context: Optional[int] = number(None, minimum=1)  # also with documents and prompts cut after so many tokens
    every_n_steps: int = number(0, minimum=0)  # recipe=pretrain: evaluate while training, and at the end; 0: never

    def problems(self) -> Iterator[str]:
        legal = (LOSS_TASK, *RETRIEVAL_TASKS)
        if not self.tasks:
            yield f"evaluate.tasks=[] evaluates nothing: use some of {', '.join(legal)}"
        for name in self.tasks:
            if name not in legal:
                yield f"evaluate.tasks={self.tasks} has {name}, which is not known: use some of {', '.join(legal)}"
        for length in self.lengths:
            if length < 1:
                yield f"evaluate.lengths={self.lengths} has {length}: lengths are tokens, at least 1"
        for name in ("tasks", "lengths"):
            values = getattr(self, name)
            if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
                yield f"evaluate.{name}={values} has {twice[0]} twice: list each once"
        if self.tasks == [LOSS_TASK] and len(self.lengths) > 1:
            shorter, longest = sorted(self.lengths)[-2:]
            yield (
                f"evaluate.lengths={self.lengths} are lengths of retrieval, but evaluate.tasks=[loss] is measured at "
                f"one, by position: type evaluate.lengths=[{longest}], and for the same tokens with less context "
                f"recipe=evaluate evaluate.context={shorter}"
            )
        if self.context is not None and self.scoring == "generate" and LOSS_TASK not in self.tasks:
            yield f"evaluate.context={self.context} cannot go with evaluate.scoring=generate: use one_pass"


@dataclass
class GenerateConfig(_Checked, prefix="generate."):
    """recipe=generate: text by a trained model, one prompt after the other, each on all ranks."""

    model: Optional[str] = None  # a run dir, a folder in its checkpoints/, or a Hugging Face model; unset: model.path
    prompt: Optional[str] = None  # one text
    prompt_file: Optional[str] = None  # .jsonl: rows of prompt or messages; any other file: a text on each line
    max_new_tokens: int = number(128, minimum=1)  # fewer if the model ends its text
    temperature: float = number(0.0, minimum=0)  # 0: always the most likely token (greedy)
    top_k: Optional[int] = number(None, minimum=1)  # sample from so many most likely tokens; unset: from all
    top_p: float = number(1.0, minimum=0)  # sample from the most likely tokens that have this probability together
    seed: int = number(0, minimum=0, below=2**32)  # of sampling
    output: Optional[str] = None  # a .jsonl file, a row for each prompt once it is done; unset: RUN_DIR/generated.jsonl

    def problems(self) -> Iterator[str]:
        if not 0 < self.top_p <= 1:
            yield f"generate.top_p={self.top_p} must be above 0 and at most 1: use generate.top_p=0.95, or leave it out"
        for name, value, default in (("top_k", self.top_k, None), ("top_p", self.top_p, 1.0)):
            if value != default and not self.temperature:
                yield f"generate.{name}={value} has no effect on greedy decoding: add generate.temperature=1"


@dataclass
class SweepConfig(_Checked, prefix="sweep."):
    """python train.py -m +sweep=NAME: a search over many runs, called trials."""

    objective: str = choice(*OBJECTIVES)
    sampler: str = choice("tpe", "grid")  # tpe: Optuna's search, learns from earlier trials; grid: all values
    num_trials: int = number(20, minimum=1)  # of tpe, including failed ones
    num_parallel: int = number(1, minimum=1)  # above 1: needs hydra/launcher=submitit_slurm or submitit_local


@dataclass
class Config(_Checked):
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    max_length: MaxLengthConfig = field(default_factory=MaxLengthConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    recipe: str = choice(*RECIPES)  # forward: forward passes only
    explain: bool = False  # print the resolved plan and stop
    explain_gpu: Optional[str] = choice(None, *GPUS)  # explain launch.num_ranks such GPUs, eight a host, not those here
    cluster: Optional[str] = None  # plan: 8xh200, 2x8xh100, or a cluster's file. Others: speeds for auto and explain
    profile: bool = False  # record a torch profiler trace of profile_steps on every rank
    profile_steps: list[int] = field(default_factory=lambda: [3, 4])  # first and last step to record
    memory_snapshot: bool = False  # record GPU memory allocations on every rank
    documents: Any = None  # bench_attention, plan: 8x8192, lognormal or lengths that add up to data.sequence_length
    breakdown: bool = True  # after the last step, if short: exposed communication, and the time of a step by part
    num_steps: int = number(300, minimum=1)  # optimizer steps, or forward passes over a batch
    seed: int = 0  # of the weights

    def problems(self) -> Iterator[str]:
        if self.lora.rank and not self.model.path and self.recipe not in INFERENCE:
            yield f"lora.rank={self.lora.rank} needs a trained model: add model.path=FOLDER_OR_HUB_NAME"
        if self.attention.layout == "balanced" and self.engine.micro_batch_size > 1:
            yield (
                f"attention.layout=balanced lays out one sequence, not engine.micro_batch_size="
                f"{self.engine.micro_batch_size}: use micro-batches of 1 and a longer data.sequence_length, or zigzag"
            )
        if self.data.document_mask and self.parallelism.method == "tensor_pipeline":
            yield "parallelism=tensor_pipeline has no document masks: add data.document_mask=false"
        if self.data.stream and self.parallelism.method == "tensor_pipeline":
            yield "data.stream=true cannot go with parallelism=tensor_pipeline: leave it out"
        if self.data.stream and self.recipe not in ("pretrain", "forward"):
            yield f"data.stream=true needs recipe=pretrain or recipe=forward, not recipe={self.recipe}: leave it out"
        if self.data.preview and self.recipe not in ("pretrain", "forward"):
            yield f"data.preview={self.data.preview} needs recipe=pretrain or recipe=forward, not recipe={self.recipe}"
        if self.model.path and self.parallelism.method == "tensor_pipeline":
            yield "model.path cannot go with parallelism=tensor_pipeline: use +experiment=finetune"
        if self.data.tokenizer is None and self.model.vocab_size < 257:
            yield (
                f"model.vocab_size={self.model.vocab_size} must be at least 257, 256 bytes and a separator, unless "
                "data.tokenizer names a smaller tokenizer"
            )
        if self.recipe != "evaluate" and self.evaluate.model is not None:
            yield f"evaluate.model={self.evaluate.model} has no effect without recipe=evaluate: add it"
        for name in ("model", "prompt", "prompt_file") if self.recipe != "generate" else ():
            if (value := getattr(self.generate, name)) is not None:
                yield f"generate.{name}={value} has no effect without recipe=generate: add it"
        if self.recipe == "calibrate" and self.engine.dtype == "fp32":
            yield "engine.dtype=fp32 cannot go with recipe=calibrate, since forecasts are of half precision: use bf16"
        if self.recipe != "calibrate" and self.calibrate.output is not None:
            yield f"calibrate.output={self.calibrate.output} has no effect without recipe=calibrate: add it"
        if self.recipe in INFERENCE:
            yield from _inference_problems(self)
        if self.data.stages is not None:
            yield from _staged_run_problems(self)
        if self.checkpoint.keep_best and not self.evaluate.every_n_steps and not self.logging.validate_every_n_steps:
            yield (
                "checkpoint.keep_best=true has only the last step to choose from: add evaluate.every_n_steps=50 or "
                "logging.validate_every_n_steps=50"
            )
        if self.evaluate.every_n_steps:
            yield from _training_evaluation_problems(self)
        if self.recipe == "compare" and not self.compare.entries:
            yield "recipe=compare has nothing to compare: type recipe=compare +experiment=paper_table"
        if self.documents is not None and self.recipe not in ("bench_attention", "plan"):
            yield (
                f"documents={self.documents} needs recipe=bench_attention or recipe=plan, not recipe={self.recipe}: "
                "leave it out"
            )
        yield from _plan_problems(self)
        document_lengths(self)  # checks them
        if self.explain_gpu and not self.explain:
            yield f"explain_gpu={self.explain_gpu} starts no run: add explain=true, or leave it out"
        if self.explain_gpu and self.launch.num_ranks is None:
            yield f"explain_gpu={self.explain_gpu} needs a number of GPUs: add launch.num_ranks=8, or another number"
        if self.explain_gpu and self.recipe == "compare":
            yield f"recipe=compare explains the ranks of this machine alone: leave out explain_gpu={self.explain_gpu}"
        if self.recipe == "max_length" and self.attention.method == "auto":
            yield "attention=auto may change with the length, so recipe=max_length needs attention=ring"
        if self.recipe == "max_length" and self.parallelism.method == "tensor_pipeline":
            yield "recipe=max_length does not predict tensor and pipeline ranks: use +experiment=ra_sp"
        for name in ("ring_degree", "ulysses_degree") if self.attention.method == "auto" else ():
            if degree := getattr(self.parallelism, name):
                yield f"attention=auto chooses degrees: leave out parallelism.{name}={degree}, or use attention=hybrid"
        for name in ("profile", "memory_snapshot"):
            if getattr(self, name) and self.recipe not in ("pretrain", "forward"):
                yield f"{name}=true needs recipe=pretrain or recipe=forward, not recipe={self.recipe}"
        steps = self.profile_steps
        if len(steps) != 2 or not 2 <= steps[0] <= steps[1]:
            yield f"profile_steps={steps} must be the first and the last step, from step 2 on: use profile_steps=[3,4]"
        if steps != [3, 4] and not self.profile:
            yield f"profile_steps={steps} has no effect without profile=true: add it"
        if self.profile and self.num_steps < steps[1]:
            yield f"profile=true records step {steps[1]}, but num_steps={self.num_steps}: use num_steps={steps[1]}"


def document_lengths(config: Config) -> tuple[int, ...]:
    """The lengths of the documents that recipe=bench_attention packs and recipe=plan assumes; unset: one document.

    Raises:
        ConfigError: for what is no documents, a length below 1, or a sum other than the sequence's length.
    """
    documents, length = config.documents, config.data.sequence_length
    equal = re.fullmatch(r"(\d+)x(\d+)", documents) if isinstance(documents, str) else None
    if documents is None:
        lengths = [length]
    elif documents == "lognormal":
        lengths = _lognormal_lengths(length)
    elif equal:
        lengths = [int(equal[2])] * int(equal[1])
    elif isinstance(documents, list) and all(type(size) is int for size in documents):
        lengths = documents
    else:
        raise ConfigError(
            f"documents={documents} is not known: type +documents=8x8192 (eight documents of 8,192 tokens), "
            "+documents=lognormal (random lengths), or the lengths themselves, +documents=[4096,2048,2048]"
        )
    if min(lengths, default=0) < 1:
        raise ConfigError(f"documents={documents} must be at least 1 document of at least 1 token: +documents=8x8192")
    if sum(lengths) != length:
        raise ConfigError(
            f"documents={documents} add up to {sum(lengths)} tokens, but data.sequence_length={length}: type "
            f"data.sequence_length={sum(lengths)}, or documents that add up to {length}"
        )
    return tuple(lengths)


def _lognormal_lengths(length: int) -> list[int]:
    """Random ones, the same each time, of at most half of the tokens each.

    The median is 1,500 tokens, 12,000 of long sequences, and an eighth of short ones.
    """
    import numpy as np  # takes a tenth of a second

    generator, drawn = np.random.default_rng(0), []
    log_median = min(7.3 if length < 100_000 else 9.4, math.log(length / 8))
    while sum(drawn) < length:
        size = int(max(min(64, length // 32), 1, generator.lognormal(log_median, 1.3)))
        drawn.append(min(size, max(1, length // 2)))
    drawn[-1] -= sum(drawn) - length
    return drawn


def _inference_problems(config: Config) -> Iterator[str]:
    """Of a recipe of a trained model. What `recipes.inference.source.resolve_source` returns would have some, too."""
    recipe, model, path = config.recipe, getattr(config, config.recipe).model, config.model.path
    if model is None and path is None:
        yield f"recipe={recipe} needs a model: type {recipe}.model=RUN_DIR, a checkpoint or a Hugging Face folder"
    if model is not None and path is not None:
        yield f"{recipe}.model={model} and model.path={path} are two models: leave one of them out"
    if config.lora.rank:
        yield f"lora.rank={config.lora.rank} is read from the run of {recipe}.model: leave it out"
    if config.engine.zero_stage == 3:
        yield f"engine.zero_stage=3 cannot go with recipe={recipe}, which holds all weights on every rank: leave it out"
    if config.parallelism.method == "tensor_pipeline":
        yield f"recipe={recipe} cannot go with parallelism=tensor_pipeline: use +experiment=ra_sp"


def _plan_problems(config: Config) -> Iterator[str]:
    """Of recipe=plan, and of its settings in other recipes."""
    if config.recipe != "plan":
        if config.plan != PlanConfig():
            yield f"plan.tokens={config.plan.tokens:g} has no effect without recipe=plan: add it"
        if config.cluster is not None and config.explain_gpu:
            yield f"cluster={config.cluster} and explain_gpu={config.explain_gpu} both name GPUs: leave one of them out"
        elif config.cluster is not None and config.attention.method != "auto" and not config.explain:
            yield (
                f"cluster={config.cluster} has no effect on recipe={config.recipe}: add recipe=plan, attention=auto or "
                "explain=true, or leave it out"
            )
        return
    if config.cluster is None:
        yield "recipe=plan needs a cluster: type cluster=8xh200, 2x8xh100 (hosts x GPUs x kind), or a path to a .yaml"
    if config.launch.num_ranks is not None:
        yield f"launch.num_ranks={config.launch.num_ranks} cannot go with recipe=plan: cluster=8xh200 says how many"
    if config.explain_gpu:
        yield f"explain_gpu={config.explain_gpu} cannot go with recipe=plan: cluster=8xh200 says which GPUs"
    if config.explain:
        yield "explain=true cannot go with recipe=plan, which starts no run anyway: leave it out"
    if config.documents is not None and config.parallelism.method == "tensor_pipeline":
        yield f"documents={config.documents} cannot go with parallelism=tensor_pipeline, which has no document masks"
    if config.engine.dtype == "fp32":
        yield "engine.dtype=fp32 cannot go with recipe=plan, since speeds were measured in half precision: use bf16"


def _staged_run_problems(config: Config) -> Iterator[str]:
    """Of data.stages in its run."""
    setting, last = f"data.stages={config.data.stages}", config.data.stages[-1][0]
    if config.recipe != "pretrain":
        yield f"{setting} needs recipe=pretrain, not recipe={config.recipe}: leave it out"
    if config.parallelism.method == "tensor_pipeline":
        yield f"{setting} cannot go with parallelism=tensor_pipeline: use +experiment=ra_sp"
    if last > config.num_steps:
        yield f"{setting}: step {last} never comes with num_steps={config.num_steps}: type num_steps={2 * last}"


def _training_evaluation_problems(config: Config) -> Iterator[str]:
    """Of an evaluation while training."""
    asked = config.evaluate
    setting = f"evaluate.every_n_steps={asked.every_n_steps}"
    if config.recipe != "pretrain":
        yield f"{setting} needs recipe=pretrain, not recipe={config.recipe}: leave it out"
    if asked.scoring != "one_pass":
        yield f"{setting} cannot go with evaluate.scoring={asked.scoring}: leave that out, which is for recipe=evaluate"
    if asked.context is not None:
        yield f"{setting} cannot go with evaluate.context={asked.context}: leave that out, which is for recipe=evaluate"
    if config.parallelism.method == "tensor_pipeline":
        yield f"{setting} cannot go with parallelism=tensor_pipeline: use +experiment=ra_sp"
    longest = config.data.sequence_length
    if too_long := [length for length in asked.lengths if length > longest]:
        yield (
            f"evaluate.lengths={asked.lengths} has {too_long[0]}, more than data.sequence_length={longest}, for which "
            f"a run with {setting} is planned: leave it out, or evaluate the run afterwards with recipe=evaluate"
        )


def one_divisor(number: int) -> str:
    """Of 4: "1, 2 or 4"."""
    *others, last = (str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
    return f"{', '.join(others)} or {last}" if others else last


def flatten(settings: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    by_name: dict[str, Any] = {}
    for name, value in settings.items():
        by_name |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return by_name
