"""What a model does class by class: compression that sacrifices the rare class must be visible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import metrics as sk

from autocompress.metrics import confusions, decisions
from autocompress.task import Evaluation


@dataclass(frozen=True)
class ClassScore:
    """How one class fares.

    Attributes:
        name: Of the class; its number where it has no name.
        support: Samples of it.
        recall: Share of them that are found; None without a sample.
        precision: Share of what is taken for it that is it; None when nothing is.
    """

    name: str
    support: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class PerClass:
    """The dense and the compressed model, class by class on the same samples.

    Attributes:
        dense: Before.
        compressed: After.
        confusion_dense: Counts, a row a true class, a column a predicted one: ``(classes, classes)``. Where a
            sample may have several labels, a table [[TN, FP], [FN, TP]] a label: ``(labels, 2, 2)``.
        confusion_compressed: The same after.
    """

    dense: tuple[ClassScore, ...]
    compressed: tuple[ClassScore, ...]
    confusion_dense: list[Any]
    confusion_compressed: list[Any]

    def to_json(self) -> dict[str, Any]:
        """As ``result.json`` holds it."""
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
        dense: The dense model on the test data.
        compressed: The compressed model on the same.
        names: Of the classes, in order.
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
