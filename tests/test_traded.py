"""Constraints on one class that are met at the cost of the others, on predictions made here."""

import numpy as np
import pytest

from autocompress.metrics import METRICS, Metric, accuracy, as_metric
from autocompress.task import Evaluation
from autocompress.verdict.constraint import Constraint, parse_constraint
from autocompress.verdict.limit import parse_constraints
from autocompress.verdict.traded import counterpart, traded


def evaluation(found: int, refused: int, n: int = 100) -> Evaluation:
    """A model that finds so many of ``n`` who are ill, and so many of ``n`` who are healthy."""
    targets = np.repeat([1, 0], n)
    predicted = np.zeros_like(targets)
    predicted[:found] = 1
    predicted[n + refused :] = 1
    outputs = np.eye(2, dtype=np.float32)[predicted]
    return Evaluation(accuracy.score(targets, outputs), outputs, targets)


DENSE = evaluation(found=90, refused=95)
EVERYONE_ILL = evaluation(found=99, refused=40)


def said(
    texts: str | list[str], compressed: Evaluation, *, metric: str = "auc", max_drop: float = 0.02, relative=False
) -> list[str]:
    required = parse_constraints(texts, ("healthy", "ill"))
    judged = [one.judge(compressed) for one in required if isinstance(one, Constraint)]
    return list(traded(required, judged, DENSE, compressed, METRICS[metric], max_drop, relative=relative))


def test_a_sensitivity_that_is_met_by_calling_nearly_everyone_ill_is_said() -> None:
    assert said("sensitivity>=0.9", EVERYONE_ILL) == [
        "sensitivity>=0.9 is met at the cost of specificity: on test the dense model has 0.9500 and the "
        "compressed one 0.4000, a drop of more than 2 pp, the bound on auc, with 95% confidence"
    ]
    (of_class,) = said("recall[ill]>=0.9", EVERYONE_ILL, relative=True)
    assert "cost of specificity[ill]: on test the dense" in of_class and "a drop of more than 2%, the" in of_class
    (other,) = said("specificity>=0.9", evaluation(found=20, refused=100))
    assert "cost of sensitivity: on test the dense model has 0.9000 and the compressed one 0.2000" in other


@pytest.mark.parametrize(
    ("texts", "compressed", "metric"),
    [
        ("sensitivity>=0.9", evaluation(found=99, refused=94), "auc"),  # within the bound
        ("sensitivity>=0.9", evaluation(found=99, refused=91), "auc"),  # beyond it, but that may be chance
        ("sensitivity>=0.995", EVERYONE_ILL, "auc"),  # not met, which is said anyway
        ("sensitivity<=0.995", EVERYONE_ILL, "auc"),
        ("auc>=0.1", EVERYONE_ILL, "auc"),  # has no counterpart
        ("sensitivity>=0.9", EVERYONE_ILL, "specificity"),  # what it costs is bounded
        (["sensitivity>=0.9", "specificity>=0.3"], EVERYONE_ILL, "auc"),
    ],
)
def test_nothing_is_said_where_nothing_is_traded_or_that_was_allowed(texts, compressed, metric) -> None:
    assert said(texts, compressed, metric=metric) == []


def test_test_data_of_one_class_have_no_other_to_trade() -> None:
    ill = Evaluation(1.0, np.eye(2, dtype=np.float32)[[1, 1]], np.array([1, 1]))
    required = parse_constraint("sensitivity>=0.9")
    assert list(traded([required], [required.judge(ill)], ill, ill, accuracy, 0.01)) == []


def test_each_recall_has_the_counterpart_of_its_class() -> None:
    names = ("healthy", "ill")
    for given, other in (
        ("sensitivity", "specificity"),
        ("specificity", "sensitivity"),
        ("recall[ill]", "specificity[ill]"),
        ("sensitivity[0]", "specificity[0]"),
        ("specificity[ill]", "sensitivity[ill]"),
    ):
        found = counterpart(as_metric(given, names))
        assert found is not None and found.name == other
        expected = as_metric(other, names).score(DENSE.targets, DENSE.outputs)
        assert found.score(DENSE.targets, DENSE.outputs) == expected
    for given in ("precision[ill]", "auc"):
        assert counterpart(as_metric(given, names)) is None
    assert counterpart(Metric("sensitivity", accuracy.score)) is None  # of a user, whatever it measures
    assert counterpart(Metric("recall[ill]", accuracy.score)) is None
