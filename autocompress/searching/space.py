"""Space: all that a search may choose from. A trial proposes a whole configuration in it."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autocompress.recovery import Recovery, with_settings
from autocompress.scheme import Scheme, describe
from autocompress.searching.dimensions import Dimension, plain, staged

DENSITY, SCHEME = "density", "scheme"  # the dimensions that every search may have


@dataclass(frozen=True)
class Configuration:
    """What one trial is run with.

    Attributes:
        density: The density to compress to; 1 where the scheme takes none.
        scheme: How to compress.
        recovery: How to train.
        params: All that was proposed beside the density, by name.
    """

    density: float
    scheme: Scheme
    recovery: Recovery
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One choice of the scheme and of all other categorical dimensions: it has a drop curve of its own.

    Attributes:
        params: The choices, by the dimension's name; without those that make no difference to the scheme.
        low: The lowest density to propose; 1 where there is no density to search over.
    """

    params: Mapping[str, Any]
    low: float

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether these parameters of a trial are of this arm."""
        return all(params.get(name) == value for name, value in self.params.items())


@dataclass(frozen=True)
class Space:
    """What a search may choose from.

    Attributes:
        schemes: The schemes to choose from; several make a categorical dimension.
        recovery: How trials train, but for what is a dimension.
        lows: For each scheme, the lowest density to propose; 1 where it has none to search over.
        dimensions: What else is varied, on this model: see `autocompress.searching.dimensions.on_model`.
    """

    schemes: tuple[Scheme, ...]
    recovery: Recovery
    lows: tuple[float, ...]
    dimensions: tuple[Dimension, ...] = ()

    @property
    def low(self) -> float:
        """The lowest density that any scheme may be proposed; 1 when none has a density to search over."""
        return min(self.lows)

    @property
    def is_finite(self) -> bool:
        """Whether everything but the density is a choice among a few."""
        return all(one.is_categorical for one in self.dimensions)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every dimension as Optuna sees it. A trial has a value for each; some may make no difference to it."""
        named: dict[str, BaseDistribution] = {DENSITY: FloatDistribution(self.low, 1.0, log=True)}
        if len(self.schemes) > 1:
            named[SCHEME] = CategoricalDistribution(list(map(describe, self.schemes)))
        return named | {one.name: one.distribution for one in self.dimensions}

    @property
    def dense_params(self) -> dict[str, Any]:
        """Of the dense model: density 1, whatever else. Optuna models the dimensions that all trials have."""
        return {name: _middle(distribution) for name, distribution in self.distributions.items()} | {DENSITY: 1.0}

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """All combinations of scheme and categorical dimensions that differ; none where one is continuous."""
        if not self.is_finite:
            return ()
        found = []
        for scheme, low in zip(self.schemes, self.lows, strict=True):
            chosen = {SCHEME: describe(scheme)} if len(self.schemes) > 1 else {}
            applying = [one for one in self.dimensions if one.applies_to(scheme)]
            choices = [one.distribution.choices for one in applying]  # type: ignore[attr-defined]  # categorical
            for combination in itertools.product(*choices):
                params = dict(zip((one.name for one in applying), combination, strict=True))
                found.append(Arm(chosen | params, low))
        return tuple(found)

    def arm_of(self, params: Mapping[str, Any]) -> Arm | None:
        """The arm that a trial's parameters are of; None where there are no arms."""
        return next((arm for arm in self.arms if arm.holds(params)), None)

    def params_at(self, arm: Arm, density: float) -> dict[str, Any]:
        """The parameters of a trial of an arm, those that make no difference to it included."""
        # exp(log(low)) may fall short of low by the last bit, and Optuna would not take it
        return self.dense_params | dict(arm.params) | {DENSITY: min(1.0, max(self.low, density))}

    def suggest(self, trial: optuna.Trial) -> Configuration:
        """Has the study's sampler choose in every dimension."""
        return self.configuration({name: _suggest(trial, name, d) for name, d in self.distributions.items()})

    def configuration(self, params: Mapping[str, Any]) -> Configuration:
        """The configuration that a trial's parameters stand for."""
        chosen = self._scheme(params)
        scheme, recovery, relative = self.schemes[chosen], self.recovery, dict[str, float]()
        density = max(self.lows[chosen], params[DENSITY]) if scheme.takes_density else 1.0
        for one in self.dimensions:
            value = plain(params[one.name])
            if one.of == "recovery":
                recovery = with_settings(recovery, **{one.field: value})
            elif one.of == "scheme":
                scheme = one.put(scheme, value)
            else:
                relative |= dict.fromkeys(one.modules, value)
        scheme = staged(scheme, relative) if relative else scheme
        others = {name: value for name, value in params.items() if name != DENSITY}
        return Configuration(density, scheme, recovery, others)

    def _scheme(self, params: Mapping[str, Any]) -> int:
        names = [describe(scheme) for scheme in self.schemes]
        return names.index(params[SCHEME]) if len(names) > 1 else 0


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
        case FloatDistribution():
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    raise AssertionError(f"{name}: a dimension is a list or a range")


def _middle(distribution: BaseDistribution) -> Any:
    """The first of a list, the middle of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    middle = (low * high) ** 0.5 if distribution.log else (low + high) / 2
    return round(middle) if isinstance(distribution, IntDistribution) else middle
