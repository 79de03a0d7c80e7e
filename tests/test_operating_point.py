"""Decision thresholds at operating points, against scikit-learn's ROC curve."""

import re

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from autocompress.verdict.operating_point import OperatingPoint

VALUES = (0.1, 0.5, 2 / 3, 0.9, 0.95, 1.0)


def ranked(n: int, seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Whether samples are of a class, both being there, and scores that tell something of it."""
    rng = np.random.default_rng(seed)
    is_class = rng.permutation(np.arange(n) % 3 == 0)
    scores = rng.normal(size=n) + is_class
    return is_class, scores.round() if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("n", [4, 10, 100])
def test_the_score_is_the_best_of_the_roc_curve_and_the_threshold_gives_it(n, value, ties) -> None:
    for seed in range(20):
        is_class, scores = ranked(n, seed, ties=ties)
        fpr, tpr, _ = roc_curve(is_class, scores, drop_intermediate=False)
        for fixed, reached, scored in (("sensitivity", tpr, 1 - fpr), ("specificity", 1 - fpr, tpr)):
            point = OperatingPoint(fixed, value)
            assert point.score(is_class, scores) == pytest.approx(scored[reached >= value - 1e-12].max())
            found = scores >= point.threshold(is_class, scores)
            rates = {"sensitivity": found[is_class].mean(), "specificity": (~found)[~is_class].mean()}
            assert rates[fixed] >= value - 1e-12
            assert rates[point.scored] == point.score(is_class, scores)


def test_a_threshold_lies_half_way_between_the_scores_that_it_separates() -> None:
    is_class, scores = np.array([False, False, True, True]), np.array([0.1, 0.3, 0.5, 0.9])
    assert OperatingPoint("sensitivity", 1.0).threshold(is_class, scores) == pytest.approx(0.4)
    assert OperatingPoint("sensitivity", 0.5).threshold(is_class, scores) == pytest.approx(0.7)
    assert OperatingPoint("specificity", 0.5).threshold(is_class, scores) == pytest.approx(0.2)
    assert OperatingPoint("specificity", 1.0).threshold(is_class, scores) == pytest.approx(0.4)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_scores_that_hardly_differ_are_still_separated(dtype) -> None:
    low = dtype(0.3)
    high = np.nextafter(low, dtype(1))
    is_class, scores = np.array([False, True]), np.array([low, high])
    for fixed in ("sensitivity", "specificity"):
        point = OperatingPoint(fixed, 1.0)
        assert point.score(is_class, scores) == 1.0
        assert low < point.threshold(is_class, scores) <= high


def test_a_model_that_gives_all_samples_one_score_finds_all_or_nothing() -> None:
    is_class, scores = np.array([False, True, False, True]), np.zeros(4)
    assert OperatingPoint("specificity", 0.5).score(is_class, scores) == 0.0
    assert OperatingPoint("sensitivity", 0.5).score(is_class, scores) == 0.0
    assert OperatingPoint("specificity", 0.5).threshold(is_class, scores) > 0
    assert OperatingPoint("sensitivity", 0.5).threshold(is_class, scores) == 0


def test_a_share_of_whole_samples_needs_no_sample_more() -> None:
    """0.07 * 100 is 7.000000000000001 in floats."""
    is_class = np.arange(200) >= 100
    scores = np.where(is_class, np.arange(200.0), -1.0)
    found = scores >= OperatingPoint("sensitivity", 0.07).threshold(is_class, scores)
    assert found.sum() == 7


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (("auc", "sensitivity", "0.9"), "auc@sensitivity=0.9 is no operating point; write specificity@sens"),
        (("sensitivity", "sensitivity", "0.9"), "sensitivity@sensitivity=0.9 is no operating point"),
        (("sensitivity", "specificity", "high"), "sensitivity@specificity=high is no operating point"),
        (("sensitivity", "specificity", "nan"), "sensitivity@specificity=nan is no operating point"),
        (("sensitivity", "specificity", "0"), "specificity must be above 0 and at most 1, or 100%"),
        (("sensitivity", "specificity", "95"), "sensitivity@specificity=95: specificity must be above 0"),
    ],
)
def test_what_is_no_operating_point_is_refused_in_a_line(written, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OperatingPoint.parse(*written)


def test_a_value_may_be_in_percent() -> None:
    assert OperatingPoint.parse("specificity", "sensitivity", "95%") == OperatingPoint("sensitivity", 0.95)
    assert str(OperatingPoint("sensitivity", 0.95)) == "specificity@sensitivity=0.95"
