"""Decision thresholds for the deployed model: chosen on val, and checked on test.

A metric at an operating point, such as ``specificity@sensitivity=0.95``, scores a model at the threshold that
suits the samples at hand. Who deploys the model needs one threshold for all samples to come: that of val. As test
had no part in choosing it, the rates there are plain proportions, with exact confidence bounds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from autocompress.metrics import Metric
from autocompress.task import Evaluation
from autocompress.verdict.operating_point import OperatingPoint
from autocompress.verdict.scores import class_scores, positive_classes, probabilities

NEAR_ONE = 0.999  # from here on float32 has few numbers left: it rounds the softmax of surer models to 1


@dataclass(frozen=True)
class Rates:
    """The two shares of right decisions on a class.

    Attributes:
        sensitivity: Share of the class that is found; None without a sample of it.
        specificity: Share of the others that is not taken for the class; None without any.
    """

    sensitivity: float | None
    specificity: float | None


@dataclass(frozen=True)
class DecisionThreshold:
    """The decision threshold of one model for one class, chosen on val, and the rates there.

    Attributes:
        metric: The metric whose operating point it is, e.g. ``"specificity@sensitivity=0.95"``.
        class_name: The class; its number where it has no name.
        probability: A sample is counted as the class if the model's probability of it is at least this.
        val: The rates on val.
        test: The rates on test.
        lower: The true rates are at least these, each with the study's confidence.
    """

    metric: str
    class_name: str
    probability: float
    val: Rates
    test: Rates
    lower: Rates

    @property
    def sentence(self) -> str:
        """How to decide by it, and what that gave on test."""
        on_test = [f"the {name} is {rate:.4f}" for name, rate in vars(self.test).items() if rate is not None]
        in_float64 = ", computed in float64" if self.probability > NEAR_ONE else ""
        return (
            f"Decision threshold for `{self.metric}`, chosen on the validation data: count a sample as "
            f"{self.class_name!r} if its probability{in_float64} is at least {self.probability!r}. "
            f"On the test data {' and '.join(on_test)}."
        )


def decision_thresholds(
    metric: Metric, val: Evaluation, test: Evaluation, names: Sequence[str] = (), confidence: float = 0.95
) -> tuple[DecisionThreshold, ...]:
    """The decision thresholds of a metric at an operating point: of each class that it is about.

    Args:
        metric: The metric; without an operating point there are no thresholds.
        val: A model's evaluation on val, which the thresholds are chosen on.
        test: Its evaluation on test.
        names: The names of the classes, in order.
        confidence: Confidence of each of the one-sided bounds on test.
    """
    return tuple(_thresholds(metric, metric.point, val, test, names, confidence)) if metric.point else ()


def _thresholds(
    metric: Metric,
    point: OperatingPoint,
    val: Evaluation,
    test: Evaluation,
    names: Sequence[str],
    confidence: float,
) -> Iterator[DecisionThreshold]:
    rankings_val, rankings_test = (class_scores(e.targets, e.outputs) for e in (val, test))
    p_val, p_test = (probabilities(e.targets, e.outputs) for e in (val, test))
    for k in positive_classes(val.targets, val.outputs) if metric.only is None else (metric.only,):
        is_class, scores = rankings_val[k]
        if is_class.all() or not is_class.any():
            continue
        on_val, on_test = (is_class, p_val[:, k]), (rankings_test[k][0], p_test[:, k])
        probability = _as_probability(point.threshold(is_class, scores), scores, p_val[:, k])
        yield DecisionThreshold(
            metric=metric.name,
            class_name=names[k] if k < len(names) else str(k),
            probability=probability,
            val=_rates(probability, *on_val, _share),
            test=_rates(probability, *on_test, _share),
            lower=_rates(probability, *on_test, partial(lower_bound, confidence=confidence)),
        )


def _as_probability(threshold: float, scores: NDArray[np.float64], probability: NDArray[np.float64]) -> float:
    """A probability that separates the same samples as a threshold on their scores.

    It is about half way between the probabilities below and above, which are 0 and 1 where there is no sample, and
    has as few digits, at least four, as keep it in the middle half between them: it can be written in full.
    """
    is_found = scores >= threshold
    below, above = probability[~is_found].max(initial=0.0), probability[is_found].min(initial=1.0)
    middle, quarter = float(below + above) / 2, float(above - below) / 4
    for digits in range(4, 17):
        written = float(f"{middle:.{digits}g}")
        if abs(written - middle) < quarter:
            return written
    return float(above)


def _rates(
    threshold: float,
    is_class: NDArray[np.bool_],
    scores: NDArray[np.float64],
    share: Callable[[int, int], float | None],
) -> Rates:
    """A share of right decisions, or a bound on it, from the number of right ones and of all."""
    is_found = scores >= threshold
    right = (is_found[is_class], ~is_found[~is_class])
    return Rates(*(share(int(of_them.sum()), len(of_them)) for of_them in right))


def _share(successes: int, n: int) -> float | None:
    return successes / n if n else None


def lower_bound(successes: int, n: int, confidence: float) -> float | None:
    """The exact one-sided lower bound on a proportion (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        successes: Number of successes.
        n: Number of samples; without any there is no bound.
        confidence: Its confidence.

    Example:
        >>> print(f"{lower_bound(20, 20, 0.95):.4f}")  # the 20th root of 0.05
        0.8609
    """
    if not n:
        return None
    return float(betaincinv(successes, n - successes + 1, 1 - confidence)) if successes else 0.0
