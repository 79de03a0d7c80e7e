import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autocompress.disk.files import read_json, write_json
from autocompress.disk.storage import (
    StudyFolder,
    new_folder,
    prepare_out,
    resume_folder,
    study_settings,
)
from autocompress.goal import as_objective
from autocompress.trial import TrialResult, TrialSpec, run_trial

IDENTITY = {"task": "my task", "scheme": "StructPrune(min_keep=4)+Quantize16", "max_drop": 0.01, "seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StudyFolder]:
    folder = StudyFolder(tmp_path / "study")
    yield folder
    folder.close()


@pytest.fixture
def result(make_spec: Callable[..., TrialSpec]) -> TrialResult:
    return run_trial(make_spec(number=3, timing=True, objectives=(as_objective("latency"),)))


# JSON


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1, "umlaut": "ä"})
    assert read_json(file) == {"a": 1, "umlaut": "ä"}
    with pytest.raises(TypeError):
        write_json(file, {"a": 2, "b": object()})  # fails half-way
    assert read_json(file) == {"a": 1, "umlaut": "ä"}
    write_json(file, {"a": 3})
    assert read_json(file) == {"a": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"nonsense"])
def test_damaged_json_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is damaged: ") as refused:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(refused.value)


# Trials


def test_a_trial_starts_from_the_sparsest_model_that_is_denser(folder: StudyFolder, result: TrialResult) -> None:
    assert folder.start(0.1, range(100)) is None
    weights = {density: {"w": torch.full((3,), density)} for density in (0.3, 0.1234567890123, 0.05)}
    folder.save_trial(replace(result, starts=weights))
    folder.save_trial(replace(result, number=4, starts={0.2: {"w": torch.ones(3)}}))
    for asked, trial, found in ((0.01, 3, 0.05), (0.1, 3, 0.1234567890123), (0.15, 4, 0.2), (0.3, 3, 0.3)):
        start = folder.start(asked, range(100))
        assert start is not None and (start.trial, start.density) == (trial, found)
    assert torch.equal(folder.start(0.1, range(100)).weights["w"], weights[0.1234567890123]["w"])  # type: ignore[union-attr]
    assert folder.start(0.31, range(100)) is None
    (folder.trial(4) / "trial.json").unlink()  # a trial without its record was cut short
    assert folder.start(0.15, range(100)).density == 0.3  # type: ignore[union-attr]
    (damaged,) = folder.path.glob("trials/*/start-0.3.*")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert folder.start(0.15, range(100)) is None
    assert folder.load_trial(3) == replace(result, model=None)


def test_a_trial_comes_back_as_it_was_saved(folder: StudyFolder, result: TrialResult) -> None:
    assert result.model is not None and result.measurement.latency
    folder.save_trial(result)
    assert folder.load_trial(3) == replace(result, model=None)
    state = folder.load_weights(3)
    assert state.keys() == result.model.state_dict().keys()
    assert all(torch.equal(tensor, result.model.state_dict()[name]) for name, tensor in state.items())
    assert sorted(path.name for path in folder.trial(3).iterdir()) == ["model.safetensors", "trial.json"]


def test_a_trial_without_a_record_is_missing(folder: StudyFolder, result: TrialResult) -> None:
    folder.save_trial(result)
    (folder.trial(3) / "trial.json").unlink()  # killed between the weights and the record
    with pytest.raises(ValueError, match=r"0003/trial\.json is missing"):
        folder.load_trial(3)
    folder.save_trial(result)
    assert folder.load_trial(3).number == 3


def unsealed(text: str) -> dict:
    return {key: value for key, value in json.loads(text).items() if key != "seal"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "null",
        lambda text: "[]",
        lambda text: text.replace('"seconds": ', '"seconds": 1'),  # a digit too many, which only the seal knows
        lambda text: json.dumps({**unsealed(text), "measurement": None}),
        lambda text: json.dumps({k: v for k, v in unsealed(text).items() if k != "score"}),
        lambda text: json.dumps({k: v for k, v in unsealed(text).items() if k != "curves"}),
        lambda text: json.dumps({**unsealed(text), "surplus": 1}),
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_file(
    folder: StudyFolder, result: TrialResult, damage: Callable[[str], str]
) -> None:
    folder.save_trial(result)
    file = folder.trial(3) / "trial.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"0003/trial\.json is damaged") as refused:
        folder.load_trial(3)
    assert "\n" not in str(refused.value)


def test_damaged_weights_are_an_error_that_names_the_file(folder: StudyFolder, result: TrialResult) -> None:
    folder.save_trial(result)
    file = folder.trial(3) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"0003/model\.safetensors.* is not a readable weights file"):
        folder.load_weights(3)


def test_records_of_later_versions_with_more_measurements_are_read(
    folder: StudyFolder, result: TrialResult
) -> None:
    folder.save_trial(result)
    file = folder.trial(3) / "trial.json"
    record = read_json(file)
    record["measurement"]["colour"] = "blue"
    write_json(file, record)
    assert folder.load_trial(3) == replace(result, model=None)


# Studies


def test_a_new_study_keeps_what_was_asked(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, "mine", IDENTITY)
    assert folder.path == tmp_path / "mine"
    settings = study_settings(tmp_path, "mine")
    assert settings.items() >= IDENTITY.items()
    assert settings["autocompress"]
    folder.close()


def test_a_study_without_a_name_is_named_after_task_scheme_and_time(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, None, IDENTITY)
    assert folder.path.name.startswith("my-task-StructPrune-min-keep-4-Quantize16-20")
    folder.close()
    resume_folder(tmp_path, folder.path.name, IDENTITY).close()  # a name that it takes back


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/b",
        "/x",
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "x\n",
        "ä",
        "cache",
        "mlflow.db",
        "mlflow-artifacts",
        "x" * 300,
    ],
)
def test_names_that_would_land_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(ValueError, match="use letters, digits"):
        new_folder(home, name, IDENTITY)
    with pytest.raises(ValueError, match="there is no study"):
        resume_folder(home, name, IDENTITY)
    assert list(home.iterdir()) == []
    assert list(tmp_path.iterdir()) == [home]


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    new_folder(tmp_path, "mine", IDENTITY).close()
    with pytest.raises(ValueError, match=r"named 'mine' is in .* already; choose another name, or resume it"):
        new_folder(tmp_path, "mine", IDENTITY)
    resume_folder(tmp_path, "mine", IDENTITY).close()  # the refusal let go of the lock


def test_resuming_asks_for_the_same(tmp_path: Path) -> None:
    new_folder(tmp_path, "mine", IDENTITY).close()
    resume_folder(tmp_path, "mine", IDENTITY).close()
    with pytest.raises(
        ValueError, match=r"'mine' was made with scheme 'StructPrune.*', not 'Prune'; resume it as it"
    ):
        resume_folder(tmp_path, "mine", {**IDENTITY, "scheme": "Prune"})
    with pytest.raises(ValueError, match=r"made with max_drop 0\.01, not 0\.02"):
        resume_folder(tmp_path, "mine", {**IDENTITY, "max_drop": 0.02})


def test_resuming_what_is_not_there_lists_what_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no study 'x' in .* \(there: none\)"):
        resume_folder(tmp_path, "x", IDENTITY)
    for name in ("two", "one"):
        new_folder(tmp_path, name, IDENTITY).close()
    with pytest.raises(ValueError, match=r"\(there: one, two\)"):
        resume_folder(tmp_path, "x", IDENTITY)


def test_a_study_has_one_holder(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, "mine", IDENTITY)
    with pytest.raises(ValueError, match=f"'mine' is being run by process {os.getpid()} on .*, since 20"):
        resume_folder(tmp_path, "mine", IDENTITY)
    folder.close()
    assert not (folder.path / "holder.json").exists()
    resume_folder(tmp_path, "mine", IDENTITY).close()


HOLD = (
    "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1); time.sleep(60)"
)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    StudyFolder(tmp_path).close()
    command = [sys.executable, "-uc", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(ValueError, match="is being run by another process"):
            StudyFolder(tmp_path)
        process.kill()
    StudyFolder(tmp_path).close()


# The home


def test_the_home_is_absolute_and_made_with_the_first_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = prepare_out(Path("a/b"))
    assert home == tmp_path / "a" / "b" and not list(tmp_path.iterdir())
    new_folder(home, "mine", {}).close()
    assert prepare_out(home) == home


def test_a_home_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to '.*file.*': .*; choose another folder"):
        prepare_out(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to"):
        prepare_out(tmp_path / "file" / "below")
    for below in ("x" * 300, "new/" + "x" * 300, f"new/{'x' * 300}/runs", "new/" + "é" * 130):
        with pytest.raises(ValueError, match=r"cannot write to '.*': File name too long; choose another folder$"):
            prepare_out(tmp_path / below)
    with pytest.raises(ValueError, match=r"cannot write to '.*': .*embedded null .*; choose another folder$"):
        prepare_out(tmp_path / "new" / "a\0b")


def test_a_folder_of_somebody_elses_is_neither_used_nor_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    thesis = tmp_path / "precious" / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="holds something other than a study"):
        new_folder(tmp_path, "precious", {"task": "t", "scheme": "s"})
    folder = StudyFolder(tmp_path / "precious")
    folder.discard()
    assert thesis.read_text() == "years of work"


def test_default_names_of_the_same_second_differ(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path, None, {"task": "肺炎", "scheme": "Prune"}) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        folder.discard()
        assert not folder.path.exists()
