"""The posterior of the drop curve: what the trials so far say about the lowest density within the bound.

With one free density the drop is a noisy, nearly monotone curve of the log density: flat, then a cliff. The
*threshold* is the density at which the true drop reaches the bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtr, ndtri

Array: TypeAlias = NDArray[np.float64]

# The noise of one observed drop; fractions (0.01 is one point).
TRAINING_NOISE = 2e-3  # prior median of what the training seed alone moves (ResNet-56 on CIFAR-10: 0.2 points)
SHARED = 0.5  # share of the sampling variance that trials have in common: they share the validation samples
MISFIT = 0.2  # error of the family of curves, as a share of the distance from the bound: it has to fit there
NU = 4  # degrees of freedom of the Student-t noise
SE_FLOOR = 1e-4  # a standard error estimated as 0 says only that no sample disagreed
BOUND_FLOOR = 0.005  # the scale of the cliff when the bound itself is smaller
FAR = 5  # a drop of more bounds than this says only that it is beyond: curves saturate, the family does not

# Adaptive importance sampling, settled by its Monte-Carlo error: 1% of the interval's width at 25 ms.
DIMENSIONS, ROUNDS, POINTS = 6, 8, 1280
WIDEN = 1.5  # the next round's covariance over that of the draws so far
ENOUGH = 8  # effective draws that a fit needs; more contract too slowly, fewer are no fit


@dataclass(frozen=True)
class Observation:
    """What a finished trial says: at ``depth`` = log(1 / density) it dropped ``drop``, or at least that.

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

    a is the plateau: what compression loses (or gains, when negative) before the cliff, and
    g(u) = 1 - exp(-u / 0.2) lets every curve start from the dense model's drop of 0. F is the cliff: exponential
    with z well below 0, a hockey stick that bends z / k before the threshold with z well above 0.

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

        def cliff(u: Array) -> Array:
            return _softplus(self.steepness * (u - t) + self.bend)

        foot = cliff(np.zeros(1))
        rise = (cliff(depth) - foot) / (cliff(t) - foot)
        return np.asarray(a * _ramp(depth) + (self.bound - a * _ramp(t)) * rise)


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the trials say about the threshold: the smallest density whose true drop is within the bound.

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
        return float(self.weights @ (self.curves.threshold[:, 0] >= math.log(1 / density)))

    def threshold(self, probability: float) -> float:
        """The smallest density feasible with at least this probability; never below the study's lowest."""
        return self._density(quantile(self.curves.threshold[:, 0], self.weights, 1 - probability))

    def interval(self, mass: float = 0.8) -> tuple[float, float]:
        """The central interval ``(low, high)`` that holds the threshold density with probability ``mass``."""
        return self.threshold((1 - mass) / 2), self.threshold((1 + mass) / 2)

    def learnable_interval(self, mass: float = 0.8) -> tuple[float, float]:
        """The same interval were the noise common to all trials known: what more trials can narrow."""
        t, s, w = self.curves.threshold[:, 0], self.shared, self.weights
        mean_t, mean_s = w @ t, w @ s
        slope = float(w @ ((t - mean_t) * (s - mean_s)) / (w @ (s - mean_s) ** 2))
        residual = t - slope * (s - mean_s)
        high, low = (self._density(quantile(residual, w, q)) for q in ((1 - mass) / 2, (1 + mass) / 2))
        return low, high

    def curve(self, densities: ArrayLike, mass: float = 0.8) -> tuple[Array, Array, Array]:
        """The drop at ``densities``, shape (m,): its median and the ends of its central interval."""
        drops = self.curves(np.log(1 / np.asarray(densities, dtype=float)))
        levels = (0.5, (1 - mass) / 2, (1 + mass) / 2)
        middle, low, high = (np.array([quantile(d, self.weights, q) for d in drops.T]) for q in levels)
        return middle, low, high

    def _density(self, depth: float) -> float:
        return float(min(1.0, max(self.low, math.exp(-depth))))


@lru_cache(maxsize=48)  # one state of a study is asked about several times, and by arm; half a MB each
def fit_posterior(
    seen: tuple[Observation, ...], low: float, bound: float, *, seed: int = 0, shared: float = SHARED
) -> Posterior:
    """What the observations say about the threshold; the prior when there are none.

    By adaptive importance sampling (AMIS; Cornuet, Marin, Mira and Robert 2012) with quasi-random points: the
    same arguments give the same posterior in any process.

    Args:
        seen: What the finished trials found.
        low: The lowest density of the study.
        bound: On the drop, a fraction: 0.01 is one point.
        seed: Of the quasi-random points.
        shared: Share of the sampling variance that trials have in common, between 0 and 1.
    """
    depth_max = math.log(1 / low)

    told = _as_arrays(seen, FAR * max(bound, BOUND_FLOOR))

    def log_likelihood(x: Array) -> Array:
        return _log_likelihood(told, *_from_normal(x, depth_max, bound), shared)

    x, weights = _sample(log_likelihood, seed, rounds=ROUNDS if seen else 1)
    curves, _, shared_noise = _from_normal(x, depth_max, bound)
    return Posterior(low, curves, weights, shared_noise[:, 0].copy())  # a view would keep all of x


# The model. A draw is a point x of shape (6,); under the prior its coordinates are standard normal.


def _from_normal(x: Array, depth_max: float, bound: float) -> tuple[Curves, Array, Array]:
    """Curves, training noise and shared noise of draws x of shape (n, 6); the latter two of shape (n, 1)."""
    x_threshold, x_slope, x_bend, x_rise, x_noise, shared = np.hsplit(x, DIMENSIONS)
    # The threshold: anywhere in log density, with some room beyond the lowest density.
    threshold = np.maximum(1e-3, 1.15 * depth_max * ndtr(x_threshold))
    # What the cliff rises from the plateau to the bound: about the bound.
    scale = max(bound, BOUND_FLOOR)
    rise = scale * np.exp(0.5 * x_rise)
    # The cliff: from an exponential to a sharp bend, and its slope d drop / d depth at the threshold.
    bend = -3 + 11 * ndtr(x_bend)
    slope = 5 * scale * np.exp(0.9 * x_slope)
    steepness = slope / rise * _softplus(bend) / expit(bend)
    plateau = bound - rise
    training_noise = TRAINING_NOISE * np.exp(0.8 * x_noise)
    return Curves(threshold, plateau, steepness, bend, bound), training_noise, shared


class _Told(NamedTuple):
    """Observations as arrays of shape (m,); ``rejected`` where the drop is at least ``drop``."""

    depth: Array
    drop: Array
    se: Array
    rejected: NDArray[np.bool_]


def _as_arrays(seen: Sequence[Observation], far: float) -> _Told:
    depth, drop, se = (np.array([getattr(o, f) for o in seen]) for f in ("depth", "drop", "drop_se"))
    rejected = np.array([o.rejected for o in seen], dtype=bool) | (drop > far)
    # Standard errors are pooled over neighbouring densities: a trial with bad luck has a larger one than a
    # trial with good luck, and that alone would pull the threshold towards the lucky ones.
    near = np.exp(-(((depth[:, None] - depth) / 0.3) ** 2) / 2)
    return _Told(depth, np.minimum(drop, far), np.sqrt(near @ se**2 / near.sum(axis=1)), rejected)


def _log_likelihood(
    told: _Told, curves: Curves, training_noise: Array, shared_noise: Array, shared: float
) -> Array:
    """Log probability of the observations under each draw, shape (n,)."""
    depth, drop, se, rejected = told
    if not len(depth):
        return np.zeros(len(shared_noise))
    expected = curves(depth)
    misfit = MISFIT * (expected - curves.bound)
    scale = np.sqrt((1 - shared) * se**2 + training_noise**2 + misfit**2)
    r = (drop - expected - math.sqrt(shared) * se * shared_noise) / scale
    log_p = -np.log(scale) - (NU + 1) / 2 * np.log1p(r**2 / NU)
    if rejected.any():
        # P(T >= r) for Student's t with 4 degrees of freedom, in closed form.
        s = r[:, rejected] / np.sqrt(1 + r[:, rejected] ** 2 / NU)
        log_p[:, rejected] = np.log(np.maximum(1e-300, 0.5 - 0.375 * s * (1 - s**2 / 12)))
    return np.asarray(log_p.sum(axis=1))


def _softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def _ramp(depth: Array) -> Array:
    return np.asarray(-np.expm1(-depth / 0.2))


# Its posterior.


def _sample(log_likelihood: Callable[[Array], Array], seed: int, rounds: int) -> tuple[Array, Array]:
    """Draws of the posterior under a standard normal prior, shape (n, 6), and their weights, shape (n,).

    Each round draws from a normal fitted to all draws so far, the first from the prior. A draw's weight is
    its posterior density over the mixture of the normals of all rounds (AMIS's deterministic mixture).
    """
    points = _normal_points(seed).reshape(ROUNDS, POINTS, DIMENSIONS)
    mean, root = np.zeros(DIMENSIONS), np.eye(DIMENSIONS)
    x = np.empty((0, DIMENSIONS))
    log_p, proposals = np.empty(0), []
    for z in points[:rounds]:
        new = mean + z @ root.T
        x, log_p = np.concatenate([x, new]), np.concatenate([log_p, log_likelihood(new)])
        proposals.append((mean, root))
        mixture = np.logaddexp.reduce([_log_normal(x, *p) for p in proposals]) - math.log(len(proposals))
        log_w = log_p - (x**2).sum(axis=1) / 2 - mixture
        mean, root = _fit(x, log_w)
    return x, _normalized(log_w)


def _fit(x: Array, log_w: Array) -> tuple[Array, Array]:
    """Mean and root of the widened covariance, with the weights tempered until enough draws count."""
    for temperature in (1, 2, 4, 8, 16, 32):
        w = _normalized(log_w / temperature)
        if 1 / (w @ w) >= ENOUGH:
            break
    mean = w @ x
    centred = x - mean
    covariance = (centred * w[:, None]).T @ centred
    root = np.linalg.cholesky(WIDEN * covariance + 1e-6 * np.eye(DIMENSIONS))
    return mean, np.asarray(root, dtype=np.float64)


def _log_normal(x: Array, mean: Array, root: Array) -> Array:
    z = np.linalg.solve(root, (x - mean).T)
    return np.asarray(-(z**2).sum(axis=0) / 2 - np.log(np.diag(root)).sum())


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
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(cumulative, level * cumulative[-1]), len(values) - 1)])
