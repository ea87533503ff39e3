"""Text by a trained model, its prompt spread over the ring: greedy or sampled, as it comes and as JSON lines."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.tokenizer import SEPARATOR, PretrainedTokenizer, Tokenizer, open_tokenizer
from recipes.engine.build import build_engine
from recipes.inference.decoder import Decoder
from recipes.inference.prompts import Prompt, read_prompts
from recipes.inference.sampling import Sampler, Sampling
from recipes.inference.source import load_weights
from recipes.inference.text_stream import TextStream
from recipes.monitor.reporter import Reporter
from recipes.planning.explain import banner
from recipes.planning.memory import gib
from recipes.planning.plan import Plan
from ring_attention.trace import report_status


class Completion(NamedTuple):
    """What follows one prompt, and how long it took. Rates are None where nothing was timed."""

    tokens: list[int]
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


def generate(plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Complete every prompt, and return the median of the decoded tokens/s.

    Every rank must call it; `reporter` is rank 0's alone. It prints the text as it comes, and writes a row to
    generate.output once a prompt is done, so that a crash loses no row.
    """
    config, settings = plan.config, plan.config.generate
    assert settings.model is not None
    assert settings.output is not None
    if reporter:
        reporter.say(*banner(plan, run_dir), "", "loading the model ...")
    report_status("part", "building the model")
    engine = build_engine(plan)
    step = load_weights(engine.model, settings.model)
    prompts, tokenizer = read_prompts(config), open_tokenizer(config.data)
    stop = {_separator(tokenizer), *engine.model.stop_tokens}  # pyright: ignore[reportGeneralTypeIssues]
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    decoder, completions = Decoder(engine), []
    if reporter:
        reporter.say(f"{settings.model}{'' if step is None else f', step {step}'}")

    for number, prompt in enumerate(prompts, 1):
        report_status("part", f"prompt {number} of {len(prompts)}")
        if reporter:
            reporter.say("", f"prompt {number} of {len(prompts)}, {len(prompt.tokens):,} tokens: {_shortened(prompt)}")
        shown = _Shown(tokenizer, reporter)
        completion = _complete(decoder, prompt, settings.max_new_tokens, stop, Sampler(sampling, number - 1), shown)
        completions.append(completion)
        if reporter:
            is_stopped = len(completion.tokens) < settings.max_new_tokens
            row = {
                "prompt": prompt.text,
                **prompt.chat,
                "completion": tokenizer.decode(np.array(completion.tokens, np.int64)),
                "num_prompt_tokens": len(prompt.tokens),
                "tokens": completion.tokens,
                "ended_by": "stop token" if is_stopped else "max_new_tokens",
                "prefill_tokens_per_s": completion.prefill_tokens_per_s,
                "decode_tokens_per_s": completion.decode_tokens_per_s,
            }
            with Path(settings.output).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            reporter.say(f"{_rates(completion)}; keys and values: {gib(decoder.cache_bytes)} GiB per rank")
            reporter.advance()

    prefill = _median([one.prefill_tokens_per_s for one in completions])
    decode = _median([one.decode_tokens_per_s for one in completions])
    if reporter:
        reporter.write_summary({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode})
        reporter.say("", f"done: {len(prompts)} prompts", f"completions (JSON lines):  {settings.output}")
    return float("nan") if decode is None else decode


class _Shown:
    """Prints tokens as text on rank 0; nothing elsewhere."""

    def __init__(self, tokenizer: Tokenizer, reporter: Reporter | None) -> None:
        self._text, self._reporter = TextStream(tokenizer), reporter

    def put(self, token: int) -> None:
        if self._reporter:
            self._reporter.stream(self._text.put(token))

    def end(self) -> None:
        if self._reporter:
            self._reporter.stream(self._text.rest() + "\n")


def _complete(
    decoder: Decoder, prompt: Prompt, max_new_tokens: int, stop: set[int], sampler: Sampler, shown: _Shown
) -> Completion:
    started = time.perf_counter()
    decoder.read(prompt.tokens, max_new_tokens)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    is_read = time.perf_counter()
    tokens = []
    for token in decoder.decode(stop, sampler):  # each has come from the device
        tokens.append(token)
        shown.put(token)
    is_done = time.perf_counter()
    shown.end()
    num_read = len(prompt.tokens) - 1
    prefill = num_read / (is_read - started) if num_read else None
    return Completion(tokens, prefill, len(tokens) / (is_done - is_read) if tokens else None)


def _rates(completion: Completion) -> str:
    prefill, decode = (
        "none" if rate is None else f"{rate:,.1f}"
        for rate in (completion.prefill_tokens_per_s, completion.decode_tokens_per_s)
    )
    return f"{len(completion.tokens):,} new tokens; prefill {prefill} tokens/s, decode {decode} tokens/s"


def _median(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def _separator(tokenizer: Tokenizer) -> int:
    return tokenizer.eos_id if isinstance(tokenizer, PretrainedTokenizer) else SEPARATOR


def _shortened(prompt: Prompt) -> str:
    """The end of its text, in one line."""
    text = " ".join(prompt.text[-200:].split())
    return text if len(text) <= 60 else f"... {text[-60:]}"
