"""Scores by class, before and after: compression that sacrifices a rare class must be visible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import metrics as sk

from autocompress.task import Evaluation
from autocompress.verdict.scores import confusions, decisions


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class.

    Attributes:
        name: The name of the class; its number where it has none.
        support: Samples of the class.
        recall: Share of these samples that are predicted as the class; None without a sample.
        precision: Share of the samples predicted as the class that belong to it; None without such a sample.
    """

    name: str
    support: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class PerClass:
    """The scores of the dense and the compressed model by class, on the same samples.

    Attributes:
        dense: The dense model's scores.
        compressed: The compressed model's scores.
        confusion_dense: The dense model's confusion matrix: counts by true class (row) and predicted class
            (column), shape ``(classes, classes)``. Where a sample may have several labels, a matrix [[TN, FP],
            [FN, TP]] per label, shape ``(labels, 2, 2)``.
        confusion_compressed: The compressed model's.
    """

    dense: tuple[ClassScore, ...]
    compressed: tuple[ClassScore, ...]
    confusion_dense: list[Any]
    confusion_compressed: list[Any]

    def to_json(self) -> dict[str, Any]:
        """The scores in JSON types, as in ``result.json``."""
        return {
            "classes": [
                {
                    "name": after.name,
                    "support": after.support,
                    "dense_recall": before.recall,
                    "recall": after.recall,
                    "dense_precision": before.precision,
                    "precision": after.precision,
                }
                for before, after in zip(self.dense, self.compressed, strict=True)
            ],
            "confusion": {"dense": self.confusion_dense, "compressed": self.confusion_compressed},
        }


def per_class(dense: Evaluation, compressed: Evaluation, names: Sequence[str] = ()) -> PerClass:
    """Recall, precision and confusion of both models on the same samples.

    Args:
        dense: The dense model's evaluation on the test data.
        compressed: The compressed model's evaluation on the same data.
        names: The names of the classes, in order.
    """
    return PerClass(_scores(dense, names), _scores(compressed, names), _confusion(dense), _confusion(compressed))


def _scores(evaluation: Evaluation, names: Sequence[str]) -> tuple[ClassScore, ...]:
    targets, outputs = evaluation.targets, evaluation.outputs
    return tuple(
        ClassScore(
            name=names[k] if k < len(names) else str(k),
            support=int(fn + tp),
            recall=float(tp / (fn + tp)) if fn + tp else None,
            precision=float(tp / (fp + tp)) if fp + tp else None,
        )
        for k, ((_, fp), (fn, tp)) in enumerate(confusions(targets, outputs).tolist())
    )


def _confusion(evaluation: Evaluation) -> list[Any]:
    targets, outputs = evaluation.targets, evaluation.outputs
    if targets.ndim == 2:
        counts: list[Any] = confusions(targets, outputs).tolist()
    else:
        labels = np.arange(outputs.shape[1])
        counts = sk.confusion_matrix(targets, decisions(targets, outputs), labels=labels).tolist()
    return counts
