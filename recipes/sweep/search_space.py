"""What a sweep ranges over, from Hydra's override grammar to Optuna's distributions and back to overrides.

choice(...), a,b, glob(*): one of these; range(...): numbers at equal steps; interval(...) and tag(log,interval(...)):
numbers between two. Below `sweep`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from conf.schema import ConfigError

EXAMPLE = "'optimizer.lr=tag(log,interval(1e-4,1e-2))' or model.num_layers=2,4"


@dataclass(frozen=True)
class SearchSpace:
    """What is swept, by field or group, and the overrides that all trials have in common.

    Args:
        swept: the distributions.
        texts: the values as they were typed.
        keys: the left sides of the overrides, such as +experiment.
    """

    swept: dict[str, BaseDistribution]
    texts: dict[str, str]
    keys: dict[str, str]
    common: list[str]

    @property
    def num_combinations(self) -> int | None:
        """None if an interval has no end of them."""
        if any(isinstance(distribution, FloatDistribution) for distribution in self.swept.values()):
            return None
        return math.prod(len(_values(distribution)) for distribution in self.swept.values())

    def grid(self) -> list[dict[str, Any]]:
        """All combinations; the last field changes fastest, as in Hydra's own sweeps."""
        values = [_values(distribution) for distribution in self.swept.values()]
        return [dict(zip(self.swept, point, strict=True)) for point in itertools.product(*values)]

    def first_overrides(self) -> list[str]:
        """Of a trial with the first value of each field."""
        return self.overrides(
            {
                name: distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low  # pyright: ignore[reportAttributeAccessIssue]
                for name, distribution in self.swept.items()
            }
        )

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """Everything that a trial is composed of."""
        return [*self.common, *(f"{key}={values[name]}" for name, key in self.keys.items())]

    def describe(self, values: dict[str, Any]) -> str:
        """The overrides in which trials differ, for people: numbers are rounded."""
        return " ".join(f"{self.keys[name]}={shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """A swept value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_space(overrides: list[Override], sampler: str) -> SearchSpace:
    """The space; of several overrides of one field the last counts.

    Raises:
        ConfigError: if nothing is swept, or an interval in a grid.
    """
    last = {override.key_or_group: override for override in overrides}
    swept = {name: override for name, override in last.items() if override.is_sweep_override()}
    if not swept:
        raise ConfigError(f"nothing is swept: give a field several values, such as {EXAMPLE}")
    texts = {name: str(override.input_line).partition("=")[2] for name, override in swept.items()}
    for name, override in swept.items():
        if sampler == "grid" and override.is_interval_sweep():
            raise ConfigError(
                f"{name}={texts[name]} has no end of values, so it cannot be in a grid: use sweep.sampler=tpe, or "
                f"choice(...) or range(...)"
            )
    return SearchSpace(
        swept={name: _distribution(override) for name, override in swept.items()},
        texts=texts,
        keys={name: override.get_key_element() for name, override in swept.items()},
        common=[str(override.input_line) for name, override in last.items() if name not in swept],
    )


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """The trial's value: what it has already, or what Optuna chooses."""
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case FloatDistribution():
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    raise AssertionError(distribution)


def _distribution(override: Override) -> BaseDistribution:
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None
        assert high is not None
        if not low < high or ("log" in value.tags and low <= 0):
            raise ConfigError(f"{override.input_line} must rise" + (", from above 0" if "log" in value.tags else ""))
        kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
        return kind(low, high, log="log" in value.tags)  # pyright: ignore[reportArgumentType]
    if isinstance(value, RangeSweep):
        numbers: list[Any] = sorted(override.sweep_iterator())
        if len(numbers) > 1 and all(isinstance(number, int) for number in numbers):
            return IntDistribution(numbers[0], numbers[-1], step=numbers[1] - numbers[0])
        # steps of floats do not add up to the numbers that were typed
    elements: list[Any] = list(dict.fromkeys(override.sweep_iterator()))
    if not elements:
        raise ConfigError(f"{override.input_line} has no values: give at least one")
    if all(type(element) in (int, float) for element in elements):
        return CategoricalDistribution(elements)  # ordered as numbers in the figure
    return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))


def _values(distribution: BaseDistribution) -> list[Any]:
    match distribution:
        case CategoricalDistribution():
            return list(distribution.choices)
        case IntDistribution():
            return list(range(distribution.low, distribution.high + 1, distribution.step))
    raise AssertionError(f"an interval has no values: {distribution}")
