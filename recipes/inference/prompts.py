"""The prompts of recipe=generate, as text and as tokens. The launcher's parent reads them first, to refuse mistakes."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import NamedTuple

from conf.schema import Config, ConfigError, GenerateConfig
from data.tokenizer import BYTES, PretrainedTokenizer, Tokenizer, open_tokenizer, tokenizer_problem
from recipes.checkpoint.manifest import CHECKPOINTS_DIR
from recipes.model.rope import decoding_problem

OUTPUT_FILE = "generated.jsonl"


class Prompt(NamedTuple):
    text: str
    tokens: list[int]  # at least one


def check_files(config: Config, run_dir: Path) -> None:
    """Raises ConfigError if there is no prompt, or the output cannot be written: before a checkpoint is read."""
    if (run_dir / CHECKPOINTS_DIR).exists():
        raise ConfigError(
            f"hydra.run.dir={run_dir} holds a training run, whose settings and summary would be replaced: give that as "
            "generate.model, and leave hydra.run.dir out"
        )
    _texts(config.generate)
    _output(config.generate, run_dir)


def with_prompts(config: Config, run_dir: Path) -> Config:
    """The configuration with the length of the longest prompt and its answer, and the path of the output.

    Raises:
        ConfigError: as `check_files`; also if a prompt is empty, the tokenizer is not the model's, or the model's
            rotary embeddings change with the length.
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
    """The prompts in their order, tokenized as transformers does: with what the tokenizer puts before a text.

    Raises:
        ConfigError: as `with_prompts`.
    """
    texts = _texts(config.generate)
    tokenizer = open_tokenizer(config.data)
    _check_tokenizer(config, tokenizer)
    if isinstance(tokenizer, PretrainedTokenizer):
        tokens = tokenizer.wrapped(texts, return_attention_mask=False, verbose=False)["input_ids"]
    else:
        tokens = [encoded[:-1].tolist() for encoded in tokenizer.encode(texts)]  # without the separator
    for number, one in enumerate(tokens, 1):
        if not one:
            raise ConfigError(f"prompt {number} is empty, and the tokenizer begins no text by itself: give some text")
    return [Prompt(*pair) for pair in zip(texts, tokens, strict=True)]


def _texts(given: GenerateConfig) -> list[str]:
    if (given.prompt is None) == (given.prompt_file is None):
        raise ConfigError(
            "recipe=generate needs either a prompt, \"generate.prompt='Once upon a time'\", or a file of prompts, "
            "generate.prompt_file=prompts.jsonl"
        )
    if given.prompt is not None:
        return [given.prompt]
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
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of_row(f"{setting}, line {number}", line) for number, line in numbered]


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


def _prompt_of_row(where: str, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f'{where} is no JSON ({error}): write {{"prompt": "some text"}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{where} has no text as prompt: write {{"prompt": "some text"}}')
    return row["prompt"]


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    if problem := tokenizer_problem(tokenizer, config.model.vocab_size):
        raise ConfigError(problem)
    if tokenizer is BYTES and config.model.vocab_size != BYTES.size:
        raise ConfigError(
            f"the model has a vocabulary of {config.model.vocab_size:,} tokens, and its run names no tokenizer to make "
            f"them of a prompt: type data.tokenizer=FOLDER_OR_HUB_NAME (bytes are for models of {BYTES.size} tokens)"
        )
