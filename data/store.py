"""The tokens of a source on disk: made once, then memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenStore:
    """All documents of one source, one after the other."""

    name: str  # of the source, as in conf.schema.source_configs
    tokens: np.ndarray  # [T] memory-mapped, uint16 or int32
    ends: np.ndarray  # [N] int64, cumulative; document d is tokens[ends[d-1]:ends[d]], with its separator or EOS
    trained: np.ndarray | None = None  # [T] bool: whether a token may be a label; None: all may
    num_skipped: int = 0  # rows that data.bad_rows=skip left out

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [N] int64."""
        return np.diff(self.ends, prepend=0)
