"""MLflow's store: one SQLite database and one artifact directory per output directory, or a server."""

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
    """A client of the database in ``out`` and the experiment's id; both are created if they do not exist.

    Several processes may call this at once.

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
    """A client of an MLflow server and the experiment's id; the experiment is created if it does not exist.

    If the server does not answer this fails after some seconds, not after minutes as by MLflow's default.

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
    """Checks the form of a tracking URI and returns it.

    Raises:
        ValueError: If MLflow cannot use it.
    """
    if not re.match(r"(https?|sqlite|postgresql|mysql|mssql|databricks)(\+\w+)?://", uri) and uri != "databricks":
        raise ValueError(f"{without_secrets(uri)!r} is not a tracking URI; write http://HOST:5000 or the like")
    return uri


def without_secrets(text: str) -> str:
    """The text without the users, passwords and tokens in its addresses."""
    # A password may contain @ or /: rather remove a part of a path than show a part of a password.
    text = re.sub(r"(?<=://)(?:[^/@:\s'\"]*:[^\s'\"]*|[^/\s'\"]+)@", "", text)
    return re.sub(
        r"([?&]\w*(?:token|password|passwd|pwd|secret|key)\w*=)[^&\s'\"]*", r"\1...", text, flags=re.IGNORECASE
    )


def database_uri(out: Path) -> str:
    """The URI of the database, with its absolute path.

    Raises:
        ValueError: If the path has a character that is special in URIs, which MLflow does not escape.
    """
    path = (out / DATABASE).absolute().as_posix()
    if special := set("%?") & set(path):
        raise ValueError(f"MLflow cannot keep a database in {out}: {special.pop()!r} in the path")
    return f"sqlite:///{path}"


def check_database(out: Path) -> None:
    """Checks that the database can be written; MLflow itself would retry for 100 s before it reported a failure.

    If the directory was moved or copied, also updates the paths of artifacts: MLflow stores them as absolute
    paths, and would look for them, and write new ones, in the old place.

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
    """The address in the UI, without the host, of the page with the runs of the latest study."""
    with contextlib.closing(sqlite3.connect(out / DATABASE, timeout=_SQLITE_TIMEOUT_S)) as database:
        latest = database.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC").fetchone()
    page = f"experiments/{latest[0]}/runs?viewStateShareKey={_VIEW}&" if latest else "experiments?"
    return f"#/{page}workflowType=machine_learning"


def artifact_root(out: Path) -> str:
    """The URI of the artifact directory, with its absolute path."""
    return (out / ARTIFACTS).absolute().as_uri()


def save_model(file: Path, directory: Path, *, run_id: str, model_id: str) -> None:
    """Writes an MLflow model with a torch.export file: without pickle, loadable as ``pytorch`` and ``pyfunc``.

    Not by `mlflow.pytorch.save_model`, which would export the module again: the model has the same file that was
    checked.

    Args:
        file: The exported program, of one input and one output with a dynamic batch.
        directory: The model's folder, which is created.
        run_id: The run that the model comes from.
        model_id: The id of the logged model.
    """
    import torch
    from mlflow import pyfunc
    from mlflow.models import Model

    (directory / "data").mkdir(parents=True)
    shutil.copy(file, directory / "data" / "model.pt2")
    model = Model(run_id=run_id, model_uuid=model_id, model_id=model_id, signature=_signature(file))
    model.add_flavor("pytorch", model_data="data", pytorch_version=str(torch.__version__), code=None)
    pyfunc.add_to_model(
        model,
        loader_module="mlflow.pytorch",
        data="data",
        python_env="python_env.yaml",
        model_config={"device": None},
    )
    model.model_size_bytes = file.stat().st_size
    model.save(directory / "MLmodel")
    requirements = "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in ("mlflow", "torch"))
    (directory / "requirements.txt").write_text(requirements)
    environment = f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n"
    (directory / "python_env.yaml").write_text(environment)


def _signature(file: Path) -> "ModelSignature":
    """The program's inputs and outputs as MLflow describes them; dynamic sizes are -1."""
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
    """Imports MLflow without telemetry; within the ``with`` block it logs warnings and errors only."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when MLflow is imported
    for message, category in _OWN_WARNINGS:  # not by `warnings.catch_warnings`, which is not thread-safe
        warnings.filterwarnings("ignore", message, category)
    import mlflow  # noqa: F401  before the level is set, as the import sets it, too

    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _create(out: Path) -> None:
    """Creates the database, under a temporary name first: MLflow could not open one that was left incomplete."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = out / f"{DATABASE}.new"
    new.unlink(missing_ok=True)
    new_uri = database_uri(out) + ".new"
    store = SqlAlchemyStore(new_uri, artifact_root(out))  # type: ignore[no-untyped-call]
    store.engine.dispose()
    new.replace(out / DATABASE)


def _experiment_id(client: "MlflowClient", out: Path | None, name: str) -> str:
    """The id of the experiment of that name, which is created or restored if need be."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        view = {"selectedColumns": [*(f"metrics.`{name}`" for name in _COLUMNS), "params.`scheme`"]}
        tags = {
            "mlflow.experimentKind": "custom_model_development",  # runs and models, not chats and traces
            f"mlflow.sharedViewState.{_VIEW}": json.dumps(view),  # the UI shows no metrics unless told which
        }
        return client.create_experiment(name, artifact_root(out) if out else None, tags=tags)
    if experiment.lifecycle_stage == "deleted":  # removed in the UI, which keeps its name taken
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id
