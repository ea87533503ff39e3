"""Every setting of a run: one dataclass per group, one line of meaning per field, and the checks that need no hardware.

Imports no project code and nothing slow: it must refuse a bad configuration within a second. What depends on the
number of ranks is checked by `degrees.resolve_degrees`, once that number is known.
"""

from __future__ import annotations

import glob
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

KERNELS = ("auto", "flash_attn_4", "ffpa", "cudnn", "aten_flash", "mem_efficient", "cpu_flash", "reference")
METHODS = ("ring", "ulysses", "hybrid", "all_gather", "local", "auto")
TRANSPORTS = ("auto", "p2p", "copy_engine")
RECIPES = ("pretrain", "forward", "compare", "bench_attention", "max_length")
# what a sweep can look for, and which recipes measure it; names of RUN_DIR/summary.json
OBJECTIVES = {
    "validation_loss": ("minimize", ("pretrain",)),
    "tokens_per_s": ("maximize", ("pretrain", "forward")),
    "model_tflops_per_rank": ("maximize", ("pretrain", "forward")),
}
BYTE_VOCAB_SIZE = 257  # 256 byte values and the document separator


class ConfigError(ValueError):
    """A setting that cannot work: says the value, the rule and what to type. Shown to the user without a traceback."""


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value} is not known: use {', '.join(choices)}")


def _at_least(name: str, value: float, minimum: float) -> None:
    if not minimum <= value < math.inf:  # also refuses nan
        raise ConfigError(f"{name}={value} must be at least {minimum}" + (", and finite" if value == math.inf else ""))


@dataclass
class ModelConfig:
    """The shape of the transformer; length and dtype are not the model's."""

    name: str = "tiny"
    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2  # fewer than num_heads is grouped-query attention
    head_dim: int = 32
    mlp_size: int = 384
    mlp: str = "swiglu"  # swiglu | gelu
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    vocab_size: int = BYTE_VOCAB_SIZE
    tied_head: bool = False  # the output head shares the embedding's weight
    bias: bool = False  # in every linear layer but the head
    rope_theta: float = 10000.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _choice("model.mlp", self.mlp, ("swiglu", "gelu"))
        _choice("model.norm", self.norm, ("rmsnorm", "layernorm"))
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "mlp_size"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("norm_eps", "init_std"):
            _at_least(f"model.{name}", getattr(self, name), 0)
        _at_least("model.rope_theta", self.rope_theta, 1)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}: "
                f"use one of {divisors(self.num_heads)}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs of numbers")


@dataclass
class AttentionConfig:
    """How attention is computed over the ranks that share a sequence."""

    method: str = "ring"  # ring | ulysses | hybrid | all_gather | local | auto (chosen by arithmetic: explain=true)
    layout: str = "zigzag"  # zigzag | contiguous
    transport: str = "auto"  # p2p (NCCL, gloo) | copy_engine (NVIDIA GPUs; p2p between hosts) | auto: by the device
    kernel: str = "auto"  # auto | flash_attn_4 | ffpa | cudnn | aten_flash | mem_efficient | cpu_flash | reference
    intra_host_gb_per_s: Optional[float] = None  # for auto: a rank's link within a host; unset: 280 (NVLink), CPU 2
    inter_host_gb_per_s: Optional[float] = None  # for auto: a rank's link between hosts; unset: 45 (400 Gb/s), CPU 1

    def __post_init__(self) -> None:
        _choice("attention.method", self.method, METHODS)
        _choice("attention.layout", self.layout, ("zigzag", "contiguous"))
        _choice("attention.transport", self.transport, TRANSPORTS)
        _choice("attention.kernel", self.kernel, KERNELS)
        for name in ("intra_host_gb_per_s", "inter_host_gb_per_s"):
            speed = getattr(self, name)
            if speed is not None and not 0 < speed < math.inf:
                raise ConfigError(f"attention.{name}={speed} must be above 0, and finite")


class Degrees(NamedTuple):
    """The rank grid: the product is the number of ranks."""

    data: int
    ring: int
    ulysses: int
    tensor: int = 1
    pipeline: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence's tokens."""
        return self.ring * self.ulysses


@dataclass
class ParallelismConfig:
    """The rank grid; what is left unset fills the ranks there are."""

    method: str = "sequence"  # what fills them: sequence (by the attention method) | tensor_pipeline
    data_degree: Optional[int] = None  # replicas, each with sequences of its own
    ring_degree: Optional[int] = None  # ranks that share one sequence; of a hybrid, its Ulysses groups
    ulysses_degree: Optional[int] = None  # ranks that share one sequence by heads: ulysses and hybrid
    tensor_degree: Optional[int] = None  # tensor_pipeline: ranks that share each layer's weights, as Megatron-LM does
    pipeline_degree: Optional[int] = None  # tensor_pipeline: stages of layers

    def __post_init__(self) -> None:
        _choice("parallelism.method", self.method, ("sequence", "tensor_pipeline"))
        for name in Degrees._fields:
            degree = getattr(self, f"{name}_degree")
            if degree is not None:
                _at_least(f"parallelism.{name}_degree", degree, 1)
        for name in ("tensor_degree", "pipeline_degree"):
            if self.method == "sequence" and (getattr(self, name) or 1) > 1:
                raise ConfigError(
                    f"parallelism.{name}={getattr(self, name)} needs parallelism=tensor_pipeline: type "
                    "+experiment=tp_pp"
                )


@dataclass
class EngineConfig:
    """What DeepSpeed's engine does, and the batch of one step."""

    dtype: str = "bf16"  # bf16 | fp16 (dynamic loss scale) | fp32
    zero_stage: int = 1
    micro_batch_size: int = 1  # sequences per ring and micro-batch
    gradient_accumulation_steps: int = 1
    train_batch_size: Optional[int] = None  # sequences per step, all ranks; if set, it gives the accumulation steps
    gradient_clipping: float = 1.0  # largest gradient norm; 0 is off
    recompute: str = "none"  # layers in the backward pass, for memory: none | selective (all but attention) | full
    offload_activations: bool = False  # what recompute keeps lies in the host's memory meanwhile; copies overlap
    offload_optimizer: bool = False  # its state and its step on the host (ZeRO-Offload); ZeRO stages 1 to 3
    offload_parameters: bool = False  # weights on the host but where they are needed; ZeRO stage 3
    tile_tokens: Optional[int] = None  # that have logits, or hidden MLP activations, at once; 0: all; unset: by memory
    on_bad_step: str = "stop"  # loss or gradients are not finite: stop | skip, which goes on with the next batch
    deterministic: bool = False  # deterministic kernels only, at some cost
    detect_anomaly: bool = False  # name the forward operation whose gradient is NaN; slow

    def __post_init__(self) -> None:
        _choice("engine.dtype", self.dtype, ("bf16", "fp16", "fp32"))
        _choice("engine.recompute", self.recompute, ("none", "selective", "full"))
        if self.offload_activations and self.recompute == "none":
            raise ConfigError(
                "engine.offload_activations=true moves what is kept of layers that are computed again: use "
                "engine.recompute=selective, or full"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError(
                "engine.offload_optimizer=true cannot go with engine.zero_stage=0: use engine.zero_stage=1, 2 or 3"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ConfigError(
                f"engine.offload_parameters=true cannot go with engine.zero_stage={self.zero_stage}, which leaves "
                "weights whole: use engine.zero_stage=3"
            )
        _choice("engine.on_bad_step", self.on_bad_step, ("stop", "skip"))
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is not known: use 0, 1, 2, 3")
        if self.dtype == "fp16" and self.zero_stage == 0:
            raise ConfigError(
                "engine.dtype=fp16 cannot go with engine.zero_stage=0, where DeepSpeed does not scale the loss but "
                "unscales the gradients: use engine.zero_stage=1"
            )
        _at_least("engine.micro_batch_size", self.micro_batch_size, 1)
        _at_least("engine.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _at_least("engine.gradient_clipping", self.gradient_clipping, 0)
        if self.tile_tokens is not None:
            _at_least("engine.tile_tokens", self.tile_tokens, 0)
        if self.train_batch_size is not None:
            _at_least("engine.train_batch_size", self.train_batch_size, 1)
            if self.gradient_accumulation_steps != 1:
                raise ConfigError(
                    f"engine.train_batch_size={self.train_batch_size} gives the accumulation steps, so "
                    f"engine.gradient_accumulation_steps={self.gradient_accumulation_steps} must be left out"
                )


@dataclass
class OptimizerConfig:
    """AdamW, with linear warm-up and a decay to min_lr_ratio * lr at the last step."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # spares norms, biases and embeddings
    warmup_fraction: float = 0.1  # of num_steps
    decay: str = "cosine"  # cosine | linear | constant
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _choice("optimizer.decay", self.decay, ("cosine", "linear", "constant"))
        for name in ("lr", "eps", "weight_decay"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"optimizer.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")


@dataclass
class DataConfig:
    """Which text is read, and how it is cut into sequences."""

    source: str = "stdlib"  # stdlib: Python's own library | text_files | hub
    files: Any = None  # text_files: a glob or a list of globs
    name: Optional[str] = None  # hub: data set name, or a local folder that load_dataset can read
    subset: Optional[str] = None  # hub: data set configuration
    split: str = "train"  # hub: split
    text_field: str = "text"  # hub: the column that holds the text
    sequence_length: int = 2048  # tokens that the model sees at once, over all ranks of a ring
    validation_sequences: int = 8  # held out, from the start of the corpus
    shuffle_seed: int = 0  # order of the files
    overfit_one_batch: bool = False  # every step gets the first batch; a check that learning works

    def __post_init__(self) -> None:
        _choice("data.source", self.source, ("stdlib", "text_files", "hub"))
        _at_least("data.sequence_length", self.sequence_length, 1)
        _at_least("data.validation_sequences", self.validation_sequences, 1)
        for name in ("name", "files"):
            if re.search(r"://[^/]*@", str(getattr(self, name))):  # not shown: it may hold a password
                raise ConfigError(
                    f"data.{name} holds a URL with a login, which would be kept with the run: leave the login out; "
                    "private data sets of the hub take HF_TOKEN"
                )
        if self.source == "text_files":
            self._check_files()
        if self.source == "hub" and not self.name:
            raise ConfigError("data=hub needs a data set: data.name=OWNER/NAME or a local folder")

    def _check_files(self) -> None:
        patterns = [self.files] if isinstance(self.files, str) else self.files
        if not patterns or not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise ConfigError("data=text_files needs files: data.files='texts/*.txt' or data.files=[a.txt,b.txt]")
        for pattern in patterns:
            if not glob.glob(pattern, recursive=True):
                raise ConfigError(
                    f"data.files={pattern} matches no file: give a path or a glob, from the folder you are in"
                )


@dataclass
class LoggingConfig:
    """What is shown and kept."""

    every_n_steps: int = 20
    validate_every_n_steps: int = 0  # 0: only at the end
    wandb: str = "auto"  # auto: online with a login, else offline | online | offline | disabled
    project: str = "ring-attention"
    group: Optional[str] = None  # of wandb; a sweep that has none takes sweep-FOLDER
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _choice("logging.wandb", self.wandb, ("auto", "online", "offline", "disabled"))
        _at_least("logging.every_n_steps", self.every_n_steps, 1)
        _at_least("logging.validate_every_n_steps", self.validate_every_n_steps, 0)


@dataclass
class CheckpointConfig:
    """What recipe=pretrain keeps in RUN_DIR/checkpoints. Its command with hydra.run.dir=RUN_DIR goes on from there."""

    every_n_steps: int = 100  # 0: only after the last step, and when told to end (SIGTERM or SIGUSR1)
    keep: int = 2  # so many, the newest; 0: none are written

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_n_steps", self.every_n_steps, 0)
        _at_least("checkpoint.keep", self.keep, 0)


@dataclass
class LaunchConfig:
    """Which ranks run; ignored where a launcher (torchrun, deepspeed, srun) has started them."""

    num_ranks: Optional[int] = None  # all GPUs, or 4 on the CPU
    timeout_s: float = 600.0  # a collective that takes longer ends the run
    stall_factor: float = 20.0  # so does a step that takes so many times the median of those before; 0 is off
    stall_s: float = 60.0  # but only after so long

    def __post_init__(self) -> None:
        if self.num_ranks is not None:
            _at_least("launch.num_ranks", self.num_ranks, 1)
        _at_least("launch.timeout_s", self.timeout_s, 1)
        _at_least("launch.stall_factor", self.stall_factor, 0)
        if 0 < self.stall_factor < 2:
            raise ConfigError(
                f"launch.stall_factor={self.stall_factor} would end steps that are hardly slower than others: use at "
                "least 2, or launch.stall_factor=0, which never ends any"
            )
        _at_least("launch.stall_s", self.stall_s, 1)


@dataclass
class CompareConfig:
    """recipe=compare: several configurations on the same hardware, in turns, and one table."""

    entries: dict[str, list[str]] = field(default_factory=dict)  # name: what is overridden, such as [+experiment=dp]
    only: list[str] = field(default_factory=list)  # of the entries; empty is all
    baseline: str = ""  # the entry that changes are against; empty is the first
    recipe: str = "forward"  # what is measured: forward | pretrain
    rounds: int = 3  # each entry has its turn in each, so that drift hits all alike; of recipe=bench_attention, too
    steps_per_round: int = 2  # timed, after one that warms up
    micro_batch_sizes: list[int] = field(default_factory=lambda: [1])  # tried first; each entry keeps its fastest
    downscale: bool = False  # cut the batch to step_time_s per step, and on the CPU everything; the cuts are named
    step_time_s: float = 4.0  # by arithmetic
    roofline: bool = False  # also, in each round, what matrix products and attention alone allow on these ranks
    plot: str = "bars"  # bars | scaling: throughput over the number of ranks

    def __post_init__(self) -> None:
        _choice("compare.recipe", self.recipe, ("forward", "pretrain"))
        _choice("compare.plot", self.plot, ("bars", "scaling"))
        for name, values in (("baseline", [self.baseline] if self.baseline else []), ("only", self.only)):
            for value in values:
                if self.entries and value not in self.entries:
                    raise ConfigError(f"compare.{name}={value} is no entry: use {', '.join(self.entries)}")
        for name in ("rounds", "steps_per_round", "step_time_s"):
            _at_least(f"compare.{name}", getattr(self, name), 1)
        if not self.micro_batch_sizes:
            raise ConfigError("compare.micro_batch_sizes is empty: use compare.micro_batch_sizes=[1]")
        for size in self.micro_batch_sizes:
            _at_least("compare.micro_batch_sizes", size, 1)


@dataclass
class MaxLengthConfig:
    """recipe=max_length: the longest sequence that this configuration can train."""

    memory_gib: Optional[float] = None  # that a rank may use; unset: its device's less a tenth, or its part of the host
    confirm_s: float = 600.0  # try the length found if its two steps should take no longer; 0 never does

    def __post_init__(self) -> None:
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise ConfigError(f"max_length.memory_gib={self.memory_gib} must be above 0, and finite")
        _at_least("max_length.confirm_s", self.confirm_s, 0)


@dataclass
class SweepConfig:
    """python train.py -m +sweep=NAME: many runs, called trials, and which of them is the best."""

    objective: str = "validation_loss"  # lowest | tokens_per_s | model_tflops_per_rank: highest, fair between lengths
    sampler: str = "tpe"  # tpe: Optuna's search, which learns from earlier trials | grid: every combination
    num_trials: int = 20  # of tpe, failed ones too; a grid is as large as it is
    num_parallel: int = 1  # trials at a time; more than one needs hydra/launcher=submitit_slurm or submitit_local

    def __post_init__(self) -> None:
        _choice("sweep.objective", self.objective, tuple(OBJECTIVES))
        _choice("sweep.sampler", self.sampler, ("tpe", "grid"))
        _at_least("sweep.num_trials", self.num_trials, 1)
        _at_least("sweep.num_parallel", self.num_parallel, 1)


@dataclass
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
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
    sweep: SweepConfig = field(default_factory=SweepConfig)
    recipe: str = "pretrain"  # pretrain | forward (no gradients) | compare | bench_attention | max_length
    explain: bool = False  # print the resolved plan and stop
    profile: bool = False  # record a torch profiler trace of the profile_steps on every rank
    profile_steps: list[int] = field(default_factory=lambda: [3, 4])  # the first and the last of them
    memory_snapshot: bool = False  # record what GPU memory is used for on every rank
    breakdown: bool = True  # after the last step: exposed communication and the share of time per part
    num_steps: int = 300  # optimizer steps, or forward passes over a batch
    seed: int = 0  # of the weights

    def __post_init__(self) -> None:
        _choice("recipe", self.recipe, RECIPES)
        _at_least("num_steps", self.num_steps, 1)
        if self.recipe == "compare" and not self.compare.entries:
            raise ConfigError("recipe=compare has nothing to compare: type recipe=compare +experiment=paper_table")
        for name in ("profile", "memory_snapshot"):
            if self.recipe in ("compare", "bench_attention", "max_length") and getattr(self, name):
                raise ConfigError(
                    f"{name}=true is for single runs: leave it out, or type recipe=pretrain or recipe=forward"
                )
        if self.recipe == "max_length" and self.attention.method == "auto":
            raise ConfigError(
                "attention=auto may choose another method at another length, so recipe=max_length predicts nothing: "
                "use attention=ring"
            )
        if self.recipe == "max_length" and self.parallelism.method == "tensor_pipeline":
            raise ConfigError("recipe=max_length probes one layer, which has no pipeline stages: use +experiment=ra_sp")
        if len(self.profile_steps) != 2 or not 2 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ConfigError(
                f"profile_steps={self.profile_steps} must be the first and the last step to record, from step 2 on: "
                "use profile_steps=[3,4]"
            )
        if self.profile_steps != [3, 4] and not self.profile:
            raise ConfigError(f"profile_steps={self.profile_steps} says what profile=true records: add profile=true")
        if self.profile and self.num_steps < self.profile_steps[1]:
            raise ConfigError(
                f"profile=true records steps {self.profile_steps[0]} to {self.profile_steps[1]}, but "
                f"num_steps={self.num_steps}: use num_steps={self.profile_steps[1]}"
            )
        for name in ("ring_degree", "ulysses_degree"):
            degree = getattr(self.parallelism, name)
            if self.attention.method == "auto" and degree is not None:
                raise ConfigError(
                    f"attention=auto chooses by itself, but parallelism.{name}={degree}: leave it unset, or use "
                    "attention=hybrid"
                )
        if self.model.vocab_size < BYTE_VOCAB_SIZE:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} cannot hold byte tokens: use at least {BYTE_VOCAB_SIZE}"
            )


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    by_name: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            by_name |= flatten(value, f"{prefix}{name}.")
        else:
            by_name[f"{prefix}{name}"] = value
    return by_name
