"""Thompson sampling over arms: which scheme, which criterion, and at which density to try it next.

An arm is one combination of the categorical dimensions. Each has a drop curve and a threshold of its own, with the
posterior of `ThresholdSampler`; its worth is the objective at its threshold.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from autocompress.sampler import ThresholdSampler, WholeSampler, affordable_depth, depth_of, observations
from autocompress.searching.posterior import Array, Posterior, quantile
from autocompress.searching.space import DENSITY, Arm, Space

ALIKE = math.log(2)  # standard deviation of the arms' log thresholds around their common mean
BEATS = 0.05  # an arm is not tried again if it beats the best known one with a smaller probability
HOPELESS = 2  # failed trials after which an arm without any result is given up


class ArmSampler(WholeSampler):
    """Seeks the best objective within the bound over the arms of a space and their densities.

    Thompson (1933): each arm's threshold is drawn from its posterior, the objective at the drawn density is read
    off the arm's trials, and the arm that is best by this draw is tried, at the density that `ThresholdSampler`
    proposes from the arm's own trials. Each arm is tried once to begin with.

    Arms learn from each other roughly where the cliff is: their log thresholds are taken to scatter around a
    common mean with a standard deviation of log 2 (a random effect), so that an arm without trials starts near the
    others' thresholds. The study's answer does not use that: it relies on an arm's own trials alone.

    With several objectives each draw weighs their logarithms at random (as ParEGO does, Knowles 2006), so that the
    arms of the whole front take turns.

    Args:
        space: A space with arms.
        max_drop: The bound on the drop, a fraction.
        seed: Makes the proposals repeatable; they depend on it and on the study's trials alone.
        tolerance: An arm counts as known when its threshold density is known to within this share of itself.
    """

    def __init__(self, space: Space, max_drop: float, seed: int = 0, tolerance: float = 0.15) -> None:
        assert space.arms, "a space with a range is searched by gp, tpe or random"
        self.space, self.max_drop, self.seed, self.tolerance = space, max_drop, seed, tolerance
        self.distributions = space.distributions

    def propose_params(self, study: Study, number: int, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """An arm, and a density for it."""
        arm = self.choose(trials, study.directions, number)
        return self.space.params_at(arm, self._density(arm, trials))

    def choose(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], number: int) -> Arm:
        """The arm for trial ``number``, given the other trials."""
        mine = self._by_arm(trials)
        for arm, own in zip(self.space.arms, mine, strict=True):
            if not own:
                return arm
        rng = np.random.default_rng([self.seed, number])
        weights = rng.dirichlet(np.ones(len(directions)))
        worths, beliefs = Worths(mine, trials, directions), self.shared_beliefs(mine)

        def drawn(i: int) -> float:
            threshold, p = beliefs[i]
            return float(weights @ worths.at(i, rng.choice(threshold, size=1, p=p))[:, 0])

        candidates = self.open_arms(trials, directions) or list(range(len(mine)))
        return self.space.arms[min(candidates, key=drawn)]

    def open_arms(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[int]:
        """Indices of the arms worth another trial: not known yet, and perhaps better than the best known one."""
        mine = self._by_arm(trials)
        unknown = [i for i, own in enumerate(mine) if not self._is_known(self.space.arms[i], own)]
        if len(directions) > 1:
            return unknown
        worths, beliefs = Worths(mine, trials, directions), self.shared_beliefs(mine)
        known = (i for i in range(len(mine)) if i not in unknown)
        best = min((self._safe_worth(i, mine, worths) for i in known), default=math.inf)

        def may_be_best(i: int) -> bool:
            threshold, p = beliefs[i]
            return not mine[i] or float(p @ (worths.at(i, threshold)[0] < best)) > BEATS

        return [i for i in unknown if may_be_best(i)]

    def best(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> Arm | None:
        """The arm of the best objective at its density that is within the bound with 90% probability.

        None with several objectives, or if that arm has no trials.
        """
        if len(directions) > 1:
            return None
        mine = self._by_arm(trials)
        worths = Worths(mine, trials, directions)
        best = min(range(len(mine)), key=lambda i: self._safe_worth(i, mine, worths))
        return self.space.arms[best] if mine[best] else None

    def done(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> str | None:
        """Why no further trial is worth its cost, in words; None when one is."""
        if self.open_arms(trials, directions):
            return None
        n = len(self.space.arms)
        return f"of the {n} combinations each is known well enough, or known not to be the best"

    def posterior(self, arm: Arm, trials: Sequence[FrozenTrial]) -> Posterior:
        """The posterior of the arm's threshold, given its own trials."""
        return self._sampler(arm).posterior(of_arm(arm, trials))

    def shared_beliefs(self, mine: Sequence[Sequence[FrozenTrial]]) -> list[tuple[Array, Array]]:
        """Draws of each arm's threshold (log 1/density) and their probabilities, given the trials of all arms.

        They are those of each arm's own posterior, reweighted: a normal prior around the precision-weighted mean
        of the other arms' thresholds replaces the flat one. An arm without a density has the single draw 0.
        """
        arms = zip(self.space.arms, mine, strict=True)
        own = [self._sampler(arm).posterior(trials) if arm.low < 1 else None for arm, trials in arms]
        seen = [(i, *_moments(b)) for i, b in enumerate(own) if b is not None and observations(mine[i])]
        shared = []
        for i, belief in enumerate(own):
            if belief is None:
                shared.append((np.zeros(1), np.ones(1)))
                continue
            threshold, weights = belief.curves.threshold[:, 0], belief.weights
            others = [(mean, 1 / (variance + ALIKE**2)) for j, mean, variance in seen if j != i]
            if others:
                precision = sum(weight for _, weight in others)
                mean = sum(m * weight for m, weight in others) / precision
                log_prior = -((threshold - mean) ** 2) / (2 * (ALIKE**2 + 1 / precision))
                weights = weights * np.exp(log_prior - log_prior.max())
                weights = weights / weights.sum()
            shared.append((np.minimum(threshold, -math.log(self.space.arms[i].low)), weights))
        return shared

    def _density(self, arm: Arm, trials: Sequence[FrozenTrial]) -> float:
        """The density at which to try an arm next."""
        if arm.low == 1:
            return 1.0
        mine = self._by_arm(trials)
        i = self.space.arms.index(arm)
        if mine[i]:
            return self._sampler(arm).propose(mine[i])
        return math.exp(-quantile(*self.shared_beliefs(mine)[i], 0.5))  # near the other arms' thresholds

    def _is_known(self, arm: Arm, own: Sequence[FrozenTrial]) -> bool:
        """Whether an arm's threshold is known to within the tolerance, or the arm has only failed."""
        if not any(t.state.is_finished() and "drop" in t.user_attrs for t in own):
            return len([t for t in own if t.state.is_finished()]) >= HOPELESS
        return arm.low == 1 or self._sampler(arm).done(own, self.tolerance) is not None

    def _safe_worth(self, i: int, mine: Sequence[Sequence[FrozenTrial]], worths: "Worths") -> float:
        """The single objective of arm ``i`` at its sparsest density within the bound with 90% probability.

        Infinite if there is no such density.
        """
        arm, own = self.space.arms[i], mine[i]
        if arm.low == 1:
            return float(worths.at(i, np.zeros(1))[0, 0]) if any(map(_is_feasible, own)) else math.inf
        depth = -math.log(self._sampler(arm).posterior(own).threshold(0.9))
        reachable = depth > 0 and depth >= affordable_depth(own)
        return float(worths.at(i, np.array([depth]))[0, 0]) if reachable else math.inf

    def _by_arm(self, trials: Sequence[FrozenTrial]) -> list[list[FrozenTrial]]:
        """The trials of each arm, as by `of_arm`, in a single pass over the trials."""
        own: list[list[FrozenTrial]] = [[] for _ in self.space.arms]
        choices = [name for name in self.distributions if name != DENSITY]
        lists: dict[tuple[Any, ...], list[list[FrozenTrial]]] = {}  # by the choices: those of their arms
        for trial in trials:
            if not (params := trial.params) or trial.user_attrs.get("dense"):
                continue
            chosen = tuple(params.get(name) for name in choices)
            if chosen not in lists:
                lists[chosen] = [mine for arm, mine in zip(self.space.arms, own, strict=True) if arm.holds(params)]
            for mine in lists[chosen]:
                mine.append(trial)
        return own

    def _sampler(self, arm: Arm) -> ThresholdSampler:
        return ThresholdSampler(arm.low, self.max_drop, self.seed)


class Worths:
    """Predicts the objectives of each arm at any density from its trials: the smaller, the better.

    The logarithm of an objective is taken to be linear in the logarithm of the density, with the same slope in all
    arms, through the arm's nearest trial. An objective with values that are not positive is taken as it is.

    Args:
        mine: The trials of each arm.
        trials: All trials; the dense model's gives the slope as long as no arm has trials at two densities.
        directions: The directions of the objectives.
    """

    def __init__(
        self,
        mine: Sequence[Sequence[FrozenTrial]],
        trials: Sequence[FrozenTrial],
        directions: Sequence[StudyDirection],
    ) -> None:
        dense = [(0.0, np.array(t.values)) for t in trials if t.user_attrs.get("dense")]
        of_arms = [[(depth_of(t), np.array(t.values)) for t in own if t.values] for own in mine]
        every = np.array([values for points in (dense, *of_arms) for _, values in points])
        sign = np.array([1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in directions])
        as_log = (every > 0).all(axis=0)

        def scored(points: Sequence[tuple[float, Array]]) -> tuple[Array, Array]:
            """Depths in ascending order, and the scores there."""
            points = sorted(points, key=lambda point: point[0])
            values = np.array([v for _, v in points]).reshape(len(points), len(sign))
            logs = np.log(np.where(as_log, values, 1.0))
            return np.array([depth for depth, _ in points]), sign * np.where(as_log, logs, values)

        self._points = [scored(points) for points in of_arms]
        self._slope = _slope(self._points, scored(dense), len(sign))

    def at(self, i: int, depths: Array) -> Array:
        """The scores of arm ``i`` at depths of shape (n,), shape (objectives, n); infinite without trials."""
        depth, score = self._points[i]
        if not len(depth):
            return np.full((len(self._slope), len(depths)), math.inf)
        nearest = np.searchsorted((depth[1:] + depth[:-1]) / 2, depths)
        return np.asarray((score[nearest] + self._slope * (depths - depth[nearest])[:, None]).T)


def _slope(points: Sequence[tuple[Array, Array]], dense: tuple[Array, Array], objectives: int) -> Array:
    """The change of each score with depth, shape (objectives,): within arms, or else from the dense model."""
    centred = [(x - x.mean(), y - y.mean(axis=0)) for x, y in points if len(x)]
    if sum(float(x @ x) for x, _ in centred) < 1e-3 and len(dense[0]):
        centred = [(x, y - dense[1][0]) for x, y in points if len(x)]
    spread = sum(float(x @ x) for x, _ in centred)
    rise = sum((x @ y for x, y in centred), np.zeros(objectives))
    return np.asarray(rise / spread if spread > 0 else np.zeros(objectives))


def of_arm(arm: Arm, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of an arm, without the dense model's."""
    own = (t for t in trials if not arm.params or arm.holds(t.params))
    return [t for t in own if t.params and not t.user_attrs.get("dense")]


def _is_feasible(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("feasible"))


def _moments(belief: Posterior) -> tuple[float, float]:
    """Mean and variance of the threshold."""
    threshold, weights = belief.curves.threshold[:, 0], belief.weights
    mean = float(weights @ threshold)
    return mean, float(weights @ (threshold - mean) ** 2)
