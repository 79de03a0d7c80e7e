"""Constraint: a second metric that the compressed model must reach, such as ``sensitivity>=0.95``.

The bound on the drop is relative to the dense model; a constraint is on the compressed model's own score.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autocompress.metrics import Metric, as_metric
from autocompress.showing.comparison import COUNTED, constrained, in_unit
from autocompress.task import Evaluation
from autocompress.verdict.scores import classes_present, smallest_class

Standing: TypeAlias = Literal["certified", "not certifiable", "not met"]

# NAME>=NUMBER or NAME<=NUMBER, with the unit of the number.
WRITTEN = r"\s*(.+?)\s*(>=|<=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%|[a-zA-Zµ]*)\s*"

RESAMPLES_SE = 100  # for the standard error of one trial's value
RESAMPLES = 2000  # for the bounds on test


@dataclass(frozen=True)
class Checked:
    """The result of checking a constraint on a trial.

    Attributes:
        text: The constraint, e.g. ``"sensitivity>=0.95"``.
        value: The score, or the cost.
        se: Its standard error over samples.
        excess: By how much the score misses the required value: at most 0 where the constraint is met. For a cost,
            the logarithm of its ratio to the allowed value.
        unit: The unit of a cost; empty for a score.
        is_cost: Whether it bounds a cost of the model, and not a metric.
    """

    text: str
    value: float
    se: float
    excess: float
    unit: str = ""
    is_cost: bool = False

    @property
    def met(self) -> bool:
        """Whether the constraint is met."""
        return self.excess <= 0

    @property
    def metric(self) -> str:
        """The name of the metric or cost, in words."""
        return constrained(self.text)

    @property
    def shown(self) -> str:
        """The metric or cost with its value: ``"latency 4.81 ms"``."""
        return f"{self.metric} {in_unit(self.value, self.unit)}"

    @property
    def warning(self) -> str:
        """The warning when the dense model itself violates the constraint."""
        return f"the dense model itself has {self.metric} {self.value:.4f} on val, which violates {self.text}"


@dataclass(frozen=True)
class Judged:
    """The judgement of a constraint on held-out data.

    Attributes:
        text: The constraint.
        value: The score on test, or the cost.
        lower: The true score is at least this, with ``confidence``.
        upper: The true score is at most this, with ``confidence``.
        confidence: The confidence of each of the two one-sided bounds.
        standing: ``certified``: met at the worse of the two bounds. ``not met``: missed even at the better one.
            ``not certifiable``: met at one of them only.
        met: Whether the observed score itself meets the constraint.
        unit: The unit of a cost; empty for a score.
        is_cost: Whether it bounds a cost of the model: measured again, with the bounds of the measurement's noise.
    """

    text: str
    value: float
    lower: float
    upper: float
    confidence: float
    standing: Standing
    met: bool
    unit: str = ""
    is_cost: bool = False

    @property
    def sentence(self) -> str:
        """The judgement in a sentence, with its numbers."""
        if self.is_cost:
            value, known = in_unit(self.value, self.unit), ""
            if self.lower < self.upper:
                ends = f"{in_unit(self.lower, self.unit)} to {in_unit(self.upper, self.unit)}"
                known = f", {ends} with {100 * self.confidence:g}% confidence"
            required = f"(required: {self.text})" if self.met else f", which violates {self.text}"
            is_count = self.unit in COUNTED  # the unit names what is counted
            subject = "It has" if is_count else f"Its {constrained(self.text)} is"
            return f"{subject} {value}{known} {required}.".replace(" ,", ",")
        at_least = self.text.rfind(">=") > self.text.rfind("<=")  # the name of a class may have others
        lower, upper = f"at least {self.lower:.4f}", f"at most {self.upper:.4f}"
        violated = "" if self.met else f"which violates {self.text}, "
        bound = (lower if at_least else upper) if self.met else (upper if at_least else lower)
        sure = f"{bound} with {100 * self.confidence:g}% confidence"
        required = f" (required: {self.text})" if self.met else ""
        return f"On test {constrained(self.text)} is {self.value:.4f}, {violated}{sure}{required}."


@dataclass(frozen=True)
class Constraint:
    """A metric, and the score that it must reach.

    Attributes:
        metric: The metric.
        at_least: Whether the score must be at least ``value`` (``>=``) or at most (``<=``).
        value: The required score.
    """

    metric: Metric
    at_least: bool
    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.text}: the value must be a finite number")
        low, high = self.metric.low, self.metric.high
        if self.value > high if self.at_least else self.value < low:
            never = f"never above {high:g}, or {100 * high:g}%" if self.at_least else f"never below {low:g}"
            raise ValueError(f"{self.text} cannot be met: {self.metric.name} is {never}")

    @property
    def text(self) -> str:
        """The constraint as it is written: ``"sensitivity>=0.95"``."""
        return f"{self.metric.source or self.metric.name}{'>=' if self.at_least else '<='}{self.value:g}"

    def excess(self, score: float) -> float:
        """By how much ``score`` misses the required value; at most 0 where it does not."""
        # rounded, as drops are, so that a score of exactly 0.95 meets 0.95
        return round(self.value - score if self.at_least else score - self.value, 12)

    def score(self, evaluation: Evaluation) -> float:
        """The score of the constrained metric."""
        return self.metric.score(evaluation.targets, evaluation.outputs)

    def check(self, evaluation: Evaluation) -> Checked:
        """Checks the constraint on a trial's evaluation on val."""
        value = self.score(evaluation)
        scores = _resampled(self.metric, evaluation, RESAMPLES_SE)
        se = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        return Checked(self.text, value, se, self.excess(value))

    def judge(self, evaluation: Evaluation, confidence: float = 0.95) -> Judged:
        """Judges the constraint on the answer's evaluation on test, which is used once.

        Args:
            evaluation: The answer's evaluation on test.
            confidence: Confidence of each of the bounds.
        """
        value = self.score(evaluation)
        lower, upper = self._bounds(evaluation, value, confidence)
        worse, better = (lower, upper) if self.at_least else (upper, lower)
        standing: Standing = "not certifiable"
        if self.excess(worse) <= 0:
            standing = "certified"
        elif self.excess(better) > 0:
            standing = "not met"
        return Judged(self.text, value, lower, upper, confidence, standing, self.excess(value) <= 0)

    def _bounds(self, evaluation: Evaluation, value: float, confidence: float) -> tuple[float, float]:
        """One-sided bounds on the true score: percentiles of bootstrap resamples.

        Where all resamples have the same score (no prediction was wrong) the margin is the exact bound on a
        proportion of n successes among n (as of the "rule of three"), with n the size of the smallest class.
        """
        scores = _resampled(self.metric, evaluation, RESAMPLES)
        if len(scores) < RESAMPLES / 2:
            return -math.inf, math.inf
        if scores.min() < scores.max():
            return float(np.quantile(scores, 1 - confidence)), float(np.quantile(scores, confidence))
        margin = 1 - (1 - confidence) ** (1 / smallest_class(evaluation.targets))
        return max(self.metric.low, value - margin), min(self.metric.high, value + margin)


def parse_constraint(text: str, classes: Sequence[str] = ()) -> Constraint:
    """Parses ``METRIC>=VALUE`` or ``METRIC<=VALUE``; the value may be ``0.95`` or ``95%``.

    Raises:
        ValueError: If it is not of this form, or there is no such metric.
    """
    match = re.fullmatch(WRITTEN, text)
    if not match or match[4] not in ("", "%"):
        raise ValueError(
            f"{text!r} is not a constraint; write METRIC>=VALUE or METRIC<=VALUE: sensitivity>=0.95, latency<=5ms"
        )
    name, operator, number, percent = match.groups()
    return Constraint(as_metric(name, classes), operator == ">=", float(number) / (100 if percent else 1))


def _resampled(metric: Metric, evaluation: Evaluation, resamples: int) -> NDArray[np.float64]:
    """The scores of bootstrap resamples, shape ``(n,)``; those that lack a class are left out."""
    targets, outputs = evaluation.targets, evaluation.outputs
    present = classes_present(targets)
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(targets), size=len(targets)) for _ in range(resamples))
    scores = [metric.score(targets[i], outputs[i]) for i in draws if classes_present(targets[i]) == present]
    return np.array([score for score in scores if math.isfinite(score)], dtype=np.float64)
