"""The posterior of the drop curve given the trials so far, and of the lowest density within the bound.

With one free density the drop is a noisy, nearly monotone curve of the log density: flat, then a cliff. The
*threshold* is the density at which the true drop reaches the bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtr, ndtri

Array: TypeAlias = NDArray[np.float64]

# The noise of one observed drop; fractions (0.01 is one point).
TRAINING_NOISE = 2e-3  # prior median of the effect of the training seed alone (ResNet-56 on CIFAR-10: 0.2 points)
SHARED = 0.5  # share of the sampling variance that trials have in common: they share the validation samples
MISFIT = 0.2  # error of the family of curves, as a share of the distance from the bound: there it has to fit
NU = 4  # degrees of freedom of the Student-t noise
SE_FLOOR = 1e-4  # least standard error: an estimate of 0 means only that no sample disagreed
BOUND_FLOOR = 0.005  # the scale of the cliff when the bound itself is smaller
FAR = 5  # drops beyond so many bounds count as "at least that": real curves saturate, the family does not

MANY = 48  # the most observations that a fit uses, see `telling`
AT_A_TIME = 8  # observations that are evaluated together at all draws: so many stay in a processor's cache

# Settings of the adaptive importance sampling: a Monte-Carlo error of 1% of the interval's width, in 10 ms.
# Its sums use einsum, on one thread: BLAS would start more for this many draws, which doubles the time.
DIMENSIONS, ROUNDS, POINTS = 6, 8, 1280
WIDEN = 1.5  # the next round's covariance over that of the draws so far
ENOUGH = 8  # effective draws that a fit needs; more contract too slowly, fewer are no fit


class Observation(NamedTuple):
    """The result of a finished trial: at ``depth`` = log(1 / density) it dropped ``drop``, or at least that.

    Attributes:
        depth: log(1 / density): 0 is dense, larger is sparser.
        drop: Observed drop against the dense model, a fraction.
        drop_se: Its standard error from the finite validation set.
        rejected: The trial was stopped early: the drop is at least ``drop``.
    """

    depth: float
    drop: float
    drop_se: float
    rejected: bool = False


@dataclass(frozen=True)
class Curves:
    """A family of curves drop(depth), one per row, that cross the bound at ``threshold``.

    With u the depth, D the bound and t the threshold::

        drop(u) = a g(u) + (D - a g(t)) (F(u) - F(0)) / (F(t) - F(0)),    F(u) = log(1 + exp(k (u - t) + z))

    a is the plateau: the drop (or gain, when negative) before the cliff, and g(u) = 1 - exp(-u / 0.2) lets every
    curve start from the dense model's drop of 0. F is the cliff: exponential with z well below 0, a hockey stick
    that bends z / k before the threshold with z well above 0.

    Attributes:
        threshold: t, shape (n, 1).
        plateau: a, a fraction, shape (n, 1).
        steepness: k, shape (n, 1).
        bend: z, shape (n, 1).
        bound: D, a fraction.
    """

    threshold: Array
    plateau: Array
    steepness: Array
    bend: Array
    bound: float

    def __call__(self, depth: Array) -> Array:
        """The drops at depths of shape (m,), shape (n, m)."""
        t, a = self.threshold, self.plateau

        foot, height = self._scale
        rise = (_softplus(self.steepness * (depth - t) + self.bend) - foot) * height
        return np.asarray(a * _ramp(depth) + rise)

    @cached_property
    def _scale(self) -> tuple[Array, Array]:
        """F(0), and (D - a g(t)) / (F(t) - F(0)), shape (n, 1) each."""
        foot = _softplus(self.bend - self.steepness * self.threshold)
        height = self.bound - self.plateau * _ramp(self.threshold)
        return foot, height / (_softplus(self.bend) - foot)


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior of the threshold, the smallest density whose true drop is within the bound, by weighted draws.

    *True* means on the population: the noise that all trials share through the validation samples does not
    average out over trials, and is part of every probability here.

    Attributes:
        low: The lowest density of the study.
        curves: Draws of the drop curve.
        weights: Their probabilities, shape (n,).
        shared: The draws of the noise common to all trials, in standard errors, shape (n,).
    """

    low: float
    curves: Curves
    weights: Array
    shared: Array

    def p_feasible(self, density: float) -> float:
        """The probability that the true drop at ``density`` is within the bound."""
        return 1 - self._thresholds.p_below(math.log(1 / density))

    def threshold(self, probability: float) -> float:
        """The smallest density feasible with at least this probability; never below the study's lowest."""
        return self._density(self._thresholds.quantile(1 - probability))

    def interval(self, mass: float = 0.8) -> tuple[float, float]:
        """The central interval ``(low, high)`` that holds the threshold density with probability ``mass``."""
        return self.threshold((1 - mass) / 2), self.threshold((1 + mass) / 2)

    def learnable_interval(self, mass: float = 0.8) -> tuple[float, float]:
        """The same interval if the noise common to all trials were known: the part that more trials can narrow."""
        high, low = (self._density(self._learnable.quantile(q)) for q in ((1 - mass) / 2, (1 + mass) / 2))
        return low, high

    def curve(self, densities: ArrayLike, mass: float = 0.8) -> tuple[Array, Array, Array]:
        """The drop at ``densities``, shape (m,): its median and the ends of its central interval."""
        drops = self.curves(np.log(1 / np.asarray(densities, dtype=float)))
        levels = (0.5, (1 - mass) / 2, (1 + mass) / 2)
        draws = [_Draws(drop, self.weights) for drop in drops.T]
        middle, low, high = (np.array([drop.quantile(level) for drop in draws]) for level in levels)
        return middle, low, high

    @cached_property
    def _thresholds(self) -> "_Draws":
        return _Draws(self.curves.threshold[:, 0], self.weights)

    @cached_property
    def _learnable(self) -> "_Draws":
        """The threshold minus its linear regression on the common noise."""
        t, s, w = self.curves.threshold[:, 0], self.shared, self.weights
        mean_t, mean_s = (w * t).sum(), (w * s).sum()
        slope = float((w * (t - mean_t) * (s - mean_s)).sum() / (w * (s - mean_s) ** 2).sum())
        return _Draws(t - slope * (s - mean_s), w)

    def _density(self, depth: float) -> float:
        return float(min(1.0, max(self.low, math.exp(-depth))))


# The latest posteriors, half a MB each: those of one state of a study, and of its arms, are needed several times.
_known: dict[tuple[tuple[Observation, ...], float, float, int, float], Posterior] = {}
STATES, KNOWN = 2, 128  # how many earlier states of one arm are kept, and how many posteriors in all


def fit_posterior(
    seen: tuple[Observation, ...], low: float, bound: float, *, seed: int = 0, shared: float = SHARED
) -> Posterior:
    """The posterior of the threshold given the observations; the prior when there are none.

    The latest results are cached. Of a growing list of observations only the last states are kept, so that a long
    study takes no more memory than a short one.

    Args:
        seen: The observations of the finished trials.
        low: The lowest density of the study.
        bound: The bound on the drop, a fraction: 0.01 is one point.
        seed: Seeds the quasi-random points.
        shared: Share of the sampling variance that trials have in common, between 0 and 1.
    """
    key = (seen, low, bound, seed, shared)
    posterior = _known.pop(key, None)
    if posterior is None:
        posterior = _fitted(*key)
        grown = [old for old in list(_known) if old[1:] == key[1:] and old[0] == seen[: len(old[0])]]
        for old in (*grown[:-STATES], *list(_known)[:-KNOWN]):
            _known.pop(old, None)
    _known[key] = posterior  # now the latest
    return posterior


def _fitted(seen: tuple[Observation, ...], low: float, bound: float, seed: int, shared: float) -> Posterior:
    """Computes `fit_posterior` by adaptive importance sampling with quasi-random points.

    Cornuet, Marin, Mira and Robert, "Adaptive Multiple Importance Sampling" (2012). The same arguments give the
    same posterior in any process.
    """
    depth_max = math.log(1 / low)
    data = _as_arrays(telling(seen, bound), FAR * max(bound, BOUND_FLOOR))

    def log_likelihood(x: Array) -> Array:
        return _log_likelihood(data, *_from_normal(x, depth_max, bound), shared)

    x, weights = _sample(log_likelihood, seed, rounds=ROUNDS if seen else 1)
    curves, _, shared_noise = _from_normal(x, depth_max, bound)
    return Posterior(low, curves, weights, shared_noise[:, 0].copy())  # a view would keep all of x


# The model. A draw is a point x of shape (6,); under the prior its coordinates are standard normal.


def _from_normal(x: Array, depth_max: float, bound: float) -> tuple[Curves, Array, Array]:
    """Curves, training noise and shared noise of draws x of shape (n, 6); the latter two of shape (n, 1)."""
    x_threshold, x_slope, x_bend, x_rise, x_noise, shared = np.hsplit(x, DIMENSIONS)
    # The threshold: anywhere in log density, with some room beyond the lowest density.
    threshold = np.maximum(1e-3, 1.15 * depth_max * ndtr(x_threshold))
    # The height of the cliff, from the plateau to the bound: about the bound.
    scale = max(bound, BOUND_FLOOR)
    rise = scale * np.exp(0.5 * x_rise)
    # The cliff: from an exponential to a sharp bend, and its slope d drop / d depth at the threshold.
    bend = -3 + 11 * ndtr(x_bend)
    slope = 5 * scale * np.exp(0.9 * x_slope)
    steepness = slope / rise * _softplus(bend) / expit(bend)
    plateau = bound - rise
    training_noise = TRAINING_NOISE * np.exp(0.8 * x_noise)
    return Curves(threshold, plateau, steepness, bend, bound), training_noise, shared


def telling(seen: Sequence[Observation], bound: float) -> Sequence[Observation]:
    """At most `MANY` observations: half are nearest to where drops cross the bound, half are spread evenly.

    More of them would narrow the posterior by less than its error: trials share half of their sampling noise,
    which does not average out, and hundreds would be trusted beyond the fit of the family of curves. Given the
    crossing, the choice depends on depths alone, so that lucky trials are no more likely to be chosen.
    """
    if len(seen) <= MANY:
        return seen
    depth = np.array([one.depth for one in seen])
    order = np.argsort(depth, kind="stable")
    beyond = np.array([one.rejected or one.drop > bound for one in seen])[order]
    # The depth that has the fewest observations on its wrong side; the middle one of several.
    wrong = np.cumsum(np.concatenate([[np.sum(~beyond)], np.where(beyond, 1, -1)]))
    cuts = np.flatnonzero(wrong == wrong.min())
    crossing = depth[order][min(cuts[len(cuts) // 2], len(seen) - 1)]
    by_distance = np.argsort(np.abs(depth - crossing), kind="stable")
    near, rest = by_distance[: MANY // 2], np.sort(by_distance[MANY // 2 :])
    spread = rest[np.argsort(depth[rest], kind="stable")][
        np.linspace(0, len(rest) - 1, MANY - len(near)).round().astype(int)
    ]
    return [seen[i] for i in np.sort(np.concatenate([near, spread]))]


class _Data(NamedTuple):
    """Observations as arrays of shape (m,); ``rejected`` where the drop is at least ``drop``."""

    depth: Array
    drop: Array
    se: Array
    rejected: NDArray[np.bool_]


def _as_arrays(seen: Sequence[Observation], far: float) -> _Data:
    """The observations as arrays; drops beyond ``far`` are cut off there, and count as rejected."""
    depth, drop, se = (np.array([getattr(o, f) for o in seen]) for f in ("depth", "drop", "drop_se"))
    rejected = np.array([o.rejected for o in seen], dtype=bool) | (drop > far)
    # Standard errors are pooled over neighbouring densities: a trial with bad luck has a larger one than a
    # trial with good luck, and that alone would pull the threshold towards the lucky ones.
    near = np.exp(-(((depth[:, None] - depth) / 0.3) ** 2) / 2)
    return _Data(depth, np.minimum(drop, far), np.sqrt(near @ se**2 / near.sum(axis=1)), rejected)


def _log_likelihood(
    data: _Data, curves: Curves, training_noise: Array, shared_noise: Array, shared: float
) -> Array:
    """Log probability of the observations under each draw, shape (n,)."""
    log_p = np.zeros(len(shared_noise))
    for i in range(0, len(data.depth), AT_A_TIME):
        part = slice(i, i + AT_A_TIME)
        chunk = _Data(data.depth[part], data.drop[part], data.se[part], data.rejected[part])
        log_p += _log_probabilities(chunk, curves, training_noise, shared_noise, shared).sum(axis=1)
    return log_p


def _log_probabilities(
    data: _Data, curves: Curves, training_noise: Array, shared_noise: Array, shared: float
) -> Array:
    """Log probability of each observation under each draw, up to a constant, shape (n, m)."""
    depth, drop, se, rejected = data
    expected = curves(depth)
    misfit = MISFIT * (expected - curves.bound)
    variance = misfit**2 + ((1 - shared) * se**2 + training_noise**2)
    away = drop - expected - math.sqrt(shared) * se * shared_noise
    spread = variance + away**2 / NU
    log_p = NU / 2 * np.log(variance) - (NU + 1) / 2 * np.log(spread)
    if rejected.any():
        # P(T >= r) for Student's t with 4 degrees of freedom, in closed form.
        s = away[:, rejected] / np.sqrt(spread[:, rejected])
        log_p[:, rejected] = np.log(np.maximum(1e-300, 0.5 - 0.375 * s * (1 - s**2 / 12)))
    return np.asarray(log_p)


def _softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def _ramp(depth: Array) -> Array:
    return np.asarray(-np.expm1(-depth / 0.2))


# Sampling from the posterior.


def _sample(log_likelihood: Callable[[Array], Array], seed: int, rounds: int) -> tuple[Array, Array]:
    """Draws of the posterior under a standard normal prior, shape (n, 6), and their weights, shape (n,).

    Each round draws from a normal fitted to all draws so far, the first from the prior. A draw's weight is
    its posterior density over the mixture of the normals of all rounds (AMIS's deterministic mixture).
    """
    points = _normal_points(seed).reshape(ROUNDS, POINTS, DIMENSIONS)
    x, log_p, mixture = np.empty((0, DIMENSIONS)), np.empty(0), np.empty(0)
    log_w, proposals = np.empty(0), list[tuple[Array, Array]]()
    for z in points[:rounds]:
        mean, root = _fit(x, log_w) if proposals else (np.zeros(DIMENSIONS), np.eye(DIMENSIONS))
        new = mean + np.einsum("ij,kj->ik", z, root)
        of_new = [_log_normal(new, *earlier) for earlier in proposals] or [np.full(len(new), -np.inf)]
        mixture = np.concatenate([mixture, np.logaddexp.reduce(of_new)])
        x, log_p = np.concatenate([x, new]), np.concatenate([log_p, log_likelihood(new)])
        proposals.append((mean, root))
        mixture = np.logaddexp(mixture, _log_normal(x, mean, root))
        log_w = log_p - (x**2).sum(axis=1) / 2 - mixture
    return x, _normalized(log_w)


def _fit(x: Array, log_w: Array) -> tuple[Array, Array]:
    """Mean and Cholesky root of the widened covariance, the weights tempered until enough draws are effective."""
    for temperature in (1, 2, 4, 8, 16, 32):
        w = _normalized(log_w / temperature)
        if 1 / np.einsum("i,i", w, w) >= ENOUGH:
            break
    mean = np.einsum("i,ij->j", w, x)
    centred = x - mean
    covariance = np.einsum("ij,ik->jk", centred * w[:, None], centred)
    root = np.linalg.cholesky(WIDEN * covariance + 1e-6 * np.eye(DIMENSIONS))
    return mean, np.asarray(root, dtype=np.float64)


def _log_normal(x: Array, mean: Array, root: Array) -> Array:
    """The log density of a normal at draws x of shape (n, 6), up to a constant, shape (n,)."""
    z = np.einsum("ij,kj->ik", x - mean, np.linalg.inv(root))
    return np.asarray(-np.einsum("ij,ij->i", z, z) / 2 - np.log(np.diag(root)).sum())


def _normalized(log_w: Array) -> Array:
    w = np.exp(log_w - log_w.max())
    return np.asarray(w / w.sum())


@cache
def _normal_points(seed: int) -> Array:
    """Quasi-random standard normal points, shape (rounds x points, 6): a randomly shifted Kronecker sequence.

    Its step is the root of x^7 = x + 1, the golden ratio's analogue in 6 dimensions (Roberts 2018).
    """
    ratio = 1.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (DIMENSIONS + 1))
    step = ratio ** -np.arange(1, DIMENSIONS + 1)
    shift = np.random.default_rng(seed).random(DIMENSIONS)
    uniform = (shift + np.arange(1, ROUNDS * POINTS + 1)[:, None] * step) % 1
    return np.asarray(ndtri(np.clip(uniform, 1e-9, 1 - 1e-9)))


def quantile(values: Array, weights: Array, level: float) -> float:
    """The smallest value with at least ``level`` of the weight at or below it."""
    return _Draws(values, weights).quantile(level)


class _Draws:
    """Weighted draws of a number, sorted once for many quantiles and probabilities."""

    def __init__(self, values: Array, weights: Array) -> None:
        order = np.argsort(values)
        self.values, self.p_up_to = values[order], np.cumsum(weights[order])

    def quantile(self, level: float) -> float:
        first = self.p_up_to.searchsorted(level * self.p_up_to[-1])
        return float(self.values[min(first, len(self.values) - 1)])

    def p_below(self, value: float) -> float:
        before = self.values.searchsorted(value)
        return float(self.p_up_to[before - 1]) if before else 0.0
