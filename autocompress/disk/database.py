"""A database in which several coordinators keep one study."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from autocompress.experiments.mlflow_store import without_secrets

_DRIVERS = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite"}
CONNECT_S = 10
LOCKED_S = 60  # one coordinator writes to SQLite at a time; of its own accord it waits for 5 s
# Of several processes that make the tables of a new database at once all but one fail, at each table anew.
_ATTEMPTS, _PAUSE_S = 20, 0.1


def check_database(url: str) -> str:
    """The address of a database, if a study can be kept there; it is not asked whether it answers.

    Raises:
        ValueError: If it is none; the message holds no password.
    """
    kind, separator, rest = url.partition("://")
    if not separator or kind not in _DRIVERS or not rest.strip("/"):
        raise ValueError(
            f"storage={without_secrets(url)!r}; write postgresql://USER@HOST/DATABASE, or sqlite:///FILE for "
            "several coordinators on one machine"
        )
    if kind != "sqlite" and rest.count("@") > 1:  # what is taken for the host would be told in errors
        raise ValueError("storage: an @ in a user or password of an address is written %40")
    try:
        make_url(url)
    except (SQLAlchemyError, ValueError):  # what they say may hold a piece of the password
        raise ValueError(
            "storage is not an address; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with what is special "
            "in it percent-encoded"
        ) from None
    return url


@contextmanager
def connected(url: str) -> Iterator[RDBStorage]:
    """Optuna's tables in a database, made if they are not there; for a ``with`` block.

    Raises:
        ValueError: If it cannot be used; the message says what is wrong, without user and password.
        RuntimeError: If it cannot be used any more; so, too.
    """
    database = _connect(check_database(url))
    try:
        yield database
    except (SQLAlchemyError, StorageInternalError) as error:
        raise RuntimeError(
            f"the database {without_secrets(url)} was lost: {_reason(error, url)}; every finished trial is kept, "
            "and the study can be resumed"
        ) from error
    finally:
        database.remove_session()
        database.engine.dispose()


def _connect(url: str) -> RDBStorage:
    kind, _, rest = url.partition("://")
    patience = {"connect_timeout": CONNECT_S} if kind == "postgresql" else {"timeout": LOCKED_S}
    options = {"pool_pre_ping": True, "connect_args": patience}
    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(f"{_DRIVERS[kind]}://{rest}", engine_kwargs=options)
        except ImportError as error:
            raise ValueError(
                f"storage={without_secrets(url)!r} needs a driver ({error}); "
                "pip install 'autocompress[postgresql]'"
            ) from None
        except (SQLAlchemyError, RuntimeError) as error:  # the latter: its tables are of another Optuna
            if _is_being_made(error) and attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE_S)
                continue
            raise ValueError(
                f"storage={without_secrets(url)!r} cannot be used: {_reason(error, url)}; see that it runs, and "
                "give user and password in the address, or in PGUSER and PGPASSWORD or ~/.pgpass"
            ) from None
    raise AssertionError("unreachable")


def _is_being_made(error: Exception) -> bool:
    """Whether another process makes the same tables just now."""
    return isinstance(error, IntegrityError) or "already exists" in str(error)


def _reason(error: BaseException, url: str) -> str:
    """The database's own first words, without the password should they hold it."""
    error = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    said = str(getattr(error, "orig", None) or error)
    password = make_url(url).password
    said = said.replace(str(password), "...") if password else said
    return re.split(r"\n|Multiple connection attempts", without_secrets(said))[0].strip()
