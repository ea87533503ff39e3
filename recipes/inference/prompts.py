"""The prompts of recipe=generate, as text and as tokens. The launcher's parent reads them first, to refuse mistakes."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from conf.schema import Config, ConfigError, GenerateConfig
from data.chat import chat_template, prompt_tokens, template_refusal
from data.source import messages_problem, parsed_tools, without_nulls
from data.tokenizer import BYTES, PretrainedTokenizer, Tokenizer, open_tokenizer, tokenizer_problem
from recipes.checkpoint.manifest import CHECKPOINTS_DIR
from recipes.model.rope import decoding_problem

OUTPUT_FILE = "generated.jsonl"
_TEXT_ROW = '{"prompt": "some text"}'
_CHAT_ROW = '{"messages": [{"role": "user", "content": "some text"}]}'


class Prompt(NamedTuple):
    text: str  # of messages what the chat template makes of them
    tokens: list[int]  # at least one
    chat: dict[str, Any]  # messages and tools as the row has them; empty if it has a text


class _Given(NamedTuple):
    """A prompt as it is given: a text, or messages, for which `chat` is as in `Prompt`."""

    where: str  # for people
    text: str
    chat: dict[str, Any]


def check_files(config: Config, run_dir: Path) -> None:
    """Raises ConfigError if there is no prompt, or the output cannot be written: before a checkpoint is read."""
    if (run_dir / CHECKPOINTS_DIR).exists():
        raise ConfigError(
            f"hydra.run.dir={run_dir} holds a training run, whose settings and summary would be replaced: give that as "
            "generate.model, and leave hydra.run.dir out"
        )
    _given_prompts(config.generate)
    _output(config.generate, run_dir)


def with_prompts(config: Config, run_dir: Path) -> Config:
    """The configuration with the length of the longest prompt and its answer, and the path of the output.

    Raises:
        ConfigError: as `check_files`; also if a prompt is empty, the tokenizer is not the model's or cannot make a
            text of messages, or the model's rotary embeddings change with the length.
    """
    resolved = copy.deepcopy(config)
    prompts = read_prompts(config)
    resolved.generate.output = str(_output(config.generate, run_dir))
    resolved.data.sequence_length = max(len(prompt.tokens) for prompt in prompts) + config.generate.max_new_tokens
    resolved.num_steps, resolved.breakdown = len(prompts), False
    engine = resolved.engine
    engine.micro_batch_size, engine.gradient_accumulation_steps, engine.train_batch_size = 1, 1, None
    if config.model.path:
        from recipes.model.pretrained import model_config  # imports transformers

        text_config = model_config(config.model).get_text_config()
        if problem := decoding_problem(text_config, resolved.data.sequence_length):
            raise ConfigError(f"{config.model.path}: {problem}")
    return resolved


def read_prompts(config: Config) -> list[Prompt]:
    """The prompts in their order, tokenized as transformers does.

    A text begins with what the tokenizer puts before it, unless it begins with BOS itself. Messages become the text of
    the tokenizer's chat template.

    Raises:
        ConfigError: as `with_prompts`.
    """
    given = _given_prompts(config.generate)
    tokenizer = open_tokenizer(config.data)
    _check_tokenizer(config, tokenizer)
    texts = [one.text for one in given if not one.chat]
    of_texts = iter(_tokens(tokenizer, texts) if texts else [])
    prompts = [
        _of_messages(tokenizer, one) if one.chat else Prompt(one.text, next(of_texts), one.chat) for one in given
    ]
    for number, prompt in enumerate(prompts, 1):
        if not prompt.tokens:
            raise ConfigError(f"prompt {number} is empty, and the tokenizer begins no text by itself: give some text")
    return prompts


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not isinstance(tokenizer, PretrainedTokenizer):
        return [encoded[:-1].tolist() for encoded in tokenizer.encode(texts)]  # without the separator
    wrapped = tokenizer.wrapped
    tokens = wrapped(texts, return_attention_mask=False, verbose=False)["input_ids"]
    for index, text in enumerate(texts):
        if wrapped.bos_token and text.startswith(wrapped.bos_token):  # as a chat template's text often does
            (bare,) = tokenizer.tokens([text])
            if bare[:1] == [wrapped.bos_token_id]:  # not where split_special_tokens makes letters of the name
                tokens[index] = bare
    return tokens


def _of_messages(tokenizer: Tokenizer, given: _Given) -> Prompt:
    messages, tools = without_nulls(given.chat["messages"]), parsed_tools(given.chat)
    if not isinstance(tokenizer, PretrainedTokenizer) or chat_template(tokenizer.wrapped, tools) is None:
        has_none = "bytes have" if tokenizer is BYTES else f"data.tokenizer={tokenizer.name} has"
        raise ConfigError(
            f"{given.where} has messages, and {has_none} no chat template to make a text of them: type "
            f"data.tokenizer=FOLDER_OR_HUB_NAME of the model's tokenizer with one, or write {_TEXT_ROW}"
        )
    wrapped = tokenizer.wrapped
    try:
        text = wrapped.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        return Prompt(text, prompt_tokens(wrapped, messages, tools), given.chat)
    except Exception as error:  # of Jinja, whatever the template does
        raise ConfigError(f"{given.where}: {template_refusal(error)}: correct its messages") from error


def _given_prompts(given: GenerateConfig) -> list[_Given]:
    if (given.prompt is None) == (given.prompt_file is None):
        raise ConfigError(
            "recipe=generate needs either a prompt, \"generate.prompt='Once upon a time'\", or a file of prompts, "
            "generate.prompt_file=prompts.jsonl"
        )
    if given.prompt is not None:
        return [_Given("generate.prompt", given.prompt, {})]
    assert given.prompt_file is not None
    path, setting = Path(given.prompt_file).expanduser(), f"generate.prompt_file={given.prompt_file}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold what splitlines takes for ends of lines
    except OSError as error:
        raise ConfigError(f"{setting} cannot be read ({error.strerror}): give a file of prompts") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f'{setting} has no prompt: write a text on each line, or rows {{"prompt": ...}} as .jsonl')
    placed = [(f"{setting}, line {number}", line) for number, line in numbered]
    if path.suffix != ".jsonl":
        return [_Given(where, line, {}) for where, line in placed]
    return [_given_by_row(where, line) for where, line in placed]


def _output(given: GenerateConfig, run_dir: Path) -> Path:
    output = Path(given.output or run_dir / OUTPUT_FILE).expanduser().absolute()
    if given.output and not output.parent.is_dir():
        parent = output.parent
        raise ConfigError(
            f"generate.output={given.output}: there is no folder {parent}: type mkdir -p {shlex.quote(str(parent))}"
        )
    if output.exists() and given.output:
        raise ConfigError(f"generate.output={output} is there already: give a new name, or delete it")
    if output.exists():
        raise ConfigError(
            f"{output} is there already: type another hydra.run.dir or generate.output=FILE, or delete it"
        )
    return output


def _given_by_row(where: str, line: str) -> _Given:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error}): write {_TEXT_ROW} or {_CHAT_ROW}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is no object: write {_TEXT_ROW} or {_CHAT_ROW}")
    prompt, messages = row.get("prompt"), row.get("messages")
    if messages is None:
        if not isinstance(prompt, str):
            raise ConfigError(f"{where} has no text as prompt, and no messages: write {_TEXT_ROW} or {_CHAT_ROW}")
        return _Given(where, prompt, {})
    if prompt is not None:
        raise ConfigError(f"{where} has both prompt and messages, and a row is one prompt: delete one of them")
    if problem := messages_problem(messages, "messages"):
        raise ConfigError(f"{where}: {problem} in column 'messages': write {_CHAT_ROW}")
    try:
        parsed_tools(row)
    except ValueError as error:
        raise ConfigError(f"{where}: broken JSON in column 'tools' ({error}): write a list of tools") from error
    return _Given(where, "", {name: row[name] for name in ("messages", "tools") if row.get(name) is not None})


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    if problem := tokenizer_problem(tokenizer, config.model.vocab_size):
        raise ConfigError(problem)
    if tokenizer is BYTES and config.model.vocab_size != BYTES.size:
        raise ConfigError(
            f"the model has a vocabulary of {config.model.vocab_size:,} tokens, and its run names no tokenizer to make "
            f"them of a prompt: type data.tokenizer=FOLDER_OR_HUB_NAME (bytes are for models of {BYTES.size} tokens)"
        )
