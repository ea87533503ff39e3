"""What recipe=generate does without ranks: sampling, text as it comes, prompts, what it refuses."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import (
    Config,
    ConfigError,
    Degrees,
    EngineConfig,
    EvaluateConfig,
    GenerateConfig,
    LaunchConfig,
    LoraConfig,
    ModelConfig,
)
from data.tokenizer import BYTES
from recipes.inference.prompts import check_files, read_prompts, with_prompts
from recipes.inference.sampling import GREEDY, Sampler, Sampling
from recipes.inference.source import resolve_source
from recipes.inference.text_stream import TextStream
from recipes.model.pretrained import resolve
from recipes.model.rope import decoding_problem, rope_switch
from recipes.planning.memory import cache_bytes
from recipes.planning.plan import Plan
from recipes.planning.refusal import cache_refusal
from tests.errors import names, refused
from tests.families import tiny_config

LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 2.0])


def config(given: GenerateConfig, **others) -> Config:
    return Config(recipe="generate", generate=given, **others)


# ------------------------------------------------------------------ sampling


def test_greedy_takes_the_first_of_the_most_likely():
    assert Sampler(GREEDY)(LOGITS).item() == 1


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.5}]
)
def test_probabilities_are_those_of_transformers(options):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    given = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | options
    expected: Any = torch.randn(1, 50)
    nothing: Any = torch.zeros(1, 0, dtype=torch.long)
    found = Sampling(**given).probabilities(expected[0])
    expected = TemperatureLogitsWarper(given["temperature"])(nothing, expected)
    if given["top_k"]:
        expected = TopKLogitsWarper(given["top_k"])(nothing, expected)
    expected = TopPLogitsWarper(given["top_p"])(nothing, expected).softmax(-1)[0]
    torch.testing.assert_close(found, expected)


def test_a_temperature_near_0_is_greedy():
    torch.testing.assert_close(Sampling(1e-42, top_k=1).probabilities(LOGITS[:4]), torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_tokens_are_drawn_as_often_as_they_are_likely_and_never_if_they_are_not():
    sampling = Sampling(temperature=1.0, top_k=4, seed=3)
    sampler, num_drawn = Sampler(sampling), 20_000
    counts = collections.Counter(sampler(LOGITS).item() for _ in range(num_drawn))
    for token, probability in enumerate(sampling.probabilities(LOGITS).tolist()):
        assert counts[token] / num_drawn == pytest.approx(probability, abs=0.015)
    assert counts[2] == 0


def test_a_text_has_random_numbers_of_its_own_and_the_same_each_time():
    def draws(seed: int, index: int) -> list[float]:
        sampler = Sampler(Sampling(1.0, seed=seed), index)
        return [sampler(torch.zeros(1000)).item() for _ in range(8)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, index)) for seed in (1, 2) for index in (0, 1)}) == 4


# ------------------------------------------------------------------ text


def test_text_comes_by_whole_characters_and_adds_up():
    text = "naïve 日本 🙂!"
    stream = TextStream(BYTES)
    parts = [stream.put(token) for token in text.encode()]
    assert "".join(parts) == text
    assert stream.rest() == ""
    assert parts[2:4] == ["", "ï"]
    assert parts[-5:] == ["", "", "", "🙂", "!"]


def test_bytes_that_are_no_text_come_too():
    stream = TextStream(BYTES)
    parts = [stream.put(token) for token in (0x41, 0xFF, 0xFF, 0xFF, 0xFF, 0x42, 0xE6)]
    assert parts == ["A", "", "", "", "\ufffd" * 4, "B", ""]
    assert stream.rest() == "\ufffd"


def test_text_of_a_trained_tokenizer_adds_up(tiny_llama: Path):
    from conf.schema import DataConfig
    from data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(DataConfig(tokenizer=str(tiny_llama)))
    tokens = tokenizer.encode(["def größe(x):\n    return '🙂 日本' # naïve"])[0][:-1].tolist()
    stream = TextStream(tokenizer)
    shown = "".join(map(stream.put, tokens)) + stream.rest()
    assert shown == tokenizer.decode(np.array(tokens))


# ------------------------------------------------------------------ prompts


def test_prompts_come_from_lines_or_rows(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a\\nb\u2028c", "id": 3}\n')
    lines = read_prompts(config(GenerateConfig(model="x", prompt_file=str(tmp_path / "lines.txt"))))
    assert [prompt.text for prompt in lines] == ["one", "two"]
    assert lines[0].tokens == list(b"one")
    (row,) = read_prompts(config(GenerateConfig(model="x", prompt_file=str(tmp_path / "rows.jsonl"))))
    assert row.text == "a\nb\u2028c"


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tiny_llama: Path):
    from transformers import AutoTokenizer

    given = config(GenerateConfig(prompt="def main"), model=ModelConfig(path=str(tiny_llama)))
    given.data.tokenizer, given.model.vocab_size = str(tiny_llama), 2048
    (prompt,) = read_prompts(given)
    assert prompt.tokens == AutoTokenizer.from_pretrained(tiny_llama)("def main")["input_ids"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_that_begins_with_bos_gets_no_second_one(tiny_llama: Path, tmp_path: Path, adds_bos):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.bos_token + "def main"
    assert tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2  # what the prompt would have
    bare, begun = tokenizer("def main", add_special_tokens=False)["input_ids"], tokenizer("def main")["input_ids"]
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.save_pretrained(tiny_llama := tmp_path / "model")
    rows = [{"prompt": text}, {"prompt": tokenizer.bos_token + text}, {"prompt": "def main"}]
    found = [prompt.tokens for prompt in read_prompts(of_rows(tiny_llama, tmp_path, *rows))[1:]]
    assert found == [begun, [begun[0], *begun], begun if adds_bos else bare]


def with_template(tiny_llama: Path, folder: Path, template: str | None) -> Path:
    """A copy of the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def of_rows(tokenizer: Path | None, folder: Path, *rows: dict) -> Config:
    """Of a file that has a text, and then the rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "one"}, *rows)))
    given = config(GenerateConfig(model="x", prompt_file=str(folder / "rows.jsonl")))
    if tokenizer is not None:
        given.data.tokenizer, given.model.vocab_size = str(tokenizer), 2048
    return given


def test_messages_become_tokens_as_by_transformers(tiny_llama: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_llama)
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + plain.chat_template
    reference = AutoTokenizer.from_pretrained(with_template(tiny_llama, tmp_path / "model", template))
    chat = [
        {"role": "user", "content": "Hello there", "name": None},
        {"role": "assistant", "content": "General Kenobi"},
        {"role": "user", "content": "Again"},
    ]
    tools = [{"type": "function", "function": {"name": "lightsaber", "parameters": {}}}]
    rows = [{"messages": chat}, {"messages": chat, "tools": tools}, {"messages": chat, "tools": json.dumps(tools)}]
    rows = [*rows, {"messages": chat[:1], "prompt": None, "tools": None, "id": 3}]
    text, *prompts = read_prompts(of_rows(tmp_path / "model", tmp_path, *rows))
    assert (text.text, text.chat) == ("one", {})
    for prompt, row, given in zip(prompts, rows, (None, tools, tools, None), strict=True):
        expected = reference.apply_chat_template(row["messages"], tools=given, add_generation_prompt=True)
        assert prompt.tokens == expected["input_ids"]
        assert prompt.text == reference.decode(prompt.tokens)
        assert prompt.chat == {name: row[name] for name in ("messages", "tools") if row.get(name)}
    assert ["lightsaber" in prompt.text for prompt in prompts] == [False, True, True, False]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, ["prompt and messages", "delete"]),
        ({"text": "a"}, ["no text as prompt", "no messages", '"messages"']),
        ({"messages": "a"}, ["str", "'messages'", '"role"']),
        ({"messages": []}, ["empty list", "'messages'", '"role"']),
        ({"messages": [{"content": "a"}]}, ["without a role", '"role"']),
        ({"messages": [{"role": "user"}]}, ["without content", '"role"']),
        ({"messages": [{"from": "human", "value": "a"}]}, ["ShareGPT", "jq -c", ".messages[]"]),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "{"}, ["broken JSON", "'tools'"]),
    ],
)
def test_messages_that_are_none_are_refused_before_a_checkpoint_is_read(tmp_path: Path, row, parts):
    with refused(ConfigError, f"generate.prompt_file={tmp_path}/rows.jsonl, line 2", *parts):
        check_files(of_rows(None, tmp_path, row), tmp_path / "run")


def test_what_the_chat_template_refuses_is_named(tiny_llama: Path, tmp_path: Path):
    folder = with_template(tiny_llama, tmp_path / "model", "{{ raise_exception('not\nthis one') }}")
    given = of_rows(folder, tmp_path, {"messages": [{"role": "user", "content": "a"}]})
    with refused(ConfigError, f"generate.prompt_file={tmp_path}/rows.jsonl, line 2", "not this one", "messages"):
        with_prompts(given, tmp_path / "run")


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_messages_need_a_chat_template(tiny_llama: Path, tmp_path: Path, has_tokenizer):
    folder = with_template(tiny_llama, tmp_path / "model", None) if has_tokenizer else None
    given = of_rows(folder, tmp_path, {"messages": [{"role": "user", "content": "a"}]})
    named = f"data.tokenizer={folder}" if has_tokenizer else "bytes"
    with refused(ConfigError, "line 2", named, "no chat template", "data.tokenizer=FOLDER_OR_HUB_NAME", '"prompt"'):
        with_prompts(given, tmp_path / "run")


def test_the_plan_is_for_the_longest_prompt_and_its_answer(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("one\nthree\n")
    given = config(GenerateConfig(model="x", prompt_file=str(tmp_path / "lines.txt"), max_new_tokens=7))
    resolved = with_prompts(given, tmp_path)
    assert (resolved.data.sequence_length, resolved.num_steps) == (12, 2)
    assert resolved.generate.output == str(tmp_path / "generated.jsonl")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["generate.prompt", "generate.prompt_file"]),
        ({"prompt": "a", "prompt_file": "b"}, ["generate.prompt", "generate.prompt_file"]),
        ({"prompt": ""}, ["prompt 1", "empty"]),
        ({"prompt_file": "{folder}/none.txt"}, ["generate.prompt_file={folder}/none.txt", "No such file"]),
        ({"prompt_file": "{folder}/blank.txt"}, ["generate.prompt_file={folder}/blank.txt", "no prompt"]),
        ({"prompt_file": "{folder}/bytes.txt"}, ["generate.prompt_file={folder}/bytes.txt", "UTF-8", "byte 1"]),
        ({"prompt_file": "{folder}/cut.jsonl"}, ["line 3", "JSON"]),
        ({"prompt_file": "{folder}/other.jsonl"}, ["line 1", "prompt"]),
        ({"prompt": "a", "output": "{folder}/there.jsonl"}, ["generate.output={folder}/there.jsonl", "new name"]),
        (
            {"prompt": "a", "output": "{folder}/no/a.jsonl"},
            ["generate.output={folder}/no/a.jsonl", "mkdir -p {folder}/no"],
        ),
    ],
)
def test_prompts_and_outputs_that_cannot_be_are_refused(tmp_path: Path, settings, parts):
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "there.jsonl").write_text("")
    given = GenerateConfig(model="x", **{name: text.format(folder=tmp_path) for name, text in settings.items()})
    with refused(ConfigError, *(part.format(folder=tmp_path) for part in parts)):
        check_files(config(given), tmp_path / "run")
        with_prompts(config(given), tmp_path / "run")


def test_a_run_dir_that_has_completions_is_refused(tmp_path: Path):
    (tmp_path / "generated.jsonl").touch()
    with refused(ConfigError, f"{tmp_path}/generated.jsonl", "hydra.run.dir", "generate.output=FILE"):
        check_files(config(GenerateConfig(model="x", prompt="a")), tmp_path)


def test_the_folder_of_a_training_run_is_refused(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    with refused(ConfigError, f"hydra.run.dir={tmp_path}", "generate.model"):
        check_files(config(GenerateConfig(model=str(tmp_path), prompt="a")), tmp_path)


def test_a_model_without_its_tokenizer_is_refused():
    given = config(GenerateConfig(model="x", prompt="a"), model=ModelConfig(vocab_size=50_000))
    with refused(ConfigError, "50,000", "data.tokenizer=FOLDER_OR_HUB_NAME", "257"):
        read_prompts(given)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"max_new_tokens": 0}, ["generate.max_new_tokens=0", "1"]),
        ({"temperature": -1.0}, ["generate.temperature=-1.0", "0"]),
        ({"top_p": 0.0, "temperature": 1.0}, ["generate.top_p=0.0", "generate.top_p=0.95"]),
        ({"top_k": 5}, ["generate.top_k=5", "generate.temperature=1"]),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, parts):
    with refused(ConfigError, *parts):
        GenerateConfig(**settings)


# ------------------------------------------------------------------ the model


@pytest.mark.parametrize(
    ("others", "parts"),
    [
        ({"generate": GenerateConfig()}, ["recipe=generate", "generate.model=RUN_DIR"]),
        ({"model": ModelConfig(path="a/b")}, ["generate.model=x", "model.path=a/b"]),
        ({"lora": LoraConfig(rank=4), "model": ModelConfig(path="a/b")}, ["generate.model=x", "model.path=a/b"]),
        ({"engine": EngineConfig(zero_stage=3)}, ["engine.zero_stage=3", "recipe=generate"]),
    ],
)
def test_settings_that_contradict_the_model_are_refused(others, parts):
    with refused(ConfigError, *parts):
        Config(**{"recipe": "generate", "generate": GenerateConfig(model="x")} | others)


@pytest.mark.parametrize("name", ["model", "prompt", "prompt_file"])
def test_what_is_to_be_generated_needs_the_recipe(name: str):
    given: Any = {name: "x"}
    with refused(ConfigError, f"generate.{name}=x", "recipe=generate"):
        Config(generate=GenerateConfig(**given))


def test_lora_is_read_from_the_run():
    with refused(ConfigError, "lora.rank=4", "generate.model"):
        Config(
            recipe="generate",
            generate=GenerateConfig(),
            model=ModelConfig(path="a/b"),
            lora=LoraConfig(rank=4),
        )


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("{folder}/nowhere", "is not there"),
        ("{folder}", "is no model"),
        ("{folder}/file.safetensors", "is no model"),
        ("nowhere", "is not there"),
        ("{folder}/run", "has no checkpoint yet"),
        ("{folder}/adapter", "is an adapter, which python -m recipes.export RUN_DIR --merge"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, given: str, what: str):
    (tmp_path / "file.safetensors").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    given = given.format(folder=tmp_path)
    with refused(ConfigError, f"generate.model={given} {what}", "outputs/DATE/TIME", "config.json", "OWNER/NAME"):
        resolve_source(config(GenerateConfig(model=given)))


def test_a_hugging_face_model_that_cannot_be_read_is_named_as_it_was_typed(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    generates = Config(recipe="generate", generate=GenerateConfig(str(tmp_path)))
    for asked in (generates, Config(recipe="evaluate", evaluate=EvaluateConfig(str(tmp_path)))):
        source = resolve_source(asked)
        with refused(ConfigError, f"{asked.recipe}.model={tmp_path}", "config.json"):
            resolve(source)
    with refused(ConfigError, f"model.path={tmp_path}", "config.json"):
        resolve(Config(model=ModelConfig(path=str(tmp_path))))


def test_a_run_whose_checkpoints_are_broken_is_refused(tmp_path: Path):
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    with refused(ConfigError, "every checkpoint", tmp_path):
        resolve_source(config(GenerateConfig(model=str(tmp_path))))


def test_a_hugging_face_model_keeps_what_was_typed(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    given = config(GenerateConfig(model=str(tmp_path)), engine=EngineConfig(dtype="fp32", zero_stage=2))
    resolved = resolve_source(given)
    assert resolved.model.path == resolved.generate.model == str(tmp_path)
    assert (resolved.engine.dtype, resolved.engine.zero_stage) == ("fp32", 0)
    by_path = resolve_source(config(GenerateConfig(), model=ModelConfig(path="a/b", rope={"rope_theta": 1e6})))
    assert (by_path.generate.model, by_path.model.rope) == ("a/b", {"rope_theta": 1e6})
    assert given.model.path is None, "the given one stays"


def test_dynamic_frequencies_are_refused_beyond_their_length_alone():
    dynamic = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert decoding_problem(dynamic, 512) is None
    names(decoding_problem(dynamic, 513) or "", "rope_type=dynamic", "512", "generate.max_new_tokens")
    assert decoding_problem(tiny_config("llama"), 10_000) is None
    assert rope_switch(tiny_config("phi3")) == 128
    assert rope_switch(tiny_config("gemma3_text")) is None


# ------------------------------------------------------------------ memory


def test_the_cache_is_counted_per_rank_and_window():
    given = config(GenerateConfig(model="x", prompt="a"))
    given.data.sequence_length = 1000
    keys_and_values = 2 * 2 * 32 * 2  # of one token in one layer: 2 heads of 32 numbers in bf16
    assert cache_bytes(given, Degrees(1, 4, 1)) == 2 * keys_and_values * 1000 / 4
    given.model.num_window_layers, given.model.window = 1, 100
    assert cache_bytes(given, Degrees(1, 2, 2)) == keys_and_values * 1100 / 4


def test_a_prompt_longer_than_memory_is_refused_with_ranks_that_do_and_a_length_that_fits():
    given = config(GenerateConfig(model="x", prompt="a", max_new_tokens=100))
    given.data.sequence_length = 2**20
    memory_bytes = 64 * 2**20
    message = cache_refusal(given, Degrees(1, 2, 1), memory_bytes)
    names(message or "", "1,048,476 tokens", "generate.max_new_tokens=100", "launch.check_memory=false")
    assert message is not None
    num_ranks = int(message.partition(" ranks or more")[0].rpartition(" ")[2])
    longest = int(message.partition("at most ")[2].partition(" ")[0].replace(",", ""))
    assert cache_refusal(given, Degrees(1, num_ranks, 1), memory_bytes) is None
    assert cache_refusal(given, Degrees(1, num_ranks - 1, 1), memory_bytes) is not None
    given.data.sequence_length = longest
    assert cache_refusal(given, Degrees(1, 2, 1), memory_bytes) is None
    given.data.sequence_length += 1000
    with refused(ConfigError, "generate.max_new_tokens=100"):
        Plan(given, 2, "cpu", "CPU", None, 2, memory_bytes)


def test_one_text_is_decoded_by_all_ranks():
    given = config(GenerateConfig(model="x", prompt="a"), launch=LaunchConfig(num_ranks=2))
    given.attention.method = "local"
    with refused(ConfigError, "recipe=generate", "2 data ranks", "attention=ring"):
        Plan(given, 2, "cpu", "CPU", None, 2)
