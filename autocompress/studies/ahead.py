"""What the end of a study needs, made while its trials run, in the process beside it."""

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
        self._dense = self._folder / "dense"
        self._exported: Begun[None] | None = None
        self._rehearsed: Begun[object] | None = None
        self._staged: dict[int, Begun[Staged]] = {}  # by the number of the trial

    def prepare(self, candidates: Sequence[int], answer_of: Callable[[int], Answer | None]) -> None:
        """Has the process make what it can of the end while a trial runs.

        Once the dense model's files, which makes the next export quick; then the files of the likeliest answer;
        once a report that nobody reads, which makes the next one quick, and that without an answer if there is
        none by then; and when nothing else is under way, the files of other answers.

        Args:
            candidates: Trials that may be the answer, by their numbers, the likeliest first.
            answer_of: What such a trial is made of, where its weights are whole.
        """
        self.keep(candidates)
        if self._exported is None:
            model = self.task.on("cpu").model
            self._exported = self.aside.begin(export_dense, model, self._example, self._dense)
        for nth, number in enumerate(candidates):
            if not self.has(number) and (nth == 0 or self._is_idle) and (found := answer_of(number)):
                self.stage(found)
                self.aside.begin(have_checker, self._dense, self._example)  # for what is staged next
        if self._rehearsed is None and (candidates or self._is_idle):
            self._rehearsed = self.aside.begin(write_report, self._study, ours=True, into=self._dense)
            self.aside.begin(keep_loaded)  # all that the end needs is now imported

    @functools.cached_property
    def _example(self) -> Tensor:
        """A batch of one sample, which is read from the data once."""
        return self.task.example_input.cpu()

    @property
    def _is_idle(self) -> bool:
        begun = (*self._staged.values(), self._exported, self._rehearsed)
        return all(one.is_done for one in begun if one is not None)

    def has(self, number: int) -> bool:
        """Whether the files of this trial's model are made, or to be made."""
        return number in self._staged

    def keep(self, numbers: Collection[int]) -> None:
        """Gives up the files of all trials but these."""
        for number in self._staged.keys() - numbers:
            begun = self._staged[number]
            begun.cancel()
            if begun.is_done:  # one that runs goes on: without its folder it would wait for answers in vain
                del self._staged[number]
                shutil.rmtree(self._files_of(number), ignore_errors=True)

    def stage(self, answer: Answer) -> None:
        """Has the files of what may be the answer written and checked, unless that has begun."""
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
        """What came of `stage`, which is begun now where it was not for this answer."""
        self.stage(answer)
        return self._staged[answer.trial.number].outcome()

    @property
    def dense_onnx(self) -> Path | None:
        """The dense model as it is deployed, if it was written."""
        file = self._dense / FILES["onnx"]
        return file if self._exported is not None and file.exists() else None

    def close(self) -> None:
        """Ends the process, and removes what it made."""
        self.aside.close()
        shutil.rmtree(self._folder, ignore_errors=True)
