"""Decision thresholds of the deployed model: chosen on val, checked on test."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import binomtest

from autocompress.metrics import as_metric
from autocompress.task import Evaluation
from autocompress.verdict.decision_threshold import decision_thresholds, lower_bound


def evaluation(targets: np.ndarray, seed: int) -> Evaluation:
    """Logits that tell something of the targets."""
    rng = np.random.default_rng(seed)
    is_class = targets if targets.ndim == 2 else np.eye(targets.max() + 1)[targets]
    return Evaluation(0.0, (rng.normal(size=is_class.shape) + 2 * is_class - 1).astype(np.float32), targets)


def test_of_two_classes_the_threshold_of_val_decides_on_test() -> None:
    rng = np.random.default_rng(0)
    val, test = (evaluation(rng.integers(2, size=n), n) for n in (150, 200))
    metric = as_metric("specificity@sensitivity=0.9", ("well", "ill"))
    (at,) = decision_thresholds(metric, val, test, ("well", "ill"), confidence=0.9)
    assert (at.metric, at.class_name) == ("specificity@sensitivity=0.9", "ill")
    assert at.val.sensitivity >= 0.9 > at.val.sensitivity - 1 / 60  # not more than needed
    assert at.val.specificity == metric.score(val.targets, val.outputs)
    found = softmax(test.outputs.astype(float), axis=1)[:, 1] >= at.probability
    ill = test.targets == 1
    assert at.test.sensitivity == pytest.approx(found[ill].mean())
    assert at.test.specificity == pytest.approx((~found)[~ill].mean())
    assert at.test.specificity != metric.score(test.targets, test.outputs)  # which takes test's own threshold
    exact = binomtest(int(found[ill].sum()), int(ill.sum()), alternative="greater")
    assert at.lower.sensitivity == pytest.approx(exact.proportion_ci(0.9, method="exact").low)
    assert f"count a sample as 'ill' if its probability is at least {at.probability}. " in at.sentence
    assert f"On the test data the sensitivity is {at.test.sensitivity:.4f} and the specificity is" in at.sentence


def test_every_label_has_a_threshold_and_one_class_by_name_only_its_own() -> None:
    rng = np.random.default_rng(1)
    val, test = (evaluation(rng.integers(2, size=(90, 3)), seed) for seed in (1, 2))
    names = ("mass", "nodule", "hernia")
    metric = as_metric("sensitivity@specificity=0.8", names)
    found = decision_thresholds(metric, val, test, names)
    assert [at.class_name for at in found] == list(names)
    assert metric.score(val.targets, val.outputs) == pytest.approx(np.mean([at.val.sensitivity for at in found]))
    (only,) = decision_thresholds(as_metric("sensitivity[nodule]@specificity=0.8", names), val, test, names)
    assert (only.class_name, only.probability) == ("nodule", found[1].probability)
    decided = expit(val.outputs[:, 1].astype(float)) >= only.probability
    assert only.val.specificity == (~decided)[val.targets[:, 1] == 0].mean()


def test_what_a_split_lacks_has_no_rate() -> None:
    val = evaluation(np.arange(30) % 3, 0)
    test = evaluation(np.arange(30) % 3, 1)
    test = Evaluation(0.0, test.outputs[test.targets < 2], test.targets[test.targets < 2])
    found = decision_thresholds(as_metric("sensitivity@specificity=0.8"), val, test)
    assert [at.class_name for at in found] == ["0", "1", "2"]
    assert (found[2].test.sensitivity, found[2].lower.sensitivity) == (None, None)
    assert found[2].test.specificity is not None
    assert "On the test data the specificity is" in found[2].sentence
    without = Evaluation(0.0, val.outputs[val.targets < 2], val.targets[val.targets < 2])
    assert len(decision_thresholds(as_metric("sensitivity@specificity=0.8"), without, test)) == 2


def test_other_metrics_have_no_threshold() -> None:
    both = evaluation(np.arange(30) % 2, 0)
    assert decision_thresholds(as_metric("sensitivity"), both, both) == ()


@pytest.mark.parametrize(("successes", "n"), [(0, 12), (3, 12), (11, 12), (12, 12)])
def test_the_bound_is_the_exact_one_of_a_binomial(successes, n) -> None:
    exact = binomtest(successes, n, alternative="greater").proportion_ci(0.95, method="exact").low
    assert lower_bound(successes, n, 0.95) == pytest.approx(exact)


def written(at) -> float:
    return float(at.sentence.split("at least ")[1].split(". On")[0])


@pytest.mark.parametrize("asked", ["sensitivity@specificity=0.9", "specificity@sensitivity=0.9"])
@pytest.mark.parametrize("by", [(0, 0), (0, 12), (0, 25)])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_the_threshold_as_it_is_written_gives_the_rates_that_are_reported(asked, by, scale) -> None:
    """Also for a model that is sure of class 1 for every sample, and for one that hardly tells samples apart."""
    val, test = (evaluation(np.arange(40) % 2, seed) for seed in (0, 1))
    val, test = (Evaluation(0.0, scale * e.outputs + np.float32(by), e.targets) for e in (val, test))
    metric = as_metric(asked)
    (at,) = decision_thresholds(metric, val, test)
    assert written(at) == at.probability < 1
    assert ("computed in float64" in at.sentence) == (at.probability > 0.999)
    for e, rates in ((val, at.val), (test, at.test)):
        found = softmax(e.outputs.astype(float), axis=1)[:, 1] >= written(at)
        ill = e.targets == 1
        assert (found[ill].mean(), (~found[~ill]).mean()) == (rates.sensitivity, rates.specificity)
    assert getattr(at.val, metric.point.scored) == metric.score(val.targets, val.outputs)


@pytest.mark.parametrize(
    ("asked", "probability"), [("sensitivity@specificity=0.9", 0.75), ("specificity@sensitivity=0.9", 0.25)]
)
def test_where_all_samples_have_one_probability_the_threshold_is_clearly_above_or_below_it(asked, probability):
    same = Evaluation(0.0, np.zeros((40, 2), np.float32), np.arange(40) % 2)
    (at,) = decision_thresholds(as_metric(asked), same, same)
    assert at.probability == written(at) == probability
    assert (at.test.sensitivity, at.test.specificity) == ((0, 1) if probability > 0.5 else (1, 0))
