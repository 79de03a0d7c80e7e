"""Prepares the end of a study in its background process while trials run: exports, a rehearsal of the report."""

import functools
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from torch import Tensor

from autocompress.disk.storage import StudyFolder
from autocompress.export import Staged, export_dense, have_checker, stage
from autocompress.formats.bundle import Provenance
from autocompress.formats.instructions import FILES
from autocompress.processes.aside import Aside, Begun, keep_loaded
from autocompress.report import write_report
from autocompress.scheme import describe, parts_of
from autocompress.studies.records import Answer
from autocompress.task import Task


class Ahead:
    """Prepares the end of a study in its background process; files not prepared are made when requested.

    Args:
        aside: The background process.
        task: The task.
        folder: The study's folder.
        formats: Formats to export in addition, see `autocompress.export.check_formats`.

    Attributes:
        several_labels: Whether a sample may have several labels, which `stage` writes beside the model.
    """

    several_labels = False

    def __init__(self, aside: Aside, task: Task, folder: StudyFolder, formats: tuple[str, ...] = ()) -> None:
        self.aside, self.task, self.formats = aside, task, formats
        self._study, self._folder = folder.path, folder.ahead
        self._dense = self._folder / "dense"
        self._exported: Begun[None] | None = None
        self._rehearsed: Begun[object] | None = None
        self._staged: dict[int, Begun[Staged]] = {}  # by the number of the trial

    def prepare(self, candidates: Sequence[int], answer_of: Callable[[int], Answer | None]) -> None:
        """Starts background work for the end of the study while a trial runs.

        In this order: once, the export of the dense model, which also warms up the exporters; the export of the
        likeliest answer; once, a report that is thrown away, to warm up its libraries (if there is no candidate,
        only when the process is idle); and, when the process is idle, the exports of the other candidates.

        Args:
            candidates: Numbers of the trials that may be the answer, the likeliest first.
            answer_of: Loads a trial with its weights; None if they are damaged.
        """
        self.keep(candidates)
        if self._exported is None:
            model = self.task.on("cpu").model
            self._exported = self.aside.begin(export_dense, model, self._example, self._dense)
        for nth, number in enumerate(candidates):
            if not self.has(number) and (nth == 0 or self._is_idle) and (answer := answer_of(number)):
                self.stage(answer)
                self.aside.begin(have_checker, self._dense, self._example)  # for the export after this one
        if self._rehearsed is None and (candidates or self._is_idle):
            self._rehearsed = self.aside.begin(write_report, self._study, ours=True, into=self._dense)
            self.aside.begin(keep_loaded)  # by now the process has imported all libraries that it will need

    @functools.cached_property
    def _example(self) -> Tensor:
        """A batch of one sample."""
        return self.task.example_input.cpu()

    @property
    def _is_idle(self) -> bool:
        """Whether all work that was begun is done."""
        begun = (*self._staged.values(), self._exported, self._rehearsed)
        return all(call.is_done for call in begun if call is not None)

    def has(self, number: int) -> bool:
        """Whether the export of this trial's model has begun or is done."""
        return number in self._staged

    def keep(self, numbers: Collection[int]) -> None:
        """Cancels the exports of all trials but these, and removes their files."""
        for number in self._staged.keys() - numbers:
            begun = self._staged[number]
            begun.cancel()
            if begun.is_done:  # a running export keeps its folder, in which it waits for the checking process
                del self._staged[number]
                shutil.rmtree(self._files_of(number), ignore_errors=True)

    def stage(self, answer: Answer) -> None:
        """Begins to write and check the files of a possible answer, unless that has begun already."""
        if self.has(answer.trial.number):
            return
        task, trial = self.task.on("cpu"), answer.trial
        provenance = Provenance(
            scheme=describe(answer.scheme),
            kinds=tuple(map(type, parts_of(answer.scheme))),
            plan=trial.plan,
            density=trial.density,
            task=task.name,
            architecture=task.architecture,
            classes=task.classes,
            preprocessing=task.preprocessing,
            input=task.input,
            several_labels=self.several_labels,
        )
        self._staged[trial.number] = self.aside.begin(
            stage,
            answer.rebuilt(self.task.model).cpu(),
            self._example,
            self._files_of(trial.number),
            provenance,
            dense=task.model,
            formats=self.formats,
        )

    def _files_of(self, number: int) -> Path:
        return self._folder / f"trial-{number}"

    def staged(self, answer: Answer) -> Staged:
        """Waits for the export of this answer, which begins now if it has not yet, and returns its files."""
        self.stage(answer)
        return self._staged[answer.trial.number].outcome()

    @property
    def dense_onnx(self) -> Path | None:
        """The dense model's ONNX file, if it has been exported."""
        file = self._dense / FILES["onnx"]
        return file if self._exported is not None and file.exists() else None

    def close(self) -> None:
        """Ends the process and removes its files."""
        self.aside.close()
        shutil.rmtree(self._folder, ignore_errors=True)
