"""How MLflow keeps its records: one SQLite database and one artifact directory per output directory."""

import contextlib
import copy
import json
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:  # torch and MLflow take seconds to import
    from mlflow import MlflowClient
    from mlflow.types import Schema
    from torch import Tensor, nn

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"

_LOCK_TIMEOUT_S = 60.0
_SQLITE_TIMEOUT_S = 5.0
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)
_VIEW = "autocompress"
_COLUMNS = ("density", "drop_pp", "feasible", "score", "params", "size_bytes", "macs", "latency_ms")
_OWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (  # about MLflow's own code, as it is imported
    ("The ``noload`` loader strategy", DeprecationWarning),  # its tables, with SQLAlchemy 2.1
    (".*Any type hint is inferred as AnyType", UserWarning),  # its classes for chat models
)


def open_store(out: Path, experiment: str) -> tuple["MlflowClient", str]:
    """A client of the database in ``out`` and the experiment's id; what is missing is made.

    Any number of processes may do this at once.

    Raises:
        OSError: If ``out`` cannot be written.
        sqlite3.Error: If the database is damaged or cannot be written.
        ValueError: If MLflow cannot use a path such as ``out``.
        filelock.Timeout: If another process has been setting up the database for a minute.
    """
    out.mkdir(parents=True, exist_ok=True)
    uri = database_uri(out)
    with quiet_mlflow(), FileLock(out / f"{DATABASE}.lock", timeout=_LOCK_TIMEOUT_S):
        from mlflow import MlflowClient

        database = out / DATABASE
        if not database.exists() or database.stat().st_size == 0:
            _create(out)
        check_database(out)
        client = MlflowClient(uri, registry_uri=uri)
        return client, _experiment_id(client, out, experiment)


def open_server(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """A client of an MLflow server and the experiment's id; the experiment is made if it is not there.

    A server that does not answer is given up after some seconds, not after the minutes that MLflow would take.

    Raises:
        mlflow.exceptions.MlflowException: If the server does not answer or refuses.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    with quiet_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(uri, registry_uri=uri)
        return client, _experiment_id(client, None, experiment)


def check_uri(uri: str) -> str:
    """The address of a tracking server, if MLflow can use it.

    Raises:
        ValueError: If it is none.
    """
    if not re.match(r"(https?|sqlite|postgresql|mysql|mssql|databricks)(\+\w+)?://", uri) and uri != "databricks":
        raise ValueError(f"{without_secrets(uri)!r} is not a tracking URI; write http://HOST:5000 or the like")
    return uri


def without_secrets(text: str) -> str:
    """The text without the user, the password and the token that an address in it may carry."""
    text = re.sub(r"(?<=://)[^/@\s'\"]+@", "", text)
    return re.sub(r"([?&]\w*(?:token|password|secret|key)\w*=)[^&\s'\"]*", r"\1...", text, flags=re.IGNORECASE)


def database_uri(out: Path) -> str:
    """The database's address, absolute.

    Raises:
        ValueError: If the path has a character that is special in such an address; MLflow escapes none.
    """
    path = (out / DATABASE).absolute().as_posix()
    if special := set("%?") & set(path):
        raise ValueError(f"MLflow cannot keep a database in {out}: {special.pop()!r} in the path")
    return f"sqlite:///{path}"


def check_database(out: Path) -> None:
    """Opens the database for writing; MLflow itself would retry for 100 s before it reported a failure.

    Where the directory was moved or copied, the paths of artifacts are moved along: MLflow stores them
    absolute, so it would look for them, and write new ones, in the old place.

    Raises:
        sqlite3.Error: If the database is damaged, of another program or cannot be written.
    """
    root = artifact_root(out)
    with contextlib.closing(sqlite3.connect(out / DATABASE, timeout=_SQLITE_TIMEOUT_S)) as database, database:
        database.execute("BEGIN IMMEDIATE")
        roots = database.execute(
            "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE ?",
            (f"file:///%/{ARTIFACTS}",),
        ).fetchall()
        for (old,) in roots:
            if old == root:
                continue
            for table, column in _PLACES:
                moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                n = len(old)
                database.execute(f"{moved} WHERE substr({column}, 1, ?) = ?", (root, n + 1, n, old))


def page_of_latest_study(out: Path) -> str:
    """The UI's page, after the host, with the runs of the study begun last."""
    with contextlib.closing(sqlite3.connect(out / DATABASE, timeout=_SQLITE_TIMEOUT_S)) as database:
        latest = database.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC").fetchone()
    page = f"experiments/{latest[0]}/runs?viewStateShareKey={_VIEW}&" if latest else "experiments?"
    return f"#/{page}workflowType=machine_learning"


def artifact_root(out: Path) -> str:
    """The address of the artifact directory, absolute."""
    return (out / ARTIFACTS).absolute().as_uri()


def save_model(
    model: "nn.Module", example_input: "Tensor", directory: Path, *, run_id: str, model_id: str
) -> None:
    """Saves an MLflow model without pickle, for any batch size, loadable as ``pytorch`` and ``pyfunc``.

    What is passed explicitly here (signature, requirements, no stored example) is what MLflow would otherwise
    find out by loading the model again in another process.

    Args:
        model: The model, in eval mode on the CPU.
        example_input: A batch of shape ``(n, ...)``.
        directory: Made by this function.
        run_id: The run that the model comes from.
        model_id: The logged model that the files are for.
    """
    import mlflow.pytorch
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature

    pair = torch.cat([example_input[:1]] * 2)  # torch.export fixes a dimension of size 1
    described = Model(run_id=run_id, model_uuid=model_id, model_id=model_id)
    pyfunc.add_to_model(  # MLflow itself adds it only when a numpy example is stored, as 15 MB of JSON
        described,
        loader_module="mlflow.pytorch",
        data="data",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config={"device": None},
    )
    with torch.no_grad():
        outputs = model(pair)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # torch warns of any other layout
    mlflow.pytorch.save_model(
        plain,
        directory,
        mlflow_model=described,
        signature=ModelSignature(_schema(pair), _schema(outputs)),
        input_example=pair,
        serialization_format="pt2",
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "torch")],
    )


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """For a ``with`` block, MLflow reports warnings and errors only. Imports it, without its telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when MLflow is imported
    for about, category in _OWN_WARNINGS:  # not `warnings.catch_warnings`, which is not safe in a thread
        warnings.filterwarnings("ignore", about, category)
    import mlflow  # noqa: F401  sets its logger's level, so it must come first

    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _create(out: Path) -> None:
    """Makes the database under another name first: one cut short halfway could never be opened again."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = out / f"{DATABASE}.new"
    new.unlink(missing_ok=True)
    new_uri = database_uri(out) + ".new"
    store = SqlAlchemyStore(new_uri, artifact_root(out))  # type: ignore[no-untyped-call]
    store.engine.dispose()
    new.replace(out / DATABASE)


def _experiment_id(client: "MlflowClient", out: Path | None, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        view = {"selectedColumns": [*(f"metrics.`{name}`" for name in _COLUMNS), "params.`scheme`"]}
        tags = {
            "mlflow.experimentKind": "custom_model_development",  # runs and models, not chats and traces
            f"mlflow.sharedViewState.{_VIEW}": json.dumps(view),  # the UI shows no metrics unless told which
        }
        return client.create_experiment(name, artifact_root(out) if out else None, tags=tags)
    if found.lifecycle_stage == "deleted":  # someone removed it in the UI; its name stays taken
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _schema(batch: "Tensor") -> "Schema":
    import torch
    from mlflow.types import Schema, TensorSpec

    known = torch.float32 if batch.dtype == torch.bfloat16 else batch.dtype  # numpy has no bfloat16
    return Schema([TensorSpec(torch.empty(0, dtype=known).numpy().dtype, (-1, *batch.shape[1:]))])
