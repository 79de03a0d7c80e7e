import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from autocompress.disk.mend import LOST, restore, set_aside_if_damaged
from autocompress.disk.optuna_store import open_study
from autocompress.disk.storage import StudyFolder
from autocompress.lc import LearningCompression
from autocompress.schemes import StructPrune
from autocompress.search import add_dense, adopt, failures
from autocompress.searching.selection import finished
from autocompress.searching.space import Space
from autocompress.trial import Bound, TrialSpec, run_trial

BOUND = Bound(0.05)
DENSITIES = (0.5, 0.25, 0.4)
SPACE = Space((StructPrune(),), LearningCompression(), (0.1,))


@pytest.fixture
def folder(tmp_path: Path, make_spec: Callable[..., TrialSpec]) -> Iterator[StudyFolder]:
    """A study of three finished trials."""
    folder = StudyFolder(tmp_path / "study")
    study = opened(folder)
    result = run_trial(make_spec(recovery=LearningCompression(epochs=1, c_steps=1)))
    for density in DENSITIES:
        trial = study.ask()
        trial.suggest_float("density", 0.1, 1.0, log=True)
        found = {"density": density - 0.01, "values": (density - 0.01,), "drop": density / 10}
        folder.save_trial(replace(result, number=trial.number, density_asked=trial.params["density"], **found))
    adopt(study, BOUND, folder)
    yield folder
    folder.close()


def opened(folder: StudyFolder) -> optuna.Study:
    study = open_study(folder.journal_file, "minimize")
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    add_dense(study, SPACE, [1.0], BOUND)
    return study


def content(study: optuna.Study) -> list[object]:
    return [(t.number, t.value, t.params, t.user_attrs, t.constraints) for t in finished(study)]


def test_a_whole_journal_is_left_alone(folder: StudyFolder) -> None:
    with folder.journal_file.open("ab") as file:
        file.write(b'{"op_code": 4, "study')  # killed as it wrote
    before = folder.journal_file.read_bytes()
    assert set_aside_if_damaged(folder) is None
    assert folder.journal_file.read_bytes() == before
    study = open_study(folder.journal_file)
    restore(study, SPACE, BOUND, folder)
    assert len(finished(study)) == 3
    folder.journal_file.write_bytes(b"")
    assert set_aside_if_damaged(folder) is None


def without_trial(lines: list[bytes]) -> list[bytes]:
    """Without the line that makes the first trial: all others move up."""
    lines.remove(next(line for line in lines if json.loads(line)["op_code"] == JournalOperation.CREATE_TRIAL))
    return lines


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [*lines[:5], b"\x00" * 40 + b"\n", *lines[6:]], r"line 6 of .*journal\.log is damaged"),
        (lambda lines: [*lines[:3], b"3\n", *lines[4:]], r"line 4 of .*journal\.log is damaged"),
        (lambda lines: [lines[0].replace(b"study", b"stuby"), *lines[1:]], "is damaged: KeyError"),
        (without_trial, r"journal\.log is damaged: "),
        (lambda lines: [line.replace(b"0.24", b"0.14") for line in lines], "trial 2 is another in its record"),
    ],
    ids=["zeros", "a number", "another name", "a line less", "another digit"],
)
def test_a_damaged_journal_is_made_again_from_the_records(
    folder: StudyFolder, damage: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    before, journal = content(open_study(folder.journal_file)), folder.journal_file
    journal.write_bytes(b"".join(damage(journal.read_bytes().splitlines(keepends=True))))
    damaged = journal.read_bytes()
    problem = set_aside_if_damaged(folder)
    assert problem is not None and "\n" not in problem
    assert re.search(said, problem), problem
    assert journal.with_name("journal.log.damaged").read_bytes() == damaged
    study = opened(folder)
    restore(study, SPACE, BOUND, folder)
    assert content(study) == before
    assert set_aside_if_damaged(folder) is None


def test_a_trial_whose_record_is_damaged_too_counts_as_failed(folder: StudyFolder) -> None:
    record = folder.trial(2) / "trial.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"drop": 0.0}))
    folder.journal_file.write_bytes(b"nothing\n")
    assert "line 1" in str(set_aside_if_damaged(folder))
    study = opened(folder)
    restore(study, SPACE, BOUND, folder)
    assert [trial.state for trial in study.trials][2] == TrialState.FAIL
    assert failures(study) == [(2, LOST)]
    assert [trial.number for trial in finished(study)] == [1, 3]
