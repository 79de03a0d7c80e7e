import re

import numpy as np
import pytest

from autocompress.certify import certify, conclude
from autocompress.metrics import METRICS, accuracy
from autocompress.task import Evaluation
from autocompress.verdict.constraint import Constraint, parse_constraint
from autocompress.verdict.limit import parse_constraints
from autocompress.verdict.per_class import per_class


def evaluation(positives: int, found: int, negatives: int = 50, refused: int = 50) -> Evaluation:
    """A binary model that finds so many of the positives, and so many of the negatives."""
    targets = np.repeat([1, 0], [positives, negatives])
    predicted = np.zeros_like(targets)
    predicted[:found] = 1
    predicted[positives + refused :] = 1
    outputs = np.eye(2, dtype=np.float32)[predicted]
    return Evaluation(accuracy.score(targets, outputs), outputs, targets)


@pytest.mark.parametrize(
    ("text", "metric", "at_least", "value", "again"),
    [
        ("sensitivity>=0.95", "sensitivity", True, 0.95, "sensitivity>=0.95"),
        (" auc >= 90% ", "auc", True, 0.9, "auc>=0.9"),
        ("log_loss<=.5", "log_loss", False, 0.5, "log_loss<=0.5"),
        ("recall[mel]>=0.8", "recall[mel]", True, 0.8, "recall[mel]>=0.8"),
    ],
)
def test_what_is_written_is_what_is_meant(text, metric, at_least, value, again) -> None:
    constraint = parse_constraint(text, ("nv", "mel"))
    assert (constraint.metric.name, constraint.at_least, constraint.value) == (metric, at_least, value)
    assert constraint.text == again
    assert parse_constraint(again, ("nv", "mel")).text == again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sensitivity", "is not a constraint; write METRIC>=VALUE"),
        ("sensitivity>0.9", "is not a constraint"),
        ("sensitivity>=high", "is not a constraint"),
        ("sensitivty>=0.9", "did you mean sensitivity"),
        ("recall[x]>=0.9", "there is no class 'x'"),
        ("auc>=1e999", "must be a finite number"),
    ],
)
def test_what_is_no_constraint_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_constraint(text)


def test_a_trial_s_value_its_error_and_what_is_missing() -> None:
    checked = parse_constraint("sensitivity>=0.95").check(evaluation(200, 184))
    assert checked.value == 0.92
    assert checked.excess == 0.03 and not checked.met
    assert checked.se == pytest.approx(np.sqrt(0.92 * 0.08 / 200), rel=0.3)
    assert parse_constraint("sensitivity>=0.92").check(evaluation(200, 184)).met  # reached exactly
    assert parse_constraint("sensitivity<=0.9").check(evaluation(200, 184)).excess == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("found", "standing", "met"),
    [
        (396, "certified", True),
        (382, "not certifiable", True),
        (376, "not certifiable", False),
        (340, "not met", False),
    ],
)
def test_the_verdict_on_test_wants_the_bound_and_not_just_the_value(found, standing, met) -> None:
    judged = parse_constraint("sensitivity>=0.95").judge(evaluation(400, found))
    assert (judged.standing, judged.met) == (standing, met)
    assert judged.lower <= judged.value <= judged.upper
    assert judged.value == found / 400
    assert f"{judged.value:.4f}" in judged.sentence
    assert ("violates sensitivity>=0.95" in judged.sentence) is not met


def test_a_perfect_score_of_few_samples_certifies_little() -> None:
    judged = parse_constraint("sensitivity>=0.95").judge(evaluation(10, 10, negatives=40, refused=40))
    assert judged.lower == pytest.approx(0.05 ** (1 / 10))  # the exact bound for 10 of 10
    assert judged.standing == "not certifiable"


@pytest.mark.parametrize("found", [0, 10])
def test_the_bounds_lie_where_the_metric_does(found) -> None:
    judged = parse_constraint("sensitivity>=0.95").judge(evaluation(10, found, negatives=40, refused=40))
    assert judged.lower < judged.upper
    assert (judged.lower, judged.upper)[found == 10] == found / 10


def test_the_bounds_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    constraint, true, missed = Constraint(METRICS["sensitivity"], True, 0.9), 0.9, 0
    for _ in range(12):
        missed += constraint.judge(evaluation(150, int(rng.binomial(150, true)))).lower > true
    assert missed <= 3  # of 12 at 5%: more than 3 has a chance of 0.2%


def test_the_worst_outcome_is_the_verdict_and_every_number_is_said() -> None:
    dense, compressed = evaluation(400, 392), evaluation(400, 392)
    verdict = certify(accuracy, dense, compressed, 0.02)
    assert verdict.outcome == "certified"
    assert conclude(verdict, ()) == ("certified", verdict.sentence)
    violated = parse_constraint("sensitivity>=0.999").judge(compressed)
    outcome, sentence = conclude(verdict, (violated,))
    assert outcome == "not met"
    assert sentence.startswith("Not met, for a constraint. Of the drop alone: certified: on 450 test samples")
    assert "On test sensitivity is 0.9800, which violates sensitivity>=0.999" in sentence
    met = parse_constraint("sensitivity>=0.9").judge(compressed)
    assert conclude(verdict, (met,)) == ("certified", f"{verdict.sentence} {met.sentence}")


def test_each_class_before_and_after() -> None:
    dense, compressed = evaluation(20, 18, 30, 29), evaluation(20, 9, 30, 30)
    found = per_class(dense, compressed, ("healthy", "ill"))
    assert [(c.name, c.support) for c in found.dense] == [("healthy", 30), ("ill", 20)]
    assert [c.recall for c in found.dense] == [29 / 30, 0.9]
    assert [c.precision for c in found.compressed] == [30 / 41, 1.0]
    assert found.confusion_dense == [[29, 1], [2, 18]]
    assert found.confusion_compressed == [[30, 0], [11, 9]]
    stored = found.to_json()
    assert stored["classes"][1] == {
        "name": "ill",
        "support": 20,
        "dense_recall": 0.9,
        "recall": 0.45,
        "dense_precision": 18 / 19,
        "precision": 1.0,
    }
    assert stored["confusion"] == {"dense": [[29, 1], [2, 18]], "compressed": [[30, 0], [11, 9]]}


def test_a_class_that_is_absent_or_never_found_has_no_number() -> None:
    targets = np.array([0, 0, 1])
    outputs = np.eye(3, dtype=np.float32)[[0, 0, 0]]
    one = Evaluation(0.0, outputs, targets)
    scores = per_class(one, one).dense
    assert [(c.support, c.recall, c.precision) for c in scores] == [
        (2, 1.0, 2 / 3),
        (1, 0.0, None),
        (0, None, None),
    ]


def test_labels_have_a_table_each() -> None:
    targets = np.array([[1, 0], [1, 1], [0, 0]])
    outputs = np.array([[2, -1], [-1, 1], [-1, -1]], dtype=np.float32)
    found = per_class(Evaluation(0.0, outputs, targets), Evaluation(0.0, outputs, targets), ("effusion", "mass"))
    assert [(c.name, c.support, c.recall) for c in found.dense] == [("effusion", 2, 0.5), ("mass", 1, 1.0)]
    assert found.confusion_dense == [[[1, 0], [1, 1]], [[2, 0], [0, 1]]]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("sensitivity>=95", "sensitivity>=95 cannot be met: sensitivity is never above 1, or 100%"),
        ("sensitivity@specificity=90%>=150%", "sensitivity@specificity=0.9 is never above 1, or 100%"),
        ("log_loss<=-0.1", "log_loss<=-0.1 cannot be met: log_loss is never below 0"),
    ],
)
def test_a_constraint_that_no_score_meets_is_refused(written, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_constraint(written)
    assert parse_constraint("sensitivity>=100%").value == 1.0


def test_a_constraint_at_an_operating_point_may_have_spaces_and_is_taken_for_no_objective() -> None:
    (required,) = parse_constraints("sensitivity @ specificity = 90% >= 80%")
    assert required.text == "sensitivity@specificity=0.9>=0.8"
    with pytest.raises(ValueError, match=r"specificity@sensitivity is no operating point; write specificity@"):
        parse_constraints("specificity@sensitivity>=95%")
