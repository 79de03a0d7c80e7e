"""The end of a study: the answer is judged on test, measured beside the dense model, and exported."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from autocompress.bundle import Provenance, rebuild
from autocompress.certify import certify, conclude
from autocompress.deployed import deployed
from autocompress.export import Export, export
from autocompress.layers import compare_layers
from autocompress.measurement import Measurement, compare
from autocompress.per_class import per_class
from autocompress.progress import span
from autocompress.result import Settings, Watcher
from autocompress.runtimes import shown_runtimes
from autocompress.scheme import Facts, Scheme, Weights, describe
from autocompress.storage import StudyFolder
from autocompress.task import Evaluation, Task
from autocompress.trial import TrialResult


@dataclass(frozen=True)
class Answer:
    """The trial that the search answers with, and what its model is made of.

    Attributes:
        trial: The trial.
        scheme: How it was compressed.
        facts: What the scheme found out about the dense model.
        state: Its weights.
    """

    trial: TrialResult
    scheme: Scheme
    facts: Facts
    state: Weights


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
    """

    settings: Settings
    task: Task
    dense: Evaluation
    dense_cost: Measurement
    folder: StudyFolder
    watcher: Watcher

    def of(self, answer: Answer) -> dict[str, Any]:
        """What `autocompress.result.Result` says of the answer, by the names of its fields."""
        task, settings, best = self.task, self.settings, answer.trial
        self.watcher.doing("judging the answer on test")
        rebuilt = rebuild(answer.scheme, task.model, answer.facts, best.plan, best.density, answer.state)
        model = deployed(rebuilt, task.example_input)
        with span(0, 0.5):
            dense_test = task.evaluate(task.model, task.test)
        with span(0.5, 1):
            test = task.evaluate(model, task.test)
        bound = settings.bound
        certificate = certify(
            task.metric, dense_test, test, bound.max_drop, relative=bound.relative, confidence=settings.confidence
        )
        judged = tuple(constraint.judge(test) for constraint in settings.constraints)
        outcome, sentence = conclude(certificate, judged)
        scores = {
            "dense": {"val": self.dense.score, "test": dense_test.score},
            "compressed": {"val": best.score, "test": test.score},
        }
        layers = compare_layers(task.model, rebuilt)
        model = model.cpu()
        self.watcher.doing("exporting the answer")
        results = {"metric": task.metric.name, "scores": scores, "verdict": sentence}
        exported = self._export(rebuilt, answer, results)
        onnx = next((one.path for one in exported.artifacts if one.format == "onnx"), None)
        self.watcher.doing("measuring the answer beside the dense model")
        costs = compare(
            [task.model, rebuilt],
            task.example_input,
            settings.measured_on,
            dense_params=self.dense_cost.params,
            params=[None, best.measurement.params],
            runtimes=shown_runtimes(settings.runtime, settings.measured_on),
            onnx_files=[None, onnx],
        )
        return {
            "verdict": outcome,
            "sentence": sentence,
            "certificate": certificate,
            "model": model,
            "density": best.density,
            "drop_val": best.drop,
            "measurements": dict(zip(("dense", "compressed"), costs, strict=True)),
            "scores": scores,
            "exported": exported,
            "per_class": per_class(dense_test, test, task.classes),
            "constraints": tuple(zip(best.constraints, judged, strict=True)),
            "answer": best.number,
            "layers": layers,
        }

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

    def _export(self, model: nn.Module, answer: Answer, results: dict[str, Any]) -> Export:
        task = self.task
        provenance = Provenance(
            scheme=describe(answer.scheme),
            plan=answer.trial.plan,
            density=answer.trial.density,
            task=task.name,
            architecture=task.architecture,
            classes=task.classes,
            preprocessing=task.preprocessing,
            input=task.input,
            results=results,
        )
        formats = self.settings.formats
        exported = export(model, task.example_input, self.folder.best, provenance, formats=formats)
        for name, reason in exported.refused.items():
            self.watcher.warned(f"{name} is not offered: {reason}")
        return exported
