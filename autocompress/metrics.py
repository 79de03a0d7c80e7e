"""Metrics: how a model is judged, on top of scikit-learn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

Targets = NDArray[np.int64]
Outputs = NDArray[np.float32]


@dataclass(frozen=True)
class Metric:
    """A score of a model's outputs.

    Attributes:
        name: As it appears in tables and logs.
        score: Maps targets of shape ``(n,)`` and outputs of shape ``(n, classes)`` to a number.
        higher_is_better: Whether a larger score is the better one.
        correct: For metrics that are a mean of right and wrong answers: targets and outputs to booleans of
            shape ``(n,)``. They allow an exact paired bound on the drop; None otherwise.
    """

    name: str
    score: Callable[[Targets, Outputs], float]
    higher_is_better: bool = True
    correct: Callable[[Targets, Outputs], NDArray[np.bool_]] | None = None

    def drop(self, dense: float, compressed: float, *, relative: bool = False) -> float:
        """What compression lost: positive is worse. With ``relative``, as a share of the dense score."""
        lost = dense - compressed if self.higher_is_better else compressed - dense
        # 0.97 - 0.96 is more than 0.01 by the last bit, and a drop of one point is within a bound of one
        return round(lost / abs(dense) if relative and dense else lost, 12)


def _is_correct(targets: Targets, outputs: Outputs) -> NDArray[np.bool_]:
    return np.asarray(outputs.argmax(axis=1) == targets)


def _accuracy(targets: Targets, outputs: Outputs) -> float:
    return float(sk.accuracy_score(targets, outputs.argmax(axis=1)))


def _balanced_accuracy(targets: Targets, outputs: Outputs) -> float:
    return float(sk.balanced_accuracy_score(targets, outputs.argmax(axis=1)))


accuracy = Metric("accuracy", _accuracy, correct=_is_correct)
balanced_accuracy = Metric("balanced_accuracy", _balanced_accuracy)
