"""What the end of a study needs, made while its trials run, in the process beside it."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from autocompress.disk.storage import StudyFolder
from autocompress.export import Staged, stage
from autocompress.export import get_ready as export_early
from autocompress.formats.bundle import Provenance, rebuild
from autocompress.processes.aside import Aside, Begun
from autocompress.report import write_report
from autocompress.scheme import Facts, Scheme, Weights, describe
from autocompress.task import Task
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

    def rebuilt(self, dense: nn.Module) -> nn.Module:
        """Its model, see `autocompress.formats.bundle.rebuild`."""
        return rebuild(self.scheme, dense, self.facts, self.trial.plan, self.trial.density, self.state)


class Ahead:
    """Has the process beside a study prepare its end; what it has not prepared is made when it is asked for.

    Args:
        aside: The process.
        task: The task.
        folder: Where the study lives.
        formats: What to export besides, see `autocompress.export.check_formats`.
    """

    def __init__(self, aside: Aside, task: Task, folder: StudyFolder, formats: tuple[str, ...] = ()) -> None:
        self.aside, self.task, self.formats = aside, task, formats
        self._study, self._folder = folder.path, folder.ahead
        self._onnx = self._folder / "dense.onnx"
        self._ready: Begun[None] | None = None
        self._staged: dict[int, Begun[Staged]] = {}  # the last that was begun, by the number of its trial

    def get_ready(self) -> None:
        """Has the process do once what makes its first export and its first figure slow."""
        if self._ready is None and self.aside.is_there:
            task = self.task.on("cpu")
            self._ready = self.aside.begin(
                _get_ready, task.model, task.example_input.cpu(), self._onnx, self._study
            )

    def has(self, number: int) -> bool:
        """Whether the files of this trial's model are the last that were to be made."""
        return number in self._staged

    def stage(self, answer: Answer, model: nn.Module) -> None:
        """Has the files of what may be the answer written and checked, in place of those of any other.

        Args:
            answer: The trial and what it is made of.
            model: Its model, rebuilt. It is not changed.
        """
        for superseded in self._staged.values():
            superseded.cancel()
        task, trial = self.task.on("cpu"), answer.trial
        provenance = Provenance(
            scheme=describe(answer.scheme),
            plan=trial.plan,
            density=trial.density,
            task=task.name,
            architecture=task.architecture,
            classes=task.classes,
            preprocessing=task.preprocessing,
            input=task.input,
        )
        begun = self.aside.begin(
            stage,
            copy.deepcopy(model).cpu(),
            task.example_input.cpu(),
            self._folder / "answer",
            provenance,
            dense=task.model,
            formats=self.formats,
        )
        self._staged = {trial.number: begun}

    def staged(self, answer: Answer, model: nn.Module) -> Staged:
        """What came of `stage`, which is begun now where it was not for this answer."""
        if not self.has(answer.trial.number):
            self.stage(answer, model)
        return self._staged[answer.trial.number].outcome()

    @property
    def dense_onnx(self) -> Path | None:
        """The dense model as it is deployed, if it was written."""
        return self._onnx if self._ready is not None and self._onnx.exists() else None

    def close(self) -> None:
        """Ends the process, and removes what it made."""
        self.aside.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _get_ready(model: nn.Module, example_input: Tensor, onnx: Path, study: Path) -> None:
    """Writes the dense model, and a report of the trials so far that nobody reads: the next is quicker."""
    onnx.parent.mkdir(exist_ok=True)
    export_early(model, example_input, onnx)
    write_report(study, ours=True, into=onnx.parent)
