import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import metrics as sk

from autocompress.metrics import METRICS, Metric, accuracy, as_metric
from autocompress.showing.comparison import spaced
from autocompress.task import Evaluation
from autocompress.verdict.constraint import parse_constraint
from autocompress.verdict.scores import classes_present, confusions, smallest_class

RNG = np.random.default_rng(0)
BINARY = RNG.integers(2, size=80)
BINARY_LOGITS = (RNG.normal(size=(80, 2)) + np.eye(2)[BINARY]).astype(np.float32)
MULTI = RNG.integers(4, size=120)
MULTI_LOGITS = (RNG.normal(size=(120, 4)) + np.eye(4)[MULTI]).astype(np.float32)
LABELS = RNG.integers(2, size=(90, 3))
LABEL_LOGITS = (RNG.normal(size=(90, 3)) + 2 * LABELS - 1).astype(np.float32)


def score(name: str, targets: np.ndarray, outputs: np.ndarray) -> float:
    return METRICS[name].score(targets, outputs)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", lambda y, found, p: sk.accuracy_score(y, found)),
        ("balanced_accuracy", lambda y, found, p: sk.balanced_accuracy_score(y, found)),
        ("auc", lambda y, found, p: sk.roc_auc_score(y, p[:, 1])),
        ("average_precision", lambda y, found, p: sk.average_precision_score(y, p[:, 1])),
        ("sensitivity", lambda y, found, p: sk.recall_score(y, found)),
        ("specificity", lambda y, found, p: sk.recall_score(y, found, pos_label=0)),
        ("precision", lambda y, found, p: sk.precision_score(y, found)),
        ("f1", lambda y, found, p: sk.f1_score(y, found, average="macro")),
        ("kappa", lambda y, found, p: sk.cohen_kappa_score(y, found)),
        ("log_loss", lambda y, found, p: sk.log_loss(y, p)),
    ],
)
def test_of_two_classes_as_scikit_learn(name, reference) -> None:
    p = softmax(BINARY_LOGITS.astype(float), axis=1)
    expected = reference(BINARY, BINARY_LOGITS.argmax(1), p)
    assert score(name, BINARY, BINARY_LOGITS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("auc", lambda y, found, p: sk.roc_auc_score(y, p, multi_class="ovr", average="macro")),
        ("average_precision", lambda y, found, p: sk.average_precision_score(np.eye(4)[y], p)),
        ("sensitivity", lambda y, found, p: sk.recall_score(y, found, average="macro")),
        ("precision", lambda y, found, p: sk.precision_score(y, found, average="macro")),
        ("f1", lambda y, found, p: sk.f1_score(y, found, average="macro")),
        ("kappa", lambda y, found, p: sk.cohen_kappa_score(y, found)),
        ("log_loss", lambda y, found, p: sk.log_loss(y, p)),
    ],
)
def test_of_four_classes_as_scikit_learn(name, reference) -> None:
    p = softmax(MULTI_LOGITS.astype(float), axis=1)
    expected = reference(MULTI, MULTI_LOGITS.argmax(1), p)
    assert score(name, MULTI, MULTI_LOGITS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", lambda y, found, p: (y == found).all(axis=1).mean()),
        ("auc", lambda y, found, p: sk.roc_auc_score(y, p, average="macro")),
        ("average_precision", lambda y, found, p: sk.average_precision_score(y, p, average="macro")),
        ("sensitivity", lambda y, found, p: sk.recall_score(y, found, average="macro")),
        ("specificity", lambda y, found, p: sk.recall_score(1 - y, 1 - found, average="macro")),
        ("f1", lambda y, found, p: sk.f1_score(y, found, average="macro")),
        ("log_loss", lambda y, found, p: np.mean([sk.log_loss(a, b) for a, b in zip(y.T, p.T, strict=True)])),
    ],
)
def test_of_several_labels_as_scikit_learn(name, reference) -> None:
    expected = reference(LABELS, (LABEL_LOGITS > 0).astype(int), expit(LABEL_LOGITS.astype(float)))
    assert score(name, LABELS, LABEL_LOGITS) == pytest.approx(expected)


def test_balanced_accuracy_of_labels_is_the_mean_of_both_recalls() -> None:
    both = [score(name, LABELS, LABEL_LOGITS) for name in ("sensitivity", "specificity")]
    assert score("balanced_accuracy", LABELS, LABEL_LOGITS) == pytest.approx(np.mean(both))


def test_of_one_class_by_number_and_by_name() -> None:
    recalls = sk.recall_score(MULTI, MULTI_LOGITS.argmax(1), average=None)
    precisions = sk.precision_score(MULTI, MULTI_LOGITS.argmax(1), average=None)
    names = ("akiec", "bcc", "mel", "nv")
    for k, name in enumerate(names):
        for called in (str(k), name):
            assert as_metric(f"recall[{called}]", names).score(MULTI, MULTI_LOGITS) == pytest.approx(recalls[k])
        assert as_metric(f"precision[{k}]").score(MULTI, MULTI_LOGITS) == pytest.approx(precisions[k])
    assert as_metric("specificity[1]").score(BINARY, BINARY_LOGITS) == score("specificity", BINARY, BINARY_LOGITS)


def test_only_log_loss_is_better_when_lower_and_only_accuracy_counts_right_answers() -> None:
    assert [m.name for m in METRICS.values() if not m.higher_is_better] == ["log_loss"]
    assert [m.name for m in METRICS.values() if m.correct] == ["accuracy"]
    right = accuracy.correct(LABELS, LABEL_LOGITS)
    assert right.shape == (90,) and right.mean() == score("accuracy", LABELS, LABEL_LOGITS)


def test_scores_lie_in_the_range_that_the_metric_declares() -> None:
    of_class = [as_metric(f"{kind}[1]") for kind in ("recall", "sensitivity", "specificity", "precision")]
    for metric in (*METRICS.values(), *of_class):
        right, wrong = (sign * 1e4 * np.eye(2, dtype=np.float32)[BINARY] for sign in (1, -1))
        best, worst = (metric.score(BINARY, logits) for logits in (right, wrong))
        assert best == pytest.approx(metric.high if metric.higher_is_better else metric.low)
        assert metric.low <= min(best, worst) <= max(best, worst) <= metric.high
    with pytest.raises(ValueError, match="low=1 and high=0; low must be less"):
        Metric("mine", accuracy.score, low=1, high=0)


def test_what_cannot_be_scored_says_so_and_what_can_is_finite() -> None:
    ones = np.ones(5, dtype=np.int64)
    logits = np.tile(np.array([0.0, 1.0], dtype=np.float32), (5, 1))
    with pytest.raises(ValueError, match="all samples are of one class"):
        score("auc", ones, logits)
    with pytest.raises(ValueError, match="no negative sample"):
        score("specificity", ones, logits)
    assert score("kappa", ones, logits) == 1.0
    assert score("precision", np.array([1, 0]), np.array([[1, 0], [1, 0]], dtype=np.float32)) == 0.0
    certain = np.array([[1e4, -1e4]], dtype=np.float32)
    assert score("log_loss", np.array([1]), certain) == pytest.approx(-np.log(1e-15))


def test_every_metric_survives_pickling(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def share(targets, outputs):\n    return (outputs.argmax(1) == targets).mean()\n")
    for metric in (*METRICS.values(), as_metric("recall[1]"), as_metric(f"{file}:share")):
        again = pickle.loads(pickle.dumps(metric))
        assert again.score(BINARY, BINARY_LOGITS) == metric.score(BINARY, BINARY_LOGITS)
        assert (again.name, again.higher_is_better) == (metric.name, metric.higher_is_better)
        assert (again.low, again.high) == (metric.low, metric.high)


def test_a_metric_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from autocompress import Metric\n"
        "def fails(targets, outputs):\n    raise RuntimeError('no')\n"
        "def text(targets, outputs):\n    return 'much'\n"
        "error = Metric('error', lambda y, z: 1 - float((z.argmax(1) == y).mean()), higher_is_better=False)\n"
        "number = 3\n"
    )
    mine = as_metric(f"{file}:error")
    assert (mine.name, mine.higher_is_better, mine.source) == ("error", False, f"{file}:error")
    assert mine.score(BINARY, BINARY_LOGITS) == pytest.approx(1 - score("accuracy", BINARY, BINARY_LOGITS))
    for name, message in (
        ("fails", "raised RuntimeError: no"),
        ("text", "returned 'much'; it must return a number"),
    ):
        with pytest.raises(ValueError, match=message):
            as_metric(f"{file}:{name}").score(BINARY, BINARY_LOGITS)
    with pytest.raises(ValueError, match="is a int, not a Metric"):
        as_metric(f"{file}:number")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("AUC", "unknown metric 'AUC'; did you mean auc"),
        ("nonsense", "unknown metric 'nonsense' .available: accuracy, "),
        ("recall[mel]", "there is no class 'mel'; it is one of a, b"),
        ("recall[2]", "there is no class '2'; it is one of a, b"),
        ("auc[1]", r"unknown metric auc\[1\]; of one class there are recall"),
        ("there/is/none.py:f", "there is no file"),
        (3, "metric=3; give a name"),
    ],
)
def test_unknown_metrics_are_refused_in_one_line(given, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        as_metric(given, ("a", "b"))
    assert "\n" not in str(refused.value)


def test_a_metric_is_itself() -> None:
    mine = Metric("mine", accuracy.score)
    assert as_metric(mine) is mine


def test_the_rarest_class_and_how_many_there_are() -> None:
    assert (smallest_class(np.array([0, 0, 0, 2, 2])), classes_present(np.array([0, 0, 0, 2, 2]))) == (2, 2)
    labels = np.array([[0, 1], [0, 1], [1, 1]])
    assert (smallest_class(labels), classes_present(labels)) == (1, 3)


def test_confusions_are_those_of_scikit_learn() -> None:
    for targets, outputs, found in (
        (MULTI, MULTI_LOGITS, MULTI_LOGITS.argmax(1)),
        (LABELS, LABEL_LOGITS, LABEL_LOGITS > 0),
    ):
        labels = np.arange(outputs.shape[1])
        expected = sk.multilabel_confusion_matrix(targets, found, labels=labels)
        np.testing.assert_array_equal(confusions(targets, outputs), expected)


def test_rates_at_operating_points_are_those_of_the_roc_curve() -> None:
    fpr, tpr, _ = sk.roc_curve(BINARY, BINARY_LOGITS[:, 1] - BINARY_LOGITS[:, 0], drop_intermediate=False)
    found = as_metric("specificity@sensitivity=80%").score(BINARY, BINARY_LOGITS)
    assert found == pytest.approx((1 - fpr)[tpr >= 0.8].max())
    # Of the first class the two rates are exchanged.
    assert as_metric("sensitivity[0]@specificity=0.8").score(BINARY, BINARY_LOGITS) == pytest.approx(found)
    assert as_metric("specificity[1]@sensitivity=0.8").score(BINARY, BINARY_LOGITS) == found


@pytest.mark.parametrize(("targets", "outputs"), [(MULTI, MULTI_LOGITS), (LABELS, LABEL_LOGITS)])
def test_rates_at_operating_points_of_several_classes_are_means(targets, outputs) -> None:
    n = outputs.shape[1]
    mean = as_metric("sensitivity@specificity=0.9").score(targets, outputs)
    each = [as_metric(f"sensitivity[{k}]@specificity=0.9").score(targets, outputs) for k in range(n)]
    assert mean == pytest.approx(np.mean(each)) and len(set(each)) > 1


def test_an_operating_point_travels_and_has_the_name_that_was_written() -> None:
    metric = as_metric("specificity[ill]@sensitivity=95%", ("well", "ill"))
    assert metric.name == "specificity[ill]@sensitivity=0.95" and (metric.low, metric.high) == (0, 1)
    again = pickle.loads(pickle.dumps(metric))
    assert (again.name, again.point, again.only) == (metric.name, metric.point, metric.only)
    assert again.score(BINARY, BINARY_LOGITS) == metric.score(BINARY, BINARY_LOGITS)
    with pytest.raises(ValueError, match=r"there is no class 'sick'; it is one of well, ill"):
        as_metric("specificity[sick]@sensitivity=95%", ("well", "ill"))
    with pytest.raises(ValueError, match="all of class 1, or none is"):
        metric.score(np.ones_like(BINARY), BINARY_LOGITS)


@pytest.mark.parametrize("named", ["T>=2cm", "a<=b [x]", "left@right=both", "[x]@sensitivity=95%", "a_b]"])
def test_a_class_may_have_a_name_that_looks_like_a_metric_or_a_constraint(named) -> None:
    classes = ("other", named)
    targets = np.arange(40) % 2
    outputs = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    for metric in (f"recall[{named}]", f"specificity[{named}]@sensitivity=0.9"):
        assert spaced(metric) == metric and spaced(f"balanced_{metric}") == f"balanced {metric}"
        for written in (f"{metric}>=0.01", f"{metric}<=0.99"):
            constraint = parse_constraint(written, classes)
            assert constraint.metric.name == metric and constraint.text == written
            sentence = constraint.judge(Evaluation(0.0, outputs, targets)).sentence
            assert sentence.startswith(f"On test {metric} is ")
            bound = "at least" if written.endswith(">=0.01") else "at most"
            assert f", {bound} 0." in sentence


@pytest.mark.parametrize(
    "written",
    ["specificity@sensitivity", "specificity@95%", "specificity@sensitivity>=95%", "specificity@sensitivity:95%",
     "specificity@sensitivity[1]=95%", "specificity[1]@", "tpr @ fpr = 5%"],
)  # fmt: skip
def test_what_is_nearly_an_operating_point_is_refused_with_the_form_of_one(written) -> None:
    with pytest.raises(ValueError, match=re.escape("no operating point; write specificity@sensitivity=95%, ")):
        as_metric(written, ("0", "1"))


def test_an_operating_point_may_have_spaces_and_its_name_has_all_digits() -> None:
    assert as_metric("specificity @ sensitivity = 95%").name == "specificity@sensitivity=0.95"
    assert as_metric("specificity@sensitivity=99.99999%").name == "specificity@sensitivity=0.9999999"
    with pytest.raises(
        ValueError, match=r"specificity@sensitivity=150%: sensitivity must be above 0 and at most 1"
    ):
        as_metric("specificity@sensitivity=150%")
