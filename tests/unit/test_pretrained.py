"""What model.path, model.rope and lora refuse before ranks start, each in one line, and what model.rope changes."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import CausalLMOutput

from conf.degrees import resolve_degrees
from conf.schema import AttentionConfig, Config, ConfigError, DataConfig, LaunchConfig, LoraConfig, ModelConfig
from data.corpus import open_corpus
from recipes.model.pretrained import _check_head, model_config, resolve
from tests.errors import names, refused
from tests.families import FAMILIES, tiny_config, tiny_model

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"


def refusal(model: ModelConfig, lora: LoraConfig | None = None) -> str:
    """The one line of the error."""
    with pytest.raises(ConfigError) as caught:
        resolve(Config(model=model, lora=lora or LoraConfig()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(**changes: Any) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut_off(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    sorted(folder.glob("model-*"))[1].unlink()


def break_the_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text("[]")


def make_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


# what happens to a good folder; what the error names beside model.path
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["config.json", "save_pretrained"]),
    "an adapter": (make_an_adapter, ["adapter", "python -m recipes.export", "--merge"]),
    "no folder": (shutil.rmtree, ["folder", "config.json", "OWNER/NAME"]),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{no"), ["config.json", "JSON", "download"]),
    "no JSON object": (lambda folder: (folder / "config.json").write_text("[1]"), ["config.json", "JSON"]),
    "a wrong value": (edit_config(num_attention_heads="four"), ["num_attention_heads", "four"]),
    "an unknown kind": (edit_config(model_type="nonsense"), ["nonsense"]),
    "cut off": (cut_off, [WEIGHTS, "cut off", "download"]),
    "a cut off header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x10"), [WEIGHTS, "cut off"]),
    "a missing shard": (lose_a_shard, ["model-00002-of-00004.safetensors", "missing", "download"]),
    "a broken index": (break_the_index, [f"{WEIGHTS}.index.json", "download"]),
    "only .bin": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        [WEIGHTS, "pytorch_model.bin", "save_pretrained"],
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS, "missing"]),
    "fewer layers than described": (edit_config(num_hidden_layers=5), ["1,311,872", "1,508,736"]),
    "quantized": (edit_config(quantization_config={"quant_method": "fp8"}), ["fp8", "bf16"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused(tmp_path: Path, tiny_llama: Path, case: str):
    damage, parts = DAMAGES[case]
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    damage(folder)
    names(refusal(ModelConfig(path=str(folder))), f"model.path={folder}", *parts)


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "plan", "cluster": "8xh200"},
        {"explain": True, "explain_gpu": "h100", "launch": LaunchConfig(num_ranks=8)},
    ],
    ids=["plan", "explain_gpu"],
)
def test_what_is_not_here_needs_no_weights(tmp_path: Path, tiny_llama: Path, settings: dict[str, Any]):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / WEIGHTS).unlink()
    whole, planned = (resolve(Config(model=ModelConfig(path=str(path)), **settings)) for path in (tiny_llama, folder))
    assert planned.model.num_weights == whole.model.num_weights == 1_311_872
    shutil.rmtree(folder)
    with refused(ConfigError, f"model.path={folder}", "config.json"):
        resolve(Config(model=ModelConfig(path=str(folder)), **settings))


def test_a_file_is_no_folder(tiny_llama: Path):
    path = tiny_llama / WEIGHTS
    names(refusal(ModelConfig(path=str(path))), f"model.path={path}", "folder")


ARCHITECTURES: dict[str, tuple[str, str, list[str]]] = {  # model type, class, what the error names
    "BERT": ("bert", "BertForMaskedLM", ["BertForMaskedLM", "ForCausalLM"]),
    "BERT without a class": ("bert", "", ["BertLMHeadModel", "causal"]),
    "T5": ("t5", "T5ForConditionalGeneration", ["T5ForConditionalGeneration", "ForCausalLM"]),
    "images": ("gemma3", "Gemma3ForConditionalGeneration", ["Gemma3ForConditionalGeneration", "ForCausalLM"]),
    "GPT-2": ("gpt2", "GPT2LMHeadModel", ["GPT2LMHeadModel", "ForCausalLM"]),
    "state spaces": ("mamba", "MambaForCausalLM", ["layers 0, 1", "linear_attention", "Conv1d"]),
    "linear attention": ("qwen3_next", "Qwen3NextForCausalLM", ["layers 0, 1, 2", "linear_attention", "Conv1d"]),
    "chunks": ("llama4_text", "Llama4ForCausalLM", ["layers 0, 1, 2", "chunked_attention"]),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_architecture_that_would_not_be_exact_is_refused(tmp_path: Path, tiny_llama: Path, case: str):
    model_type, architecture, parts = ARCHITECTURES[case]
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    settings: dict[str, Any] = {"architectures": [architecture] if architecture else None}
    if model_type not in ("t5", "gemma3"):
        settings["num_hidden_layers"] = 2 if model_type == "mamba" else 4
    transformers.AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    text = refusal(ModelConfig(path=str(folder)))
    names(text, f"model.path={folder}", *parts)
    assert text.count("Conv1d") <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_folder_of_every_family_is_accepted(tmp_path: Path, family: str):
    tiny_model(family, "eager", torch.bfloat16).save_pretrained(tmp_path)
    resolved = resolve(Config(model=ModelConfig(path=str(tmp_path))))
    assert resolved.model.num_layers == 2
    assert resolved.data.tokenizer == str(tmp_path)


def test_a_gated_model_says_how_to_be_let_in(monkeypatch: pytest.MonkeyPatch):
    response: Any = type("Response", (), {"headers": {}, "request": None})()

    def gated(*_: Any, **__: Any) -> None:
        try:
            raise GatedRepoError("403 Client Error", response=response)
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it") from error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    names(refusal(ModelConfig(path="owner/gated")), "model.path=owner/gated", "gated", "HF_TOKEN")


@pytest.mark.parametrize("offline", [False, True])
def test_an_unknown_name_of_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch, offline: bool):
    def unknown(*_: Any, **__: Any) -> None:
        raise RuntimeError("404 Client Error\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if offline:
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError))
    text = refusal(ModelConfig(path="nobody/nothing"))
    names(text, "model.path=nobody/nothing", "config.json", "OWNER/NAME")
    assert ("Repository Not Found" in text) != offline


def test_another_version_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path):
    version = importlib.metadata.version
    other = {"transformers": "4.57.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or version(name))
    names(refusal(ModelConfig(path=str(tiny_llama))), "transformers 4.57.1", "5.17")


ROPES: list[tuple[Any, list[Any]]] = [
    ("yarn", ["model.rope=yarn", "{rope_type:yarn,factor:4}"]),
    ({}, ["model.rope={}", "{rope_type:yarn,factor:4}"]),
    ({"rope_type": "nonsense"}, ["rope_type=nonsense", "yarn", "llama3"]),
    ({"rope_type": "yarn"}, ["model.rope", "factor"]),
    ({"rope_type": "llama3", "factor": 4}, ["low_freq_factor", "high_freq_factor"]),
    ({"factor": 4}, ["model.rope", "factor", "default"]),
    ({"rope_type": "yarn", "factor": "four"}, ["factor=four", 1]),
    ({"rope_type": "yarn", "factor": 0.5}, ["factor=0.5", 1]),
    ({"rope_type": "yarn", "factor": 4, "beta": 1}, ["beta"]),
]


@pytest.mark.parametrize(("rope", "parts"), ROPES)
def test_wrong_rotary_embeddings_are_refused(tiny_llama: Path, capfd: Any, rope: Any, parts: list[Any]):
    names(refusal(ModelConfig(path=str(tiny_llama), rope=rope)), *parts)
    assert capfd.readouterr().err == ""


def test_a_head_that_gets_something_else_is_refused():
    model: Any = transformers.LlamaForCausalLM(tiny_config("llama"))
    _check_head(model)

    def forward(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **kwargs).last_hidden_state / 2))

    model.__class__ = type("ScaledLlama", (transformers.LlamaForCausalLM,), {"forward": forward})
    with refused(ValueError, "head", "layers' output"):
        _check_head(model)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("phi", {}, ["bias=True", "without bias"]),
        ("opt", {"dropout": 0.0}, ["decoder"]),
        # another head_dim in each kind of layer
        ("gemma4_text", {"vocab_size_per_layer_input": 96}, ["config.json", "head_dim"]),
    ],
)
def test_a_head_or_a_shape_that_is_not_supported_is_refused(tmp_path: Path, family: str, changes: Any, words: Any):
    tiny_model(family, "eager", **changes).save_pretrained(tmp_path)
    names(refusal(ModelConfig(path=str(tmp_path))), f"model.path={tmp_path}", *words)


def test_layers_with_rotary_embeddings_by_kind_need_the_kind(tmp_path: Path):
    config = tiny_config("gemma3_text")
    config.save_pretrained(tmp_path)
    with refused(ValueError, "full_attention", "sliding_attention", "KIND"):
        model_config(ModelConfig(path=str(tmp_path), rope={"rope_type": "linear", "factor": 8}))
    rope = {"full_attention": {"rope_type": "linear", "factor": 8}}
    changed = model_config(ModelConfig(path=str(tmp_path), rope=rope))
    assert changed.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8}
    assert changed.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert changed.max_position_embeddings == 8 * config.max_position_embeddings


@pytest.mark.parametrize(
    ("family", "rope", "expected", "length"),
    [
        ("qwen3", {"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}, 512),
        (
            "qwen3",
            {"rope_type": "yarn", "factor": 4},
            {"rope_type": "yarn", "factor": 4, "rope_theta": 1e4, "original_max_position_embeddings": 512},
            2048,
        ),
        # stretched already: from the length that it was trained with
        ("ministral3", {"factor": 16}, {"rope_type": "yarn", "factor": 16, "beta_fast": 32.0}, 16 * 64),
        ("llama", {"rope_type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}, 1024),
        # frequencies change beyond max_position_embeddings, which must stay
        ("qwen3", {"rope_type": "dynamic", "factor": 4}, {"rope_type": "dynamic", "factor": 4, "rope_theta": 1e4}, 512),
    ],
)
def test_rotary_embeddings_change_as_in_config_json(tmp_path: Path, family: str, rope, expected, length: int):
    tiny_config(family).save_pretrained(tmp_path)
    changed = model_config(ModelConfig(path=str(tmp_path), rope=rope))
    assert changed.rope_parameters == changed.rope_parameters | expected
    assert changed.max_position_embeddings == length
    if "rope_type" in rope:
        assert changed.rope_parameters == expected


def test_a_shape_beside_model_path_is_refused(tiny_llama: Path):
    with refused(ConfigError, "model.num_layers=4", f"model.path={tiny_llama}"):
        ModelConfig(path=str(tiny_llama), num_layers=4)


def test_lora_needs_a_model():
    with refused(ConfigError, "lora.rank=8", "model.path=FOLDER_OR_HUB_NAME"):
        Config(lora=LoraConfig(rank=8))


@pytest.mark.parametrize("targets", [["nothing"], ["q_proj", "nothing"], ["lm_head", "nothing"]])
def test_lora_targets_must_match(tiny_llama: Path, targets: list[str]):
    text = refusal(ModelConfig(path=str(tiny_llama)), LoraConfig(rank=4, target_modules=targets))
    names(text, "nothing", "q_proj", "up_proj", "lora.target_modules=[down_proj]")


@pytest.mark.parametrize(("rank", "targets"), [(4, "q_proj"), (4, []), (4, [1]), (0, ["q_proj"])])
def test_lora_targets_are_a_list_with_a_rank(rank: int, targets: Any):
    with refused(ConfigError, f"lora.target_modules={targets}"):
        LoraConfig(rank=rank, target_modules=targets)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, tiny_llama: Path):
    tiny_model("llama", "eager", vocab_size=300).save_pretrained(tmp_path)
    config = Config(model=ModelConfig(path=str(tmp_path)), data=DataConfig(tokenizer=str(tiny_llama)))
    resolved = resolve(config)
    with refused(ConfigError, f"data.tokenizer={tiny_llama}", "2,048", "model.vocab_size=300"):
        open_corpus(resolved.data, resolved.model.vocab_size)


def test_ulysses_needs_enough_kv_heads(tiny_llama: Path):
    config = Config(model=ModelConfig(path=str(tiny_llama)), attention=AttentionConfig(method="ulysses"))
    with pytest.raises(ConfigError) as caught:
        resolve_degrees(resolve(config), 4)
    names(str(caught.value), "model.num_kv_heads=2", "parallelism.ulysses_degree=2", "attention=ring")
    assert "model.num_kv_heads=4" not in str(caught.value)  # the model has what it has


def test_weights_that_the_files_lack_are_refused(tmp_path: Path, tiny_llama: Path):
    from recipes.model.huggingface import load_model

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    weights["model.other.weight"] = weights.pop("model.norm.weight")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    config = resolve(Config(model=ModelConfig(path=str(folder))))  # as many weights as there should be
    with refused(ConfigError, f"model.path={folder}", "model.norm.weight", "download"):
        load_model(config, torch.device("cpu"), {})
