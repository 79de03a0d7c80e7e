"""Opens Optuna studies: in a journal in the study's folder, or in a database that several coordinators share."""

from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from autocompress.goal import Direction


class _NoLock(JournalFileSymlinkLock):
    """Does not lock: the study's folder has a lock, and Optuna's would outlive a killed process by 30 s."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def open_study(journal: Path, *directions: Direction) -> optuna.Study:
    """Opens the study in a journal.

    Args:
        journal: The journal's file.
        directions: The directions of the objectives, to continue or create the study; none to only read it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not directions:
        return optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend(str(journal))))
    _drop_incomplete_line(journal)
    return _open(JournalStorage(JournalFileBackend(str(journal), _NoLock(str(journal)))), "study", directions)


def open_shared(database: BaseStorage, name: str, *directions: Direction) -> optuna.Study:
    """Opens the study of that name in a database; creates it if it does not exist."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _open(database, name, directions)


def _open(storage: BaseStorage, name: str, directions: Sequence[Direction]) -> optuna.Study:
    return optuna.create_study(storage=storage, directions=directions, study_name=name, load_if_exists=True)


def _drop_incomplete_line(journal: Path) -> None:
    """Removes a last line without its end, left by a killed process: the next entry would be appended to it."""
    if journal.is_file() and not (content := journal.read_bytes()).endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
