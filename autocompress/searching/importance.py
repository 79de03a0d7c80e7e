"""Adaptive importance sampling: weighted draws of a posterior whose prior is standard normal."""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Array: TypeAlias = NDArray[np.float64]

# Settled by its Monte-Carlo error: 1% of the interval's width at 10 ms.
# Its sums are einsum's, on one thread: BLAS wakes others for this many draws, which doubles the time.
DIMENSIONS, ROUNDS, POINTS = 6, 8, 1280
WIDEN = 1.5  # the next round's covariance over that of the draws so far
ENOUGH = 8  # effective draws that a fit needs; more contract too slowly, fewer are no fit


def sample(log_likelihood: Callable[[Array], Array], seed: int, rounds: int) -> tuple[Array, Array]:
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
    """Mean and root of the widened covariance, with the weights tempered until enough draws count."""
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
    """The quantile of weighted values, see `Draws`, for a single question."""
    return Draws(values, weights).quantile(level)


class Draws:
    """Weighted draws of a number, sorted once for many questions."""

    def __init__(self, values: Array, weights: Array) -> None:
        order = np.argsort(values)
        self.values, self.p_up_to = values[order], np.cumsum(weights[order])

    def quantile(self, level: float) -> float:
        """The smallest value with at least ``level`` of the weight at or below it."""
        first = self.p_up_to.searchsorted(level * self.p_up_to[-1])
        return float(self.values[min(first, len(self.values) - 1)])

    def p_below(self, value: float) -> float:
        """The weight below ``value``."""
        before = self.values.searchsorted(value)
        return float(self.p_up_to[before - 1]) if before else 0.0
