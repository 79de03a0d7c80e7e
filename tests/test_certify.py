import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from autocompress.certify import (
    Verdict,
    certifiable_drop,
    certified_in_order,
    certify,
    drop_standard_error,
    paired_bounds,
)
from autocompress.metrics import Metric, accuracy, balanced_accuracy
from autocompress.task import Evaluation
from autocompress.verdict.change import loss_or_gain
from autocompress.verdict.scores import Outputs, Targets

# The same score without `correct`, so that the bootstrap has a closed form to agree with.
resampled_accuracy = replace(accuracy, name="resampled_accuracy", correct=None)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.certify.RESAMPLES", 100)


def evaluation(metric: Metric, targets: Targets, classes: np.ndarray) -> Evaluation:
    outputs = np.eye(max(2, int(targets.max()) + 1), dtype=np.float32)[classes]
    return Evaluation(metric.score(targets, outputs), outputs, targets)


def pair(
    n: int, lost: int, gained: int, metric: Metric = accuracy, both_wrong: int = 0
) -> tuple[Evaluation, Evaluation]:
    """Two classes; the dense model alone is right on the first samples, the compressed one on the next."""
    targets = np.arange(n) % 2
    dense, compressed = targets.copy(), targets.copy()
    compressed[:lost] = 1 - targets[:lost]
    dense[lost : lost + gained] = 1 - targets[lost : lost + gained]
    last = slice(n - both_wrong, n)
    dense[last] = compressed[last] = 1 - targets[last]
    return evaluation(metric, targets, dense), evaluation(metric, targets, compressed)


def test_bounds_by_hand() -> None:
    # n = 98, b = 5, c = 2: p1 = 0.06, p2 = 0.03, (0.09 - 0.0009) / 100 = 0.000891, its root 0.0298496.
    lower, upper = paired_bounds(lost=5, gained=2, n=98, confidence=0.95)
    assert upper == pytest.approx(0.03 + 1.6448536 * 0.0298496, abs=1e-7)
    assert lower == pytest.approx(0.03 - 1.6448536 * 0.0298496, abs=1e-7)
    # n = 898, no disagreement: the difference is 0 and its error sqrt(2 / 900 / 900).
    lower, upper = paired_bounds(lost=0, gained=0, n=898, confidence=0.975)
    assert upper == -lower == pytest.approx(1.959964 * math.sqrt(2) / 900, abs=1e-7)


@pytest.mark.parametrize("n", [500, 1000, 2000, 5000, 10_000])
@pytest.mark.parametrize("disagreement", [0.04, 0.1])
def test_a_model_at_the_bound_is_certified_in_one_of_twenty_test_sets(n: int, disagreement: float) -> None:
    bound, repeats = 0.01, 400_000
    p_lost, p_gained = (disagreement + bound) / 2, (disagreement - bound) / 2
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=repeats)
    pairs, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    certified = [paired_bounds(b, c, n, 0.95)[1] <= bound for b, c in pairs.tolist()]
    contradicted = [paired_bounds(b, c, n, 0.95)[0] > bound for b, c in pairs.tolist()]
    assert 0.04 <= counts @ certified / repeats <= 0.06
    assert counts @ contradicted / repeats <= 0.06


@pytest.mark.parametrize("true", [(0.01, 0.01, 0.01), (0.0, 0.01, 0.012), (0.0, 0.004, 0.01)])
def test_in_a_fixed_order_several_models_are_as_safe_as_one(true: tuple[float, ...]) -> None:
    """Of all test sets at most one in twenty certifies any model that drops the bound or more."""
    n, bound, repeats, rng = 2000, 0.01, 4000, np.random.default_rng(0)
    p = [((0.04 + drop) / 2, (0.04 - drop) / 2) for drop in true]
    # Each model with test sets of its own: the worst case, for mistakes that coincide count once.
    draws = [rng.multinomial(n, [*q, 1 - sum(q)], size=repeats)[:, :2].tolist() for q in p]
    passed = np.array([[paired_bounds(b, c, n, 0.95)[1] <= bound for b, c in of_one] for of_one in draws])
    beyond = true.index(next(drop for drop in true if drop >= bound))
    certified = [
        certified_in_order("certified" if one else "not certifiable" for one in models) for models in passed.T
    ]
    wrong = np.array(certified) > beyond
    assert wrong.mean() <= 0.06
    if beyond < 2:  # what the order protects from: each by itself
        assert passed[beyond:].any(axis=0).mean() > 0.065


def test_nothing_is_looked_at_after_the_first_failure() -> None:
    outcomes = iter(["certified", "not certifiable", "certified"])
    assert certified_in_order(outcomes) == 1  # type: ignore[arg-type]  # a list of outcomes
    assert list(outcomes) == ["certified"]
    assert certified_in_order(["certified"] * 3) == 3


def test_three_outcomes() -> None:
    certified = certify(accuracy, *pair(2000, lost=10, gained=9), max_drop=0.01)
    assert (certified.outcome, certified.met) == ("certified", True)
    assert certified.drop == pytest.approx(0.0005)
    assert (certified.lower, certified.upper) == paired_bounds(10, 9, 2000, 0.95)
    unsure = certify(accuracy, *pair(449, lost=3, gained=2), max_drop=0.01)
    assert (unsure.outcome, unsure.met) == ("not certifiable", True)
    broken = certify(accuracy, *pair(2000, lost=100, gained=5), max_drop=0.01)
    assert (broken.outcome, broken.met) == ("not met", False)


def verdict(**changes: object) -> Verdict:
    base = Verdict("certified", 0.0022, 0.00931, -0.0041, 449, 0.95, 0.01, False, "accuracy")
    return replace(base, **changes)  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            verdict(),
            "Certified: on 449 test samples accuracy drops 0.22 pp, at most 0.94 pp with 95% confidence "
            "(bound 1 pp).",
        ),
        (
            verdict(outcome="not certifiable", upper=0.01301),
            "Met on validation, not certifiable with 449 test samples: accuracy drops 0.22 pp on test, "
            "at most 1.31 pp with 95% confidence (bound 1 pp).",
        ),
        (
            verdict(outcome="not certifiable", drop=0.0134, upper=0.02),
            "Met on validation, not certifiable with 449 test samples: accuracy drops 1.34 pp on test, "
            "which is more than the bound, at most 2 pp with 95% confidence (bound 1 pp).",
        ),
        (
            verdict(outcome="not met", drop=0.05, lower=0.03119, confidence=0.99),
            "Not met: on 449 test samples accuracy drops 5 pp, at least 3.11 pp with 99% confidence (bound 1 pp).",
        ),
        (
            verdict(drop=-0.004, upper=-0.0001, relative=True, metric="balanced_accuracy"),
            "Certified: on 449 test samples balanced accuracy gains 0.4%, at least 0.01% with 95% confidence "
            "(bound 1%).",
        ),
        (
            verdict(metric="log_loss", higher_is_better=False),
            "Certified: on 449 test samples log loss worsens by 0.22 pp, at most 0.94 pp with 95% confidence "
            "(bound 1 pp).",
        ),
    ],
)
def test_the_sentence(given: Verdict, sentence: str) -> None:
    assert given.sentence == sentence


@pytest.mark.parametrize(("drop", "called"), [(0.25, "loses"), (0.0, "loses"), (-0.0, "loses"), (-0.25, "gains")])
def test_a_negative_drop_is_a_gain_and_has_a_size_without_a_sign(drop: float, called: str) -> None:
    change, size = loss_or_gain(drop, "loses", "gains")
    assert f"{change} {size:.2f}" == f"{called} {abs(drop):.2f}"


def test_relative_divides_by_the_dense_score() -> None:
    absolute = certify(accuracy, *pair(1000, lost=20, gained=10, both_wrong=190), max_drop=0.05)
    relative = certify(accuracy, *pair(1000, lost=20, gained=10, both_wrong=190), max_drop=0.05, relative=True)
    assert relative.drop == pytest.approx(absolute.drop / 0.8)
    assert relative.upper == pytest.approx(absolute.upper / 0.8)
    assert relative.lower == pytest.approx(absolute.lower / 0.8)
    assert "1.25%" in relative.sentence


def test_the_bootstrap_agrees_with_the_closed_form() -> None:
    exact = certify(accuracy, *pair(1500, lost=60, gained=30), max_drop=0.03)
    resampled = certify(resampled_accuracy, *pair(1500, 60, 30, resampled_accuracy), max_drop=0.03)
    assert resampled.drop == exact.drop
    # 2,000 resamples place a 5% quantile to about 2% of the interval's width; plus a lattice of 1 / 1500.
    assert resampled.upper == pytest.approx(exact.upper, abs=0.001)
    assert resampled.lower == pytest.approx(exact.lower, abs=0.001)


def test_the_bootstrap_is_repeatable_and_resamples_a_relative_drop(few_resamples: None) -> None:
    models = pair(300, lost=20, gained=10, metric=balanced_accuracy, both_wrong=60)
    first, second = (certify(balanced_accuracy, *models, max_drop=0.05, seed=7) for _ in "ab")
    assert first == second
    assert certify(balanced_accuracy, *models, max_drop=0.05, seed=8) != first
    relative = certify(balanced_accuracy, *models, max_drop=0.05, relative=True)
    assert relative.upper == pytest.approx(first.upper / models[0].score, rel=0.2)


def test_the_bootstrap_leaves_out_resamples_that_lost_a_class(few_resamples: None) -> None:
    targets = np.array([0] * 97 + [1] * 3)
    compressed = np.where(np.arange(100) % 10 == 0, 1 - targets, targets)
    models = (evaluation(balanced_accuracy, targets, c) for c in (targets, compressed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = certify(balanced_accuracy, *models, max_drop=0.2)
    assert math.isfinite(result.upper) and result.lower < result.drop < result.upper


def test_nothing_is_certified_when_most_resamples_have_no_score(few_resamples: None) -> None:
    def never(targets: Targets, outputs: Outputs) -> float:
        return 0.5 if len(np.unique(outputs, axis=0)) > 9 else math.nan

    outputs = np.arange(20, dtype=np.float32).reshape(10, 2)
    same = Evaluation(0.5, outputs, np.arange(10) % 2)
    result = certify(Metric("rare", never), same, same, max_drop=0.1)
    assert (result.outcome, result.upper) == ("not certifiable", math.inf)
    assert "at most an unknown amount" in result.sentence


@pytest.mark.parametrize("metric", [accuracy, balanced_accuracy])
def test_no_drop_exceeds_what_the_metric_can_lose(metric: Metric, few_resamples: None) -> None:
    targets = np.arange(6) % 2
    same = evaluation(metric, targets, targets)
    swapped = evaluation(metric, targets, 1 - targets)
    lost, gained = certify(metric, same, swapped, 0.01), certify(metric, swapped, same, 0.01)
    assert (lost.drop, lost.upper, gained.drop, gained.lower) == (1, 1, -1, -1)
    assert lost.lower < 1 and gained.upper > -1


def test_agreement_on_a_few_samples_does_not_certify(few_resamples: None) -> None:
    few = pair(40, lost=0, gained=0, metric=balanced_accuracy)
    assert certify(balanced_accuracy, *few, max_drop=0.01).outcome == "not certifiable"
    many = pair(1000, lost=0, gained=0, metric=balanced_accuracy)
    assert certify(balanced_accuracy, *many, max_drop=0.01).outcome == "certified"


@pytest.mark.parametrize(("lost", "gained", "n"), [(30, 10, 1000), (5, 0, 200)])
def test_the_standard_error_of_a_drop(lost: int, gained: int, n: int) -> None:
    differences = np.array([1] * lost + [-1] * gained + [0] * (n - lost - gained))
    expected = differences.std() / math.sqrt(n)
    assert drop_standard_error(accuracy, *pair(n, lost, gained)) == pytest.approx(expected)
    resampled = drop_standard_error(resampled_accuracy, *pair(n, lost, gained, resampled_accuracy))
    assert resampled == pytest.approx(expected, rel=0.25)


def test_the_standard_error_of_a_relative_drop() -> None:
    models = pair(1000, 30, 10, both_wrong=190)
    absolute = drop_standard_error(accuracy, *models)
    assert drop_standard_error(accuracy, *models, relative=True) == pytest.approx(absolute / models[0].score)


def test_the_certifiable_drop_is_the_largest_that_is_certified() -> None:
    drop = certifiable_drop(n=449, max_drop=0.01, disagreement=0.03)
    disagreeing = round(0.03 * 449)
    assert drop is not None
    difference = round(drop * 449)
    lost, gained = (disagreeing + difference) // 2, (disagreeing - difference) // 2
    assert certify(accuracy, *pair(449, lost, gained), max_drop=0.01).outcome == "certified"
    assert certify(accuracy, *pair(449, lost + 1, gained - 1), max_drop=0.01).outcome == "not certifiable"
    assert certifiable_drop(n=50, max_drop=0.01, disagreement=0.0) is None
    assert certifiable_drop(n=10_000, max_drop=0.01, disagreement=0.02) == pytest.approx(0.0076)


def test_evaluations_of_other_samples_are_refused() -> None:
    dense, compressed = pair(100, 3, 2)[0], pair(90, 3, 2)[1]
    with pytest.raises(ValueError, match=r"100 samples.*90.*same order"):
        certify(accuracy, dense, compressed, max_drop=0.01)
    shuffled = replace(pair(100, 3, 2)[1], targets=1 - dense.targets)
    with pytest.raises(ValueError, match="unshuffled"):
        drop_standard_error(accuracy, dense, shuffled)
    with pytest.raises(ValueError, match="confidence=95"):
        certify(accuracy, *pair(100, 3, 2), max_drop=0.01, confidence=95)
