"""Tokens to text as they come."""

from __future__ import annotations

import numpy as np

from data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what an unfinished character decodes to
MAX_BYTES = 4  # of a character, and so the most tokens that it can take


class TextStream:
    """Decodes tokens one after the other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._num_shown = 0  # decode from here on; of those tokens the text is out

    def put(self, token: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._tokens.append(token)
        return self._new_text(is_last=len(self._tokens) - self._num_shown == MAX_BYTES)

    def rest(self) -> str:
        """The text of an unfinished end."""
        return self._new_text(is_last=True)

    def _new_text(self, is_last: bool) -> str:
        # a few tokens before are decoded, too: what a token becomes may depend on them
        before = self._decoded(self._tokens[self._start : self._num_shown])
        text = self._decoded(self._tokens[self._start :])
        if text.endswith(INCOMPLETE) and not is_last:
            return ""
        self._start, self._num_shown = self._num_shown, len(self._tokens)
        return text[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(np.array(tokens, np.int64)) if tokens else ""
