"""How a rank's peak memory grows with layers and length, from a few that were measured, and the longest that fits.

Pure arithmetic; below `max_length`, which measures. N layers on sequences of L tokens peak at
fixed + per_layer N + (per_token + per_token_layer N) L: states do not grow with L, activations and the ring's buffers
do in proportion, for no rank holds scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LEAST_GROWTH = 0.005  # of a peak between two lengths: less says nothing of a slope
MOST_BEND = 0.05  # of a peak: what a third length may lie off the line through two others


class NoFit(ValueError):
    """The peaks do not follow the formula; the message says what was measured and what it should have been."""


@dataclass(frozen=True)
class MemoryFit:
    """Coefficients in GiB, of the rank that peaks highest."""

    fixed: float
    per_layer: float
    per_token: float
    per_token_layer: float

    @classmethod
    def through(cls, peaks_gib: Mapping[tuple[int, int], float]) -> MemoryFit:
        """Through the peaks of two numbers of layers and two lengths, by (layers, length).

        Raises:
            NoFit: if memory does not grow with the length.
        """
        (few, more), (short, long) = (sorted({key[index] for key in peaks_gib}) for index in (0, 1))
        slope = {
            layers: (peaks_gib[layers, long] - peaks_gib[layers, short]) / (long - short) for layers in (few, more)
        }
        for layers in (few, more):
            grown, peak = peaks_gib[layers, long] - peaks_gib[layers, short], peaks_gib[layers, long]
            if grown < LEAST_GROWTH * peak:
                raise NoFit(
                    f"the peak of {layers} layer{'s' if layers > 1 else ''} grows by {grown:.4f} GiB from "
                    f"L = {short:,} to {long:,}, less than {100 * LEAST_GROWTH:g} % of it: something else sets it"
                )
        at_zero = {layers: peaks_gib[layers, short] - slope[layers] * short for layers in (few, more)}
        # a layer takes at least nothing; what is less is noise
        per_layer = max(0.0, (at_zero[more] - at_zero[few]) / (more - few))
        per_token_layer = max(0.0, (slope[more] - slope[few]) / (more - few))
        return cls(at_zero[few] - few * per_layer, per_layer, slope[few] - few * per_token_layer, per_token_layer)

    def peak_gib(self, num_layers: int, length: int) -> float:
        return self.without_tokens_gib(num_layers) + self.per_token_gib(num_layers) * length

    def without_tokens_gib(self, num_layers: int) -> float:
        return self.fixed + self.per_layer * num_layers

    def per_token_gib(self, num_layers: int) -> float:
        return self.per_token + self.per_token_layer * num_layers

    def longest(self, num_layers: int, limit_gib: float, multiple: int) -> int:
        """The longest L that peaks at no more than the limit, a multiple of `multiple`; 0 if none does."""
        length = (limit_gib - self.without_tokens_gib(num_layers)) / self.per_token_gib(num_layers)
        return max(0, int(length // multiple) * multiple)


def check_line(peaks_gib: Mapping[int, float]) -> None:
    """Raises NoFit unless the peaks of three lengths, by length, lie on a line."""
    short, middle, long = sorted(peaks_gib)
    slope = (peaks_gib[middle] - peaks_gib[short]) / (middle - short)
    expected = peaks_gib[middle] + slope * (long - middle)
    if abs(peaks_gib[long] - expected) > MOST_BEND * peaks_gib[long]:
        raise NoFit(
            f"L = {short:,} and {middle:,} peak at {peaks_gib[short]:.3f} and {peaks_gib[middle]:.3f} GiB, so L = "
            f"{long:,} should peak at {expected:.3f}, but does at {peaks_gib[long]:.3f}: memory is no line over L"
        )
