import numpy as np
import pytest

from autocompress.metrics import Metric, accuracy, balanced_accuracy

TARGETS = np.array([0, 0, 0, 0, 1, 2])
OUTPUTS = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 0]]  # 3 of 4, 1 of 1, 0 of 1


def test_accuracy_is_the_share_of_right_answers() -> None:
    assert accuracy.score(TARGETS, OUTPUTS) == pytest.approx(4 / 6)
    assert accuracy.correct is not None
    assert accuracy.correct(TARGETS, OUTPUTS).tolist() == [True, True, True, False, True, False]
    assert accuracy.correct(TARGETS, OUTPUTS).mean() == accuracy.score(TARGETS, OUTPUTS)


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    assert balanced_accuracy.score(TARGETS, OUTPUTS) == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert balanced_accuracy.correct is None  # no mean of right and wrong answers


def test_scores_depend_on_the_largest_logit_alone() -> None:
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(50, 4)).astype(np.float32)
    targets = rng.integers(4, size=50)
    for metric in (accuracy, balanced_accuracy):
        assert metric.score(targets, outputs) == metric.score(targets, 3 * outputs - 5)
        assert type(metric.score(targets, outputs)) is float


def test_drop_is_positive_when_worse() -> None:
    assert accuracy.drop(0.9, 0.88) == pytest.approx(0.02)
    assert accuracy.drop(0.9, 0.91) == pytest.approx(-0.01)
    assert accuracy.drop(0.8, 0.76, relative=True) == pytest.approx(0.05)
    error = Metric("error", accuracy.score, higher_is_better=False)
    assert error.drop(0.10, 0.12) == pytest.approx(0.02)
    assert error.drop(0.10, 0.12, relative=True) == pytest.approx(0.2)


def test_relative_drop_of_odd_dense_scores() -> None:
    assert accuracy.drop(0.0, -0.1, relative=True) == pytest.approx(0.1)  # nothing to be relative to
    assert accuracy.drop(-0.5, -0.6, relative=True) == pytest.approx(0.2)


def test_a_drop_of_one_point_is_within_a_bound_of_one() -> None:
    assert accuracy.drop(0.97, 0.96) == 0.01
    assert accuracy.drop(0.5, 0.49, relative=True) == 0.02
