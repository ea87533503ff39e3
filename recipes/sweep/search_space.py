"""The search space of a sweep: Hydra's override grammar as Optuna's distributions.

A choice is choice(...), a,b or glob(*). Numbers at equal steps are range(...). Numbers in an interval are interval(...)
or tag(log,interval(...)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from conf.schema import ConfigError

Distribution = CategoricalDistribution | IntDistribution | FloatDistribution
EXAMPLE = "'optimizer.lr=tag(log,interval(1e-4,1e-2))' or model.num_layers=2,4"


@dataclass(frozen=True)
class SearchSpace:
    """What is swept, by field or group."""

    swept: dict[str, Distribution]
    texts: dict[str, str]  # their values as typed
    keys: dict[str, str]  # the left sides of their overrides, such as +experiment
    common: list[str]  # the overrides that all trials share

    @property
    def num_combinations(self) -> float:
        """Infinite for a space with an interval of real numbers."""
        return math.prod(math.inf if isinstance(d, FloatDistribution) else len(_values(d)) for d in self.swept.values())

    def grid(self) -> Iterator[dict[str, Any]]:
        """All combinations, with the lowest number of an interval. The last field changes fastest, as in Hydra."""
        for combination in itertools.product(*map(_values, self.swept.values())):
            yield dict(zip(self.swept, combination, strict=True))

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """All overrides of a trial. One that was interrupted while it was drawn may lack values."""
        return [*self.common, *(f"{key}={values[name]}" for name, key in self.keys.items() if name in values)]


def format_value(value: Any) -> str:
    """A swept value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_space(overrides: list[Override], sampler: str) -> SearchSpace:
    """The search space. The last override of a field counts.

    Raises:
        ConfigError: if nothing is swept, or for an interval in a grid.
    """
    last = {override.key_or_group: override for override in overrides}
    swept = {name: override for name, override in last.items() if override.is_sweep_override()}
    if not swept:
        raise ConfigError(f"nothing is swept: give a field several values, such as {EXAMPLE}")
    texts = {name: str(override.input_line).partition("=")[2] for name, override in swept.items()}
    for name, override in swept.items():
        if sampler == "grid" and override.is_interval_sweep():
            raise ConfigError(f"{name}={texts[name]} has infinitely many values: use sweep.sampler=tpe or choice(...)")
    return SearchSpace(
        swept={name: _distribution(override) for name, override in swept.items()},
        texts=texts,
        keys={name: override.get_key_element() for name, override in swept.items()},
        common=[str(override.input_line) for name, override in last.items() if name not in swept],
    )


def _distribution(override: Override) -> Distribution:
    value = override.value()
    if isinstance(value, IntervalSweep):
        low: Any = value.start
        high: Any = value.end
        is_log = "log" in value.tags
        if not low < high or (is_log and low <= 0):
            raise ConfigError(f"{override.input_line} must be ascending" + (" and above 0" if is_log else ""))
        is_integer = isinstance(low, int) and isinstance(high, int)
        return (IntDistribution if is_integer else FloatDistribution)(low, high, log=is_log)
    if isinstance(value, RangeSweep):
        numbers: list[Any] = sorted(override.sweep_iterator())
        if len(numbers) > 1 and all(isinstance(number, int) for number in numbers):
            return IntDistribution(numbers[0], numbers[-1], step=numbers[1] - numbers[0])
        # floats become choices: adding up their step would not give the numbers that were typed
    choices: list[Any] = list(dict.fromkeys(override.sweep_iterator()))
    if not choices:
        raise ConfigError(f"{override.input_line} has no values: give at least one")
    if not all(type(choice) in (int, float) for choice in choices):  # numbers are sorted in the figure
        choices = list(dict.fromkeys(override.sweep_string_iterator()))
    return CategoricalDistribution(choices)


def _values(distribution: Distribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, FloatDistribution):
        return [distribution.low]
    return list(range(distribution.low, distribution.high + 1, distribution.step))
