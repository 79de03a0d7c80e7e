"""The folders of studies, written so that a kill at any moment leaves complete files."""

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

_LEFT_BEHIND = (LOCK, "holder.json", ".holder.json.tmp", ".study.json.tmp")  # by a study killed at its start
RESERVED = ("cache", "mlflow-artifacts", "mlflow.db")  # no names for studies


def prepare_out(out: Path) -> Path:
    """Checks that studies can be written to a folder, and returns its absolute path; does not create it.

    Raises:
        ValueError: If it cannot be created or written to.
    """
    parent, missing = out.absolute(), []
    try:
        while not _exists(parent):
            missing.append(parent.name)
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
        for name in missing:  # raises if the file system does not allow the name
            _exists(parent / name)
        return out.resolve()
    except (OSError, ValueError) as error:  # ValueError: the path has a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot write to {str(out)!r}: {reason}; choose another folder") from None


def _exists(path: Path) -> bool:
    """Whether a path exists; unlike `Path.exists`, raises OSError for one that cannot exist."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


class StudyFolder:
    """A study's folder: its settings, its journal, its trials, its answer and its result.

    One process at a time holds it; or several share it, whose Optuna study is in a database: these take turns, and
    each claims the trials that it runs. The locks are the operating system's, which releases those of a process
    that was killed.

    Args:
        path: The folder; created if it does not exist.
        shared: Whether several processes share it.

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
        now = datetime.now(UTC).isoformat(" ", "minutes")
        write_json(self._holder_file, {"pid": os.getpid(), "host": socket.gethostname(), "since": now})

    @property
    def _holder_file(self) -> Path:
        return self.path / "holder.json"

    def _holder(self) -> str:
        """The process that holds the study, in words."""
        try:
            holder = read_json(self._holder_file)
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # not written yet
            return "another process"

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A lock among the processes that share the study, to choose a trial or to write anything but a trial."""
        with self._lock if self.shared else contextlib.nullcontext():
            yield

    def claim(self, number: int) -> bool:
        """Claims a trial for this process; False if this or another process has claimed it already."""
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
        """Releases the claims to the given trials; without arguments, all claims."""
        for number in numbers or tuple(self._claims):
            lock = self._claims.pop(number)
            if lock is not None:
                (self.trial(number) / LOCK).unlink(missing_ok=True)
                lock.release()

    def close(self) -> None:
        """Releases all locks, so that other processes can hold the study."""
        self.give_back()
        if self._lock.is_locked:
            self._holder_file.unlink(missing_ok=True)
        self._lock.release()

    def discard(self) -> None:
        """Removes the files of a study that has not begun, and the folder itself if it is empty then."""
        self.close()
        for name in ("study.json", *_LEFT_BEHIND):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder has other files
            self.path.rmdir()

    @property
    def settings_file(self) -> Path:
        """The file of the study's settings."""
        return self.path / "study.json"

    def update_settings(self, more: Mapping[str, Any]) -> None:
        """Adds entries to the study's settings, or replaces them."""
        with self.turn():
            write_json(self.settings_file, {**read_json(self.settings_file), **more})

    @property
    def journal_file(self) -> Path:
        """Optuna's journal."""
        return self.path / "journal.log"

    @property
    def has_begun(self) -> bool:
        """Whether the search has begun."""
        return self.journal_file.exists() or (self.path / "trials").exists()

    @property
    def result_file(self) -> Path:
        """The file of the study's result."""
        return self.path / "result.json"

    @property
    def best(self) -> Path:
        """The folder of the answer's files."""
        return self.path / "best"

    @property
    def ahead(self) -> Path:
        """The temporary folder in which this process prepares the study's end."""
        return self.path / (f".ahead-{socket.gethostname()}-{os.getpid()}" if self.shared else ".ahead")

    def trial(self, number: int) -> Path:
        """The folder of one trial."""
        return self.path / "trials" / f"{number:04d}"

    def save_trial(self, result: TrialResult) -> None:
        """Writes a trial's weights, then its record: a trial that has a record is complete."""
        folder = self.trial(result.number)
        folder.mkdir(parents=True, exist_ok=True)
        for temporary in folder.glob(".*.tmp"):  # left by a process that was killed
            temporary.unlink()
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
        """The sparsest stored model that a trial at ``density`` can start from; None if there is none.

        Args:
            density: The trial's density.
            among: The numbers of the trials whose models it may start from.
        """
        files = [file for file in self.path.glob("trials/*/start-*") if (file.parent / "trial.json").is_file()]
        starts = [(float(file.stem.removeprefix("start-")), file) for file in files]
        for start_density, file in sorted(starts):
            if start_density >= density and (number := int(file.parent.name)) in among:
                with contextlib.suppress(OSError, ValueError):  # damaged: the next one is a head start, too
                    return Start(number, start_density, weights.load(file))
        return None

    def load_weights(self, number: int) -> dict[str, Any]:
        """The state dict of a trial's realized model."""
        return weights.load(self.trial(number) / "model.safetensors")


def _trial_result(record: dict[str, Any]) -> TrialResult:
    measurement = Measurement.from_json(record.pop("measurement"))
    curves = {name: tuple(values) for name, values in record.pop("curves").items()}
    constraints = tuple(Checked(**checked) for checked in record.pop("constraints", ()))
    values = tuple(record.pop("values"))
    return TrialResult(measurement=measurement, curves=curves, constraints=constraints, values=values, **record)


def new_folder(home: Path, name: str | None, asked: Mapping[str, Any]) -> StudyFolder:
    """Creates the folder of a new study, with its settings.

    Args:
        home: The folder of all studies.
        name: The study's name; None for one made of the task, the scheme and the time.
        asked: The study's settings: JSON types only.

    Raises:
        ValueError: If the name cannot be used or is taken.
    """
    path = check_free(home, _default_name(home, asked) if name is None else name)
    folder = StudyFolder(path, shared="storage" in asked)
    write_json(folder.settings_file, {**asked, "autocompress": version("autocompress")})
    return folder


def check_free(home: Path, name: str) -> Path:
    """The path of the folder of a new study of this name.

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
    """Checks the name of a study and returns it.

    Raises:
        ValueError: If a study cannot have this name.
    """
    if not re.fullmatch(NAME, name) or name in RESERVED:
        given = name if len(name) <= LONGEST else f"{name[:20]}..."
        raise ValueError(
            f"name={given!r}; use letters, digits, '.', '_' and '-', 1 to {LONGEST} of them, "
            f"and not {' or '.join(RESERVED)}"
        )
    return name


def resume_folder(home: Path, name: str, identity: Mapping[str, Any]) -> StudyFolder:
    """Opens the folder of a study to resume it.

    Args:
        home: The folder of all studies.
        name: The study's name.
        identity: The settings that must be those of the study.

    Raises:
        ValueError: If there is no such study, or its settings differ.
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
    """The stored settings of a study or a sweep.

    Args:
        home: The folder of all studies.
        name: The study's name.
        kind: ``"study"`` or ``"sweep"``.

    Raises:
        ValueError: If there is none of that name, or it is of the other kind.
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
