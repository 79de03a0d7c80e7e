"""What is made ahead of a study's end, here without a process that makes it: it is made when it is needed."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress.disk.storage import StudyFolder
from autocompress.processes.aside import Aside, Begun
from autocompress.studies import ahead as module
from autocompress.studies.ahead import Ahead
from autocompress.studies.records import Answer
from autocompress.trial import TrialSpec, run_trial


def test_only_what_was_staged_of_the_answer_is_used(
    tmp_path: Path, make_spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    expected: list[Any]

    def stage(model: torch.nn.Module, example_input: Any, folder: Path, provenance: Any, **others: Any) -> Any:
        made.append((provenance.density, sum(p.numel() for p in model.parameters())))
        return made[-1]  # in place of what is staged

    monkeypatch.setattr(module, "stage", stage)
    answers, models = [], []
    for number, density in ((1, 0.9), (2, 0.3)):
        spec = make_spec(number, density)
        trial = run_trial(spec)
        assert trial.model is not None
        models.append(trial.model)
        answers.append(Answer(trial, spec.scheme, spec.facts, trial.model.state_dict()))
        rebuilt = answers[-1].rebuilt(spec.task.model).state_dict()
        assert all(torch.equal(rebuilt[name], value) for name, value in trial.model.state_dict().items())
    expected = [
        (one.trial.density, sum(p.numel() for p in model.parameters()))
        for one, model in zip(answers, models, strict=True)
    ]
    folder = StudyFolder(tmp_path / "study")
    ahead = Ahead(Aside(), spec.task, folder)
    assert not ahead.has(1)
    ahead.stage(answers[0])
    assert ahead.has(1) and not ahead.has(2) and made == []
    assert ahead.staged(answers[0]) == expected[0]  # once: begun, not made again
    ahead.stage(answers[0])
    ahead.stage(answers[1])
    ahead.keep([2])
    assert ahead.has(2) and not ahead.has(1)
    assert ahead.staged(answers[1]) == expected[1]
    assert made == expected  # the first, given up, was not made again
    ahead.close()
    folder.close()


def test_other_answers_wait_until_the_process_is_idle(tmp_path: Path, make_spec: Callable[..., TrialSpec]) -> None:
    spec = make_spec(1, 0.9)
    trial = run_trial(spec)
    assert trial.model is not None
    state = trial.model.state_dict()
    begun: list[tuple[str, Future[Any]]] = []

    class Slow(Aside):
        def begin(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            begun.append((function.__name__, Future()))
            return Begun(begun[-1][1], lambda: None, self.close)

    def prepared(*candidates: int) -> list[str]:
        begun_before = len(begun)
        ahead.prepare(
            candidates, lambda number: Answer(replace(trial, number=number), spec.scheme, spec.facts, state)
        )
        return [name for name, _ in begun[begun_before:]]

    def done() -> None:
        for _, future in begun:
            if not future.done():
                future.set_result(None)

    folder = StudyFolder(tmp_path / "study")
    ahead = Ahead(Slow(), spec.task, folder)
    assert prepared() == ["export_dense"]  # before the first trial
    assert prepared(1, 2) == ["stage", "have_checker", "write_report", "keep_loaded"]
    assert prepared(1, 2) == []  # the first are under way
    done()
    assert prepared(1, 2) == ["stage", "have_checker"] and ahead.has(1) and ahead.has(2)
    assert prepared(2, 3) == [] and ahead.has(2) and not ahead.has(1)
    done()
    assert prepared(4, 3) == ["stage", "have_checker"] and ahead.has(4) and not ahead.has(3)
    ahead.close()
    ahead = Ahead(Slow(), spec.task, folder)  # of a study in which nothing can be the answer yet
    assert prepared() == ["export_dense"] and prepared() == []
    done()
    assert prepared() == ["write_report", "keep_loaded"] and prepared() == []
    ahead.close()
    folder.close()


def test_the_folder_of_what_is_under_way_stays(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    ahead = Ahead(Aside(), None, folder)  # type: ignore[arg-type]  # no task: nothing is made
    runs, waits, is_done = Future[Any](), Future[Any](), Future[Any]()
    runs.set_running_or_notify_cancel()
    is_done.set_result(None)
    for number, future in enumerate((runs, waits, is_done)):
        ahead._staged[number] = Begun(future, lambda: None, lambda: None)
        ahead._files_of(number).mkdir(parents=True)
    ahead.keep([])
    assert waits.cancelled() and [ahead._files_of(number).exists() for number in range(3)] == [True, False, False]
    assert ahead.has(0) and not ahead.has(1)  # it is not begun a second time beside itself
    runs.set_result(None)
    ahead.keep([])
    assert not ahead.has(0) and not ahead._files_of(0).exists()
    ahead.close()
    assert not folder.ahead.exists()
    folder.close()


def test_those_who_share_a_study_do_not_share_what_they_make_ahead(tmp_path: Path) -> None:
    alone, shared = StudyFolder(tmp_path / "alone"), StudyFolder(tmp_path / "shared", shared=True)
    assert alone.ahead.name == ".ahead"  # so that the next run finds what a killed one has left
    assert shared.ahead.name.startswith(".ahead-") and shared.ahead.parent == shared.path
    ahead = Ahead(Aside(), None, alone)  # type: ignore[arg-type]  # no task: nothing is made
    (alone.ahead / "dense").mkdir(parents=True)
    (alone.ahead / "dense" / "model.onnx").write_bytes(b"left by a run that was killed")
    assert ahead.dense_onnx is None
    ahead.close()
    assert not alone.ahead.exists()
    for folder in (alone, shared):
        folder.close()
