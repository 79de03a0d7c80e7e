"""What a machine does to a study: no room on the disk, a file system that is read-only, a clock that jumps."""

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import autocompress as ac
from autocompress.lc import LearningCompression
from autocompress.studies.watcher import Silent
from autocompress.task import Task
from autocompress.trial import TrialResult

ASKED: dict[str, Any] = {
    "max_drop": 0.3,
    "trials": 3,
    "sampler": "random",
    "recovery": LearningCompression(epochs=1, c_steps=1, lr=0.05),
    "device": "cpu",
}


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """A mount for a ``with`` block; skips where this is not allowed."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user cannot mount file systems here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=32m", "tmpfs", place):
        yield place


class AfterFirst(Silent):
    """Does something when the first trial has finished."""

    def __init__(self, does: Callable[[], None]) -> None:
        self.does: Callable[[], None] | None = does

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Any) -> None:
        if self.does:
            self.does()
            self.does = None


def fill(place: Path) -> None:
    """Until no block is left."""
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


@pytest.mark.slow
def test_a_disk_that_is_full_costs_no_finished_trial(disk: Path, tiny_task: Task) -> None:
    with pytest.raises(OSError, match=r"No space left on device.*study can be resumed") as refused:
        ac.tune(tiny_task, **ASKED, out=disk, name="study", watcher=AfterFirst(lambda: fill(disk)))
    assert "\n" not in str(refused.value)
    kept = (disk / "study" / "trials" / "0001" / "trial.json").read_bytes()
    (disk / "filler").unlink()
    result = ac.tune(tiny_task, **ASKED, out=disk, resume="study")
    assert sorted(record.number for record in result.records) == [1, 2, 3]
    assert (disk / "study" / "trials" / "0001" / "trial.json").read_bytes() == kept
    assert not list(disk.rglob("*.tmp"))


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_costs_no_finished_trial(tmp_path: Path, tiny_task: Task) -> None:
    trials = tmp_path / "study" / "trials"
    with mounted("-t", "tmpfs", "tmpfs", tmp_path):

        def protect() -> None:
            subprocess.run(["mount", "--bind", trials, trials], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", trials], check=True)

        try:
            with pytest.raises(OSError, match=r"Read-only file system.*study can be resumed") as refused:
                ac.tune(tiny_task, **ASKED, out=tmp_path, name="study", watcher=AfterFirst(protect))
        finally:
            subprocess.run(["umount", trials], check=False)
        assert "\n" not in str(refused.value)
        result = ac.tune(tiny_task, **ASKED, out=tmp_path, resume="study")
        assert sorted(record.number for record in result.records) == [1, 2, 3]


def test_a_folder_that_is_read_only_is_said_before_anything_is_done(tmp_path: Path, tiny_task: Task) -> None:
    refused = pytest.raises(ValueError, match=r"cannot write to .*: Read-only file system; choose another folder")
    with mounted("-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path), refused:
        ac.tune(tiny_task, **ASKED, out=tmp_path)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By up to a year either way, each time that somebody asks it."""
    still = ac.tune(tiny_task, **ASKED, out=tmp_path / "still")
    jumps, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + jumps.uniform(-3e7, 3e7))
    jumping = ac.tune(tiny_task, **ASKED, out=tmp_path / "jumping", timeout=600)
    assert [(r.number, r.density, r.score) for r in jumping.records] == [
        (r.number, r.density, r.score) for r in still.records
    ]
    assert jumping.answer == still.answer and jumping.stopped == still.stopped
    assert 0 < jumping.seconds < 600 and all(0 < record.seconds < 600 for record in jumping.records)
    os.utime(jumping.folder / "study.json", (0, 0))  # written in 1970, by its clock
    assert ac.tune(tiny_task, **ASKED, out=tmp_path / "jumping", resume=jumping.name).answer == still.answer
