"""The end of a study: judges the answer on test, exports it, and measures it beside the dense model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from autocompress.certify import Outcome, Verdict, certified_in_order, certify, conclude
from autocompress.disk.storage import StudyFolder
from autocompress.export import Export, publish
from autocompress.gauges.runtimes import shown_runtimes
from autocompress.measurement import Measurement, compare
from autocompress.networks.deployed import deployed
from autocompress.networks.layers import compare_layers
from autocompress.progress import span
from autocompress.studies.ahead import Ahead
from autocompress.studies.records import Answer
from autocompress.studies.result import Tested
from autocompress.studies.settings import Settings
from autocompress.studies.watcher import Watcher
from autocompress.task import Evaluation, Task
from autocompress.trial import TrialResult
from autocompress.verdict.constraint import Checked, Constraint, Judged
from autocompress.verdict.decision_threshold import DecisionThreshold, decision_thresholds
from autocompress.verdict.limit import Limit, Requirement
from autocompress.verdict.per_class import per_class
from autocompress.verdict.traded import traded


@dataclass(frozen=True)
class Judgement:
    """The judgement of one model on the test data.

    Attributes:
        rebuilt: The model as it was trained.
        model: The model as it is deployed.
        dense_test: The dense model's evaluation on test.
        test: The model's evaluation on test.
        certificate: The verdict on its drop.
        constraints: The verdict on each constraint.
    """

    rebuilt: nn.Module
    model: nn.Module
    dense_test: Evaluation
    test: Evaluation
    certificate: Verdict
    constraints: tuple[Judged, ...]

    @property
    def outcome(self) -> Outcome:
        """The verdict on the drop and on all the constraints together."""
        return conclude(self.certificate, self.constraints)[0]

    @property
    def sentence(self) -> str:
        """The verdict on the drop and on all the constraints, in words."""
        return conclude(self.certificate, self.constraints)[1]

    def withheld(self) -> "Judgement":
        """This judgement without a certificate, because a model before it in the sequence was not certified."""
        if self.outcome != "certified":
            return self
        return replace(self, certificate=replace(self.certificate, outcome="not certifiable"))


@dataclass(frozen=True)
class Conclusion:
    """Concludes a study.

    Attributes:
        settings: The study's settings.
        task: The task, its model on the study's device.
        dense: The dense model's evaluation on val.
        dense_cost: The dense model's measurement.
        dense_checked: The check of each constraint on the dense model.
        folder: The study's folder.
        watcher: Receives the study's progress.
        ahead: The exports that were prepared during the search.
        settle: Waits for the study's background work, so that nothing runs beside the final timing.
        timing: Whether an objective or a limit needs times, memory or energy.
    """

    settings: Settings
    task: Task
    dense: Evaluation
    dense_cost: Measurement
    dense_checked: Sequence[Checked]
    folder: StudyFolder
    watcher: Watcher
    ahead: Ahead
    settle: Callable[[], None]
    timing: bool = False

    def of(self, shortlist: Sequence[Answer]) -> dict[str, Any]:
        """Judges, exports and measures the answer.

        Args:
            shortlist: See `judge`.

        Returns:
            The fields of `autocompress.studies.result.Result` that depend on the answer, by name.
        """
        task, settings = self.task, self.settings
        self._begin_export(shortlist)
        answer, judgement, fields = self.judge(shortlist)
        self.ahead.keep([answer.trial.number])
        best = answer.trial
        scores = {
            "dense": {"val": self.dense.score, "test": judgement.dense_test.score},
            "compressed": {"val": best.score, "test": judgement.test.score},
        }
        notes = self._traded(judgement)
        layers = compare_layers(task.model, judgement.rebuilt)
        thresholds = self._decision_thresholds(judgement)  # on the study's device
        model = judgement.model.cpu()
        self.watcher.doing("exporting the answer")
        results = {"metric": task.metric.name, "scores": scores, "verdict": fields["sentence"]}
        exported = self._export(answer, results, thresholds.get("compressed", ()))
        onnx = next((file.path for file in exported.artifacts if file.format == "onnx"), None)
        self.settle()
        self.watcher.doing("measuring the answer beside the dense model")
        costs = compare(
            [task.model, judgement.rebuilt],
            task.example_input,
            settings.measured_on,
            dense_params=self.dense_cost.params,
            params=[None, best.measurement.params],
            runtimes=shown_runtimes(settings.runtime, settings.measured_on),
            onnx_files=[self.ahead.dense_onnx, onnx],
        )
        return {
            **fields,
            "verdict": judgement.outcome,
            "certificate": judgement.certificate,
            "model": model,
            "density": best.density,
            "drop_val": best.drop,
            "measurements": dict(zip(("dense", "compressed"), costs, strict=True)),
            "scores": scores,
            "exported": exported,
            "per_class": per_class(judgement.dense_test, judgement.test, task.classes),
            "constraints": tuple(zip(best.constraints, judgement.constraints, strict=True)),
            "dense_constraints": dense_scores(settings.constraints, self.dense_checked, judgement.dense_test),
            "notes": notes,
            "answer": best.number,
            "decision_thresholds": thresholds,
            "layers": layers,
        }

    def judge(self, shortlist: Sequence[Answer]) -> tuple[Answer, Judgement, dict[str, Any]]:
        """Judges the shortlist on test in its order, up to the first trial that is not certified.

        Args:
            shortlist: The trials, densest first, the search's answer last; fixed before the test data are used.

        Returns:
            The answer: the last trial that is certified, or, if none is, the search's answer, not certified; its
            judgement; and the fields ``sentence`` and ``shortlist`` of the result.
        """
        self.watcher.doing("judging the answer on test")
        with span(0, 0.5):
            dense = self.task.evaluate(self.task.model, self.task.test)
        judged: dict[int, Judgement] = {}

        def outcome_of(answer: Answer) -> Outcome:
            start, share = 0.5 + len(judged) / len(shortlist) / 2, 0.5 / len(shortlist)
            with span(start, start + share):
                judgement = judged[answer.trial.number] = self._judge(answer, dense)
            return judgement.outcome

        certified = certified_in_order(map(outcome_of, shortlist))
        answer = shortlist[certified - 1] if certified else shortlist[-1]
        if answer.trial.number not in judged:
            outcome_of(answer)
        judgement = judged[answer.trial.number] if certified else judged[answer.trial.number].withheld()
        trials = [candidate.trial for candidate in shortlist]
        tested = tuple(_tested(trial, judged.get(trial.number)) for trial in trials)
        sentence = " ".join([judgement.sentence, *_about_shortlist(trials, certified)])
        return answer, judgement, {"sentence": sentence, "shortlist": tested}

    def _judge(self, candidate: Answer, dense: Evaluation) -> Judgement:
        task, bound, trial = self.task, self.settings.bound, candidate.trial
        confidence = self.settings.confidence
        rebuilt = candidate.rebuilt(task.model)
        model = deployed(rebuilt, task.example_input)
        test = task.evaluate(model, task.test)
        certificate = certify(
            task.metric, dense, test, bound.max_drop, relative=bound.relative, confidence=confidence
        )
        cost, dense_cost = self._costs(rebuilt, trial)
        constraints = tuple(
            one.judge(test, confidence) if isinstance(one, Constraint) else one.judge(cost, dense_cost)
            for one in self.settings.constraints
        )
        return Judgement(rebuilt, model, dense, test, certificate, constraints)

    def _decision_thresholds(self, judgement: Judgement) -> dict[str, tuple[DecisionThreshold, ...]]:
        """The decision thresholds of both models, by model; none without a metric at an operating point."""
        task, constraints = self.task, self.settings.constraints
        scored = [task.metric, *(one.metric for one in constraints if isinstance(one, Constraint))]
        metrics = {metric.name: metric for metric in scored if metric.point is not None}
        if not metrics:
            return {}
        val = task.evaluate(judgement.model, task.val)
        evaluations = {"dense": (self.dense, judgement.dense_test), "compressed": (val, judgement.test)}
        return {
            model: tuple(
                threshold
                for metric in metrics.values()
                for threshold in decision_thresholds(metric, *pair, task.classes, self.settings.confidence)
            )
            for model, pair in evaluations.items()
        }

    def _traded(self, judgement: Judgement) -> tuple[str, ...]:
        """Notes on constraints that are met at the cost of another class, which the watcher gets, too."""
        settings = self.settings
        notes = tuple(
            traded(
                settings.constraints,
                judgement.constraints,
                judgement.dense_test,
                judgement.test,
                self.task.metric,
                settings.bound.max_drop,
                relative=settings.bound.relative,
                confidence=settings.confidence,
            )
        )
        for note in notes:
            self.watcher.warned(note)
        return notes

    def _costs(self, rebuilt: nn.Module, trial: TrialResult) -> tuple[Measurement, Measurement]:
        """The measurements of a model and the dense one, taken anew if there are limits on times or the like."""
        if not (self.timing and any(isinstance(limit, Limit) for limit in self.settings.constraints)):
            return trial.measurement, self.dense_cost
        cost, dense = compare(
            [rebuilt, self.task.model],
            self.task.example_input,
            self.settings.measured_on,
            dense_params=self.dense_cost.params,
            params=[trial.measurement.params, None],
            runtimes=(self.settings.runtime,),
        )
        return cost, dense

    def of_none(self, sentence: str) -> dict[str, Any]:
        """The fields of the result, see `of`, if no trial met the bound.

        Args:
            sentence: The verdict in words.
        """
        return {
            "verdict": "not met",
            "sentence": sentence,
            "certificate": None,
            "model": self.task.model,
            "density": 1.0,
            "drop_val": 0.0,
            "measurements": {"dense": self.dense_cost},
            "scores": {"dense": {"val": self.dense.score}},
            "exported": Export((), {}),
        }

    def _begin_export(self, shortlist: Sequence[Answer]) -> None:
        """Begins to export the answer while it is judged, if there is only one candidate."""
        self.ahead.keep([candidate.trial.number for candidate in shortlist])
        if len(shortlist) == 1 and not self.timing:
            self.ahead.stage(shortlist[0])

    def _export(self, answer: Answer, results: dict[str, Any], thresholds: Sequence[DecisionThreshold]) -> Export:
        if thresholds:
            results |= {"decision_thresholds": [asdict(threshold) for threshold in thresholds]}
        advice = [threshold.sentence for threshold in thresholds]
        exported = publish(self.ahead.staged(answer), self.folder.best, results, advice)
        for name, reason in exported.refused.items():
            self.watcher.warned(f"{name} is not offered: {reason}")
        for file in exported.artifacts:
            if file.not_fresh:
                self.watcher.warned(f"{file.path.name} was not checked in a fresh process: {file.not_fresh}")
        return exported


def dense_scores(
    constraints: Sequence[Requirement], checked: Sequence[Checked], test: Evaluation
) -> tuple[dict[str, float] | None, ...]:
    """For each constraint, the dense model's score by split; None for a bound on a cost.

    Args:
        constraints: The constraints.
        checked: Their checks on the dense model, which have its scores on val.
        test: The dense model's evaluation on test.
    """
    return tuple(
        {"val": on_val.value, "test": one.score(test)} if isinstance(one, Constraint) else None
        for one, on_val in zip(constraints, checked, strict=True)
    )


def _tested(trial: TrialResult, judgement: Judgement | None) -> Tested:
    if judgement is None:
        return Tested(trial.number, trial.density, trial.drop)
    drop, upper = judgement.certificate.drop, judgement.certificate.upper
    return Tested(trial.number, trial.density, trial.drop, judgement.outcome, drop, upper)


def _about_shortlist(shortlist: Sequence[TrialResult], certified: int) -> Iterator[str]:
    """A sentence on the verdicts of the trials beside the answer; nothing if there was only one trial.

    Args:
        shortlist: The trials in the order in which they were judged.
        certified: How many of them, from the first, are certified.
    """
    if len(shortlist) == 1:
        return
    if certified == len(shortlist):
        trials, are = ("trial", "is") if certified == 2 else ("trials", "are")
        yield f"The denser {trials} of the shortlist, tested before it, {are} certified as well."
        return
    failed, last = shortlist[certified], shortlist[-1]
    named = f"trial {failed.number} of density {failed.density:.3g}"
    if not certified:
        yield f"The denser {named} was tested first and is not certified, so nothing sparser can be."
    elif failed is last:
        yield f"The search's answer, {named}, was tested after it and is not certified."
    else:
        yield (
            f"The next, {named}, is not certified, so the search's answer, trial {last.number} of density "
            f"{last.density:.3g}, was not tested."
        )
