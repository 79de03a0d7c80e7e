"""Reads a study's folder leniently, in whatever state it is, without changing it."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias

import filelock

from autocompress.disk.files import LOCK, NAME, called, read_json

State = Literal["finished", "interrupted", "running", "unfinished", "damaged"]


@dataclass(frozen=True)
class Record:
    """The contents of a study's folder.

    Attributes:
        folder: The folder.
        asked: The content of ``study.json``, the study's settings; empty if that is damaged.
        found: The content of ``result.json``; None before the study's end.
        trials: The records of finished trials, by number.
        failed: Number and reason of each trial that ended without a result.
        state: ``running`` while a process holds the study's lock, ``unfinished`` if it ended without a result.
        problems: A sentence for each file that could not be read.
    """

    folder: Path
    asked: Mapping[str, Any]
    found: Mapping[str, Any] | None
    trials: tuple[Mapping[str, Any], ...]
    failed: tuple[tuple[int, str], ...]
    state: State
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The study's name, which is its folder's."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """``study``, or ``sweep``."""
        return str(self.asked.get("kind", "study"))

    @property
    def unit(self) -> str:
        """The unit of 100 times a drop: points, or percent of the dense model's score."""
        return "%" if self.asked.get("drop") == "relative" else " pp"

    @property
    def begun(self) -> str:
        """The time at which the study was started, such as ``2026-11-20 15:38`` in UTC; empty if not recorded."""
        timestamp = self.asked.get("provenance", {}).get("begun", "")
        return str(timestamp)[:16].replace("T", " ")

    @property
    def answer(self) -> Mapping[str, Any] | None:
        """The record of the trial that is the study's answer, if there is one."""
        number = self.found.get("answer") if self.found else None
        return next((trial for trial in self.trials if trial["number"] == number), None)


def read_record(folder: Path, *, journal: bool = True, ours: bool = False) -> Record:
    """Reads a study's folder; damaged files are left out and named in `Record.problems`.

    Args:
        folder: A folder with a ``study.json``.
        journal: Whether to read the failed trials of a study without a result from Optuna's journal.
        ours: Whether this process holds the study's lock; the study then counts as ended.
    """
    problems: list[str] = []
    asked = _read(folder / "study.json", problems, {})
    if asked is not None and any(not isinstance(asked.get(key, {}), dict) for key in ("provenance", "recovery")):
        problems.append(f"{folder / 'study.json'} is damaged: it does not say what was asked")
        asked = None
    found = None
    if (folder / "result.json").is_file():
        is_sweep = asked is not None and asked.get("kind") == "sweep"
        found = _read(folder / "result.json", problems, {} if is_sweep else _OF_RESULT)
    files = sorted(folder.glob("trials/*/trial.json"))
    trials = [trial for file in files if (trial := _read(file, problems, _OF_TRIAL)) is not None]
    trials.sort(key=lambda trial: int(trial["number"]))
    held = not ours and _is_held(folder)
    if found is not None and isinstance(found.get("failed"), list):
        failed = tuple((entry["number"], entry["reason"]) for entry in found["failed"] if _is_failure(entry))
    else:
        failed = tuple(_failed_in_journal(folder / "journal.log", problems)) if journal and not held else ()
    state: State
    if asked is None:
        state = "damaged"
    elif held:
        state = "running"
    elif found is None:
        state = "unfinished"
    else:
        state = "interrupted" if found.get("stopped") == "interrupted" else "finished"
    return Record(folder, asked or {}, found, tuple(trials), failed, state, tuple(problems))


Types: TypeAlias = Mapping[str, type | UnionType]

_OF_TRIAL: Types = {
    **{"number": int, "feasible": bool | int, "measurement": dict},
    **dict.fromkeys(("density", "score", "drop", "seconds"), int | float),
}
_OF_RESULT: Types = {
    **dict.fromkeys(("verdict", "sentence", "stopped"), str),
    **dict.fromkeys(("measurements", "scores", "drop_pp", "artifacts", "not_exported"), dict),
    **{"trials": list, "density": int | float, "seconds": int | float},
}


def _read(file: Path, problems: list[str], needed: Types) -> dict[str, Any] | None:
    """Reads a JSON file that must have keys of some types; if it has not, adds a problem and returns None."""
    try:
        value = read_json(file)
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return None
    unusable = [
        key
        for key, types in needed.items()
        if not isinstance(value, dict) or not isinstance(value.get(key), types)
    ]
    if unusable:
        problems.append(f"{file} is damaged: it has no usable {unusable[0]!r}")
        return None
    return value


def _is_failure(entry: Any) -> bool:
    return isinstance(entry, dict) and {"number", "reason"} <= entry.keys()


@contextlib.contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Turns errors within a ``with`` block, caused by unexpected content of a study's files, into one line.

    Raises:
        ValueError: Instead of the KeyError, TypeError and the like that absent or wrong values cause.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"the study {name!r} is damaged: {type(error).__name__}: {error}") from error


def _is_held(folder: Path) -> bool:
    """Whether a process is running the study, or a trial of it, now."""
    locks = [folder / LOCK, *folder.glob(f"trials/*/{LOCK}")]
    return any(_is_locked(file) for file in locks if file.exists())


def _is_locked(file: Path) -> bool:
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, OSError):
        return True
    lock.release()
    return False


def _failed_in_journal(journal: Path, problems: list[str]) -> Iterable[tuple[int, str]]:
    """Number and reason of the failed trials of a study without a result, from Optuna's journal."""
    if not journal.is_file():
        return ()
    from autocompress.disk.optuna_store import open_study  # imports torch and Optuna, which takes a second
    from autocompress.search import failures

    try:
        return failures(open_study(journal))
    except Exception as error:  # a damaged entry may make Optuna raise anything
        problems.append(f"{journal} is damaged: {type(error).__name__}: {error}")
        return ()


def study_folders(home: Path) -> list[Path]:
    """The folders of all studies in ``home``, in the order of their names."""
    return sorted(file.parent for file in home.glob("*/study.json") if re.fullmatch(NAME, file.parent.name))


def find_study(home: Path, run: str) -> Path:
    """The folder of the study that ``run`` says: its name, a beginning that only it has, ``last``, or its path.

    Raises:
        ValueError: If there is none, or several; the message names those there are.
    """
    if os.sep in run and (Path(run) / "study.json").is_file():  # as it is printed, and as a shell completes it
        return Path(run)
    folders = study_folders(home)
    names = [folder.name for folder in folders]
    if not folders:
        raise ValueError(f"there are no studies in {home}; run one with --out {shlex.quote(str(home))} first")
    if run in names:
        return home / run
    if run == "last":
        return max(folders, key=lambda folder: (folder / "study.json").stat().st_mtime)
    matching = [name for name in names if name.startswith(run)]
    if len(matching) == 1:
        return home / matching[0]
    if matching:
        raise ValueError(f"{run!r} is the beginning of {', '.join(matching)}; write more of the name")
    raise ValueError(f"there is no study {run!r} in {home} (there: {', '.join(names)})")


def answer_folder(directory: Path) -> Path:
    """The folder of a study's answer.

    Args:
        directory: The study's folder or its subfolder ``best``; any other folder is returned unchanged.

    Raises:
        ValueError: If the study has no answer; the message says why, and what to do.
    """
    place = directory.absolute()
    study = place.parent if place.name == "best" else place
    if not (study / "study.json").is_file():
        return directory
    if (study / "best").is_dir():
        return study / "best"
    record = read_record(study, journal=False)
    name, kind, found = record.name, record.kind, record.found
    if kind == "sweep":
        why = "it compares and exports nothing; tune what it found best"
    elif found is not None:
        shown = f"autocompress show {called(study)} says what came nearest and what may help"
        why = f"its verdict is {found.get('verdict')!r} and nothing was exported; {shown}"
    elif record.state == "running":
        why = "it is still running"
    else:
        why = f"it did not come to its end; autocompress tune --resume {called(study)} goes on with it"
    raise ValueError(f"the {kind} {name!r} has no answer to load: {why}")
