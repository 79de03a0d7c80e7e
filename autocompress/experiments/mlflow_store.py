"""How MLflow keeps its records: one SQLite database and one artifact directory per output directory."""

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:  # torch and MLflow take seconds to import
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature
    from torch import Tensor

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
    # A password may have an @ or a / itself: better a piece of a path too few than one of a password too many.
    text = re.sub(r"(?<=://)(?:[^/@:\s'\"]*:[^\s'\"]*|[^/\s'\"]+)@", "", text)
    return re.sub(
        r"([?&]\w*(?:token|password|passwd|pwd|secret|key)\w*=)[^&\s'\"]*", r"\1...", text, flags=re.IGNORECASE
    )


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


def save_model(file: Path, directory: Path, *, run_id: str, model_id: str) -> None:
    """Makes an MLflow model of a torch.export file: without pickle, loadable as ``pytorch`` and ``pyfunc``.

    Not `mlflow.pytorch.save_model`, which would export the module a second time: what is logged is the very file
    that was checked.

    Args:
        file: The exported program, of one input and one output with a dynamic batch.
        directory: Made by this function.
        run_id: The run that the model comes from.
        model_id: The logged model that the files are for.
    """
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model

    (directory / "data").mkdir(parents=True)
    shutil.copy(file, directory / "data" / "model.pt2")
    described = Model(run_id=run_id, model_uuid=model_id, model_id=model_id, signature=_signature(file))
    described.add_flavor("pytorch", model_data="data", pytorch_version=str(torch.__version__), code=None)
    pyfunc.add_to_model(
        described,
        loader_module="mlflow.pytorch",
        data="data",
        python_env="python_env.yaml",
        model_config={"device": None},
    )
    described.model_size_bytes = file.stat().st_size
    described.save(directory / "MLmodel")
    needed = "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in ("mlflow", "torch"))
    (directory / "requirements.txt").write_text(needed)
    environment = f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n"
    (directory / "python_env.yaml").write_text(environment)


def _signature(file: Path) -> "ModelSignature":
    """What the program takes and gives, as it says itself; -1 where any size will do."""
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    program = torch.export.load(file)
    signature = program.graph_signature
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}

    def schema(names: Sequence[str]) -> Schema:
        return Schema([TensorSpec(_numpy_dtype(nodes[name]), _sizes(nodes[name])) for name in names])

    return ModelSignature(schema(signature.user_inputs), schema(signature.user_outputs))


def _sizes(tensor: "Tensor") -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else -1 for n in tensor.shape)


def _numpy_dtype(tensor: "Tensor") -> Any:
    import torch

    known = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype  # numpy has no bfloat16
    return torch.empty(0, dtype=known).numpy().dtype


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
