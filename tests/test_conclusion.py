"""The end of a study on models made here: which of a shortlist is the answer, and what is said of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocompress.disk.storage import StudyFolder
from autocompress.lc import LearningCompression
from autocompress.measurement import measure
from autocompress.metrics import METRICS, Metric
from autocompress.processes.aside import Aside
from autocompress.schemes import StructPrune
from autocompress.studies.ahead import Ahead
from autocompress.studies.conclusion import Conclusion, dense_scores
from autocompress.studies.records import Answer
from autocompress.studies.settings import Settings
from autocompress.studies.watcher import Silent
from autocompress.trial import Bound, TrialSpec, run_trial
from autocompress.verdict.constraint import Constraint
from autocompress.verdict.limit import check_all, parse_constraints

MakeSpec = Callable[..., TrialSpec]
BOUND = Bound(0.25)


@pytest.fixture
def conclude(tmp_path: Path, make_spec: MakeSpec):
    """Judges a shortlist of trials, each by its number: an odd one learns, an even one does not."""

    def conclude(*numbers: int, **changes: Any):
        listed, spec = [], make_spec()
        for number in numbers:
            spec = make_spec(
                number,
                0.9 if number % 2 else 0.15,
                scheme=StructPrune(criterion="l2"),
                recovery=LearningCompression(epochs=8, lr=0.05 if number % 2 else 1e-9),
                bound=BOUND,
            )
            trial = run_trial(spec)
            assert trial.model is not None
            listed.append(Answer(trial, spec.scheme, spec.facts, trial.model.state_dict()))
        task, folder = spec.task, StudyFolder(tmp_path / "study")
        settings = Settings((spec.scheme,), BOUND, spec.objectives, **changes)
        cost = measure(task.model, task.example_input, timing=False)
        try:
            ahead = Ahead(Aside(), task, folder)
            ended = Conclusion(settings, task, spec.dense, cost, (), folder, Silent(), ahead, lambda: None)
            return ended.judge(listed)
        finally:
            folder.close()

    return conclude


def outcomes(told) -> list[tuple[int, str | None]]:
    return [(one.number, one.outcome) for one in told["shortlist"]]


def test_the_answer_is_the_last_that_is_certified_before_the_first_that_is_not(conclude) -> None:
    answer, found, told = conclude(1, 2, 4)
    assert outcomes(told) == [(1, "certified"), (2, "not certifiable"), (4, None)]
    assert (answer.trial.number, found.outcome) == (1, "certified")
    assert found.certificate.drop == told["shortlist"][0].drop
    assert told["sentence"].startswith("Certified: ")
    assert "The next, trial 2 of density 0.1" in told["sentence"] and "trial 4" in told["sentence"]


def test_of_several_that_are_certified_the_last_is_the_answer(conclude) -> None:
    answer, found, told = conclude(1, 3)
    assert outcomes(told) == [(1, "certified"), (3, "certified")]
    assert (answer.trial.number, found.outcome) == (3, "certified")
    assert told["sentence"].endswith("The denser trial of the shortlist, tested before it, is certified as well.")


def test_after_a_first_failure_nothing_is_certified(conclude) -> None:
    answer, found, told = conclude(2, 1)
    assert outcomes(told) == [(2, "not certifiable"), (1, "certified")]  # by itself it would be
    assert (answer.trial.number, found.outcome) == (1, "not certifiable")
    assert found.certificate.outcome == "not certifiable"
    assert told["sentence"].startswith("Met on validation, not certifiable with 60 test samples")
    assert "The denser trial 2 of density 0.1" in told["sentence"]


def test_a_constraint_on_a_metric_is_judged_with_the_confidence_of_the_study(conclude) -> None:
    required = parse_constraints(["auc>=0.1", "params<=1M"])
    by_auc, by_params = conclude(1, constraints=required, confidence=0.999)[1].constraints
    assert (by_auc.confidence, by_params.confidence) == (0.999, 0.95)  # of a cost: of its timing's interval
    assert "with 99.9% confidence (required: auc>=0.1)" in by_auc.sentence
    assert by_auc.lower < conclude(1, constraints=required)[1].constraints[0].lower


def test_a_metric_of_the_dense_model_on_val_is_what_its_check_has_found(make_spec: MakeSpec) -> None:
    spec, scored = make_spec(), []

    def counted(targets, outputs) -> float:
        scored.append(len(targets))
        return float((outputs.argmax(1) == targets).mean())

    required = parse_constraints(["params<=1M", Constraint(Metric("counted", counted), True, 0.5), "auc>=0.5"])
    cost = measure(spec.task.model, spec.task.example_input, timing=False)
    checked = check_all(required, spec.dense, cost)
    test = spec.task.evaluate(spec.task.model, spec.task.test)
    scored.clear()
    none, by_counted, by_auc = dense_scores(required, checked, test)
    assert none is None and scored == [spec.task.test.n_samples]  # val is not scored again
    assert by_counted == {"val": checked[1].value, "test": test.score}
    assert by_auc == {"val": checked[2].value, "test": METRICS["auc"].score(test.targets, test.outputs)}
