"""Scores of a model's outputs, on top of scikit-learn: the functions behind `autocompress.metrics`.

Targets are class numbers of shape ``(n,)``, or, in multi-label tasks, zeros and ones of shape ``(n, labels)``.
Outputs are logits. The predicted class is the one with the largest logit; a label is predicted if its logit is
positive.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

Targets: TypeAlias = NDArray[np.int64]
Outputs: TypeAlias = NDArray[np.float32]
Binary: TypeAlias = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]


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


def is_correct(targets: Targets, outputs: Outputs) -> NDArray[np.bool_]:
    """Whether each sample is predicted rightly; of several labels, whether all are."""
    right = decisions(targets, outputs) == targets
    return np.asarray(right.all(axis=1) if right.ndim == 2 else right)


def _sk() -> Any:
    """scikit-learn's metrics, imported late: it takes a second, and loading a saved model needs none of them."""
    from sklearn import metrics

    return metrics


def accuracy(targets: Targets, outputs: Outputs) -> float:
    """The share of `is_correct`."""
    return float(_sk().accuracy_score(targets, decisions(targets, outputs)))


def balanced_accuracy(targets: Targets, outputs: Outputs) -> float:
    """The mean recall over the classes; for multi-label, the mean of sensitivity and specificity."""
    if targets.ndim == 2:
        return (sensitivity(targets, outputs) + specificity(targets, outputs)) / 2
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


def sensitivity(targets: Targets, outputs: Outputs) -> float:
    """The recall of `positive_classes`, their mean."""
    c = _positive(confusions(targets, outputs), targets)
    return _mean_share(c[:, 1, 1], c[:, 1, 0], "positive")


def specificity(targets: Targets, outputs: Outputs) -> float:
    """The share of the samples outside a class that is not taken for it, the mean over `positive_classes`."""
    c = _positive(confusions(targets, outputs), targets)
    return _mean_share(c[:, 0, 0], c[:, 0, 1], "negative")


def precision(targets: Targets, outputs: Outputs) -> float:
    """The share of the samples predicted as a class that belong to it, the mean over `positive_classes`."""
    c = _positive(confusions(targets, outputs), targets)
    n_predicted = c[:, :, 1].sum(axis=1)
    return float((c[:, 1, 1] / np.maximum(n_predicted, 1)).mean())  # a class never predicted has precision 0


def f1(targets: Targets, outputs: Outputs) -> float:
    """The harmonic mean of precision and recall, the mean over all classes."""
    return float(_sk().f1_score(targets, decisions(targets, outputs), average="macro", zero_division=0))


def kappa(targets: Targets, outputs: Outputs) -> float:
    """Cohen's kappa; for multi-label, the mean over the labels."""
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


def macro(binary: Binary, targets: Targets, outputs: Outputs, *, only: int | None = None) -> float:
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


def auc(is_class: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """The area under the ROC curve of one class: the Mann-Whitney U over its maximum; ties count half."""
    from scipy.stats import rankdata  # takes a second to import, as `_sk`

    n_class = int(is_class.sum())
    u = rankdata(score)[is_class].sum() - n_class * (n_class + 1) / 2
    return float(u / (n_class * (len(score) - n_class)))


def average_precision(is_class: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """The area under the precision-recall curve of one class, for `macro`."""
    return float(_sk().average_precision_score(is_class, score))


def log_loss(targets: Targets, outputs: Outputs) -> float:
    """The mean negative log-likelihood; for multi-label, of each label."""
    p = np.clip(probabilities(targets, outputs), 1e-15, 1 - 1e-15)
    if targets.ndim == 2:
        return float(-np.where(targets > 0, np.log(p), np.log1p(-p)).mean())
    return float(-np.log(p[np.arange(len(targets)), targets]).mean())


def recall_of(k: int, targets: Targets, outputs: Outputs) -> float:
    """The recall of class ``k``."""
    c = confusions(targets, outputs)[[k]]
    return _mean_share(c[:, 1, 1], c[:, 1, 0], "positive")


def specificity_of(k: int, targets: Targets, outputs: Outputs) -> float:
    """The share of the samples outside class ``k`` that is not taken for it."""
    c = confusions(targets, outputs)[[k]]
    return _mean_share(c[:, 0, 0], c[:, 0, 1], "negative")


def precision_of(k: int, targets: Targets, outputs: Outputs) -> float:
    """The share of the samples predicted as class ``k`` that belong to it."""
    c = confusions(targets, outputs)[k]
    return float(c[1, 1] / max(1, c[:, 1].sum()))
