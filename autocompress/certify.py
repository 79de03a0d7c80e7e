"""The verdict on held-out data: whether the drop is within the bound, with a confidence bound on the drop."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from autocompress.metrics import Metric
from autocompress.showing.comparison import spaced
from autocompress.task import Evaluation
from autocompress.verdict.change import loss_or_gain
from autocompress.verdict.constraint import Judged
from autocompress.verdict.scores import classes_present, smallest_class

Outcome: TypeAlias = Literal["certified", "not certifiable", "not met"]

CONFIDENCE = 0.95  # by default
RESAMPLES = 2000  # for the bounds of the verdict
RESAMPLES_SE = 100  # for the standard error of one trial: 7% accurate, and there are many trials


@dataclass(frozen=True)
class Verdict:
    """The verdict on the drop of a metric from the dense to the compressed model, on held-out data.

    Attributes:
        outcome: ``certified``: the upper bound is at most ``max_drop``. ``not met``: even the lower bound is above
            it. ``not certifiable``: neither; there are too few samples to tell.
        drop: The observed drop, a fraction (0.01 is one point); when ``relative``, of the dense score.
        upper: The drop is at most this, with ``confidence``.
        lower: The drop is at least this, with ``confidence``.
        n: Number of test samples.
        confidence: Confidence of each of the two one-sided bounds.
        max_drop: The study's bound, in the unit of ``drop``.
        relative: Whether drops are fractions of the dense score.
        metric: Name of the metric.
        higher_is_better: Whether a larger score is better.
    """

    outcome: Outcome
    drop: float
    upper: float
    lower: float
    n: int
    confidence: float
    max_drop: float
    relative: bool
    metric: str
    higher_is_better: bool = True

    @property
    def met(self) -> bool:
        """Whether the data do not contradict the bound: certified or not certifiable."""
        return self.outcome != "not met"

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, with its numbers."""
        worse, better = ("drops", "gains") if self.higher_is_better else ("worsens by", "improves by")
        change, size = loss_or_gain(self.drop, worse, better)
        observed = f"{spaced(self.metric)} {change} {_amount(size, self.relative)}"
        # The upper bound is rounded up, the lower one down, so that the sentence never claims too much.
        sure = f"with {self.confidence * 100:g}% confidence"
        bound = f"(bound {_amount(self.max_drop, self.relative)})"
        (limit, rounding), size = loss_or_gain(self.upper, ("at most", math.ceil), ("at least", math.floor))
        at_most = f"{limit} {_amount(size, self.relative, rounding)} {sure}"
        if self.drop < 0 <= self.upper:
            at_most = f"and {worse} {at_most}"
        if self.outcome == "certified":
            return f"Certified: on {self.n} test samples {observed}, {at_most} {bound}."
        if self.outcome == "not met":
            at_least = f"at least {_amount(self.lower, self.relative, math.floor)} {sure}"
            return f"Not met: on {self.n} test samples {observed}, {at_least} {bound}."
        beyond = " on test, which is more than the bound," if self.drop > self.max_drop else " on test,"
        return (
            f"Met on validation, not certifiable with {self.n} test samples: {observed}{beyond} {at_most} {bound}."
        )


def certify(
    metric: Metric,
    dense: Evaluation,
    compressed: Evaluation,
    max_drop: float,
    *,
    relative: bool = False,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Verdict:
    """Judges on held-out data whether compression cost at most ``max_drop``.

    For a metric that is a mean of right and wrong answers the bounds are those of Bonett and Price,
    see `paired_bounds`; for others they are percentiles of 2,000 paired bootstrap resamples. Each bound is
    one-sided: a compressed model whose true drop exceeds ``max_drop`` is certified on at most a fraction
    1 - ``confidence`` of test sets (approximately; the bootstrap needs some ten samples of every class).

    Args:
        metric: The metric whose drop is bounded.
        dense: The dense model's evaluation on the test data.
        compressed: The compressed model's, on the same samples in the same order.
        max_drop: The bound, a fraction: 0.01 is one point, or 1% of the dense score when ``relative``.
        relative: Whether the drop counts as a fraction of the dense score. For accuracy-like metrics the dense
            score is taken as known; the bootstrap resamples it too.
        confidence: Confidence of each bound, between 0.5 and 1.
        seed: Seeds the bootstrap.

    Raises:
        ValueError: If the two evaluations are not of the same samples, or ``confidence`` is out of range.
    """
    _check(dense, compressed)
    check_confidence(confidence)
    drop = metric.drop(dense.score, compressed.score, relative=relative)
    if metric.correct is not None:
        lost, gained = _disagreements(metric, dense, compressed)
        unit = abs(dense.score) if relative and dense.score else 1.0
        lower, upper = (x / unit for x in paired_bounds(lost, gained, len(dense.targets), confidence))
    else:
        lower, upper = _bootstrap_bounds(metric, dense, compressed, relative, confidence, seed)
    outcome: Outcome = "certified" if upper <= max_drop else "not met" if lower > max_drop else "not certifiable"
    return Verdict(
        outcome=outcome,
        drop=drop,
        upper=upper,
        lower=lower,
        n=len(dense.targets),
        confidence=confidence,
        max_drop=max_drop,
        relative=relative,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
    )


def conclude(verdict: Verdict, constraints: Sequence[Judged]) -> tuple[Outcome, str]:
    """Combines the verdicts on the drop and on all constraints: the worst outcome, and a sentence for each."""
    order: tuple[Outcome, ...] = ("certified", "not certifiable", "not met")
    outcome = max((verdict.outcome, *(constraint.standing for constraint in constraints)), key=order.index)
    sentence = verdict.sentence
    if outcome != verdict.outcome:
        sentence = (
            f"{outcome.capitalize()}, for a constraint. Of the drop alone: {sentence[0].lower()}{sentence[1:]}"
        )
    return outcome, " ".join([sentence, *(constraint.sentence for constraint in constraints)])


def certified_in_order(outcomes: Iterable[Outcome]) -> int:
    """The number of models certified in a fixed-sequence test, which stops at the first that is not certified.

    If the order is fixed before the data are seen, each model may be tested at the full level, and the probability
    of certifying any of them wrongly is still at most 1 - confidence: the first model whose true drop exceeds the
    bound is certified with at most that probability, and those after it are tested only if it was (Maurer, Hothorn
    and Lehmacher 1995; Wiens 2003, A fixed sequence Bonferroni procedure for testing multiple endpoints).

    Args:
        outcomes: The models' outcomes in that order, computed lazily: none after the first failure is requested.
    """
    certified = 0
    for outcome in outcomes:
        if outcome != "certified":
            break
        certified += 1
    return certified


def paired_bounds(lost: int, gained: int, n: int, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bounds on the drop of a proportion measured twice on the same samples.

    With p1 = (lost + 1) / (n + 2) and p2 = (gained + 1) / (n + 2)::

        p1 - p2  -/+  z sqrt((p1 + p2 - (p1 - p2)^2) / (n + 2))

    where that lies between -1 and 1, as any difference of two proportions does.

    Source: Bonett and Price (2012), Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data, Journal of Educational and Behavioral Statistics 37(4).

    Args:
        lost: Samples that only the dense model gets right.
        gained: Samples that only the compressed model gets right.
        n: Number of samples.
        confidence: Confidence of each of the two bounds.

    Example:
        >>> lower, upper = paired_bounds(lost=8, gained=2, n=449, confidence=0.95)
        >>> print(f"{lower:.4f} {upper:.4f}")
        0.0007 0.0259
    """
    p1, p2 = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    margin = float(ndtri(confidence)) * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    return max(-1.0, p1 - p2 - margin), min(1.0, p1 - p2 + margin)


def drop_standard_error(
    metric: Metric, dense: Evaluation, compressed: Evaluation, *, relative: bool = False
) -> float:
    """Standard error of the observed drop over samples, in the unit of the drop.

    With b samples that only the dense model gets right and c that only the compressed model does, it is
    sqrt(b + c - (b - c)^2 / n) / n. For metrics that are not a mean of right and wrong answers, a small bootstrap.

    Raises:
        ValueError: If the two evaluations are not of the same samples.
    """
    _check(dense, compressed)
    if metric.correct is None:
        drops = _bootstrap_drops(metric, dense, compressed, relative, RESAMPLES_SE, seed=0)
        return float(drops.std(ddof=1)) if len(drops) > 1 else 0.0
    (lost, gained), n = _disagreements(metric, dense, compressed), len(dense.targets)
    unit = abs(dense.score) if relative and dense.score else 1.0
    return math.sqrt(lost + gained - (lost - gained) ** 2 / n) / n / unit


def certifiable_drop(n: int, max_drop: float, disagreement: float, confidence: float = CONFIDENCE) -> float | None:
    """The largest observed drop that ``n`` test samples could certify; None if even the largest gain could not.

    Args:
        n: Number of test samples.
        max_drop: The bound on the drop, a fraction.
        disagreement: Fraction of the samples that only one of the two models gets right.
        confidence: Confidence of the certificate.

    Example:
        >>> print(f"{certifiable_drop(n=449, max_drop=0.01, disagreement=0.03):.4f}")
        -0.0067
    """
    disagreeing = round(disagreement * n)
    for lost in range(disagreeing, -1, -1):
        gained = disagreeing - lost
        if paired_bounds(lost, gained, n, confidence)[1] <= max_drop:
            return (lost - gained) / n
    return None


def check_confidence(confidence: float) -> None:
    """Checks a confidence level.

    Raises:
        ValueError: If it does not lie between 0.5 and 1.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0.5 and 1, such as 0.95")


def _check(dense: Evaluation, compressed: Evaluation) -> None:
    if len(dense.targets) == 0 or not np.array_equal(dense.targets, compressed.targets):
        raise ValueError(
            f"the dense model was scored on {len(dense.targets)} samples and the compressed one on "
            f"{len(compressed.targets)}, not the same in the same order; score both on an unshuffled split"
        )


def _disagreements(metric: Metric, dense: Evaluation, compressed: Evaluation) -> tuple[int, int]:
    """The number of samples that only the dense model, and that only the compressed model, gets right."""
    assert metric.correct is not None
    dense_right = metric.correct(dense.targets, dense.outputs)
    compressed_right = metric.correct(compressed.targets, compressed.outputs)
    return int((dense_right & ~compressed_right).sum()), int((compressed_right & ~dense_right).sum())


def _bootstrap_bounds(
    metric: Metric, dense: Evaluation, compressed: Evaluation, relative: bool, confidence: float, seed: int
) -> tuple[float, float]:
    """One-sided bounds: percentiles of the drop over paired resamples."""
    drops = _bootstrap_drops(metric, dense, compressed, relative, RESAMPLES, seed)
    if len(drops) < RESAMPLES / 2:  # most resamples lack a class: too few samples for any bound
        return -math.inf, math.inf
    lower, upper = (float(np.quantile(drops, q)) for q in (1 - confidence, confidence))
    if drops.min() < drops.max():
        return lower, upper
    # All resamples have the same drop: the models agree wherever the metric looks. On fresh samples they may
    # differ, so the margin is that of `paired_bounds` for no disagreement among as many samples as the smallest
    # class has, which is conservative.
    n = smallest_class(dense.targets)
    margin = paired_bounds(0, 0, n, confidence)[1]
    most = math.inf if relative else metric.high - metric.low  # that a score can change by
    return max(-most, lower - margin), min(most, upper + margin)


def _bootstrap_drops(
    metric: Metric, dense: Evaluation, compressed: Evaluation, relative: bool, resamples: int, seed: int
) -> NDArray[np.float64]:
    """The drops on paired resamples, without those resamples that lack a class and so have no score."""
    targets = dense.targets
    n_classes = classes_present(targets)

    def drop(i: NDArray[np.int64]) -> float:
        if classes_present(targets[i]) < n_classes:
            return math.nan
        dense_score, compressed_score = (metric.score(targets[i], e.outputs[i]) for e in (dense, compressed))
        return metric.drop(dense_score, compressed_score, relative=relative)

    # Not scipy.stats.bootstrap: it returns no interval if a single resample has no score.
    rng = np.random.default_rng(seed)
    drops = [drop(rng.integers(len(targets), size=len(targets))) for _ in range(resamples)]
    return np.array([d for d in drops if math.isfinite(d)], dtype=np.float64)


def _amount(drop: float, relative: bool, rounding: Callable[[float], float] = round) -> str:
    """A drop in words, rounded to a hundredth of a point."""
    if not math.isfinite(drop):
        return "an unknown amount"
    return f"{rounding(drop * 1e4) / 100 + 0.0:g}{'%' if relative else ' pp'}"  # + 0.0 turns -0.0 into 0.0
