"""The home on disk: one folder a study, written so that a kill at any moment leaves whole files."""

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import filelock

from autocompress.disk.files import LOCK, LONGEST, NAME, called, read_json, write_json
from autocompress.formats import weights
from autocompress.measurement import Measurement
from autocompress.trial import Start, TrialResult
from autocompress.verdict.constraint import Checked

_LEFT_BEHIND = (LOCK, "holder.json", ".holder.json.tmp", ".study.json.tmp")  # by who was killed as it began
RESERVED = ("cache", "mlflow-artifacts", "mlflow.db")


def prepare_out(out: Path) -> Path:
    """The folder for all studies as an absolute path. Where it is not there the first study makes it.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    place, names = out.absolute(), []
    try:
        while not _is_there(place):
            names.append(place.name)
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
        for name in names:  # whether folders can be called so
            _is_there(place / name)
        return out.resolve()
    except (OSError, ValueError) as error:  # the latter: there is a null in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot write to {str(out)!r}: {reason}; choose another folder") from None


def _is_there(path: Path) -> bool:
    """Whether there is something of this path, or nothing yet; one that cannot be raises OSError."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


class StudyFolder:
    """A study's folder: what was asked, the journal, the trials, the best model, the result.

    Held by one process at a time; or shared by several, whose study is in a database: they take turns, and each
    claims the trials that it runs. Locks are the system's, and so end with the process that has them.

    Args:
        path: The folder; made if it is not there.
        shared: Whether it is.

    Raises:
        ValueError: If another process holds it; the message says which.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.shared = path, shared
        self._lock = filelock.FileLock(path / LOCK)
        self._claims: dict[int, filelock.FileLock | None] = {}
        if shared:
            return
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"the study {path.name!r} is being run by {self._holder()}; wait for its end, or begin one of "
                "another name"
            ) from None
        began = datetime.now(UTC).isoformat(" ", "minutes")
        write_json(self._holder_file, {"pid": os.getpid(), "host": socket.gethostname(), "since": began})

    @property
    def _holder_file(self) -> Path:
        return self.path / "holder.json"

    def _holder(self) -> str:
        """The process that holds the study, in words."""
        try:
            held = read_json(self._holder_file)
            return f"process {held['pid']} on {held['host']}, since {held['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # not written yet
            return "another process"

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One of those who share the study at a time: to choose a trial, or to write what is not a trial's."""
        with self._lock if self.shared else contextlib.nullcontext():
            yield

    def claim(self, number: int) -> bool:
        """Whether a trial is now this process's to run, and was nobody's before."""
        if number in self._claims:
            return False
        lock = None
        if self.shared:
            self.trial(number).mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.trial(number) / LOCK)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                return False
        self._claims[number] = lock
        return True

    def give_back(self, *numbers: int) -> None:
        """Ends the claims to some trials; without any, to all."""
        for number in numbers or tuple(self._claims):
            lock = self._claims.pop(number)
            if lock is not None:
                (self.trial(number) / LOCK).unlink(missing_ok=True)
                lock.release()

    def close(self) -> None:
        """Lets other processes have the study."""
        self.give_back()
        if self._lock.is_locked:
            self._holder_file.unlink(missing_ok=True)
        self._lock.release()

    def discard(self) -> None:
        """Takes back what made the folder a study, and the folder itself if nothing else is in it."""
        self.close()
        for name in ("study.json", *_LEFT_BEHIND):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            self.path.rmdir()

    @property
    def settings_file(self) -> Path:
        """What was asked."""
        return self.path / "study.json"

    def update_settings(self, more: Mapping[str, Any]) -> None:
        """Adds to what was asked."""
        with self.turn():
            write_json(self.settings_file, {**read_json(self.settings_file), **more})

    @property
    def journal_file(self) -> Path:
        """Optuna's journal."""
        return self.path / "journal.log"

    @property
    def has_begun(self) -> bool:
        """Whether a search has."""
        return self.journal_file.exists() or (self.path / "trials").exists()

    @property
    def result_file(self) -> Path:
        """The result."""
        return self.path / "result.json"

    @property
    def best(self) -> Path:
        """The folder of the answer's files."""
        return self.path / "best"

    @property
    def ahead(self) -> Path:
        """The folder of what this process makes for the study's end, and removes when it ends."""
        return self.path / (f".ahead-{socket.gethostname()}-{os.getpid()}" if self.shared else ".ahead")

    def trial(self, number: int) -> Path:
        """The folder of one trial."""
        return self.path / "trials" / f"{number:04d}"

    def save_trial(self, result: TrialResult) -> None:
        """Writes a trial's weights and then its record: where there is a record the trial is whole."""
        folder = self.trial(result.number)
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.glob(".*.tmp"):  # written by a process that was killed
            half.unlink()
        assert result.model is not None
        weights.save(result.model.state_dict(), folder / "model.safetensors")
        for density, start in result.starts.items():
            weights.save(start, folder / f"start-{density!r}.safetensors")
        record = asdict(replace(result, model=None, starts={}))
        del record["model"], record["starts"]
        write_json(folder / "trial.json", record, sealed=True)

    def load_trial(self, number: int) -> TrialResult:
        """A trial's record, without its model.

        Raises:
            ValueError: If the record is missing or damaged.
        """
        file = self.trial(number) / "trial.json"
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        record = read_json(file)
        try:
            return _trial_result(record)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def start(self, density: float, among: Container[int]) -> Start | None:
        """The sparsest model that a trial at ``density`` can start from; None if only the dense one can.

        Args:
            density: Of the trial.
            among: The numbers of the trials whose models it may start from.
        """
        files = [file for file in self.path.glob("trials/*/start-*") if (file.parent / "trial.json").is_file()]
        denser = [(float(file.stem.removeprefix("start-")), file) for file in files]
        denser = [(found, file) for found, file in denser if found >= density and int(file.parent.name) in among]
        for found, file in sorted(denser):
            with contextlib.suppress(OSError, ValueError):  # damaged: it is a head start, and the next one is, too
                return Start(int(file.parent.name), found, weights.load(file))
        return None

    def load_weights(self, number: int) -> dict[str, Any]:
        """The state dict of a trial's realized model."""
        return weights.load(self.trial(number) / "model.safetensors")


def _trial_result(record: dict[str, Any]) -> TrialResult:
    measurement = Measurement.from_json(record.pop("measurement"))
    curves = {name: tuple(values) for name, values in record.pop("curves").items()}
    constraints = tuple(Checked(**one) for one in record.pop("constraints", ()))
    values = tuple(record.pop("values"))
    return TrialResult(measurement=measurement, curves=curves, constraints=constraints, values=values, **record)


def new_folder(home: Path, name: str | None, asked: Mapping[str, Any]) -> StudyFolder:
    """The folder of a new study.

    Args:
        home: The folder of all studies.
        name: The study's name; None for one made of the task, the scheme and the time.
        asked: What is asked of the study: JSON types only.

    Raises:
        ValueError: If the name cannot be used or is taken.
    """
    path = check_free(home, _default_name(home, asked) if name is None else name)
    folder = StudyFolder(path, shared="storage" in asked)
    write_json(folder.settings_file, {**asked, "autocompress": version("autocompress")})
    return folder


def check_free(home: Path, name: str) -> Path:
    """The folder of a new study of this name.

    Raises:
        ValueError: If the name cannot be used or is taken.
    """
    path = home / check_name(name)
    if (path / "study.json").exists():
        raise ValueError(f"a study named {name!r} is in {home} already; choose another name, or resume it")
    if path.exists() and any(file.name not in _LEFT_BEHIND for file in path.iterdir()):
        raise ValueError(f"{path} holds something other than a study; choose another name")
    return path


def _default_name(home: Path, asked: Mapping[str, Any]) -> str:
    task, scheme = (re.sub(r"[^A-Za-z0-9]+", "-", asked[key])[:50].strip("-") or key for key in ("task", "scheme"))
    name = f"{task}-{scheme}-{datetime.now():%Y%m%d-%H%M%S}"
    others = (f"{name}-{i}" for i in count(2))
    return name if not (home / name).exists() else next(other for other in others if not (home / other).exists())


def check_name(name: str) -> str:
    """The name, if it can be a study's.

    Raises:
        ValueError: If it cannot.
    """
    if not re.fullmatch(NAME, name) or name in RESERVED:
        given = name if len(name) <= LONGEST else f"{name[:20]}..."
        raise ValueError(
            f"name={given!r}; use letters, digits, '.', '_' and '-', 1 to {LONGEST} of them, "
            f"and not {' or '.join(RESERVED)}"
        )
    return name


def resume_folder(home: Path, name: str, identity: Mapping[str, Any]) -> StudyFolder:
    """The folder of a study that goes on.

    Raises:
        ValueError: If there is none of that name, or something else was asked of it.
    """
    asked = study_settings(home, name, identity.get("kind", "study"))
    for key, value in identity.items():
        if asked.get(key) != value:
            raise ValueError(
                f"the study {name!r} was made with {key} {asked.get(key)!r}, not {value!r}; resume it as it was "
                "or begin a new one"
            )
    return StudyFolder(home / name, shared="storage" in asked)


def study_settings(home: Path, name: str, kind: str = "study") -> dict[str, Any]:
    """What was asked of a study, or of a sweep, that exists.

    Raises:
        ValueError: If there is none of that name; the message lists those there are. If it is of the other kind.
    """
    file = home / name / "study.json"
    if not re.fullmatch(NAME, name) or not file.is_file():
        known = sorted(path.parent.name for path in home.glob("*/study.json"))
        raise ValueError(f"there is no study {name!r} in {home} (there: {', '.join(known) or 'none'})")
    asked = read_json(file)
    if (found := asked.get("kind", "study")) != kind:
        command = {"study": "tune", "sweep": "sweep"}[found]
        again = f"autocompress {command} --resume {called(home / name)}"
        raise ValueError(f"{name!r} is a {found}, not a {kind}; {again} goes on with it")
    return asked
