"""Samplers of the density: they propose which one to try next, and estimate the lowest one within the bound.

The drop is a noisy, nearly monotone curve of the log density: flat, then a cliff. `ThresholdSampler` keeps a
Bayesian posterior over that curve and hence over the *threshold*: the density at which the true drop reaches the
bound. The *depth* of a density is log(1 / density): 0 for the dense model, larger for sparser ones.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.searching.posterior import (
    SE_FLOOR,
    SHARED,
    Array,
    Observation,
    Posterior,
    fit_posterior,
    quantile,
)

APART = 0.02  # densities that differ by a smaller fraction count as the same experiment
NEARLY_KNOWN = 1.2  # if high / low of the threshold's interval is below this, proposals cycle through LEVELS
LEVELS = (0.5, 0.9, 0.1, 0.75, 0.25)  # quantiles of the threshold's depth, which also tell the slope of the curve
WORTHWHILE = 0.9  # a model of a higher density is not worth having

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class WholeSampler(optuna.samplers.BaseSampler):
    """A sampler that proposes all parameters at once, from the study's other trials alone. Without state.

    Attributes:
        distributions: All parameters that it proposes.
    """

    distributions: dict[str, BaseDistribution]

    def propose_params(self, study: Study, number: int, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The parameters of trial ``number``, given all other trials of the study."""
        raise NotImplementedError

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters that it proposes."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes all parameters of a trial."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        return self.propose_params(study, trial.number, others)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuses: all parameters are known.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{type(self).__name__} searches {', '.join(self.distributions)} and cannot propose {param_name!r}; "
            "for other dimensions use the samplers gp, tpe or random"
        )


class _DensitySampler(WholeSampler):
    """A sampler of the one parameter ``density``; subclasses implement `propose`."""

    def __init__(self, low: float, max_drop: float) -> None:
        if not 0 < low < 1:
            raise ValueError(f"low={low}: the lowest density must lie between 0 and 1")
        if not 0 <= max_drop < math.inf:
            raise ValueError(f"max_drop={max_drop}: the bound must be a fraction of at least 0, such as 0.01")
        self.low = low
        self.max_drop = max_drop
        self.distributions = {"density": FloatDistribution(low, 1.0, log=True)}

    def propose(self, trials: Sequence[FrozenTrial]) -> float:
        """The density to try next, given all other trials of the study."""
        raise NotImplementedError

    def propose_params(self, study: Study, number: int, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The density, see `propose`."""
        # exp(log(low)) may be below low by the last bit, which Optuna refuses
        return {"density": min(1.0, max(self.low, self.propose(trials)))}


class ThresholdSampler(_DensitySampler):
    """Seeks the smallest density whose drop is within a bound; the study's one parameter is ``density``.

    Each finished trial counts as one observation of a curve drop(log density), see
    `autocompress.searching.posterior`: from ``params["density"]`` and the user attributes ``drop``, ``drop_se``
    (fractions) and, for a trial that was given up, ``rejected`` (its final drop would be at least ``drop``). The
    noise of an observation has two components:

    - *shared*: all trials are scored on the same validation samples, so part of their sampling error is one
      draw common to all of them, which no number of trials averages out. It is a latent variable of the
      model: the threshold's posterior is as wide as fresh samples from the population would have it;
    - *own*: the rest of the sampling error, the training noise (inferred, about 0.2 points) and an error of
      the family of curves that grows with the distance from the bound; Student-t, to allow for outliers.

    The posterior is computed by adaptive importance sampling (AMIS; Cornuet, Marin, Mira and Robert 2012) with
    quasi-random points. It is computed from the study's trials each time: given the seed and the trials, the
    next density is the same in any process, with any storage and after any interruption.

    The next density is the posterior median of the threshold: Bayesian bisection. To make parallel trials differ,
    the densities of running trials divide the posterior into parts, and the next density is the median of the
    most probable part. Once the threshold is nearly known, proposals cycle through quantiles around it.

    With limits on costs, trials have the user attribute ``cost_excess``: the log of the cost over its limit. The
    bound on the drop requires a density above the threshold, a limit on costs one below the density at which the
    cost meets it, see `affordable_depth`; no density above that is proposed.

    Args:
        low: The lowest density of the study.
        max_drop: The bound on the drop, a fraction: 0.01 is one point.
        seed: Seeds the quasi-random points.
        shared: Share of the sampling variance that trials have in common, between 0 and 1.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, low: float, max_drop: float, seed: int = 0, *, shared: float = SHARED) -> None:
        super().__init__(low, max_drop)
        if not 0 <= shared <= 1:
            raise ValueError(f"shared={shared} must lie between 0 and 1")
        self.seed = seed
        self.shared = shared

    def posterior(self, trials: Iterable[FrozenTrial]) -> Posterior:
        """The posterior of the threshold given the finished trials; the prior if there are none."""
        return self._posterior(observations(trials))

    def _posterior(self, seen: Sequence[Observation]) -> Posterior:
        return fit_posterior(tuple(seen), self.low, self.max_drop, seed=self.seed, shared=self.shared)

    def done(self, trials: Sequence[FrozenTrial], tolerance: float) -> str | None:
        """The reason why no further trial is worth its cost, in words; None if one is.

        Args:
            trials: All trials of the study.
            tolerance: The relative width of the threshold's 80% interval that is narrow enough: 0.05 is 5%.
        """
        seen = observations(trials)
        if not seen:
            return None
        posterior = self._posterior(seen)
        if reason := _no_overlap(trials, posterior, self.low):
            return reason
        if posterior.p_feasible(self.low) >= 0.9:
            tried = max(seen).depth >= math.log(1 / self.low) - APART
            return f"the lowest density allowed, {self.low:.3g}, is within the bound" if tried else None
        worthwhile = max(WORTHWHILE, self.low**0.25)
        if posterior.p_feasible(worthwhile) <= 0.1:
            return f"no density below {worthwhile:.3g} is likely to be within the bound"
        low, high = posterior.interval()
        known = f"the threshold lies between densities {low:.3g} and {high:.3g} with 80% probability"
        if high / low <= 1 + tolerance:
            return f"{known}, within the tolerance of {tolerance:.0%}"
        low, high = posterior.learnable_interval()
        if high / low <= 1 + tolerance:
            return f"{known}, and more trials on the same validation samples cannot tell it better"
        return None

    def propose(self, trials: Sequence[FrozenTrial]) -> float:
        """The density to try next: never within 2% of one that was tried or is running."""
        seen = observations(trials)
        posterior = self._posterior(seen)
        depth_max = math.log(1 / self.low)
        running = sorted(depth_of(t) for t in trials if t.state == TrialState.RUNNING and "density" in t.params)
        taken = [0.0, *(o.depth for o in seen), *running]
        threshold = np.clip(posterior.curves.threshold[:, 0], 0, depth_max)
        part, weights = _heaviest_part(threshold, posterior.weights, running)
        low, high = posterior.learnable_interval()
        level = LEVELS[len(taken) % len(LEVELS)] if high / low < NEARLY_KNOWN else 0.5
        depth = max(quantile(part, weights, level), min(affordable_depth(trials), depth_max))
        return math.exp(-_keep_apart(depth, taken, depth_max))


class BisectionSampler(_DensitySampler):
    """Bisects the log density on whether trials were within the bound, as if they had no noise: a baseline.

    Running trials count as infeasible.

    Args:
        low: The lowest density of the study.
        max_drop: The bound on the drop, a fraction.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def bracket(self, trials: Iterable[FrozenTrial]) -> tuple[float, float]:
        """The highest infeasible and the lowest feasible density, between which the threshold lies."""
        low, high = self.low, 1.0
        for trial in sorted(trials, key=lambda t: t.number):
            density = trial.params.get("density")
            if density is None or not low < density < high:
                continue
            if trial.state == TrialState.RUNNING:
                low = density
            elif "drop" in trial.user_attrs:
                feasible = trial.user_attrs["drop"] <= self.max_drop and not trial.user_attrs.get("rejected")
                low, high = (low, density) if feasible else (density, high)
        return low, high

    def propose(self, trials: Sequence[FrozenTrial]) -> float:
        """The middle of the bracket in log density."""
        return math.sqrt(math.prod(self.bracket(trials)))


def observations(trials: Iterable[FrozenTrial]) -> list[Observation]:
    """The observations of finished trials; without the dense model, as every curve has a drop of 0 there."""
    seen = []
    for trial in trials:  # one pass, fast enough for studies of thousands of trials
        if trial.state not in FINISHED or "drop" not in (attrs := trial.user_attrs):
            continue
        if (density := asked_density(trial)) < 1:
            se, rejected = attrs.get("drop_se") or 0.0, attrs.get("rejected")
            seen.append(Observation(-math.log(density), attrs["drop"], max(SE_FLOOR, se), bool(rejected)))
    return seen


def depth_of(trial: FrozenTrial) -> float:
    """log(1 / density) of the density that a trial was run at, see `asked_density`."""
    return -math.log(asked_density(trial))


def asked_density(trial: FrozenTrial) -> float:
    """The target density of a trial: the proposed one, or the lowest one of its scheme if that is higher."""
    asked = trial.user_attrs.get("density_asked")
    return float(trial.params.get("density", 1.0) if asked is None else asked)


def affordable_depth(trials: Iterable[FrozenTrial]) -> float:
    """The estimated depth log(1 / density) from which on costs are within their limits; 0 without limits.

    Costs fall with the density. Between the sparsest trial that exceeds a limit and the next sparser one, the log
    cost is interpolated linearly in the log density. If all trials exceed it, the cost is extrapolated in
    proportion to the density.
    """
    return _affordable_depths(trials)[0]


def _affordable_depths(trials: Iterable[FrozenTrial]) -> tuple[float, float]:
    """The depth of `affordable_depth`, and a lower bound on it that allows for the error of the interpolation."""
    points = [(depth_of(t), t.user_attrs["cost_excess"]) for t in trials if "cost_excess" in t.user_attrs]
    points = sorted((depth, float(excess)) for depth, excess in points)
    last_exceeding = max((i for i, (_, excess) in enumerate(points) if excess > 0), default=None)
    if last_exceeding is None:
        return 0.0, 0.0
    depth, excess = points[last_exceeding]
    if last_exceeding + 1 == len(points):
        return depth + excess + APART, depth
    next_depth, next_excess = points[last_exceeding + 1]
    crossing = depth + (next_depth - depth) * excess / (excess - next_excess)
    return min(next_depth, crossing + APART), max(depth, crossing - (next_depth - crossing))


def _no_overlap(trials: Sequence[FrozenTrial], posterior: Posterior, low: float) -> str | None:
    """The reason, in words, why no density meets both the bound on the drop and the limits on costs, if so."""
    depth, min_depth = _affordable_depths(trials)
    if min_depth > math.log(1 / low) - APART:
        return f"even the lowest density allowed, {low:.3g}, costs more than it may"
    if min_depth > 0 and posterior.p_feasible(math.exp(-min_depth)) <= 0.1:
        return f"costs are within their limits below a density of {math.exp(-depth):.3g}, and the drop above that"
    return None


def _heaviest_part(threshold: Array, weights: Array, cuts: Sequence[float]) -> tuple[Array, Array]:
    """The draws, and weights, of the threshold in the most probable interval between two cuts."""
    part = np.searchsorted(np.asarray(cuts), threshold)
    heaviest = np.bincount(part, weights).argmax()
    return threshold[part == heaviest], weights[part == heaviest]


def _keep_apart(depth: float, taken: Sequence[float], depth_max: float) -> float:
    """The depth nearest to ``depth``, from 0 to ``depth_max``, that differs by 2% in density from all taken."""
    gap = -math.log1p(-APART) + 1e-9
    taken_depths = np.sort(np.asarray(taken))
    candidates = np.concatenate([[depth, depth_max], taken_depths - gap, taken_depths + gap])
    candidates = candidates[(candidates >= 0) & (candidates <= depth_max)]
    after = np.searchsorted(taken_depths, candidates)
    left = taken_depths[np.maximum(after - 1, 0)]
    right = taken_depths[np.minimum(after, len(taken_depths) - 1)]
    distance = np.minimum(np.abs(candidates - left), np.abs(candidates - right))
    free = candidates[distance >= gap * (1 - 1e-9)]
    return float(free[np.abs(free - depth).argmin()]) if len(free) else depth
