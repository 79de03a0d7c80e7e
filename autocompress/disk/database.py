"""A database in which several coordinators share the Optuna study."""

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
LOCKED_S = 60  # how long to wait for another coordinator's write to SQLite, whose default is 5 s
# If several processes create the tables of a new database at once, all but one fail, at each table again.
_ATTEMPTS, _PAUSE_S = 20, 0.1


def check_database(url: str) -> str:
    """Checks the form of a database's address and returns it; does not connect.

    Raises:
        ValueError: If it is not the address of a supported database; the message holds no password.
    """
    kind, separator, rest = url.partition("://")
    if not separator or kind not in _DRIVERS or not rest.strip("/"):
        raise ValueError(
            f"storage={without_secrets(url)!r}; write postgresql://USER@HOST/DATABASE, or sqlite:///FILE for "
            "several coordinators on one machine"
        )
    if kind != "sqlite" and rest.count("@") > 1:  # part of the password would be taken for the host and shown
        raise ValueError("storage: an @ in a user or password of an address is written %40")
    try:
        make_url(url)
    except (SQLAlchemyError, ValueError):  # their messages may contain a part of the password
        raise ValueError(
            "storage is not an address; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with what is special "
            "in it percent-encoded"
        ) from None
    return url


@contextmanager
def connected(url: str) -> Iterator[RDBStorage]:
    """Opens Optuna's storage in a database for a ``with`` block; creates its tables if they do not exist.

    Raises:
        ValueError: If the database cannot be used; the message says why, without user and password.
        RuntimeError: If the connection is lost within the block; likewise.
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
        except (SQLAlchemyError, RuntimeError) as error:  # RuntimeError: the tables are of another Optuna version
            if _is_race(error) and attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE_S)
                continue
            raise ValueError(
                f"storage={without_secrets(url)!r} cannot be used: {_reason(error, url)}; see that it runs, and "
                "give user and password in the address, or in PGUSER and PGPASSWORD or ~/.pgpass"
            ) from None
    raise AssertionError("unreachable")


def _is_race(error: Exception) -> bool:
    """Whether another process is creating the same tables now."""
    return isinstance(error, IntegrityError) or "already exists" in str(error)


def _reason(error: BaseException, url: str) -> str:
    """The first line of the database's own message, without the password."""
    error = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    message = str(getattr(error, "orig", None) or error)
    password = make_url(url).password
    message = message.replace(str(password), "...") if password else message
    return re.split(r"\n|Multiple connection attempts", without_secrets(message))[0].strip()
