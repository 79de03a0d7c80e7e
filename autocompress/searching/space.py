"""Space: the configurations that a search may choose from. Each trial tries one of them."""

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
    """The configuration of one trial.

    Attributes:
        density: The density to compress to; 1 where the scheme takes none.
        scheme: How to compress.
        recovery: How to train.
        params: The proposed values of all dimensions but the density, by name.
    """

    density: float
    scheme: Scheme
    recovery: Recovery
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One choice of the scheme and of all other categorical dimensions: it has a drop curve of its own.

    Attributes:
        params: The choices by dimension; without dimensions that do not apply to the scheme.
        low: The lowest density to propose; 1 where there is no density to search over.
    """

    params: Mapping[str, Any]
    low: float

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether a trial with these parameters belongs to the arm."""
        return all(params.get(name) == value for name, value in self.params.items())


@dataclass(frozen=True)
class Space:
    """The configurations that a search may choose from.

    Attributes:
        schemes: The schemes to choose from; several make a categorical dimension.
        recovery: How trials train, except for settings that are dimensions.
        lows: For each scheme, the lowest density to propose; 1 where it has none to search over.
        dimensions: The other dimensions, for this model: see `autocompress.searching.dimensions.on_model`.
    """

    schemes: tuple[Scheme, ...]
    recovery: Recovery
    lows: tuple[float, ...]
    dimensions: tuple[Dimension, ...] = ()

    @property
    def low(self) -> float:
        """The lowest density of all schemes; 1 when none has a density to search over."""
        return min(self.lows)

    @property
    def is_finite(self) -> bool:
        """Whether all dimensions but the density are categorical."""
        return all(one.is_categorical for one in self.dimensions)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each dimension. A trial has values for all, even those that do not apply."""
        named: dict[str, BaseDistribution] = {DENSITY: FloatDistribution(self.low, 1.0, log=True)}
        if len(self.schemes) > 1:
            named[SCHEME] = CategoricalDistribution(list(map(describe, self.schemes)))
        return named | {one.name: one.distribution for one in self.dimensions}

    @property
    def dense_params(self) -> dict[str, Any]:
        """The dense model's parameters: density 1 and any others; Optuna models only what all trials have."""
        return {name: _middle(distribution) for name, distribution in self.distributions.items()} | {DENSITY: 1.0}

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """All combinations of a scheme and the dimensions that apply to it; none where a dimension is a range."""
        if not self.is_finite:
            return ()
        arms = []
        for scheme, low in zip(self.schemes, self.lows, strict=True):
            chosen = {SCHEME: describe(scheme)} if len(self.schemes) > 1 else {}
            applying = [one for one in self.dimensions if one.applies_to(scheme)]
            choices = [one.distribution.choices for one in applying]  # type: ignore[attr-defined]  # categorical
            for combination in itertools.product(*choices):
                params = dict(zip((one.name for one in applying), combination, strict=True))
                arms.append(Arm(chosen | params, low))
        return tuple(arms)

    def arm_of(self, params: Mapping[str, Any]) -> Arm | None:
        """The arm that a trial with these parameters belongs to; None where there are no arms."""
        return next((arm for arm in self.arms if arm.holds(params)), None)

    def params_at(self, arm: Arm, density: float) -> dict[str, Any]:
        """The parameters of a trial of an arm, including dimensions that do not apply to it."""
        # exp(log(low)) may be below low by the last bit, which Optuna would refuse
        return self.dense_params | dict(arm.params) | {DENSITY: min(1.0, max(self.low, density))}

    def suggest(self, trial: optuna.Trial) -> Configuration:
        """The configuration that the study's sampler chooses for a trial."""
        return self.configuration({name: _suggest(trial, name, d) for name, d in self.distributions.items()})

    def configuration(self, params: Mapping[str, Any]) -> Configuration:
        """The configuration of a trial with these parameters."""
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
