"""Samplers: which density to try next, and what the trials so far say about the lowest one within the bound.

With one free density the drop is a noisy, nearly monotone curve of the log density: flat, then a cliff.
`ThresholdSampler` keeps a Bayesian posterior over that curve and hence over the *threshold*: the density at
which the true drop reaches the bound.
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

# Proposals and the end; densities and ratios of densities.
APART = 0.02  # two densities that differ by less are the same experiment
NEARLY_KNOWN = 1.2  # when high / low of the threshold's interval is below this, take turns in LEVELS
LEVELS = (0.5, 0.9, 0.1, 0.75, 0.25)  # of the threshold's depth: the slope of the curve matters now, too
WORTHWHILE = 0.9  # a model of a higher density is not worth having

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class WholeSampler(optuna.samplers.BaseSampler):
    """A sampler that proposes all parameters at once, from the study's other trials alone. Without state.

    Attributes:
        distributions: All parameters that it proposes.
    """

    distributions: dict[str, BaseDistribution]

    def propose_params(self, study: Study, number: int, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """What trial ``number`` shall try, given all other trials of the study."""
        raise NotImplementedError

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All that it proposes."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes, given the study's other trials."""
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
    """A sampler of one density; `propose` is all that differs."""

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
        """The density."""
        # exp(log(low)) may fall short of low by the last bit, and Optuna would not take it
        return {"density": min(1.0, max(self.low, self.propose(trials)))}


class ThresholdSampler(_DensitySampler):
    """Seeks the smallest density whose drop is within a bound; the study's one parameter is ``density``.

    Each finished trial counts as one observation of a curve drop(log density), see `Curves`: from
    ``params["density"]`` and the user attributes ``drop``, ``drop_se`` (fractions) and, for a trial that was
    stopped as hopeless, ``rejected`` (the drop is at least the one seen). The noise of an observation is

    - *shared*: all trials are scored on the same validation samples, so part of their sampling error is one
      draw common to all of them, which no number of trials averages out. It is a latent variable of the
      model: the threshold's posterior is as wide as fresh samples from the population would have it;
    - *own*: the rest of the sampling error, the training noise (inferred, about 0.2 points) and an error of
      the family of curves that grows with the distance from the bound; Student-t, for odd points happen.

    The posterior comes from adaptive importance sampling (AMIS; Cornuet, Marin, Mira and Robert 2012) with
    quasi-random points. It is computed from the study's trials each time: given the seed and the trials, the
    next density is the same in any process, with any storage and after any interruption.

    The next density is the posterior median of the threshold: Bayesian bisection. Densities that are running
    cut the posterior into parts, and the median of the heaviest part comes next, so that parallel trials
    differ. Once the threshold is nearly known, proposals take turns in the quantiles around it.

    Where costs are limited, too, trials have the user attribute ``cost_excess``: the logarithm of how many times
    the cost is what is allowed. The bound on the drop wants denser models than its threshold, the limit sparser
    ones than where the cost meets it, see `affordable_depth`; no denser one than that is proposed.

    Args:
        low: The lowest density of the study.
        max_drop: The bound on the drop, a fraction: 0.01 is one point.
        seed: Of the quasi-random points.
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
        """What the finished among ``trials`` say about the threshold; the prior when there are none."""
        return self._believing(observations(trials))

    def _believing(self, seen: Sequence[Observation]) -> Posterior:
        return fit_posterior(tuple(seen), self.low, self.max_drop, seed=self.seed, shared=self.shared)

    def done(self, trials: Sequence[FrozenTrial], tolerance: float) -> str | None:
        """Why no further trial is worth its cost, in words; None when one is.

        Args:
            trials: All trials of the study.
            tolerance: The relative width of the threshold's 80% interval that is narrow enough: 0.05 is 5%.
        """
        seen = observations(trials)
        if not seen:
            return None
        posterior = self._believing(seen)
        if ends := _no_overlap(trials, posterior, self.low):
            return ends
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
        posterior = self._believing(seen)
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
    """Bisects the log density on whether the trial was within the bound, believing every trial: a baseline.

    Running trials count as infeasible.

    Args:
        low: The lowest density of the study.
        max_drop: The bound on the drop, a fraction.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def bracket(self, trials: Iterable[FrozenTrial]) -> tuple[float, float]:
        """The densities between which the threshold lies: the last infeasible and the last feasible one."""
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
    """What the finished trials say; not the dense model, whose drop of 0 every curve starts from."""
    seen = []
    for trial in trials:  # written for studies of thousands of trials
        if trial.state not in FINISHED or "drop" not in (told := trial.user_attrs):
            continue
        if (density := asked_density(trial)) < 1:
            se, rejected = told.get("drop_se") or 0.0, told.get("rejected")
            seen.append(Observation(-math.log(density), told["drop"], max(SE_FLOOR, se), bool(rejected)))
    return seen


def depth_of(trial: FrozenTrial) -> float:
    """log(1 / density) of what a trial was run at: what was proposed, unless its scheme could not go so low."""
    return -math.log(asked_density(trial))


def asked_density(trial: FrozenTrial) -> float:
    """The density that a trial was run at: what was proposed, or as low as its scheme could go."""
    asked = trial.user_attrs.get("density_asked")
    return float(trial.params.get("density", 1.0) if asked is None else asked)


def affordable_depth(trials: Iterable[FrozenTrial]) -> float:
    """log(1 / density) from which on costs are within their limits, as far as is known: 0 without limits.

    A cost falls with the density. Between the sparsest trial that exceeds it and the next that does not, its
    logarithm is taken to be linear in that of the density; where each exceeds it, proportional to the density.
    """
    return _affordable_depths(trials)[0]


def _affordable_depths(trials: Iterable[FrozenTrial]) -> tuple[float, float]:
    """The depth from which on costs are within their limits, and that from which on they may be."""
    seen = [(depth_of(t), t.user_attrs["cost_excess"]) for t in trials if "cost_excess" in t.user_attrs]
    known = sorted((depth, float(excess)) for depth, excess in seen)
    beyond = max((i for i, (_, excess) in enumerate(known) if excess > 0), default=None)
    if beyond is None:
        return 0.0, 0.0
    depth, excess = known[beyond]
    if beyond + 1 == len(known):
        return depth + excess + APART, depth
    deeper, room = known[beyond + 1]
    end = depth + (deeper - depth) * excess / (excess - room)
    return min(deeper, end + APART), max(depth, end - (deeper - end))


def _no_overlap(trials: Sequence[FrozenTrial], posterior: Posterior, low: float) -> str | None:
    """Why no density is within both the bound on the drop and the limits on costs, in words."""
    depth, at_least = _affordable_depths(trials)
    if at_least > math.log(1 / low) - APART:
        return f"even the lowest density allowed, {low:.3g}, costs more than it may"
    if at_least > 0 and posterior.p_feasible(math.exp(-at_least)) <= 0.1:
        return f"costs are within their limits below a density of {math.exp(-depth):.3g}, and the drop above that"
    return None


# The proposal.


def _heaviest_part(threshold: Array, weights: Array, cuts: Sequence[float]) -> tuple[Array, Array]:
    """The draws between two neighbouring cuts that together weigh most."""
    part = np.searchsorted(np.asarray(cuts), threshold)
    heaviest = np.bincount(part, weights).argmax()
    return threshold[part == heaviest], weights[part == heaviest]


def _keep_apart(depth: float, taken: Sequence[float], depth_max: float) -> float:
    """The depth nearest to ``depth``, within the study's, that is 2% in density away from all taken."""
    gap = -math.log1p(-APART) + 1e-9
    there = np.sort(np.asarray(taken))
    candidates = np.concatenate([[depth, depth_max], there - gap, there + gap])
    candidates = candidates[(candidates >= 0) & (candidates <= depth_max)]
    after = np.searchsorted(there, candidates)
    left, right = there[np.maximum(after - 1, 0)], there[np.minimum(after, len(there) - 1)]
    away = np.minimum(np.abs(candidates - left), np.abs(candidates - right))
    free = candidates[away >= gap * (1 - 1e-9)]
    return float(free[np.abs(free - depth).argmin()]) if len(free) else depth
