"""The configuration: the error for each mistake, and how groups, experiments and the command line combine."""

# ruff: noqa: E501 - a mistake is one line here

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import pytest
import wandb
import yaml
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

import train  # registers the schema
from conf.compose import (
    as_hydra_types_it,
    check_files_typed_once,
    check_flags,
    check_multirun,
    compose_entries,
    describe_error,
    to_config,
)
from conf.degrees import accumulation_steps, resolve_degrees
from conf.schema import WANDB_MODES, CompareConfig, Config, ConfigError, DataConfig, flatten
from tests.errors import is_named, names, refused

CONF = Path(train.__file__).parent / "conf"
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))
DEFAULTS = OmegaConf.structured(Config)
FIELDS = flatten(asdict(Config()))


def compose(*overrides: str) -> Config:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("config", list(overrides)))


def merged(*fields: str) -> Config:
    """The defaults with these fields: faster than a composition, where only the schema is asked."""
    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist([*fields]))
    assert isinstance(config, DictConfig)
    return to_config(config)


def check_for_four_ranks(config: Config) -> None:
    accumulation_steps(config, resolve_degrees(config, 4))


def mistake(*overrides: str, config_of: Callable[..., Config] = compose) -> str:
    """What `train.py` prints after "error: ", from the composition, the schema or the grid of 4 ranks."""
    with pytest.raises((CompactHydraException, ConfigError)) as caught:
        check_for_four_ranks(config_of(*overrides))
    error = caught.value
    text = str(error) if isinstance(error, ConfigError) else describe_error(error)
    assert "\n" not in text
    assert "planted" not in text, "a secret is shown"
    return text


CHOICES = [
    ("sweep.objective=loss", "validation_loss tokens_per_s model_tflops_per_rank"),
    ("sweep.sampler=random", "tpe grid"),
    ("model.mlp=relu", "swiglu gelu"),
    ("model.norm=batchnorm", "rmsnorm layernorm"),
    ("attention.method=star", "ring ulysses hybrid all_gather local auto"),
    ("attention.layout=striped", "zigzag contiguous"),
    ("attention.transport=tcp", "auto p2p copy_engine"),
    ("attention.kernel=fast", "auto flash_attn_4 ffpa cudnn aten_flash mem_efficient cpu_flash reference"),
    ("engine.dtype=int8", "bf16 fp16 fp32"),
    ("engine.recompute=some", "none selective full"),
    ("engine.zero_stage=4", "0 1 2 3"),
    ("optimizer.decay=step", "cosine linear constant"),
    ("engine.on_bad_step=retry", "stop skip"),
    ("parallelism.method=expert", "sequence tensor_pipeline"),
    ("compare.recipe=x", "forward pretrain"),
    ("data.source=disk", "stdlib text_files hub"),
    ("recipe=bake", "pretrain forward compare bench_attention max_length"),
    ("data=books", "data=hub data=stdlib data=text_files"),
    ("workload=paper", "workload=layers_8b workload=paper_100k workload=paper_10k"),
    ("model=meta-llama/Llama-3.2-1B", "model=llama_1b model=tiny"),
    ("+debug=slow", "+debug=anomaly +debug=deterministic +debug=overfit +debug=profile"),
    ("+sweep=lr", "+sweep=kernels +sweep=lr_batch +sweep=search +sweep=throughput"),
]
BOUNDS = [  # the first bound is legal
    ("sweep.num_trials", "0", "1"),
    ("sweep.num_parallel", "0", "1"),
    ("model.num_layers", "0", "1"),
    ("model.vocab_size", "256", "257"),
    ("engine.tile_tokens", "-1", "0"),
    ("engine.micro_batch_size", "0", "1"),
    ("engine.gradient_clipping", "-1.0", "0"),
    ("optimizer.lr", "nan", "0"),
    ("optimizer.lr", "inf", "0"),
    ("optimizer.beta2", "1.0", "0 1"),
    ("optimizer.min_lr_ratio", "2.0", "1"),
    ("data.sequence_length", "0", "1"),
    ("data.validation_sequences", "0", "1"),
    ("logging.every_n_steps", "0", "1"),
    ("launch.num_ranks", "0", "1"),
    ("launch.stall_s", "0.0", "1"),
    ("launch.stall_factor", "-1.0", "0"),
    ("launch.timeout_s", "inf", "1"),
    ("parallelism.data_degree", "0", "1"),
    ("num_steps", "0", "1"),
    ("engine.train_batch_size", "0", "1"),
    ("max_length.memory_gib", "0.0", "0.001"),
    ("max_length.confirm_s", "-1.0", "0"),
    ("compare.rounds", "0", "1"),
    ("compare.steps_per_round", "0", "1"),
    ("compare.step_time_s", "inf", "1"),
    ("model.hidden_size", "0", "1"),
    ("parallelism.ring_degree", "0", "1"),
    ("parallelism.ulysses_degree", "0", "1"),
    ("parallelism.tensor_degree", "0", "1"),
    ("parallelism.pipeline_degree", "0", "1"),
    ("model.num_heads", "0", "1"),
    ("model.num_kv_heads", "0", "1"),
    ("model.mlp_size", "0", "1"),
    ("engine.gradient_accumulation_steps", "0", "1"),
    ("model.norm_eps", "-1.0", "0"),
    ("model.init_std", "-1.0", "0"),
    ("optimizer.eps", "-1.0", "0"),
    ("optimizer.weight_decay", "-1.0", "0"),
    ("model.rope_theta", "0.0", "1"),
    ("logging.validate_every_n_steps", "-1", "0"),
    ("checkpoint.every_n_steps", "-1", "0"),
    ("checkpoint.keep", "-1", "0"),
    ("evaluate.every_n_steps", "-1", "0"),
    ("optimizer.beta1", "1.0", "0 1"),
    ("optimizer.warmup_fraction", "1.0", "0 1"),
    ("attention.inter_host_gb_per_s", "inf", "0.001"),
    ("attention.intra_host_gb_per_s", "0.0", "0.001"),
]
BESIDE = {"model.num_heads": ["model.num_kv_heads=1"]}  # so that the bound of the field is legal
MISTAKES = [  # what is typed; the value, the rule's values and what to type
    # Hydra's
    ("attention.block=cudnn", ["attention.block", "attention.kernel=cudnn"]),
    ("+attention.block=cudnn", ["attention.block", "attention.kernel=cudnn"]),
    ("attention={block:cudnn}", ["attention.block", "attention.kernel=..."]),
    ("compare.fit=true", ["compare.fit", "compare.downscale=true"]),
    ("parallelism.sequence_sharded_norms=false", ["parallelism.sequence_sharded_norms"]),
    ("recipe=compare explain=true explain_gpu=h100 launch.num_ranks=8", ["recipe=compare", "explain_gpu=h100"]),
    ("+data.sequence_lenght=8", ["data.sequence_lenght", "data.sequence_length", "python train.py --help"]),
    ("+wandb.api_key=planted", ["wandb.api_key", "python train.py --help"]),
    ("engine.zerostage=2", ["engine.zerostage", "engine.zero_stage", "python train.py --help"]),
    ("engine.batch_size=2", ["engine.batch_size", "engine.train_batch_size", "engine.micro_batch_size"]),
    ("nosuch=1", ["nosuch", "python train.py --help"]),
    ("+experiment=rasp", ["+experiment=rasp", "ra_sp?", "+experiment=all_gather", "+experiment=ra_sp"]),
    ("hydra/launcher=slurm", ["hydra/launcher=slurm", "hydra/launcher=submitit_slurm"]),
    ("+experiment=[rasp]", ["+experiment=rasp", "ra_sp?", "+experiment=all_gather", "+experiment=ra_sp"]),
    ("+experiment=[ra_sp,nosuch]", ["+experiment=nosuch", "+experiment=all_gather", "+experiment=weak_scaling"]),
    ("data=hubb", ["data=hubb", "hub?", "data=hub", "data=stdlib", "data=text_files"]),
    ("data=hub data.name=json data.files=x.jsonl", ["data.files=x.jsonl", "data=text_files", "data=hub"]),
    ("data=text_files data.files=[train.py] data.name=x", ["data.name=x", "data=hub", "data=text_files"]),
    ("+model.pretrained=x", ["model.pretrained", "model.path=FOLDER_OR_HUB_NAME"]),
    ("data.tokenizer_name=x", ["data.tokenizer_name", "data.tokenizer=FOLDER_OR_HUB_NAME", "docs/data.md"]),
    ("data.pack_documents=true", ["data.pack_documents", "docs/data.md"]),
    ("logging.tensorboard=true", ["logging.tensorboard", "wandb", "metrics.jsonl"]),
    ("+learning_rate=1e-3", ["learning_rate", "optimizer.lr=..."]),
    ("model.num_layers=2.5", ["model.num_layers=2.5", "Integer"]),
    ("explain=maybe", ["explain=maybe", "bool"]),
    ("optimizer.lr=fast", ["optimizer.lr=fast", "Float"]),
    ("profile_steps={a:1}", ["profile_steps={a:1}", "ListConfig"]),
    ("num_steps=null", ["num_steps=null", "Optional"]),
    ("num_steps", ["num_steps", "field=value", "data.files=['a.txt','b.txt']"]),
    ("recipe=evaluate evaluate.model=a/b model.rope={rope_type:yarn,factor:4}", ["model.rope={'rope_type': 'yarn', 'factor': 4}", "model.path=FOLDER_OR_HUB_NAME", "evaluate.model"]),
    ("generate.prompt=main(", ["generate.prompt=main(", "field=value", "generate.prompt='def main('", "generate.prompt_file=prompts.jsonl"]),
    ("calibrate.output=~/a.yaml", ["calibrate.output=~/a.yaml", "(unexpected ~)", "field=value"]),
    ("engine=zero", ["engine", "engine.FIELD=value"]),
    ("+model=llama_1b", ["model", "model=OPTION"]),
    ("+workload=paper_10k", ["workload", "workload=OPTION"]),
    ("experiment=ra_sp", ["experiment", "+experiment=ra_sp"]),
    ("sweep=lr_batch", ["sweep", "+sweep=lr_batch"]),
    ("+experiment=tp_pp +experiment=dp", ["experiment", "+experiment=[ONE,OTHER]"]),
    ("optimizer.lr=1e-3,3e-3", ["optimizer.lr=1e-3,3e-3", "python train.py -m"]),
    ("~num_stepz", ["num_stepz"]),
    ("+nosuch@model=x", ["+nosuch@model=x", "nosuch"]),
    # one field
    ("logging.wandb=yes", ["logging.wandb=yes", "auto", "online", "offline", "disabled"]),  # which YAML reads as true
    ("compare.baseline=nosuch", ["compare.baseline=nosuch", "tp_pp", "tp", "pp", "ra_sp", "ulysses", "hybrid", "all_gather", "dp"]),
    ("compare.only=[dp,nosuch]", ["compare.only=nosuch", "tp_pp", "tp", "pp", "ra_sp", "ulysses", "hybrid", "all_gather", "dp"]),
    ("data=hub data.name=https://me:planted@host/set", ["data.name", "HF_TOKEN"]),
    ("data=text_files data.files=https://me:planted@host/set", ["data.files", "HF_TOKEN"]),
    # several fields
    ("recipe=max_length attention=auto", ["attention=auto", "recipe=max_length", "attention=ring"]),
    ("recipe=max_length +experiment=tp_pp", ["recipe=max_length", "+experiment=ra_sp"]),
    ("data=hub", ["data=hub", "data.name=OWNER/NAME"]),
    ("data=text_files", ["data=text_files", "data.files='texts/*.txt'", "data.files=[a.txt,b.txt]"]),
    ("data=text_files data.files=[]", ["data=text_files", "data.files='texts/*.txt'", "data.files=[a.txt,b.txt]"]),
    ("data=text_files data.files=/no/*.txt", ["data.files=/no/*.txt"]),
    ("recipe=compare compare.only=dp", ["compare.only=dp", "compare.only=[dp]"]),
    ("recipe=compare compare.entries.mine=['+experiment=dp']", ["compare.entries.mine", "+compare.entries.mine=['+experiment=dp']"]),
    ("recipe=compare +compare.entries.mine=[+experiment=dp]", ["+compare.entries.mine=[+experiment=dp]", "field=value", "+compare.entries.mine=['+experiment=dp','engine.zero_stage=2']"]),
    ("recipe=compare ~compare", ["recipe=compare", "recipe=compare +experiment=paper_table"]),
    ("recipe=compare ~compare compare.baseline=dp", ["recipe=compare", "recipe=compare +experiment=paper_table"]),
    ("evaluate.every_n_steps=9 +experiment=tp_pp", ["evaluate.every_n_steps=9", "parallelism=tensor_pipeline", "+experiment=ra_sp"]),
    ("data.stages=[[1,512],[9,2048]] +debug=overfit", ["data.stages=[[1, 512], [9, 2048]]", "data.overfit_one_batch=true"]),
    ("data.stages=[[1,512],[9,2048]] data=hub data.name=x data.stream=true", ["data.stages=[[1, 512], [9, 2048]]", "data.stream=true"]),
    ("data.stages=[[1,512],[9,2048]] +experiment=tp_pp", ["data.stages=[[1, 512], [9, 2048]]", "parallelism=tensor_pipeline", "+experiment=ra_sp"]),
    # on 4 ranks
    ("attention=ulysses", ["attention=ulysses", "parallelism.ulysses_degree=4", "model.num_kv_heads=2", "attention=hybrid", "model.num_kv_heads=4", "parallelism.ulysses_degree=2", "attention=ring"]),
    ("attention=hybrid parallelism.ulysses_degree=4", ["attention=hybrid", "parallelism.ulysses_degree=4", "model.num_kv_heads=2", "model.num_kv_heads=4", "parallelism.ulysses_degree=2", "attention=ring"]),
    ("attention=ulysses parallelism.ring_degree=2", ["attention=ulysses", "parallelism.ring_degree=2", "attention=hybrid"]),
    ("attention=auto parallelism.ulysses_degree=2", ["attention=auto", "parallelism.ulysses_degree=2", "attention=hybrid"]),
    ("attention=local parallelism.ulysses_degree=2", ["attention=local", "parallelism.ulysses_degree=2", "attention=ulysses"]),
    ("attention=local parallelism.ring_degree=2", ["attention=local", "parallelism.ring_degree=2", "attention=ring"]),
    ("attention=hybrid parallelism.data_degree=4 parallelism.ring_degree=4", ["parallelism.data_degree=4", "parallelism.ring_degree=4", "16 ranks", "4", "launch.num_ranks=16"]),
    ("attention=hybrid parallelism.data_degree=4 parallelism.ulysses_degree=2", ["parallelism.data_degree=4", "parallelism.ulysses_degree=2", "8 ranks", "4", "launch.num_ranks=8"]),
    ("+experiment=tp_pp engine.zero_stage=3", ["engine.zero_stage=3", "parallelism=tensor_pipeline", "engine.zero_stage=1"]),
    ("+experiment=tp_pp engine.recompute=full", ["engine.recompute=full", "parallelism=tensor_pipeline", "engine.recompute=none"]),
    ("+experiment=tp_pp engine.offload_optimizer=true", ["engine.offload_optimizer=true", "parallelism=tensor_pipeline", "engine.offload_optimizer=false"]),
    ("+experiment=tp_pp engine.tile_tokens=64", ["engine.tile_tokens=64", "parallelism=tensor_pipeline", "engine.tile_tokens=0"]),
    ("+experiment=tp_pp attention=ring", ["attention=ring", "parallelism=tensor_pipeline", "attention=local"]),
    ("+experiment=tp_pp parallelism.ring_degree=2", ["parallelism.ring_degree=2", "parallelism=tensor_pipeline", "parallelism.ring_degree=1"]),
    ("+experiment=tp_pp parallelism.ulysses_degree=4", ["parallelism.ulysses_degree=4", "parallelism=tensor_pipeline", "parallelism.ulysses_degree=1"]),
    ("+experiment=tp_pp parallelism.tensor_degree=4", ["parallelism.tensor_degree=4", "model.num_kv_heads=2", "parallelism.tensor_degree=2", "+experiment=ra_sp"]),
    ("+experiment=tp_pp parallelism.tensor_degree=4 model.num_kv_heads=4 model.mlp_size=386", ["parallelism.tensor_degree=4", "model.mlp_size=386", "parallelism.tensor_degree=2", "+experiment=ra_sp"]),
    ("+experiment=tp_pp parallelism.pipeline_degree=4", ["parallelism.pipeline_degree=4", "model.num_layers=2", "parallelism.pipeline_degree=2"]),
    ("+experiment=tp_pp parallelism=tp8_pp2", ["parallelism.tensor_degree=8", "4 ranks", "1", "2", "parallelism.tensor_degree=4", "launch.num_ranks"]),
    ("+experiment=tp_pp parallelism.tensor_degree=2 parallelism.pipeline_degree=1 parallelism.data_degree=1", ["parallelism.data_degree=1", "parallelism.tensor_degree=2", "parallelism.pipeline_degree=1", "2 ranks", "4", "launch.num_ranks=2"]),
]  # fmt: skip
MISTAKES_OF_FIELDS = [  # the same, where no group, file or grammar of Hydra plays a part
    ("explain=true explain_gpu=v100", ["explain_gpu=v100", "h200", "b200"]),
    ("explain_gpu=h100 launch.num_ranks=8", ["explain_gpu=h100", "explain=true"]),
    ("explain=true explain_gpu=h100", ["explain_gpu=h100", "launch.num_ranks=8"]),
    ("data.text_field=messages", ["data.text_field=messages", "data=hub", "data=stdlib"]),
    ("num_steps=${steps}", ["num_steps", "steps"]),
    ("recipe=evaluate evaluate.model=a/b lora.rank=4", ["lora.rank=4", "evaluate.model", "leave it out"]),
    ("model.head_dim=0", ["model.head_dim=0", "1"]),
    ("model.head_dim=33", ["model.head_dim=33", "even"]),
    ("engine.offload_activations=true", ["engine.offload_activations=true", "engine.recompute=selective", "full"]),
    ("launch.stall_factor=1.5", ["launch.stall_factor=1.5", "2", "0"]),
    ("compare.micro_batch_sizes=[]", ["compare.micro_batch_sizes=[]", "1", "compare.micro_batch_sizes=[1]"]),
    ("compare.micro_batch_sizes=[1,0]", ["compare.micro_batch_sizes=[1, 0]", "1", "compare.micro_batch_sizes=[1]"]),
    ("data.tokenizer=https://me:planted@host/set", ["data.tokenizer", "HF_TOKEN"]),
    ("data.tokenizer=bytes", ["data.tokenizer=bytes", "leave it out", "model.path"]),
    ("engine.offload_optimizer=true engine.zero_stage=0", ["engine.offload_optimizer=true", "engine.zero_stage=0", "1", "2", "3"]),
    ("engine.offload_parameters=true engine.zero_stage=2", ["engine.offload_parameters=true", "engine.zero_stage=3", "2"]),
    ("engine.train_batch_size=3 parallelism.data_degree=2", ["engine.train_batch_size=3", "2", "engine.micro_batch_size=1", "engine.train_batch_size=4"]),
    ("model.vocab_size=100", ["model.vocab_size=100", "257", "data.tokenizer"]),
    ("model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=4", "1", "2", "4"]),
    ("engine.dtype=fp16 engine.zero_stage=0", ["engine.dtype=fp16", "engine.zero_stage=0", "engine.zero_stage=1"]),
    ("profile_steps=[5,6]", ["profile_steps=[5, 6]", "profile=true"]),
    ("profile=true num_steps=3", ["profile=true", "4", "num_steps=3", "num_steps=4"]),
    ("profile_steps=[1,4]", ["profile_steps=[1, 4]", "profile_steps=[3,4]"]),
    ("profile_steps=[4,3]", ["profile_steps=[4, 3]", "profile_steps=[3,4]"]),
    ("profile_steps=[3]", ["profile_steps=[3]", "profile_steps=[3,4]"]),
    ("recipe=bench_attention memory_snapshot=true", ["memory_snapshot=true", "recipe=bench_attention", "recipe=pretrain", "recipe=forward"]),
    ("recipe=max_length profile=true", ["profile=true", "recipe=max_length", "recipe=pretrain", "recipe=forward"]),
    ("recipe=max_length data.preview=3", ["data.preview=3", "recipe=max_length", "recipe=pretrain", "recipe=forward"]),
    ("engine.train_batch_size=8 engine.gradient_accumulation_steps=2", ["engine.train_batch_size=8", "engine.gradient_accumulation_steps"]),
    ("parallelism.tensor_degree=2", ["parallelism.tensor_degree=2", "parallelism=tensor_pipeline", "+experiment=tp_pp"]),
    ("parallelism.pipeline_degree=2", ["parallelism.pipeline_degree=2", "parallelism=tensor_pipeline", "+experiment=tp_pp"]),
    ("recipe=forward evaluate.every_n_steps=9", ["evaluate.every_n_steps=9", "recipe=pretrain", "recipe=forward"]),
    ("evaluate.every_n_steps=9 evaluate.scoring=generate", ["evaluate.every_n_steps=9", "evaluate.scoring=generate", "recipe=evaluate"]),
    ("evaluate.every_n_steps=9 evaluate.context=64", ["evaluate.every_n_steps=9", "evaluate.context=64", "recipe=evaluate"]),
    ("evaluate.every_n_steps=9 evaluate.lengths=[512,4096]", ["evaluate.lengths=[512, 4096]", "4096", "data.sequence_length=2048", "recipe=evaluate"]),
    ("checkpoint.keep_best=true checkpoint.keep=0", ["checkpoint.keep_best=true", "checkpoint.keep=0", "checkpoint.keep=1"]),
    ("checkpoint.keep_best=true", ["checkpoint.keep_best=true", "evaluate.every_n_steps=50", "logging.validate_every_n_steps=50"]),
    ("data.stages=[[1,2048]]", ["data.stages=[[1, 2048]]", "data.stages='[[1,8192],[500,32768]]'"]),
    ("data.stages=[512,2048]", ["data.stages=[512, 2048]", "data.stages='[[1,8192],[500,32768]]'"]),
    ("data.stages=[[1,512],[9,2048.5]]", ["data.stages=[[1, 512], [9, 2048.5]]", "data.stages='[[1,8192],[500,32768]]'"]),
    ("data.stages=[[0,512],[9,2048]]", ["data.stages=[[0, 512], [9, 2048]]", "step 1"]),
    ("data.stages=[[1,512],[9,1024],[9,2048]]", ["data.stages=[[1, 512], [9, 1024], [9, 2048]]", "steps [1, 9, 9]"]),
    ("data.stages=[[1,2048],[9,2048]]", ["data.stages=[[1, 2048], [9, 2048]]", "lengths [2048, 2048]"]),
    ("data.stages=[[1,0],[9,2048]]", ["data.stages=[[1, 0], [9, 2048]]", "lengths [0, 2048]"]),
    ("data.stages=[[1,512],[9,4096]]", ["data.stages=[[1, 512], [9, 4096]]", "data.sequence_length=2048", "data.sequence_length=4096"]),
    ("data.stages=[[1,512],[9,2048]] data.long_documents=drop", ["data.stages=[[1, 512], [9, 2048]]", "data.long_documents=drop"]),
    ("data.stages=[[1,512],[9,2048]] recipe=forward", ["data.stages=[[1, 512], [9, 2048]]", "recipe=pretrain", "recipe=forward"]),
    ("data.stages=[[1,512],[9,2048]] num_steps=8", ["data.stages=[[1, 512], [9, 2048]]", "step 9", "num_steps=8", "num_steps=18"]),
    ("parallelism.ring_degree=3", ["parallelism.ring_degree=3", "4 ranks", "1", "2", "parallelism.ring_degree=4", "launch.num_ranks"]),
    ("parallelism.data_degree=8", ["parallelism.data_degree=8", "4 ranks", "1", "2", "parallelism.data_degree=4", "launch.num_ranks"]),
    ("parallelism.data_degree=1 parallelism.ring_degree=2", ["parallelism.data_degree=1", "parallelism.ring_degree=2", "2 ranks", "4", "launch.num_ranks=2"]),
    ("parallelism.ulysses_degree=2", ["attention=ring", "parallelism.ulysses_degree=2", "attention=hybrid"]),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "choices"), CHOICES)
def test_a_choice_that_is_not_known_is_refused_with_those_that_are(typed: str, choices: str):
    is_field = typed.partition("=")[0] in FIELDS
    names(mistake(typed, config_of=merged if is_field else compose), typed, *choices.split())


@pytest.mark.parametrize(("field", "value", "bounds"), BOUNDS)
def test_a_number_out_of_bounds_is_refused_and_its_bound_is_not(field: str, value: str, bounds: str):
    with refused(ConfigError, f"{field}={value}", *bounds.split()):
        merged(f"{field}={value}")
    merged(f"{field}={bounds.split()[0]}", *BESIDE.get(field, []))


@pytest.mark.parametrize(("typed", "parts"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_names_the_value_and_what_to_type(typed: str, parts: list[str]):
    names(mistake(*typed.split()), *parts)


@pytest.mark.parametrize(("typed", "parts"), MISTAKES_OF_FIELDS, ids=[typed for typed, _ in MISTAKES_OF_FIELDS])
def test_a_mistake_of_fields_names_the_values_and_what_to_type(typed: str, parts: list[str]):
    names(mistake(*typed.split(), config_of=merged), *parts)


def test_the_files_choose_the_defaults_of_the_schema():
    """So `merged` stands for a composition. The entries of a comparison are in a file alone."""
    assert merged() == replace(compose(), compare=CompareConfig())


@pytest.mark.parametrize("typed", ["nosuch=1", "+wandb.api_key=planted", "data=books"])
def test_what_is_like_nothing_else_gets_no_suggestion(typed: str):
    text = mistake(typed)
    assert "?" not in text
    assert not [field for field in FIELDS if is_named(text, field)]


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        ("model.hiden_size=3", ["model.hiden_size", "model.hidden_size", "python train.py --help"]),
        ("+experiment=rings", ["+experiment=rings", "+experiment=all_gather", "+experiment=weak_scaling"]),
        ("num_steps=0", ["num_steps=0", "1"]),
    ],
)
def test_a_mistake_in_a_comparison_names_the_entry(own: str, parts: list[str]):
    config = Config(compare=CompareConfig(entries={"mine": [own]}))
    initialized = hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF))
    with initialized, refused(ConfigError, "compare.entries.mine", *parts):
        compose_entries(config, [])


@pytest.mark.parametrize(
    ("typed", "swept"),
    [
        ("+sweep=lr_batch", ["optimizer.lr", "engine.train_batch_size"]),
        ("+sweep=lr_batch optimizer.lr=1e-3", ["engine.train_batch_size"]),
    ],
)
def test_a_sweep_without_m_names_the_swept_fields(typed: str, swept: list[str]):
    with refused(ConfigError, *swept, f"python train.py -m {typed}"):
        check_multirun(composed_for_hydra(*typed.split()))


@pytest.mark.parametrize("key", ["source", "name", "subset", "split", "text_field"])
def test_a_number_where_a_source_of_a_mixture_needs_text_is_refused(key: str):
    entry = {"source": "hub", "name": "owner/name", "weight": 1.0, key: 5}
    with refused(ConfigError, f"data.sources.a.{key}=5", f"{key}: '5'"):
        DataConfig(source="mixture", sources={"a": entry})


@pytest.mark.parametrize(
    ("from_wandb", "typed"),
    [
        ("engine.train_batch_size=8.0", "engine.train_batch_size=8"),
        ("num_steps=100.0", "num_steps=100"),
        ("parallelism.data_degree=None", "parallelism.data_degree=null"),
        ("logging.group=None", "logging.group=null"),
        # unchanged
        ("engine.train_batch_size=8.5", "engine.train_batch_size=8.5"),
        ("optimizer.lr=1.0", "optimizer.lr=1.0"),
        ("num_steps=None", "num_steps=None"),
        ("attention=None", "attention=None"),
        ("+experiment=ra_sp", "+experiment=ra_sp"),
        ("--help", "--help"),
    ],
)
def test_whole_numbers_and_none_of_wandb_agent_are_typed_as_hydra_wants_them(from_wandb, typed):
    assert as_hydra_types_it(from_wandb) == typed


def test_the_home_folder_may_be_typed_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    typed = as_hydra_types_it("data.token_store=~/stores")
    assert compose(typed).data.token_store == "/home/me/stores"
    assert as_hydra_types_it("data.files=texts/~/*.txt") == "data.files=texts/~/*.txt"


def test_files_that_are_typed_twice_are_refused():
    check_files_typed_once(["data.files=a.txt", "num_steps=3", "num_steps=4", "data.validation_files=b.txt"])
    with refused(ConfigError, "data.files=a.txt", "data.files=b.txt", "data.files=[a.txt,b.txt]"):
        check_files_typed_once(["data.files=a.txt", "data.files=b.txt"])


def test_settings_with_dashes_say_how_they_are_typed():
    check_flags(["--help", "--multirun", "-m", "--cfg", "job", "num_steps=20"])  # Hydra's own
    with refused(ConfigError, "--num_steps", "num_steps=VALUE"):
        check_flags(["+experiment=finetune", "--num_steps", "20"])
    with refused(ConfigError, "--optimizer.lr=1e-3", "optimizer.lr=1e-3"):
        check_flags(["--optimizer.lr=1e-3"])
    with refused(ConfigError, "--launch.num-ranks", "launch.num_ranks=VALUE"):
        check_flags(["--launch.num-ranks", "8"])
    with refused(ConfigError, "--explain", "explain=true"):
        check_flags(["--explain"])
    with refused(ConfigError, "learning_rate", "optimizer.lr=..."):
        check_flags(["--learning-rate=1e-3"])


def test_several_values_without_brackets_say_what_to_type():
    names(mistake("data.files=a.txt,b.txt"), "data.files=a.txt,b.txt", "data.files=[a.txt,b.txt]", "python train.py -m")


def test_an_empty_model_path_is_refused():
    names(mistake("+experiment=finetune", "model.path="), "model.path=FOLDER_OR_HUB_NAME")


def test_nested_parameters_of_a_wandb_sweep_name_the_fields_to_write():
    message = mistake("optimizer={'lr': 0.002, 'beta1': 0.8}")
    names(message, "optimizer={'lr': 0.002, 'beta1': 0.8}", "optimizer.lr", "optimizer.beta1", "YAML")


@pytest.mark.parametrize("name", ["engine.train_batch_size", "num_steps"])
def test_a_fraction_for_a_whole_number_is_an_error(name):
    names(mistake(as_hydra_types_it(f"{name}=8.5")), f"{name}=8.5")


def test_wandb_mode_is_one_of_wandbs(monkeypatch):
    assert get_args(get_type_hints(wandb.Settings)["mode"]) == WANDB_MODES
    monkeypatch.setenv("WANDB_MODE", "off")
    names(mistake(), "WANDB_MODE=off", *WANDB_MODES)
    compose("logging.wandb=disabled")  # which does not look at it
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    compose()


def test_one_run_may_set_all_fields_of_a_sweep():
    check_multirun(composed_for_hydra("+sweep=lr_batch", "optimizer.lr=1e-3", "engine.train_batch_size=8"))


def composed_for_hydra(*typed: str) -> Any:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("config", [*typed], return_hydra_config=True).hydra


@pytest.mark.parametrize(
    ("overrides", "degrees"),
    [
        ("", (1, 4, 1)),
        ("parallelism.ring_degree=2", (2, 2, 1)),
        ("parallelism.data_degree=4", (4, 1, 1)),
        ("attention=local", (4, 1, 1)),
        ("parallelism.data_degree=2 parallelism.ring_degree=2", (2, 2, 1)),
        ("attention=all_gather", (1, 4, 1)),
        ("attention=ulysses model.num_kv_heads=4", (1, 1, 4)),
        ("attention=ulysses parallelism.ulysses_degree=2", (2, 1, 2)),
        ("attention=ulysses parallelism.data_degree=2", (2, 1, 2)),
        ("attention=hybrid", (1, 2, 2)),
        ("attention=hybrid parallelism.ulysses_degree=1", (1, 4, 1)),
        ("attention=hybrid parallelism.ring_degree=2", (1, 2, 2)),
        ("attention=hybrid parallelism.data_degree=2", (2, 1, 2)),
        ("attention=hybrid model.num_kv_heads=4", (1, 1, 4)),
    ],
)
def test_unset_degrees_fill_the_ranks(overrides, degrees):
    assert resolve_degrees(compose(*overrides.split()), 4) == (*degrees, 1, 1)


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "degrees"),
    [
        (1, "", (1, 1, 1)),
        (2, "", (1, 2, 1)),
        (4, "", (1, 2, 2)),
        (8, "", (1, 4, 2)),
        (16, "", (1, 8, 2)),
        (16, "parallelism=tp8_pp2", (1, 8, 2)),
        (32, "parallelism=tp8_pp2", (2, 8, 2)),
        (16, "parallelism.data_degree=2", (2, 4, 2)),
        (4, "parallelism.data_degree=2", (2, 2, 1)),
        (8, "parallelism.tensor_degree=2", (4, 2, 1)),
        (8, "parallelism.pipeline_degree=1", (1, 8, 1)),
        (4, "parallelism.pipeline_degree=4", (1, 1, 4)),
        (4, "parallelism.tensor_degree=1 parallelism.data_degree=1", (1, 1, 4)),
    ],
)
def test_unset_tensor_and_pipeline_degrees_fill_the_ranks(num_ranks, overrides, degrees):
    config = compose("+experiment=tp_pp", "model=paper_10k", *overrides.split())
    data, tensor, pipeline = degrees
    assert resolve_degrees(config, num_ranks) == (data, 1, 1, tensor, pipeline)


def test_the_command_line_overrides_an_experiment():
    config = compose("+experiment=ra_sp", "model=llama_1b", "attention=local")
    assert (config.model.name, config.model.num_layers, config.attention.method) == ("llama_1b", 16, "local")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_chooses_options_and_sets_no_field_of_a_group(path):
    """If an experiment set a field, a later model=... on the command line could not change it."""
    content = yaml.safe_load(path.read_text())
    assert all(str(*entry).startswith("override /") for entry in content.pop("defaults"))
    groups = {name for name, value in OmegaConf.structured(Config).items() if OmegaConf.is_dict(value)}
    assert groups.isdisjoint(content)
    assert f"+experiment={path.stem}" in path.read_text().splitlines()[1]


OPTIONS = sorted({*CONF.glob("*/*.yaml")} - {*CONF.glob("clusters/*.yaml")})  # which `recipes.planning.cluster` reads


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_option_composes(path):
    group, option = path.parent.name, path.stem
    plus = "+" if group in ("experiment", "debug", "sweep") else ""
    needed = dict.fromkeys(("text_files", "jsonl", "parquet", "megatron", "chat"), "data.files=train.py")
    needed |= {"hub": "data.name=owner/name", "mixture": "data.sources={a: {source: stdlib, weight: 1}}"}
    needed |= dict.fromkeys(("huggingface", "finetune", "extend"), "model.path=FOLDER")
    extra = [needed[option]] if group != "workload" and option in needed else []
    config = compose(f"{plus}{group}={option}", *extra)
    assert group != "model" or config.model.name == option
