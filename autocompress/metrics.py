"""Metrics: scores of a model's outputs, on top of scikit-learn.

Targets are class numbers of shape ``(n,)``, or, in multi-label tasks, zeros and ones of shape ``(n, labels)``.
Outputs are logits. The predicted class is the one with the largest logit; a label is predicted if its logit is
positive.
"""

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
from scipy.special import expit, softmax

from autocompress.plugins import load_from_file, whole_spec, written_spec
from autocompress.verdict.operating_point import OperatingPoint

Targets: TypeAlias = NDArray[np.int64]
Outputs: TypeAlias = NDArray[np.float32]
Score: TypeAlias = Callable[[Targets, Outputs], float]
Binary: TypeAlias = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]


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
        only: The number of the class that it is about, if it is about one operating point of one class.

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


def decisions(targets: Targets, outputs: Outputs) -> Targets:
    """The predictions, in the shape of ``targets``: the class, or a one for each predicted label."""
    return np.asarray(outputs > 0 if targets.ndim == 2 else outputs.argmax(axis=1), dtype=np.int64)


def probabilities(targets: Targets, outputs: Outputs) -> NDArray[np.float64]:
    """Probabilities of shape ``(n, classes)``: softmax of the logits, or the sigmoid of each for multi-label."""
    logits = outputs.astype(np.float64)
    return np.asarray(expit(logits) if targets.ndim == 2 else softmax(logits, axis=1))


def smallest_class(targets: Targets) -> int:
    """Number of samples of the rarest class; for multi-label, of the rarest value of any label."""
    columns = targets.T if targets.ndim == 2 else targets[None]
    return min(int(np.unique(column, return_counts=True)[1].min()) for column in columns)


def classes_present(targets: Targets) -> int:
    """Number of classes that have samples; for multi-label, the number of values that the labels take in all."""
    columns = targets.T if targets.ndim == 2 else targets[None]
    return sum(len(np.unique(column)) for column in columns)


def _is_correct(targets: Targets, outputs: Outputs) -> NDArray[np.bool_]:
    right = decisions(targets, outputs) == targets
    return np.asarray(right.all(axis=1) if right.ndim == 2 else right)


def _sk() -> Any:
    """scikit-learn's metrics, imported late: it takes a second, and loading a saved model needs none of them."""
    from sklearn import metrics

    return metrics


def _accuracy(targets: Targets, outputs: Outputs) -> float:
    return float(_sk().accuracy_score(targets, decisions(targets, outputs)))


def _balanced_accuracy(targets: Targets, outputs: Outputs) -> float:
    if targets.ndim == 2:
        return (_sensitivity(targets, outputs) + _specificity(targets, outputs)) / 2
    c = confusions(targets, outputs)
    return _mean_share(c[:, 1, 1], c[:, 1, 0], "positive")


def confusions(targets: Targets, outputs: Outputs) -> NDArray[np.int64]:
    """One-vs-rest confusion matrices [[TN, FP], [FN, TP]], shape ``(classes, 2, 2)``.

    Equals scikit-learn's `multilabel_confusion_matrix` and takes a hundredth of its time: a bootstrap computes
    thousands.
    """
    predicted, labels = decisions(targets, outputs), np.arange(outputs.shape[1])
    is_class = targets > 0 if targets.ndim == 2 else targets[:, None] == labels
    is_predicted = predicted > 0 if predicted.ndim == 2 else predicted[:, None] == labels
    tp, n = (is_class & is_predicted).sum(axis=0), len(targets)
    n_class, n_predicted = is_class.sum(axis=0), is_predicted.sum(axis=0)
    counts = [n - n_class - n_predicted + tp, n_predicted - tp, n_class - tp, tp]
    return np.stack(counts, axis=1).reshape(-1, 2, 2)


def _mean_share(hits: NDArray[np.int64], misses: NDArray[np.int64], what: str) -> float:
    """The mean of hits / (hits + misses), over the classes where that is defined."""
    n = hits + misses
    if not n.any():
        raise ValueError(f"there is no {what} sample to score")
    return float((hits[n > 0] / n[n > 0]).mean())


def _positive(tables: NDArray[np.int64], targets: Targets) -> NDArray[np.int64]:
    """The tables of `positive_classes`."""
    return tables[_first_positive(targets, len(tables)) :]


def _sensitivity(targets: Targets, outputs: Outputs) -> float:
    c = _positive(confusions(targets, outputs), targets)
    return _mean_share(c[:, 1, 1], c[:, 1, 0], "positive")


def _specificity(targets: Targets, outputs: Outputs) -> float:
    c = _positive(confusions(targets, outputs), targets)
    return _mean_share(c[:, 0, 0], c[:, 0, 1], "negative")


def _precision(targets: Targets, outputs: Outputs) -> float:
    c = _positive(confusions(targets, outputs), targets)
    n_predicted = c[:, :, 1].sum(axis=1)
    return float((c[:, 1, 1] / np.maximum(n_predicted, 1)).mean())  # a class never predicted has precision 0


def _f1(targets: Targets, outputs: Outputs) -> float:
    return float(_sk().f1_score(targets, decisions(targets, outputs), average="macro", zero_division=0))


def _kappa(targets: Targets, outputs: Outputs) -> float:
    predicted = decisions(targets, outputs)
    if targets.ndim == 2:
        return float(np.mean([_cohen(a, b) for a, b in zip(targets.T, predicted.T, strict=True)]))
    return _cohen(targets, predicted)


def _cohen(targets: Targets, predicted: Targets) -> float:
    if len(np.union1d(targets, predicted)) == 1:  # kappa is 0 / 0: all agree on one class
        return 1.0
    return float(_sk().cohen_kappa_score(targets, predicted))


def class_scores(targets: Targets, outputs: Outputs) -> list[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """For each class, whether samples are of it, and scores that rank the samples by how likely they are.

    The scores are the probability of the class; with two classes the difference of their logits, which is the
    logit of that probability and never rounds to the same number for different samples.
    """
    if targets.ndim == 1 and outputs.shape[1] == 2:
        logit = outputs[:, 1].astype(np.float64) - outputs[:, 0]
        return [(targets == 0, -logit), (targets == 1, logit)]
    p = probabilities(targets, outputs)
    is_class = targets.T > 0 if targets.ndim == 2 else targets == np.arange(p.shape[1])[:, None]
    return list(zip(is_class, p.T, strict=True))


def positive_classes(targets: Targets, outputs: Outputs) -> range:
    """The classes that scores are means over: the second of two classes; otherwise all."""
    n = outputs.shape[1]
    return range(_first_positive(targets, n), n)


def _first_positive(targets: Targets, n_classes: int) -> int:
    return 1 if targets.ndim == 1 and n_classes == 2 else 0


def _macro(binary: Binary, targets: Targets, outputs: Outputs, *, only: int | None = None) -> float:
    """The one-vs-rest score ``binary``, averaged over the classes with both positive and negative samples.

    Args:
        binary: Maps whether samples are of a class, and their scores for it, to a number.
        targets: The true classes.
        outputs: The logits.
        only: The one class to score; None for the mean over `positive_classes`.
    """
    rankings = class_scores(targets, outputs)
    classes = positive_classes(targets, outputs) if only is None else (only,)
    scores = [binary(*rankings[k]) for k in classes if 0 < rankings[k][0].sum() < len(targets)]
    if not scores and only is not None:
        raise ValueError(f"the samples are all of class {only}, or none is, so nothing can be ranked")
    if not scores:
        raise ValueError("all samples are of one class, so nothing can be ranked; this metric needs two")
    return float(np.mean(scores))


def _auc(is_class: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """The area under the ROC curve, as the Mann-Whitney U over its maximum; ties count half."""
    from scipy.stats import rankdata  # takes a second to import, as `_sk`

    n_class = int(is_class.sum())
    u = rankdata(score)[is_class].sum() - n_class * (n_class + 1) / 2
    return float(u / (n_class * (len(score) - n_class)))


def _average_precision(is_class: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    return float(_sk().average_precision_score(is_class, score))


def _log_loss(targets: Targets, outputs: Outputs) -> float:
    p = np.clip(probabilities(targets, outputs), 1e-15, 1 - 1e-15)
    if targets.ndim == 2:
        return float(-np.where(targets > 0, np.log(p), np.log1p(-p)).mean())
    return float(-np.log(p[np.arange(len(targets)), targets]).mean())


def _recall_of(k: int, targets: Targets, outputs: Outputs) -> float:
    c = confusions(targets, outputs)[[k]]
    return _mean_share(c[:, 1, 1], c[:, 1, 0], "positive")


def _specificity_of(k: int, targets: Targets, outputs: Outputs) -> float:
    c = confusions(targets, outputs)[[k]]
    return _mean_share(c[:, 0, 0], c[:, 0, 1], "negative")


def _precision_of(k: int, targets: Targets, outputs: Outputs) -> float:
    c = confusions(targets, outputs)[k]
    return float(c[1, 1] / max(1, c[:, 1].sum()))


_share = partial(Metric, low=0.0, high=1.0)

accuracy = _share(
    "accuracy", _accuracy, correct=_is_correct, description="Share of samples with every answer right."
)
balanced_accuracy = _share("balanced_accuracy", _balanced_accuracy, description="Mean recall over the classes.")

METRICS = {
    metric.name: metric
    for metric in (
        accuracy,
        balanced_accuracy,
        _share("auc", partial(_macro, _auc), description="Area under the ROC curve; macro, one-vs-rest."),
        _share(
            "average_precision",
            partial(_macro, _average_precision),
            description="Area under the precision-recall curve; macro, one-vs-rest.",
        ),
        _share("sensitivity", _sensitivity, description="Recall of the second of two classes; macro for more."),
        _share("specificity", _specificity, description="Recall of the others; macro for more than two classes."),
        _share("precision", _precision, description="Share of the finds that are right; macro for more than two."),
        _share("f1", _f1, description="Harmonic mean of precision and recall; macro over the classes."),
        Metric("kappa", _kappa, description="Cohen's kappa: agreement beyond chance.", low=-1.0, high=1.0),
        Metric(
            "log_loss",
            _log_loss,
            higher_is_better=False,
            description="Mean negative log-likelihood.",
            low=0.0,
        ),
    )
}
OF_ONE_CLASS: dict[str, Callable[[int, Targets, Outputs], float]] = {
    "recall": _recall_of,
    "sensitivity": _recall_of,
    "specificity": _specificity_of,
    "precision": _precision_of,
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
    if match := re.fullmatch(r"(\w+)(?:\[(.+)\])?@(\w+)=(.+)", given):
        return _at_point(OperatingPoint.parse(match[1], match[3], match[4]), match[2], classes)
    if match := re.fullmatch(r"(\w+)\[(.+)\]", given):
        return _of_class(match[1], match[2], classes)
    if ":" in given or given.endswith(".py"):
        return _from_file(given)
    near = difflib.get_close_matches(given.lower(), METRICS, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"unknown metric {given!r}{hint} (available: {', '.join(METRICS)}, recall[CLASS], "
        f"specificity@sensitivity=0.95, or file.py:name)"
    )


def _of_class(kind: str, which: str, classes: Sequence[str]) -> Metric:
    """The metric ``kind[which]`` of one class, given by its name or its number."""
    if kind not in OF_ONE_CLASS:
        raise ValueError(f"unknown metric {kind}[{which}]; of one class there are {', '.join(OF_ONE_CLASS)}")
    k = _number_of(which, classes, f"{kind}[{which}]")
    return _share(f"{kind}[{which}]", partial(OF_ONE_CLASS[kind], k), description=f"{kind} of class {which}")


def _at_point(point: OperatingPoint, which: str | None, classes: Sequence[str]) -> Metric:
    """The rate at an operating point, of one class if one is given by its name or its number."""
    name = str(point) if which is None else f"{point.scored}[{which}]@{point.fixed}={point.value:g}"
    only = None if which is None else _number_of(which, classes, name)
    return _share(
        name,
        partial(_macro, point.score, only=only),
        description=f"{point.scored} at the threshold that gives a {point.fixed} of {point.value:g}",
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
