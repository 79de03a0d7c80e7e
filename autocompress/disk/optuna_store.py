"""Where Optuna keeps a study: a journal in its folder, or a database that several coordinators share."""

from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from autocompress.goal import Direction


class _Held(JournalFileSymlinkLock):
    """No lock: the study's folder has one, and Optuna's own would outlive a killed process for half a minute."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def open_study(journal: Path, *directions: Direction) -> optuna.Study:
    """The study kept in ``journal``: as it was left, to be read; or to go on with, where directions are given."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not directions:
        return optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend(str(journal))))
    _drop_half_line(journal)
    return _opened(JournalStorage(JournalFileBackend(str(journal), _Held(str(journal)))), "study", directions)


def open_shared(database: BaseStorage, name: str, *directions: Direction) -> optuna.Study:
    """The study of that name in a database, made if it is not there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _opened(database, name, directions)


def _opened(storage: BaseStorage, name: str, directions: Sequence[Direction]) -> optuna.Study:
    return optuna.create_study(storage=storage, directions=directions, study_name=name, load_if_exists=True)


def _drop_half_line(journal: Path) -> None:
    """Takes back a last line that a killed process did not write to its end: another would be appended to it."""
    if journal.is_file() and not (written := journal.read_bytes()).endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(written.rfind(b"\n") + 1)
