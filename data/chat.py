"""A conversation to tokens, and which of them are trained: what the assistant says, or a completion.

Messages become text by the tokenizer's own chat template. What the assistant says is what the template marks by
`{% generation %}`; a completion is trained where the template does not say more.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from data.source import BadRow, Conversation, CorpusError
from data.tokenizer import PretrainedTokenizer, Tokenizer

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
ROLES = ("system", "developer", "user", "assistant", "tool")
_ADVICE = "or give rows of prompt and completion, which need no mark"


def chat_template(wrapped: Any, tools: Any) -> str | None:
    """The template that a tokenizer of `transformers` applies; None if it has none."""
    try:
        return wrapped.get_chat_template(None, tools)
    except ValueError:
        return None


def prompt_tokens(wrapped: Any, messages: list[dict[str, Any]], tools: Any) -> list[int]:
    """A conversation, and what the template writes before the assistant's next turn."""
    return wrapped.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)["input_ids"]


def template_refusal(error: Exception) -> str:
    """What is wrong with a conversation on which the template raised the error."""
    return f"the chat template refuses it ({type(error).__name__}: {' '.join(str(error).split())})"


class EncodedChat(NamedTuple):
    """One conversation."""

    tokens: np.ndarray  # [n]
    trained: np.ndarray  # [n] bool


def unknown_roles(one: Conversation) -> set[str]:
    """The roles of its turns that are not in ROLES: a misspelt assistant is not trained, and nobody notices."""
    parts = [part for part in (one.messages, one.prompt, one.completion) if isinstance(part, list)]
    return {message["role"] for part in parts for message in part}.difference(ROLES)


class ChatEncoder:
    """Conversations to tokens by the tokenizer's chat template.

    Raises:
        CorpusError: for bytes, which have no template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, PretrainedTokenizer):
            raise CorpusError(
                "data=chat needs a tokenizer with a chat template, and bytes have none: add "
                "data.tokenizer=FOLDER_OR_HUB_NAME"
            )
        self._tokenizer, self._wrapped = tokenizer, tokenizer.wrapped
        self._ends = {*self._wrapped.all_special_ids, *self._wrapped.added_tokens_decoder, tokenizer.eos_id}

    def fingerprint(self) -> str:
        """Of the template."""
        return repr(self._wrapped.chat_template)

    def encode(self, conversations: list[Conversation]) -> list[EncodedChat | BadRow]:
        """The tokens of each, with EOS where the template writes no end.

        Raises:
            CorpusError: if there is no template that says what is trained.
        """
        plain = [one.messages for one in conversations if one.messages is not None and one.tools is None]
        rendered = iter(self._batch(plain))
        return [
            next(rendered) if one.messages is not None and one.tools is None else self._single(one)
            for one in conversations
        ]

    def _batch(self, conversations: list[list[dict[str, Any]]]) -> list[EncodedChat | BadRow]:
        if not conversations:
            return []
        self._check_template(None, needs_generation=True)
        try:
            masked = zip(self._masked(conversations, None), conversations, strict=True)
            return [self._of_assistant(*parts, messages) for parts, messages in masked]
        except Exception:  # one of them fails in the template: find it
            return [self._single(Conversation(one)) for one in conversations]

    def _single(self, one: Conversation) -> EncodedChat | BadRow:
        if isinstance(one.prompt, str):
            prompt, completion = self._tokenizer.tokens([one.prompt, one.completion])
            if not completion:
                return BadRow("an empty completion: nothing to train on")
            return self._ended([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
        has_generation = self._check_template(one.tools, needs_generation=one.messages is not None)
        try:
            if one.messages is not None:
                return self._of_assistant(*self._masked([one.messages], one.tools)[0], one.messages)
            return self._of_completion(one, has_generation)
        except Exception as error:  # of Jinja, whatever the template does
            return BadRow(template_refusal(error))

    def _check_template(self, tools: Any, needs_generation: bool) -> bool:
        """Whether the template marks what the assistant says. Raises CorpusError if it must and does not."""
        setting = f"data.tokenizer={self._tokenizer.name}"
        template = chat_template(self._wrapped, tools)
        if template is None:
            raise CorpusError(
                f"{setting} has no chat template: give the tokenizer of a model that was trained on chats, {_ADVICE} "
                "if they are plain text"
            )
        has_generation = _GENERATION.search(template) is not None
        if needs_generation and not has_generation:
            raise CorpusError(
                f"the chat template of {setting} does not mark what the assistant says: in its chat_template.jinja "
                "write {% generation %} before the assistant's content and {% endgeneration %} after its end token, "
                f"{_ADVICE}"
            )
        return has_generation

    def _masked(self, conversations: list[list[dict[str, Any]]], tools: Any) -> list[tuple[list[int], list[int]]]:
        batch = self._wrapped.apply_chat_template(
            conversations, tools=tools, return_assistant_tokens_mask=True, return_dict=True
        )
        return list(zip(batch["input_ids"], batch["assistant_masks"], strict=True))

    def _of_assistant(self, tokens: list[int], mask: list[int], said: list[dict[str, Any]]) -> EncodedChat | BadRow:
        """Of a template's tokens. `said` are the messages that may be trained."""
        if not any(mask):
            roles = list(dict.fromkeys(message["role"] for message in said))
            if "assistant" in roles:
                return BadRow("the chat template marks nothing of the assistant turn: nothing to train on")
            return BadRow(f"no assistant turn, only turns of {', '.join(map(repr, roles))}: nothing to train on")
        return self._ended(tokens, list(map(bool, mask)))

    def _of_completion(self, one: Conversation, has_generation: bool) -> EncodedChat | BadRow:
        messages = [*one.prompt, *one.completion]
        start = prompt_tokens(self._wrapped, one.prompt, one.tools)
        if has_generation:
            tokens, mask = self._masked([messages], one.tools)[0]
        else:
            tokens = self._wrapped.apply_chat_template(messages, tools=one.tools, return_dict=True)["input_ids"]
            mask = [1] * len(tokens)
        if tokens[: len(start)] != start:
            return BadRow("the chat template writes the prompt in another way when the completion follows")
        return self._of_assistant(tokens, [0] * len(start) + mask[len(start) :], one.completion)

    def _ended(self, tokens: list[int], trained: list[bool]) -> EncodedChat:
        """With EOS, unless a special token is the last but for white space."""
        last = len(tokens) - 1
        while last > 0 and tokens[last] not in self._ends and not self._wrapped.decode([tokens[last]]).strip():
            last -= 1
        if tokens[last] not in self._ends:
            tokens, trained = [*tokens, self._tokenizer.eos_id], [*trained, trained[last]]
        return EncodedChat(np.array(tokens, self._tokenizer.dtype), np.array(trained, bool))
