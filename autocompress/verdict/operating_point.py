"""Operating points: decision thresholds at which one error rate of a classifier is fixed.

A model gives each sample a score for a class, and a *decision threshold* turns scores into decisions: a sample is
counted as the class if its score is at least the threshold. With a lower threshold more of the class is found
(sensitivity), and more of the others is taken for it (1 - specificity). An operating point is the threshold where
one of the two rates is just high enough, so that the other is as high as it can then be: a point of the ROC curve.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

FORM = "specificity@sensitivity=95%, sensitivity@specificity=90% or specificity[CLASS]@sensitivity=95%"
ROUNDING = 1e-9  # in samples: 0.9 of 10 samples are 9, whatever the last bit of the product is


@dataclass(frozen=True)
class OperatingPoint:
    """The decision threshold at which one rate reaches a value and the other is as high as possible.

    Attributes:
        fixed: The rate that the threshold must reach.
        value: What it must reach at least, above 0 and at most 1.
    """

    fixed: Literal["sensitivity", "specificity"]
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise ValueError(f"{self}: {self.fixed} must be above 0 and at most 1, or 100%")

    @classmethod
    def parse(cls, scored: str, fixed: str, value: str) -> Self:
        """The operating point of ``scored@fixed=value``.

        Raises:
            ValueError: If these are not the two rates, or the value is not a number above 0 and at most 1.
        """
        try:
            number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            number = math.nan
        for rate, other in (("sensitivity", "specificity"), ("specificity", "sensitivity")):
            if (scored, fixed) == (other, rate) and not math.isnan(number):
                if not 0 < number <= 1:
                    raise ValueError(f"{scored}@{fixed}={value}: {fixed} must be above 0 and at most 1, or 100%")
                return cls(rate, number)  # type: ignore[arg-type]  # of a Literal's values
        raise ValueError(f"{scored}@{fixed}={value} is no operating point; write {FORM}")

    @property
    def scored(self) -> Literal["sensitivity", "specificity"]:
        """The rate that is not fixed."""
        return "specificity" if self.fixed == "sensitivity" else "sensitivity"

    def __str__(self) -> str:
        return f"{self.scored}@{self.fixed}={self.value:.12g}"

    def threshold(self, is_class: NDArray[np.bool_], scores: NDArray[Any]) -> float:
        """The decision threshold, half way between the scores that it separates.

        Args:
            is_class: Whether each sample is of the class, shape ``(n,)``; some must be, and some not.
            scores: The score of each sample, shape ``(n,)``.
        """
        rated = scores[is_class] if self.fixed == "sensitivity" else scores[~is_class]
        n = math.ceil(self.value * len(rated) - ROUNDING)  # samples that must be decided rightly
        if self.fixed == "sensitivity":
            lowest_found = np.partition(rated, -n)[-n]
            return _between(scores[scores < lowest_found].max(initial=-np.inf), lowest_found)
        highest_missed = np.partition(rated, n - 1)[n - 1]
        return _between(highest_missed, scores[scores > highest_missed].min(initial=np.inf))

    def score(self, is_class: NDArray[np.bool_], scores: NDArray[Any]) -> float:
        """The rate that is not fixed, at the decision threshold; arguments as of `threshold`."""
        is_found = scores >= self.threshold(is_class, scores)
        is_right = ~is_found[~is_class] if self.fixed == "sensitivity" else is_found[is_class]
        return float(is_right.mean())


def _between(low: float, high: float) -> float:
    """A number above ``low`` and at most ``high``, half way if both are finite."""
    if math.isinf(low):
        return float(high)
    if math.isinf(high):
        return float(np.nextafter(low, np.inf))
    middle = (float(low) + float(high)) / 2
    return middle if low < middle else float(high)
