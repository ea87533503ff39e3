"""Conversations to tokens: the template's, with what the assistant says marked, and the error for each that cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import transformers

import train
from conf.schema import Config, DataConfig
from data import store as store_module
from data.report import roles_warning
from data.source import CorpusError
from data.store import OpenedStore, open_counted
from recipes.tokenize import tokenize
from tests.errors import names, refused

USER, ASSISTANT = {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "General Kenobi"}
CHAT = [USER, ASSISTANT, USER, ASSISTANT]
LOST = {"role": "asistant", "content": "General Kenobi"}
EOS = 1


def opened(folder: Path, tokenizer: Path | None, *rows: dict, **data) -> OpenedStore:
    folder.mkdir(exist_ok=True)
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = None if tokenizer is None else str(tokenizer)
    files = str(folder / "chat.jsonl")
    config = DataConfig(source="chat", files=files, tokenizer=name, token_store=str(folder / "stores"), **data)
    return open_counted(config, "chat", print)


def with_template(tiny_llama: Path, folder: Path, template: str | None) -> Path:
    """A copy of the tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def template_of(tiny_llama: Path) -> str:
    return transformers.AutoTokenizer.from_pretrained(tiny_llama).chat_template


def trained_text(tiny_llama: Path, one: OpenedStore) -> str:
    assert one.store.trained is not None
    return transformers.AutoTokenizer.from_pretrained(tiny_llama).decode(one.store.tokens[one.store.trained])


def test_tokens_and_mask_are_the_templates(tiny_llama, tmp_path):
    one = opened(tmp_path, tiny_llama, {"messages": CHAT}, {"messages": CHAT[:2]})
    reference = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokens, trained = [], []
    for messages in (CHAT, CHAT[:2]):
        expected = reference.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        tokens += expected["input_ids"]
        trained += expected["assistant_masks"]
    assert one.store.tokens.tolist() == tokens  # the template has an end of its own
    assert one.store.trained is not None
    assert one.store.trained.dtype == np.bool_
    assert one.store.trained.tolist() == list(map(bool, trained))
    assert trained_text(tiny_llama, one) == "General Kenobi<|end_of_turn|>" * 3


def test_a_template_without_an_end_gets_eos(tiny_llama, tmp_path):
    template = (
        "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    )
    folder = with_template(tiny_llama, tmp_path / "model", template)
    one = opened(tmp_path, folder, {"messages": CHAT[:2]})
    assert one.store.tokens[-1] == EOS
    assert trained_text(tiny_llama, one) == " General Kenobi<|end_of_text|>"  # the token with the blank


@pytest.mark.parametrize("kind", ["text", "messages", "messages without a mark"])
def test_a_completion_is_trained_alone(tiny_llama, tmp_path, kind):
    row = {"prompt": "Hello there", "completion": " General Kenobi"}
    expected = " General Kenobi<|end_of_text|>"
    tokenizer = tiny_llama
    if kind != "text":
        row, expected = {"prompt": CHAT[:3], "completion": [ASSISTANT]}, "General Kenobi<|end_of_turn|>"
    else:
        tokenizer = with_template(tiny_llama, tmp_path / "model", None)
    if kind == "messages without a mark":
        template = template_of(tiny_llama).replace("{% generation %}", "").replace("{% endgeneration %}", "")
        tokenizer = with_template(tiny_llama, tmp_path / "model", template)
    assert trained_text(tiny_llama, opened(tmp_path, tokenizer, row)) == expected


def test_tools_reach_the_template(tiny_llama, tmp_path):
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + template_of(tiny_llama)
    folder = with_template(tiny_llama, tmp_path / "model", template)
    tools = [{"type": "function", "function": {"name": "lightsaber", "parameters": {}}}]
    rows = [{"messages": CHAT, "tools": tools}, {"messages": CHAT, "tools": json.dumps(tools)}, {"messages": CHAT}]
    one = opened(tmp_path, folder, *rows)
    reference = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    texts = [reference.decode(tokens) for tokens in np.split(one.store.tokens, one.store.ends[:-1])]
    assert ["lightsaber" in text for text in texts] == [True, True, False]


def test_parquet_and_data_sets_have_the_same_conversations(tiny_llama, tmp_path):
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    expected = opened(tmp_path, tiny_llama, *rows).store
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "chat.jsonl", tmp_path / "set")
    messages: list[Any] = [row["messages"] for row in rows]
    messages[1] = [{**message, "tool_calls": None} for message in messages[1]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    places: list[dict[str, Any]] = [{"name": str(tmp_path / "set")}, {"files": str(tmp_path / "a.parquet")}]
    for where in places:
        config = DataConfig(source="chat", **where, tokenizer=str(tiny_llama), token_store=str(tmp_path / "stores"))
        found = open_counted(config, "chat", print).store
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.trained is not None
        assert expected.trained is not None
        assert found.trained.tolist() == expected.trained.tolist()


def tools_of(value: Any) -> dict[str, Any]:
    """A row whose tool, its call and the list in it have a key of their own."""
    key, inner = f"key_{value}", {"shared": 1, f"deep_{value}": [value, None]}
    call = {"type": "function", "function": {"name": "put", "arguments": {"inner": inner, key: value}}}
    tool = {"type": "function", "function": {"name": "put", "parameters": {"properties": {key: {"type": "string"}}}}}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}


@pytest.mark.parametrize("where", ["parquet", "data set", "saved splits", "prompt and completion"])
def test_arrow_invents_no_keys_of_tools(tiny_llama, tmp_path, where):
    template = "{{ tools }}{% for message in messages %}{% generation %}{{ message }}{% endgeneration %}{% endfor %}"
    folder = with_template(tiny_llama, tmp_path / "model", template)
    rows = [tools_of(1), tools_of(2)]
    if where == "prompt and completion":
        rows = [
            {"prompt": row["messages"][:1], "completion": row["messages"][1:], "tools": row["tools"]} for row in rows
        ]
    expected = opened(tmp_path, folder, *rows).store
    table = pyarrow.Table.from_pylist(rows)
    if where == "saved splits":
        datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "set")
    elif where == "data set":
        (tmp_path / "set").mkdir()
        shutil.copy(tmp_path / "chat.jsonl", tmp_path / "set")
    else:
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    place: dict[str, Any] = {"name": str(tmp_path / "set"), "files": None}
    if not (tmp_path / "set").exists():
        place = {"files": str(tmp_path / "a.parquet")}
    config = DataConfig(source="chat", **place, tokenizer=str(folder), token_store=str(tmp_path / "stores"))
    decode = transformers.AutoTokenizer.from_pretrained(folder).decode
    assert decode(open_counted(config, "chat", print).store.tokens) == decode(expected.tokens)
    assert "None]" in decode(expected.tokens)  # of a list a null is a value


def test_a_null_of_json_lines_is_the_users(tiny_llama, tmp_path):
    folder = with_template(tiny_llama, tmp_path / "model", "{{ tools | tojson }}" + template_of(tiny_llama))
    one = opened(tmp_path, folder, {"messages": CHAT, "tools": [{"default": None}]})
    assert '{"default": null}' in transformers.AutoTokenizer.from_pretrained(folder).decode(one.store.tokens)


@pytest.mark.parametrize("kind", ["jsonl", "chat"])
def test_stores_of_older_chats_alone_are_not_used(tiny_llama, tmp_path, monkeypatch, kind):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Hello", "messages": CHAT}) + "\n")
    files, stores = str(tmp_path / "a.jsonl"), str(tmp_path / "stores")
    config = DataConfig(source=kind, files=files, tokenizer=str(tiny_llama), token_store=stores)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "CHAT_FORMAT", 1)
        open_counted(config, "a", print)
    assert open_counted(config, "a", print).is_new == (kind == "chat")


def test_rows_with_unknown_roles_are_counted_and_kept(tiny_llama, tmp_path, monkeypatch):
    usr = {**USER, "role": "usr"}
    known = [{"role": role, "content": "Hello"} for role in ("system", "developer", "user", "tool")]
    rows = [
        {"messages": [usr, ASSISTANT, usr, LOST]},
        {"messages": [*known, ASSISTANT, LOST]},
        {"prompt": [usr], "completion": [ASSISTANT]},
        {"prompt": "Hello", "completion": "usr"},
        {"messages": [USER, LOST]},  # skipped
    ]
    monkeypatch.setattr("data.encoders._BATCH_ROWS", 1)  # counts of batches are added
    for _ in range(2):  # made, and there
        one = opened(tmp_path, tiny_llama, *rows, bad_rows="skip")
        assert one.counts.unknown_roles == one.store.unknown_roles == {"usr": 2, "asistant": 2}
        assert one.counts.num_skipped == 1
    assert opened(tmp_path, tiny_llama, *[{"messages": [*known, ASSISTANT]}] * 3).counts.unknown_roles == {}


def test_roles_are_counted_up_to_a_number(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_ROLES", 2)
    rows = [{"messages": [{"role": role, "content": "Hello"}, ASSISTANT]} for role in ("a", "b", "c", "a")]
    assert opened(tmp_path, tiny_llama, *rows).counts.unknown_roles == {"a": 2, "b": 1}


def test_unknown_roles_are_said_once_a_source_when_data_is_opened_and_tokenized(tiny_llama, tmp_path, capsys):
    for name, roles in (("train", ["asistant", "usr"]), ("valid", ["model"]), ("clean", [])):
        messages = [ASSISTANT, *({"role": role, "content": "Hello"} for role in roles)]
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 30)
    place: dict[str, Any] = {"tokenizer": str(tiny_llama), "token_store": str(tmp_path / "stores")}
    place["sequence_length"] = 16

    def said(**data) -> list[str]:
        config = Config(recipe="forward", data=DataConfig(**place, **data))
        config.model.vocab_size = 2048
        train._open_data(config)
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "!!!" in line]
        tokenize(config)
        tokenized = [line for line in capsys.readouterr().out.splitlines() if "!!!" in line]
        assert [line.split() for line in lines] == [line.split() for line in tokenized]
        return lines

    [line] = said(source="chat", files=f"{tmp_path}/train.jsonl")
    names(line, "chat", "'asistant' in 30 rows", "'usr' in 30 rows", "data.preview=3")
    assert "model" not in line
    assert not said(source="chat", files=f"{tmp_path}/clean.jsonl")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "valid", "clean")}
    sources = {
        "a": {"source": "chat", "files": files["train"], "validation_files": files["valid"], "weight": 0.5},
        "b": {"source": "chat", "files": files["clean"], "weight": 0.5},
    }
    first, second = said(source="mixture", sources=sources)
    names(first, "a", "'asistant' in 30 rows")
    names(second, "a, validation", "'model' in 30 rows")


def test_of_many_roles_the_most_frequent_are_named():
    warning = roles_warning("chat", {**{f"rare{number}": 1 for number in range(9)}, "usr": 2000}) or ""
    names(warning, "'usr' in 2,000 rows", "'rare0' in 1 row", "and others")
    assert "rare8" not in warning
    assert roles_warning("chat", {}) is None


@pytest.mark.parametrize("where", ["parquet", "data set"])
def test_without_a_list_no_column_of_messages_is_proposed(tiny_llama, tmp_path, where):
    table = pyarrow.table({"input": ["x"], "output": ["y"], "number": [1]})
    place: dict[str, Any] = {"files": str(tmp_path / "a.parquet")}
    if where == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "set")
        place = {"name": str(tmp_path / "set")}
    config = DataConfig(source="chat", **place, tokenizer=str(tiny_llama), token_store=str(tmp_path / "stores"))
    with pytest.raises(CorpusError) as caught:
        open_counted(config, "chat", print)
    names(str(caught.value), "prompt and completion", "['input', 'number', 'output']")
    assert "data.messages_field" not in str(caught.value)
    assert "jq" not in str(caught.value)  # it reads JSON


@pytest.mark.parametrize("where", ["jsonl", "parquet", "data set"])
@pytest.mark.parametrize("column", ["messages", "talks"])
@pytest.mark.parametrize("is_named", [False, True])
def test_conversations_read_as_text_name_the_chat_source(tmp_path, where, column, is_named):
    talk = CHAT if column == "messages" else [{"from": "human", "value": "Hello"}]
    table = pyarrow.Table.from_pylist([{"number": 1, column: talk}])
    kind = where
    place: dict[str, Any] = {"files": f"{tmp_path}/a.*"}
    if where == "jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps(table.to_pylist()[0]) + "\n")
    elif where == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "set")
        kind, place = "hub", {"name": str(tmp_path / "set")}
    if is_named:
        place["text_field"] = column
    config = DataConfig(source=kind, **place, token_store=str(tmp_path / "stores"))
    advice = "type data=chat" if column == "messages" else "type data=chat data.messages_field=talks"
    with pytest.raises(CorpusError) as caught:
        open_counted(config, "a", print)
    names(str(caught.value), repr(column), advice)
    assert "data.text_field" not in str(caught.value)


def test_bytes_have_no_template(tmp_path):
    with refused(CorpusError, "data=chat", "data.tokenizer=FOLDER_OR_HUB_NAME"):
        opened(tmp_path, None, {"messages": CHAT})


def test_a_tokenizer_without_template_is_refused(tiny_llama, tmp_path):
    folder = with_template(tiny_llama, tmp_path / "model", None)
    with refused(CorpusError, f"data.tokenizer={folder}", "no chat template", "prompt and completion"):
        opened(tmp_path, folder, {"messages": CHAT})


def test_a_template_without_a_mark_is_refused(tiny_llama, tmp_path):
    template = template_of(tiny_llama).replace("{% generation %}", "").replace("{% endgeneration %}", "")
    folder = with_template(tiny_llama, tmp_path / "model", template)
    with pytest.raises(CorpusError) as caught:
        opened(tmp_path, folder, {"messages": CHAT}, bad_rows="skip")
    names(str(caught.value), f"data.tokenizer={folder}", "chat_template.jinja", "prompt and completion")
    assert "{% generation %}" in str(caught.value)


BAD = {
    "no assistant": ({"messages": [USER]}, ["no assistant turn", "'user'"]),
    "a misspelt assistant": ({"messages": [USER, LOST]}, ["no assistant turn", "'user', 'asistant'"]),
    "an assistant without mark": ({"messages": [USER, {**ASSISTANT, "content": "unmarked"}]}, ["marks nothing"]),
    "text": ({"messages": "Hello"}, ["str", "'messages'"]),
    "no messages": ({"messages": []}, ["empty", "'messages'"]),
    "no role": ({"messages": [{"content": "Hello"}]}, ["role", "'messages'"]),
    "ShareGPT": (
        {"messages": [{"from": "human", "value": "Hello"}]},
        ["ShareGPT", "jq -c", ".messages[]", "'messages'"],
    ),
    "no content": ({"messages": [{"role": "user"}]}, ["content", "'messages'"]),
    "no column": ({"chat": CHAT}, ["'messages'", "data.messages_field", "'chat'", "prompt and completion"]),
    "no list": (
        {"input": "x", "output": "y"},
        ["['input', 'output']", "jq -c '{prompt: .COLUMN, completion: .OTHER_COLUMN}' OLD > NEW"],
    ),
    "a list and a text": ({"text": "x", "chat": CHAT}, ["data.messages_field to one of ['chat']"]),
    "half": ({"prompt": "x", "completion": CHAT}, ["str", "'prompt'"]),
    "empty completion": ({"prompt": "x", "completion": ""}, ["empty completion"]),
    "broken tools": ({"messages": CHAT, "tools": "{"}, ["'tools'"]),
    "what the template refuses": ({"messages": [{"role": "refused", "content": ""}]}, ["template", "not this one"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_named_or_skipped(tiny_llama, tmp_path, case):
    row, parts = BAD[case]
    refusal = "{% if messages[0].role == 'refused' %}{{ raise_exception('not this one') }}{% endif %}"
    unmarked = "{% if messages[-1].content == 'unmarked' %}Hello{% else %}" + template_of(tiny_llama) + "{% endif %}"
    folder = with_template(tiny_llama, tmp_path / "model", refusal + unmarked)
    with pytest.raises(CorpusError) as caught:
        opened(tmp_path, folder, {"messages": CHAT}, row)
    names(str(caught.value), "chat.jsonl, row 2", "data.bad_rows=skip", *parts)
    assert "\n" not in str(caught.value)
    counts = opened(tmp_path, folder, {"messages": CHAT}, row, bad_rows="skip").counts
    assert (counts.num_documents, counts.num_skipped) == (1, 1)
