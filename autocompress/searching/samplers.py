"""Samplers by name: Bayesian in the drop curve, Optuna's own, and the plain ways they are measured against."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.sampler import BisectionSampler, ThresholdSampler
from autocompress.searching.arms import ArmSampler
from autocompress.searching.space import DENSITY, Space

SAMPLERS = ("threshold", "gp", "tpe", "bisection", "grid", "random")
GRID_SIZE = 20
MANY_ARMS = 64  # more cannot each be tried


class _Grid(optuna.samplers.GridSampler):
    """Optuna's grid sampler for ask and tell: its own `after_trial` stops `Study.optimize`, or raises."""

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Does nothing: the search ends by itself."""


class _Stateless(optuna.samplers.BaseSampler):
    """One of Optuna's samplers, created anew with a seed of its own for each trial and parameter.

    Its proposals depend on the seed, the trial's number and the study's trials alone, and not on how often the
    search was interrupted and resumed. Several searches that share a study propose different values.
    """

    def __init__(self, make: Callable[[int], optuna.samplers.BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed

    def _of(self, trial: FrozenTrial, parameter: str = "") -> optuna.samplers.BaseSampler:
        seeds = np.random.SeedSequence([self._seed, trial.number, *parameter.encode()])
        return self._make(int(seeds.generate_state(1)[0]))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


def check_sampler(name: str | None, space: Space, objectives: int = 1) -> str:
    """The sampler's name, if it can search such a space for so many objectives.

    By default it is ``threshold``; ``gp`` where there are ranges, or several objectives of a density alone.

    Raises:
        ValueError: If there is no sampler of that name, or it cannot; the message says what can.
    """
    if name is None:
        return "threshold" if space.is_finite and (objectives == 1 or len(space.arms) > 1) else "gp"
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name.lower(), SAMPLERS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown sampler {name!r}{hint} (available: {', '.join(SAMPLERS)})")
    if objectives > 1 and (name == "bisection" or (name == "threshold" and len(space.arms) == 1)):
        raise ValueError(
            f"{name} seeks the lowest density, not a front of {objectives} objectives; use gp, tpe, grid or random"
        )
    ranges = [one.name for one in space.dimensions if not one.is_categorical]
    if name == "bisection" and len(space.distributions) > 1:
        others = ", ".join(other for other in space.distributions if other != DENSITY)
        raise ValueError(
            f"bisection searches the density alone, not {others}; use threshold, gp, tpe, grid or random"
        )
    if name in ("threshold", "grid") and ranges:
        raise ValueError(
            f"{name} searches lists of values, and {ranges[0]} is a range; write {ranges[0]}=A,B,C, or use gp, "
            "tpe or random"
        )
    if name == "threshold" and len(space.arms) > MANY_ARMS:
        raise ValueError(
            f"threshold would try each of {len(space.arms)} combinations; give at most {MANY_ARMS}, or use gp, "
            "tpe or random"
        )
    return name


def make_sampler(
    name: str, space: Space, max_drop: float, seed: int, tolerance: float = 0.15
) -> optuna.samplers.BaseSampler:
    """The sampler of that name, see `SAMPLERS`.

    Args:
        name: ``threshold``, or a baseline: ``gp``, ``tpe``, ``random`` (Optuna's own, with the trials'
            constraints), ``grid`` (20 densities evenly spaced in log density, shuffled), ``bisection``.
        space: What it searches. With several arms ``threshold`` is Thompson sampling over them, see `ArmSampler`,
            and a grid has 20 densities of each.
        max_drop: The bound on the drop, a fraction.
        seed: Makes the proposals repeatable.
        tolerance: A threshold counts as known when its density is known to within this share of itself.

    Raises:
        ValueError: As `check_sampler`.
    """
    match check_sampler(name, space):
        case "threshold":
            several = len(space.arms) > 1
            low = min(space.low, 0.99)  # a scheme without a density has no threshold to search for
            return (
                ArmSampler(space, max_drop, seed, tolerance) if several else ThresholdSampler(low, max_drop, seed)
            )
        case "gp":
            # The default of 10 random trials to start with would be most of a study here. The objective is left
            # noisy, as Optuna shares this setting between objective and constraints.
            gp = optuna.samplers.GPSampler
            return _Stateless(lambda s: gp(seed=s, n_startup_trials=4, warn_independent_sampling=False), seed)
        case "tpe":
            several = len(space.distributions) > 1
            return _Stateless(lambda s: optuna.samplers.TPESampler(seed=s, multivariate=several), seed)
        case "bisection":
            return BisectionSampler(min(space.low, 0.99), max_drop)
        case "grid":
            return _Grid(_grid(space), seed=seed)
    return _Stateless(lambda s: optuna.samplers.RandomSampler(seed=s), seed)


def _grid(space: Space) -> dict[str, Sequence[str | float | int | bool | None]]:
    """The grid: densities below 1, which is the dense model's, and all values of the categorical dimensions."""
    densities = np.geomspace(space.low, 1, GRID_SIZE + 1)[:-1].tolist() if space.low < 1 else [1.0]
    lists = {n: list(d.choices) for n, d in space.distributions.items() if isinstance(d, CategoricalDistribution)}
    return {DENSITY: densities, **lists}
