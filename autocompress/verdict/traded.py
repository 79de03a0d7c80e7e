"""Constraints on one class that are met at the cost of the others, as by calling nearly everyone ill."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from autocompress.certify import CONFIDENCE, certify
from autocompress.metrics import METRICS, OF_ONE_CLASS, Metric
from autocompress.task import Evaluation
from autocompress.verdict.constraint import Constraint, Judged
from autocompress.verdict.limit import Requirement

# The share of the samples of a class that are found, and the share of all others that are not taken for it.
COUNTERPARTS = {"sensitivity": "specificity", "specificity": "sensitivity", "recall": "specificity"}


def counterpart(metric: Metric) -> Metric | None:
    """The metric that a model can give up to gain in this one: specificity for sensitivity, and the reverse.

    Returns:
        The metric, of the same class if ``metric`` is of one; None for metrics without a counterpart.
    """
    kind, bracket, which = metric.name.partition("[")
    other = COUNTERPARTS.get(kind)
    if other is None:
        return None
    if not bracket:
        return METRICS[other] if metric == METRICS.get(kind) else None  # a user's may have any name
    score = metric.score
    if not isinstance(score, partial) or score.func is not OF_ONE_CLASS[kind]:
        return None
    return replace(
        metric, name=f"{other}[{which}", score=partial(OF_ONE_CLASS[other], *score.args), description=""
    )


def traded(
    requirements: Sequence[Requirement],
    judged: Sequence[Judged],
    dense: Evaluation,
    compressed: Evaluation,
    metric: Metric,
    max_drop: float,
    *,
    relative: bool = False,
    confidence: float = CONFIDENCE,
) -> Iterator[str]:
    """A sentence for each constraint that is met while its counterpart drops by more than the bound.

    That is so if even the lower bound of the counterpart's drop, of `autocompress.certify.certify`, is above
    ``max_drop``. Counterparts that the study bounds itself, by its metric or another constraint, are left out.

    Args:
        requirements: The study's constraints.
        judged: Their judgements on test.
        dense: The dense model's evaluation on test.
        compressed: The compressed model's, on the same samples.
        metric: The metric whose drop the study bounds.
        max_drop: The bound.
        relative: Whether drops are fractions of the dense model's score.
        confidence: Confidence of the lower bound.
    """
    bounded = {metric.name, *(one.metric.name for one in requirements if isinstance(one, Constraint))}
    for one, judgement in zip(requirements, judged, strict=True):
        other = counterpart(one.metric) if isinstance(one, Constraint) and one.at_least else None
        if other is None or other.name in bounded or not judgement.met:
            continue
        try:
            before, after = (replace(e, score=other.score(e.targets, e.outputs)) for e in (dense, compressed))
        except ValueError:  # test has no sample that it counts
            continue
        if other.drop(before.score, after.score, relative=relative) <= max_drop:
            continue
        verdict = certify(other, before, after, max_drop, relative=relative, confidence=confidence)
        if verdict.outcome == "not met":
            yield (
                f"{one.text} is met at the cost of {other.name}: on test the dense model has {before.score:.4f} "
                f"and the compressed one {after.score:.4f}, a drop of more than {100 * max_drop:g}"
                f"{'%' if relative else ' pp'}, the bound on {metric.name}, with {100 * confidence:g}% confidence"
            )
