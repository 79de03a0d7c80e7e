import os
from pathlib import Path

import filelock
import optuna
import pytest

from autocompress.disk.optuna_store import open_study
from autocompress.disk.record import answer_folder, find_study, read_record, study_folders


def test_a_finished_study(recorded, tmp_path):
    trials = recorded.three_trials()
    record = read_record(recorded.write_study(tmp_path, result=recorded.found(trials)))
    assert record.state == "finished"
    assert [one["number"] for one in record.trials] == [1, 2, 3]
    assert record.answer == trials[1]
    assert record.begun == "2026-11-20 15:38"
    assert record.unit == " pp"
    assert record.problems == ()


def test_the_state_says_how_it_ended(recorded, tmp_path):
    interrupted = recorded.found(recorded.three_trials(), stopped="interrupted")
    assert read_record(recorded.write_study(tmp_path, "a", result=interrupted)).state == "interrupted"
    killed = recorded.write_study(tmp_path, "b")
    assert read_record(killed).state == "unfinished"
    with filelock.FileLock(killed / "lock"):
        assert read_record(killed).state == "running"
    assert read_record(killed).state == "unfinished"
    (killed / "study.json").write_text("no JSON")
    assert read_record(killed).state == "damaged"


def test_the_failed_trials_of_a_killed_study_are_in_its_journal(recorded, tmp_path):
    folder = recorded.write_study(tmp_path)
    study = open_study(folder / "journal.log", "minimize")
    for reason in ("it diverged", None):
        trial = study.ask()
        if reason:
            trial.set_user_attr("reason", reason)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert read_record(folder).failed == ((0, "it diverged"), (1, "cut short"))
    assert read_record(folder, journal=False).failed == ()


def test_a_study_is_found_by_name_beginning_or_last(recorded, tmp_path):
    for i, name in enumerate(("digits-a", "digits-b", "digits", "chest")):
        recorded.write_study(tmp_path, name)
        os.utime(tmp_path / name / "study.json", (i, i))
    (tmp_path / "cache").mkdir()
    assert [folder.name for folder in study_folders(tmp_path)] == ["chest", "digits", "digits-a", "digits-b"]
    assert find_study(tmp_path, "digits").name == "digits"  # the whole name, though others begin so
    assert find_study(tmp_path, "che").name == "chest"
    assert find_study(tmp_path, "last").name == "chest"
    assert find_study(tmp_path / "elsewhere", f"{tmp_path}/chest/") == tmp_path / "chest"
    with pytest.raises(ValueError, match="beginning of digits-a, digits-b"):
        find_study(tmp_path, "digits-")
    with pytest.raises(ValueError, match=r"no study 'x' in .* \(there: chest, "):
        find_study(tmp_path, "x")
    with pytest.raises(ValueError, match=r"no study '\.\./chest'"):
        find_study(tmp_path, "../chest")
    with pytest.raises(ValueError, match="there are no studies in"):
        find_study(tmp_path / "cache", "last")


def test_the_folder_of_an_answer_or_why_there_is_none(recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = recorded.write_study(tmp_path / "autocompress-runs", "a")
    again = "'a' has no answer to load: it did not come to its end; autocompress tune --resume a goes on with it$"
    for given in (study, study / "best", Path("autocompress-runs/a/best")):
        with pytest.raises(ValueError, match=again):
            answer_folder(given)
    with filelock.FileLock(study / "lock"), pytest.raises(ValueError, match=r"'a' .*: it is still running$"):
        answer_folder(study)
    missed = recorded.write_study(tmp_path, "b", result=recorded.found(recorded.three_trials(), None))
    with pytest.raises(
        ValueError, match=r"'b' .*: its verdict is 'not met' .*; autocompress show b --out \. says"
    ):
        answer_folder(missed / "best")
    (study / "best").mkdir()
    assert answer_folder(study) == answer_folder(study / "best") == study / "best"
    assert answer_folder(Path("elsewhere/best")) == Path("elsewhere/best")
