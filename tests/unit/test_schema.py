"""The configuration: the error for each mistake, and how groups, experiments and the command line combine."""

# ruff: noqa: E501 - a message is one line here, as it is on the console

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import pytest
import wandb
import yaml
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

import train  # registers the schema
from conf.compose import as_hydra_types_it, check_multirun, compose_entries, describe_error, to_config
from conf.degrees import accumulation_steps, resolve_degrees
from conf.schema import WANDB_MODES, CompareConfig, Config, ConfigError

CONF = Path(train.__file__).parent / "conf"
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))


def compose(*overrides: str) -> Config:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("config", list(overrides)))


def check_for_four_ranks(*overrides: str) -> None:
    config = compose(*overrides)
    accumulation_steps(config, resolve_degrees(config, 4))


def mistake(*overrides: str) -> str:
    """What `train.py` prints after "error: ", from the composition, the schema or the grid of 4 ranks."""
    with pytest.raises((CompactHydraException, ConfigError)) as caught:
        check_for_four_ranks(*overrides)
    error = caught.value
    return str(error) if isinstance(error, ConfigError) else describe_error(error)


MISTAKES = [
    # Hydra's. "..." stands for any words between the value, the rule and what to type.
    ("attention.block=cudnn", "attention.block is now attention.kernel: type attention.kernel=cudnn"),
    ("+attention.block=cudnn", "attention.block is now attention.kernel: type attention.kernel=cudnn"),
    ("attention={block:cudnn}", "attention.block is now attention.kernel: type attention.kernel=..."),
    ("compare.fit=true", "compare.fit is now compare.downscale: type compare.downscale=true"),
    ("parallelism.sequence_sharded_norms=false", "parallelism.sequence_sharded_norms no longer exists: leave it out ..."),
    ("+data.sequence_lenght=8", "there is no field data.sequence_lenght: did you mean data.sequence_length? python train.py --help lists all"),
    ("+wandb.api_key=planted", "there is no field wandb.api_key: python train.py --help lists all"),
    ("engine.zerostage=2", "there is no field engine.zerostage: did you mean engine.zero_stage? python train.py --help lists all"),
    ("engine.batch_size=2", "there is no field engine.batch_size: did you mean engine.train_batch_size or engine.micro_batch_size? ..."),
    ("+experiment=rasp", "+experiment=rasp is not known: did you mean ra_sp? use +experiment=all_gather, ... +experiment=ra_sp, ..."),
    ("data=hubb", "data=hubb is not known: did you mean hub? use data=hub, data=stdlib, data=text_files"),
    ("+experiment=[rasp]", "+experiment=rasp is not known: did you mean ra_sp? use +experiment=all_gather, ... +experiment=ra_sp, ..."),
    ("data=hub data.name=json data.files=x.jsonl", "data.files=x.jsonl needs data=text_files, but this is data=hub ..."),
    ("data.text_field=messages", "data.text_field=messages needs data=hub, but this is data=stdlib ..."),
    ("data=text_files data.files=[train.py] data.name=x", "data.name=x needs data=hub, but this is data=text_files ..."),
    ("+model.pretrained=x", "there is no field model.pretrained: ... random weights ... README ..."),
    ("data.tokenizer=x", "there is no field data.tokenizer: ... bytes ... docs/data.md"),
    ("data.pack_documents=true", "there is no field data.pack_documents: ... docs/data.md"),
    ("logging.tensorboard=true", "there is no field logging.tensorboard: ... wandb ... metrics.jsonl"),
    ("+learning_rate=1e-3", "there is no field learning_rate: type optimizer.lr=..."),
    ("model=meta-llama/Llama-3.2-1B", "model=meta-llama/Llama-3.2-1B is not known: use model=llama_1b, ... model=tiny"),
    ("recipe=evaluate", "recipe=evaluate is not known: use pretrain, forward, compare, bench_attention, max_length"),
    ("nosuch=1", "there is no field nosuch: python train.py --help lists all"),
    ("model.num_layers=2.5", "model.num_layers=2.5 is refused: Value '2.5' of type 'float' could not be converted to Integer"),
    ("explain=maybe", "explain=maybe is refused: Value 'maybe' is not a valid bool (type str)"),
    ("optimizer.lr=fast", "optimizer.lr=fast is refused: Value 'fast' of type 'str' could not be converted to Float"),
    ("data=books", "data=books is not known: use data=hub, data=stdlib, data=text_files"),
    ("+debug=slow", "+debug=slow is not known: use +debug=anomaly, +debug=deterministic, +debug=overfit, +debug=profile"),
    ("engine=zero", "engine has no options ... engine.FIELD=value"),
    ("+model=llama_1b", "model is chosen twice ... model=OPTION, without a plus"),
    ("experiment=ra_sp", "Could not override 'experiment' ... use +experiment=ra_sp"),
    ("+experiment=tp_pp +experiment=dp", "experiment is chosen twice ... +experiment=[ONE,OTHER]"),
    ("workload=paper", "workload=paper is not known: use workload=layers_8b, workload=paper_100k, workload=paper_10k"),
    ("+workload=paper_10k", "workload is chosen twice ... workload=OPTION, without a plus"),
    ("optimizer.lr=1e-3,3e-3", "Ambiguous value ... optimizer.lr=1e-3,3e-3 ... key=[value1,value2] ... --multirun ..."),
    ("num_steps=${steps}", "num_steps is refused: Interpolation key 'steps' not found"),
    ("num_steps", "num_steps is not of the form field=value (missing EQUAL at '<EOF>') ... quote ... \"data.files=['a.txt','b.txt']\""),
    ("+sweep=lr", "+sweep=lr is not known: use +sweep=kernels, +sweep=lr_batch, +sweep=search, +sweep=throughput"),
    ("sweep=lr_batch", "Could not override 'sweep' ... use +sweep=lr_batch"),
    ("~num_stepz", "Could not delete ... 'num_stepz' does not exist ..."),
    ("profile_steps={a:1}", "profile_steps={a:1} is refused: Cannot merge DictConfig with ListConfig"),
    ("num_steps=null", "num_steps=null is refused: field 'num_steps' is not Optional"),
    ("+experiment=[ra_sp,nosuch]", "+experiment=nosuch is not known: use +experiment=all_gather, ... +experiment=weak_scaling"),
    ("+nosuch@model=x", "Override +nosuch@model=x ... 'nosuch' does not exist ..."),
    # one field
    ("sweep.objective=loss", "sweep.objective=loss is not known: use validation_loss, tokens_per_s, model_tflops_per_rank"),
    ("sweep.sampler=random", "sweep.sampler=random is not known: use tpe, grid"),
    ("sweep.num_trials=0", "sweep.num_trials=0 must be at least 1"),
    ("sweep.num_parallel=0", "sweep.num_parallel=0 must be at least 1"),
    ("model.mlp=relu", "model.mlp=relu is not known: use swiglu, gelu"),
    ("model.norm=batchnorm", "model.norm=batchnorm is not known: use rmsnorm, layernorm"),
    ("model.num_layers=0", "model.num_layers=0 must be at least 1"),
    ("model.vocab_size=256", "model.vocab_size=256 must be at least 257"),
    ("model.head_dim=33", "model.head_dim=33 must be even ..."),
    ("attention.method=star", "attention.method=star is not known: use ring, ulysses, hybrid, all_gather, local, auto"),
    ("attention.layout=striped", "attention.layout=striped is not known: use zigzag, contiguous"),
    ("attention.transport=tcp", "attention.transport=tcp is not known: use auto, p2p, copy_engine"),
    ("attention.kernel=fast", "attention.kernel=fast is not known: use auto, flash_attn_4, ffpa, cudnn, aten_flash, mem_efficient, cpu_flash, reference"),
    ("engine.dtype=int8", "engine.dtype=int8 is not known: use bf16, fp16, fp32"),
    ("engine.recompute=some", "engine.recompute=some is not known: use none, selective, full"),
    ("engine.offload_activations=true", "engine.offload_activations=true needs recomputation: use engine.recompute=selective, or full"),
    ("engine.offload_optimizer=true engine.zero_stage=0", "engine.offload_optimizer=true cannot go with engine.zero_stage=0: use 1, 2 or 3"),
    ("engine.offload_parameters=true engine.zero_stage=2", "engine.offload_parameters=true needs engine.zero_stage=3, not stage 2"),
    ("engine.tile_tokens=-1", "engine.tile_tokens=-1 must be at least 0"),
    ("engine.zero_stage=4", "engine.zero_stage=4 is not known: use 0, 1, 2, 3"),
    ("engine.micro_batch_size=0", "engine.micro_batch_size=0 must be at least 1"),
    ("engine.gradient_clipping=-1", "engine.gradient_clipping=-1.0 must be at least 0"),
    ("optimizer.lr=nan", "optimizer.lr=nan must be at least 0"),
    ("optimizer.lr=inf", "optimizer.lr=inf must be at least 0 and below inf"),
    ("optimizer.beta2=1", "optimizer.beta2=1.0 must be at least 0 and below 1"),
    ("optimizer.min_lr_ratio=2", "optimizer.min_lr_ratio=2.0 must be at most 1"),
    ("optimizer.decay=step", "optimizer.decay=step is not known: use cosine, linear, constant"),
    ("data.sequence_length=0", "data.sequence_length=0 must be at least 1"),
    ("data.validation_sequences=0", "data.validation_sequences=0 must be at least 1"),
    ("logging.wandb=yes", "logging.wandb=yes is not known: use auto, online, offline, disabled"),
    ("logging.every_n_steps=0", "logging.every_n_steps=0 must be at least 1"),
    ("launch.num_ranks=0", "launch.num_ranks=0 must be at least 1"),
    ("launch.stall_s=0", "launch.stall_s=0.0 must be at least 1"),
    ("launch.stall_factor=-1", "launch.stall_factor=-1.0 must be at least 0"),
    ("launch.stall_factor=1.5", "launch.stall_factor=1.5 must be at least 2, or 0 to switch it off"),
    ("engine.on_bad_step=retry", "engine.on_bad_step=retry is not known: use stop, skip"),
    ("launch.timeout_s=inf", "launch.timeout_s=inf must be at least 1 and below inf"),
    ("parallelism.data_degree=0", "parallelism.data_degree=0 must be at least 1"),
    ("num_steps=0", "num_steps=0 must be at least 1"),
    ("recipe=bake", "recipe=bake is not known: use pretrain, forward, compare, bench_attention, max_length"),
    ("parallelism.method=expert", "parallelism.method=expert is not known: use sequence, tensor_pipeline"),
    ("engine.train_batch_size=0", "engine.train_batch_size=0 must be at least 1"),
    ("max_length.memory_gib=0", "max_length.memory_gib=0.0 must be at least 0.001"),
    ("max_length.confirm_s=-1", "max_length.confirm_s=-1.0 must be at least 0"),
    ("compare.recipe=x", "compare.recipe=x is not known: use forward, pretrain"),
    ("compare.rounds=0", "compare.rounds=0 must be at least 1"),
    ("compare.steps_per_round=0", "compare.steps_per_round=0 must be at least 1"),
    ("compare.step_time_s=inf", "compare.step_time_s=inf must be at least 1 and below inf"),
    ("compare.micro_batch_sizes=[]", "compare.micro_batch_sizes=[] must be numbers of at least 1: use compare.micro_batch_sizes=[1]"),
    ("compare.micro_batch_sizes=[1,0]", "compare.micro_batch_sizes=[1, 0] must be numbers of at least 1: use compare.micro_batch_sizes=[1]"),
    ("model.hidden_size=0", "model.hidden_size=0 must be at least 1"),
    ("parallelism.ring_degree=0", "parallelism.ring_degree=0 must be at least 1"),
    ("parallelism.ulysses_degree=0", "parallelism.ulysses_degree=0 must be at least 1"),
    ("parallelism.tensor_degree=0", "parallelism.tensor_degree=0 must be at least 1"),
    ("parallelism.pipeline_degree=0", "parallelism.pipeline_degree=0 must be at least 1"),
    ("model.num_heads=0", "model.num_heads=0 must be at least 1"),
    ("model.num_kv_heads=0", "model.num_kv_heads=0 must be at least 1"),
    ("model.head_dim=0", "model.head_dim=0 must be at least 1"),
    ("model.mlp_size=0", "model.mlp_size=0 must be at least 1"),
    ("engine.gradient_accumulation_steps=0", "engine.gradient_accumulation_steps=0 must be at least 1"),
    ("model.norm_eps=-1", "model.norm_eps=-1.0 must be at least 0"),
    ("model.init_std=-1", "model.init_std=-1.0 must be at least 0"),
    ("optimizer.eps=-1", "optimizer.eps=-1.0 must be at least 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0 must be at least 0"),
    ("model.rope_theta=0", "model.rope_theta=0.0 must be at least 1"),
    ("logging.validate_every_n_steps=-1", "logging.validate_every_n_steps=-1 must be at least 0"),
    ("checkpoint.every_n_steps=-1", "checkpoint.every_n_steps=-1 must be at least 0"),
    ("checkpoint.keep=-1", "checkpoint.keep=-1 must be at least 0"),
    ("optimizer.beta1=1", "optimizer.beta1=1.0 must be at least 0 and below 1"),
    ("optimizer.warmup_fraction=1", "optimizer.warmup_fraction=1.0 must be at least 0 and below 1"),
    ("attention.inter_host_gb_per_s=inf", "attention.inter_host_gb_per_s=inf must be at least 0.001 and below inf"),
    ("data.source=disk", "data.source=disk is not known: use stdlib, text_files, hub"),
    ("profile_steps=[5,6]", "profile_steps=[5, 6] ... profile=true ..."),
    ("engine.train_batch_size=3 parallelism.data_degree=2", "engine.train_batch_size=3 is no multiple of 2 data ranks x engine.micro_batch_size=1 ... use engine.train_batch_size=4"),
    ("data=hub data.name=https://me:planted@host/set", "data.name is a URL with a login ... HF_TOKEN ..."),
    ("data=text_files data.files=https://me:planted@host/set", "data.files is a URL with a login ... HF_TOKEN ..."),
    # several fields
    ("model.num_kv_heads=3", "model.num_kv_heads=3 does not divide model.num_heads=4: use 1, 2 or 4"),
    ("engine.dtype=fp16 engine.zero_stage=0", "engine.dtype=fp16 cannot go with engine.zero_stage=0 ... use engine.zero_stage=1"),
    ("profile=true num_steps=3", "profile=true records step 4, but num_steps=3: use num_steps=4"),
    ("profile_steps=[1,4]", "profile_steps=[1, 4] must be the first and the last step ... use profile_steps=[3,4]"),
    ("profile_steps=[4,3]", "profile_steps=[4, 3] must be the first and the last step ... use profile_steps=[3,4]"),
    ("profile_steps=[3]", "profile_steps=[3] must be the first and the last step ... use profile_steps=[3,4]"),
    ("recipe=bench_attention memory_snapshot=true", "memory_snapshot=true needs recipe=pretrain or recipe=forward, not recipe=bench_attention"),
    ("recipe=max_length profile=true", "profile=true needs recipe=pretrain or recipe=forward, not recipe=max_length"),
    ("recipe=max_length attention=auto", "attention=auto ... recipe=max_length needs attention=ring"),
    ("recipe=max_length +experiment=tp_pp", "recipe=max_length does not predict tensor and pipeline ranks: use +experiment=ra_sp"),
    ("data=hub", "data=hub needs a data set: data.name=OWNER/NAME or a local folder"),
    ("compare.only=[dp,nosuch]", "compare.only=nosuch is no entry: use tp_pp, tp, pp, ra_sp, ulysses, hybrid, all_gather, dp"),
    ("compare.baseline=nosuch", "compare.baseline=nosuch is no entry: use tp_pp, tp, pp, ra_sp, ulysses, hybrid, all_gather, dp"),
    ("recipe=compare compare.only=dp", "compare.only=dp must be a list: type compare.only=[dp]"),
    ("recipe=compare compare.entries.mine=['+experiment=dp']", "compare.entries.mine ... needs a plus: type +compare.entries.mine=['+experiment=dp']"),
    ("recipe=compare +compare.entries.mine=[+experiment=dp]", "+compare.entries.mine=[+experiment=dp] is not of the form field=value (no viable alternative at input '[+experiment=') ... \"+compare.entries.mine=['+experiment=dp','engine.zero_stage=2']\""),
    ("recipe=compare ~compare", "recipe=compare has nothing to compare: type recipe=compare +experiment=paper_table"),
    ("recipe=compare ~compare compare.baseline=dp", "recipe=compare has nothing to compare: type recipe=compare +experiment=paper_table"),
    ("engine.train_batch_size=8 engine.gradient_accumulation_steps=2", "engine.train_batch_size=8 sets engine.gradient_accumulation_steps: omit it"),
    ("parallelism.tensor_degree=2", "parallelism.tensor_degree=2 needs parallelism=tensor_pipeline: +experiment=tp_pp"),
    ("parallelism.pipeline_degree=2", "parallelism.pipeline_degree=2 needs parallelism=tensor_pipeline: +experiment=tp_pp"),
    ("data=text_files", "data=text_files needs files: data.files='texts/*.txt' or data.files=[a.txt,b.txt]"),
    ("data=text_files data.files=[]", "data=text_files needs files: data.files='texts/*.txt' or data.files=[a.txt,b.txt]"),
    ("data=text_files data.files=/no/*.txt", "data.files=/no/*.txt matches no file ... give a path or a glob"),
    # on 4 ranks
    ("parallelism.ring_degree=3", "parallelism.ring_degree=3 does not divide the 4 ranks: use 1, 2 or 4, such as parallelism.ring_degree=4, or another launch.num_ranks"),
    ("parallelism.data_degree=8", "parallelism.data_degree=8 does not divide the 4 ranks: use 1, 2 or 4, such as parallelism.data_degree=4, or another launch.num_ranks"),
    ("parallelism.data_degree=1 parallelism.ring_degree=2", "parallelism.data_degree=1 x parallelism.ring_degree=2 is 2 ranks, but there are 4 ... unset ... launch.num_ranks=2"),
    ("attention=ulysses", "attention=ulysses with parallelism.ulysses_degree=4 does not fit model.num_kv_heads=2 ... attention=hybrid ... model.num_kv_heads=4 ... parallelism.ulysses_degree=2 ... attention=ring ..."),
    ("attention=hybrid parallelism.ulysses_degree=4", "attention=hybrid with parallelism.ulysses_degree=4 does not fit model.num_kv_heads=2 ... model.num_kv_heads=4 ... parallelism.ulysses_degree=2 ... attention=ring ..."),
    ("parallelism.ulysses_degree=2", "attention=ring has no ulysses ranks ... leave out parallelism.ulysses_degree=2 ... attention=hybrid"),
    ("attention=ulysses parallelism.ring_degree=2", "attention=ulysses has no ring ranks ... leave out parallelism.ring_degree=2 ... attention=hybrid"),
    ("attention=hybrid parallelism.data_degree=4 parallelism.ring_degree=4", "parallelism.data_degree=4 x parallelism.ring_degree=4 is 16 ranks, but there are 4 ... launch.num_ranks=16"),
    ("attention=auto parallelism.ulysses_degree=2", "attention=auto chooses degrees ... leave out parallelism.ulysses_degree=2 ... attention=hybrid"),
    ("attention.intra_host_gb_per_s=0", "attention.intra_host_gb_per_s=0.0 must be at least 0.001"),
    ("attention=local parallelism.ulysses_degree=2", "attention=local has no ulysses ranks ... leave out parallelism.ulysses_degree=2 ... attention=ulysses"),
    ("attention=hybrid parallelism.data_degree=4 parallelism.ulysses_degree=2", "parallelism.data_degree=4 x parallelism.ulysses_degree=2 is 8 ranks, but there are 4 ... launch.num_ranks=8"),
    ("attention=local parallelism.ring_degree=2", "attention=local has no ring ranks ... leave out parallelism.ring_degree=2 ... attention=ring"),
    ("+experiment=tp_pp engine.zero_stage=3", "engine.zero_stage=3 cannot go with parallelism=tensor_pipeline ... use engine.zero_stage=1"),
    ("+experiment=tp_pp engine.recompute=full", "engine.recompute=full cannot go with parallelism=tensor_pipeline ... use engine.recompute=none"),
    ("+experiment=tp_pp engine.offload_optimizer=true", "engine.offload_optimizer=true cannot go with parallelism=tensor_pipeline ... use engine.offload_optimizer=false"),
    ("+experiment=tp_pp engine.tile_tokens=64", "engine.tile_tokens=64 cannot go with parallelism=tensor_pipeline ... use engine.tile_tokens=0"),
    ("+experiment=tp_pp attention=ring", "attention=ring cannot go with parallelism=tensor_pipeline ... use attention=local"),
    ("+experiment=tp_pp parallelism.ring_degree=2", "parallelism.ring_degree=2 cannot go with parallelism=tensor_pipeline ... parallelism.ring_degree=1"),
    ("+experiment=tp_pp parallelism.ulysses_degree=4", "parallelism.ulysses_degree=4 cannot go with parallelism=tensor_pipeline ... parallelism.ulysses_degree=1"),
    ("+experiment=tp_pp parallelism.tensor_degree=4", "parallelism.tensor_degree=4 does not divide model.num_kv_heads=2 ... parallelism.tensor_degree=2 ... +experiment=ra_sp ..."),
    ("+experiment=tp_pp parallelism.tensor_degree=4 model.num_kv_heads=4 model.mlp_size=386", "parallelism.tensor_degree=4 does not divide model.mlp_size=386 ... parallelism.tensor_degree=2 ... +experiment=ra_sp ..."),
    ("+experiment=tp_pp parallelism.pipeline_degree=4", "parallelism.pipeline_degree=4 is more than model.num_layers=2 ... use parallelism.pipeline_degree=2"),
    ("+experiment=tp_pp parallelism=tp8_pp2", "parallelism.tensor_degree=8 does not divide the 4 ranks: use 1, 2 or 4, such as parallelism.tensor_degree=4, or another launch.num_ranks"),
    ("+experiment=tp_pp parallelism.tensor_degree=2 parallelism.pipeline_degree=1 parallelism.data_degree=1", "parallelism.data_degree=1 x parallelism.tensor_degree=2 x parallelism.pipeline_degree=1 is 2 ranks, but there are 4 ... launch.num_ranks=2"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_mistake_names_the_value_the_rule_and_what_to_type(overrides, message):
    assert matches(message, mistake(*overrides.split()))


def matches(message: str, text: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in re.split(r" ?\.\.\. ?", message))
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("model.hiden_size=3", "there is no field model.hiden_size: did you mean model.hidden_size? python train.py --help lists all"),
        ("+experiment=rings", "+experiment=rings is not known: use +experiment=all_gather, ... +experiment=weak_scaling"),
        ("num_steps=0", "num_steps=0 must be at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_comparison_names_the_entry(own, message):
    config = Config(compare=CompareConfig(entries={"mine": [own]}))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)), pytest.raises(ConfigError) as caught:
        compose_entries(config, [])
    assert matches(f"compare.entries.mine: {message}", str(caught.value))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["+sweep=lr_batch"], "optimizer.lr and engine.train_batch_size would be swept: type python train.py -m +sweep=lr_batch"),
        (["+sweep=lr_batch", "optimizer.lr=1e-3"], "engine.train_batch_size would be swept: type python train.py -m +sweep=lr_batch optimizer.lr=1e-3"),
    ],
)  # fmt: skip
def test_a_sweep_without_m_names_the_swept_fields(typed, message):
    with pytest.raises(ConfigError) as caught:
        check_multirun(composed_for_hydra(*typed))
    assert str(caught.value) == f"this is one run, but {message}"


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


def test_nested_parameters_of_a_wandb_sweep_name_the_fields_to_write():
    message = mistake("optimizer={'lr': 0.002, 'beta1': 0.8}")
    assert message.startswith("optimizer={'lr': 0.002, 'beta1': 0.8} ")
    assert "write optimizer.lr and optimizer.beta1, in a sweep's YAML" in message


@pytest.mark.parametrize("name", ["engine.train_batch_size", "num_steps"])
def test_a_fraction_for_a_whole_number_is_an_error(name):
    assert mistake(as_hydra_types_it(f"{name}=8.5")).startswith(f"{name}=8.5 is refused: ")


def test_wandb_mode_is_one_of_wandbs(monkeypatch):
    assert get_args(get_type_hints(wandb.Settings)["mode"]) == WANDB_MODES
    monkeypatch.setenv("WANDB_MODE", "off")
    assert mistake() == f"WANDB_MODE=off is no mode of wandb: use {', '.join(WANDB_MODES)}, or unset it"
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


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_option_composes(path):
    group, option = path.parent.name, path.stem
    plus = "+" if group in ("experiment", "debug", "sweep") else ""
    extra = {"text_files": ["data.files=train.py"], "hub": ["data.name=owner/name"]}.get(option, [])
    config = compose(f"{plus}{group}={option}", *extra)
    assert group != "model" or config.model.name == option
