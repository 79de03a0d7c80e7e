"""The end of a study: the answer is judged on test, measured beside the dense model, and exported."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from autocompress.verdict.constraint import Constraint, Judged
from autocompress.verdict.limit import Limit
from autocompress.verdict.per_class import per_class


@dataclass(frozen=True)
class Judgement:
    """What the test data say of one model.

    Attributes:
        rebuilt: The model as it was trained.
        model: The model as it is deployed.
        dense_test: How the dense model does on test.
        test: How this one does.
        certificate: Of its drop.
        constraints: What came of each constraint.
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
        """The same in words."""
        return conclude(self.certificate, self.constraints)[1]

    def withheld(self) -> "Judgement":
        """The same where nothing may be certified any more, because a model that came before was not."""
        if self.outcome != "certified":
            return self
        return replace(self, certificate=replace(self.certificate, outcome="not certifiable"))


@dataclass(frozen=True)
class Conclusion:
    """Ends studies.

    Attributes:
        settings: What was asked.
        task: The task, its model on the study's device.
        dense: How the dense model does on val.
        dense_cost: What it costs.
        folder: Where the study lives.
        watcher: Is told how it goes.
        ahead: Has made what it could of what the end needs.
        settle: Waits for what else the study does: nothing may run beside what is timed.
        timing: Whether what is asked needs more measured than can be counted.
    """

    settings: Settings
    task: Task
    dense: Evaluation
    dense_cost: Measurement
    folder: StudyFolder
    watcher: Watcher
    ahead: Ahead
    settle: Callable[[], None]
    timing: bool = False

    def of(self, shortlist: Sequence[Answer]) -> dict[str, Any]:
        """What `autocompress.studies.result.Result` says of the answer, by the names of its fields.

        Args:
            shortlist: As for `judge`.
        """
        task, settings = self.task, self.settings
        self._begin_export(shortlist)
        answer, found, told = self.judge(shortlist)
        self.ahead.keep([answer.trial.number])
        best = answer.trial
        scores = {
            "dense": {"val": self.dense.score, "test": found.dense_test.score},
            "compressed": {"val": best.score, "test": found.test.score},
        }
        layers = compare_layers(task.model, found.rebuilt)
        model = found.model.cpu()
        self.watcher.doing("exporting the answer")
        results = {"metric": task.metric.name, "scores": scores, "verdict": told["sentence"]}
        exported = self._export(answer, results)
        onnx = next((one.path for one in exported.artifacts if one.format == "onnx"), None)
        self.settle()
        self.watcher.doing("measuring the answer beside the dense model")
        costs = compare(
            [task.model, found.rebuilt],
            task.example_input,
            settings.measured_on,
            dense_params=self.dense_cost.params,
            params=[None, best.measurement.params],
            runtimes=shown_runtimes(settings.runtime, settings.measured_on),
            onnx_files=[self.ahead.dense_onnx, onnx],
        )
        return {
            **told,
            "verdict": found.outcome,
            "certificate": found.certificate,
            "model": model,
            "density": best.density,
            "drop_val": best.drop,
            "measurements": dict(zip(("dense", "compressed"), costs, strict=True)),
            "scores": scores,
            "exported": exported,
            "per_class": per_class(found.dense_test, found.test, task.classes),
            "constraints": tuple(zip(best.constraints, found.constraints, strict=True)),
            "answer": best.number,
            "layers": layers,
        }

    def judge(self, shortlist: Sequence[Answer]) -> tuple[Answer, Judgement, dict[str, Any]]:
        """Judges the shortlist on test in its order, up to the first that is not certified.

        Args:
            shortlist: Densest first, the search's answer last; fixed before the test data are looked at.

        Returns:
            The answer, which is the last one that is certified, or else the search's own, of which then nothing is
            certified; what test says of it; the fields ``sentence`` and ``shortlist`` of the result.
        """
        self.watcher.doing("judging the answer on test")
        with span(0, 0.5):
            dense = self.task.evaluate(self.task.model, self.task.test)
        judged: dict[int, Judgement] = {}

        def outcome_of(answer: Answer) -> Outcome:
            begun, share = 0.5 + len(judged) / len(shortlist) / 2, 0.5 / len(shortlist)
            with span(begun, begun + share):
                found = judged[answer.trial.number] = self._judge(answer, dense)
            return found.outcome

        certified = certified_in_order(map(outcome_of, shortlist))
        answer = shortlist[certified - 1] if certified else shortlist[-1]
        if answer.trial.number not in judged:
            outcome_of(answer)
        found = judged[answer.trial.number] if certified else judged[answer.trial.number].withheld()
        trials = [one.trial for one in shortlist]
        tested = tuple(_tested(one, judged.get(one.number)) for one in trials)
        sentence = " ".join([found.sentence, *_of_order(trials, certified)])
        return answer, found, {"sentence": sentence, "shortlist": tested}

    def _judge(self, one: Answer, dense: Evaluation) -> Judgement:
        task, bound, trial = self.task, self.settings.bound, one.trial
        rebuilt = one.rebuilt(task.model)
        model = deployed(rebuilt, task.example_input)
        test = task.evaluate(model, task.test)
        certificate = certify(
            task.metric, dense, test, bound.max_drop, relative=bound.relative, confidence=self.settings.confidence
        )
        cost, dense_cost = self._costs(rebuilt, trial)
        constraints = tuple(
            one.judge(test) if isinstance(one, Constraint) else one.judge(cost, dense_cost)
            for one in self.settings.constraints
        )
        return Judgement(rebuilt, model, dense, test, certificate, constraints)

    def _costs(self, rebuilt: nn.Module, trial: TrialResult) -> tuple[Measurement, Measurement]:
        """What a model and, beside it, the dense one cost: measured anew where that is not the same each time."""
        if not (self.timing and any(isinstance(one, Limit) for one in self.settings.constraints)):
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
        """The same where no trial met the bound."""
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
        """Has the answer exported while it is judged, if that has not begun and it is known which it will be."""
        self.ahead.keep([one.trial.number for one in shortlist])
        if len(shortlist) == 1 and not self.timing:
            self.ahead.stage(shortlist[0])

    def _export(self, answer: Answer, results: dict[str, Any]) -> Export:
        exported = publish(self.ahead.staged(answer), self.folder.best, results)
        for name, reason in exported.refused.items():
            self.watcher.warned(f"{name} is not offered: {reason}")
        for one in exported.artifacts:
            if one.not_fresh:
                self.watcher.warned(f"{one.path.name} was not checked in a fresh process: {one.not_fresh}")
        return exported


def _tested(trial: TrialResult, judged: Judgement | None) -> Tested:
    if judged is None:
        return Tested(trial.number, trial.density, trial.drop)
    drop, upper = judged.certificate.drop, judged.certificate.upper
    return Tested(trial.number, trial.density, trial.drop, judged.outcome, drop, upper)


def _of_order(shortlist: Sequence[TrialResult], certified: int) -> Iterator[str]:
    """What came of the shortlist beside the answer, in words; nothing where there was just the one."""
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
