"""Metrics: named scores of a model's outputs, see `autocompress.verdict.scores`, and how they are written."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autocompress.plugins import load_from_file, whole_spec, written_spec
from autocompress.verdict import scores
from autocompress.verdict.operating_point import FORM, OperatingPoint
from autocompress.verdict.scores import Outputs, Targets

Score: TypeAlias = Callable[[Targets, Outputs], float]


@dataclass(frozen=True)
class Metric:
    """A score of a model's outputs.

    Attributes:
        name: As it appears in tables and logs.
        score: Maps targets of shape ``(n,)`` and outputs of shape ``(n, classes)`` to a number.
        higher_is_better: Whether a larger score is the better one.
        correct: For metrics that are a mean of right and wrong answers: maps targets and outputs to booleans of
            shape ``(n,)``, which allow an exact paired bound on the drop. None for all others.
        description: One line that explains it.
        source: ``file.py:name`` as the user wrote it, if it comes from a file.
        whole: ``file.py:name`` with the file's absolute path, which finds it again in any folder.
        low: The smallest score that there can be: confidence bounds on the true score never go below it.
        high: The largest score that there can be.
        point: The operating point, if the metric is a rate at one.
        only: With ``point``, the number of the one class that it is about; None for the mean over the classes.

    Raises:
        ValueError: If ``low`` is not below ``high``.
    """

    name: str
    score: Score
    higher_is_better: bool = True
    correct: Callable[[Targets, Outputs], NDArray[np.bool_]] | None = None
    description: str = ""
    source: str = ""
    whole: str = ""
    low: float = -math.inf
    high: float = math.inf
    point: OperatingPoint | None = None
    only: int | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"the metric {self.name!r} has low={self.low} and high={self.high}; low must be less")

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickles a metric from a file as that file's path: another process cannot import its module."""
        if self.whole:
            return as_metric, (self.whole,)
        return Metric, tuple(getattr(self, field.name) for field in fields(self))

    def drop(self, dense: float, compressed: float, *, relative: bool = False) -> float:
        """How much worse the compressed score is; with ``relative``, as a fraction of the dense score."""
        lost = dense - compressed if self.higher_is_better else compressed - dense
        # In floats 0.97 - 0.96 exceeds 0.01 by the last bit, yet a drop of one point is within a bound of one.
        return round(lost / abs(dense) if relative and dense else lost, 12)


_share = partial(Metric, low=0.0, high=1.0)

accuracy = _share(
    "accuracy", scores.accuracy, correct=scores.is_correct, description="Share of samples with every answer right."
)
balanced_accuracy = _share(
    "balanced_accuracy", scores.balanced_accuracy, description="Mean recall over the classes."
)

METRICS = {
    metric.name: metric
    for metric in (
        accuracy,
        balanced_accuracy,
        _share(
            "auc", partial(scores.macro, scores.auc), description="Area under the ROC curve; macro, one-vs-rest."
        ),
        _share(
            "average_precision",
            partial(scores.macro, scores.average_precision),
            description="Area under the precision-recall curve; macro, one-vs-rest.",
        ),
        _share(
            "sensitivity", scores.sensitivity, description="Recall of the second of two classes; macro for more."
        ),
        _share(
            "specificity", scores.specificity, description="Recall of the others; macro for more than two classes."
        ),
        _share(
            "precision",
            scores.precision,
            description="Share of the finds that are right; macro for more than two.",
        ),
        _share("f1", scores.f1, description="Harmonic mean of precision and recall; macro over the classes."),
        Metric("kappa", scores.kappa, description="Cohen's kappa: agreement beyond chance.", low=-1.0, high=1.0),
        Metric(
            "log_loss",
            scores.log_loss,
            higher_is_better=False,
            description="Mean negative log-likelihood.",
            low=0.0,
        ),
    )
}
OF_ONE_CLASS: dict[str, Callable[[int, Targets, Outputs], float]] = {
    "recall": scores.recall_of,
    "sensitivity": scores.recall_of,
    "specificity": scores.specificity_of,
    "precision": scores.precision_of,
}


MetricLike: TypeAlias = str | Metric | Score


def as_metric(given: MetricLike, classes: Sequence[str] = ()) -> Metric:
    """Turns a name, ``file.py:name`` or a function into a metric; returns a `Metric` as it is.

    Args:
        given: A name of `METRICS`; ``recall[CLASS]``, ``sensitivity[CLASS]``, ``specificity[CLASS]`` or
            ``precision[CLASS]`` of one class by name or number; ``specificity@sensitivity=0.95`` or the reverse, a
            rate at an `OperatingPoint`, also ``specificity[CLASS]@sensitivity=0.95``; a function of targets and
            outputs whose result is better the larger it is; or ``file.py:name`` of a function or a `Metric`.
        classes: The names of the classes, in order.

    Raises:
        ValueError: If there is no such metric; the message lists the available ones.
    """
    if isinstance(given, Metric):
        return given
    if callable(given) and not isinstance(given, type):
        name = getattr(given, "__name__", "")
        name = name if name.isidentifier() else "metric"  # a lambda's is <lambda>
        return Metric(name, _CheckedScore(name, given))
    if not isinstance(given, str):
        raise ValueError(f"metric={given!r:.100}; give a name, file.py:name, a Metric or a function")
    if given in METRICS:
        return METRICS[given]
    if match := re.fullmatch(r"\s*(\w+)(?:\[(.+)\])?\s*@\s*(\w+)\s*=\s*([^\]]+)", given):
        return _at_point(OperatingPoint.parse(match[1], match[3], match[4]), match[2], classes)
    if match := re.fullmatch(r"(\w+)\[(.+)\]", given):
        return _of_class(match[1], match[2], classes)
    if re.match(r"\s*\w+(?:\[.+\])?\s*@", given) and ".py" not in given:
        raise ValueError(f"{given} is no operating point; write {FORM}")
    if ":" in given or given.endswith(".py"):
        return _from_file(given)
    near = difflib.get_close_matches(given.lower(), METRICS, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"unknown metric {given!r}{hint} (available: {', '.join(METRICS)}, recall[CLASS], "
        f"specificity@sensitivity=0.95, or file.py:name)"
    )


def try_metric(metric: Metric, split: str, targets: Targets, n_logits: int) -> None:
    """Scores random outputs, so that a metric that a split cannot be scored with fails before hours are spent.

    Args:
        metric: The metric.
        split: The split's name, for the error.
        targets: All targets of the split.
        n_logits: Number of logits per sample.

    Raises:
        ValueError: If the metric cannot be scored, as that of a class without a sample.
    """
    outputs = np.random.default_rng(0).normal(size=(len(targets), n_logits)).astype(np.float32)
    try:
        metric.score(targets, outputs)
    except ValueError as error:
        raise ValueError(f"the metric {metric.name} cannot be scored on {split}: {error}") from error


def _of_class(kind: str, which: str, classes: Sequence[str]) -> Metric:
    """The metric ``kind[which]`` of one class, given by its name or its number."""
    if kind not in OF_ONE_CLASS:
        raise ValueError(f"unknown metric {kind}[{which}]; of one class there are {', '.join(OF_ONE_CLASS)}")
    k = _number_of(which, classes, f"{kind}[{which}]")
    return _share(f"{kind}[{which}]", partial(OF_ONE_CLASS[kind], k), description=f"{kind} of class {which}")


def _at_point(point: OperatingPoint, which: str | None, classes: Sequence[str]) -> Metric:
    """The rate at an operating point, of one class if one is given by its name or its number."""
    name = str(point) if which is None else str(point).replace("@", f"[{which}]@", 1)
    only = None if which is None else _number_of(which, classes, name)
    return _share(
        name,
        partial(scores.macro, point.score, only=only),
        description=f"{point.scored} at the threshold that gives a {point.fixed} of {point.value:.12g}",
        point=point,
        only=only,
    )


def _number_of(which: str, classes: Sequence[str], metric: str) -> int:
    """The number of a class that is given by its name or its number."""
    if which in classes:
        return list(classes).index(which)
    if which.isdecimal() and (not classes or int(which) < len(classes)):
        return int(which)
    known = f"it is one of {', '.join(classes)}" if classes else "write its number, from 0"
    raise ValueError(f"{metric}: there is no class {which!r}; {known}")


def _from_file(spec: str) -> Metric:
    found = load_from_file(spec)
    whole = whole_spec(spec)
    source = written_spec(whole)
    if isinstance(found, Metric):
        return replace(found, source=source, whole=whole)
    if not callable(found):
        raise ValueError(
            f"{spec!r} is a {type(found).__name__}, not a Metric or a function of targets and outputs"
        )
    name = getattr(found, "__name__", "metric")
    return Metric(name, _CheckedScore(source, found), source=source, whole=whole)


@dataclass(frozen=True)
class _CheckedScore:
    """A user's score function whose errors and wrong results become one-line errors."""

    spec: str
    function: Callable[[Targets, Outputs], Any]

    def __call__(self, targets: Targets, outputs: Outputs) -> float:
        try:
            score = self.function(targets, outputs)
        except Exception as error:
            raise ValueError(f"the metric {self.spec!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(score, Real) or isinstance(score, bool):
            raise ValueError(f"the metric {self.spec!r} returned {score!r}; it must return a number")
        return float(score)
