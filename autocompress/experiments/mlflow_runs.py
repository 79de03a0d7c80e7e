"""Writes a study to MLflow: the parent run, child runs, data sets and the model, from whichever process."""

import getpass
import math
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

from autocompress.experiments.mlflow_store import open_server, open_store, quiet_mlflow, save_model

if TYPE_CHECKING:  # MLflow takes seconds to import; whoever writes does it
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

P = ParamSpec("P")
Status = Literal["FINISHED", "FAILED", "KILLED"]

_UNFIT = re.compile(r"[^\w./ -]")  # characters that MLflow refuses in the name of a metric
_METRICS_IN_A_BATCH = 1000  # MLflow's limit
# The client and the experiment's id that this process has opened, by `Runs._key`.
_opened: dict[str, tuple["MlflowClient", str]] = {}


class Runs:
    """The runs of one study: a parent, and its children by key (the trial's number, or ``"dense"``).

    Instances can be pickled to another process and back; each process opens the store itself. All methods may
    raise MLflow's errors.

    Args:
        out: The output directory, whose database is the store.
        experiment: The experiment's name.
        uri: A server that is the store instead of the database.
    """

    def __init__(self, out: Path, experiment: str, uri: str | None) -> None:
        self._out, self._experiment, self._uri = out, experiment, uri
        self._key = uuid.uuid4().hex
        self._children: dict[str, tuple[str, str]] = {}  # run id and status, by key
        self._inherited: dict[str, object] = {}
        self.run_id: str | None = None
        self.model_id: str | None = None
        self._dense_model_id: str | None = None
        self.began = math.inf  # seconds since the epoch

    def connect(self) -> None:
        """Opens the store, unless this process has done so."""
        if self._key in _opened:
            return
        out, experiment, uri = self._out, self._experiment, self._uri
        _opened[self._key] = open_server(uri, experiment) if uri else open_store(out, experiment)
        if self.run_id is not None:  # opened by another process, which may have been killed while it wrote
            self._resume(self.run_id, self._inherited)

    @property
    def _client(self) -> "MlflowClient":
        return _opened[self._key][0]

    @property
    def _experiment_id(self) -> str:
        return _opened[self._key][1]

    @property
    def parent(self) -> str:
        """The id of the study's run."""
        if self.run_id is None:
            raise RuntimeError("the study's run could not be opened")
        return self.run_id

    def open(
        self,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        inherited: Mapping[str, object],
        data: Mapping[str, Mapping[str, Any]],
        run_id: str | None,
    ) -> None:
        """Creates the parent run, or continues the run ``run_id``.

        Args:
            name: The name of the run.
            params: Its parameters.
            tags: Its tags.
            inherited: Parameters that every child has, too.
            data: The splits by name, each with ``n`` and, if it was hashed, ``sha256``.
            run_id: The run to continue, if it is in the store.
        """
        if run_id is not None and self._resume(run_id, inherited):
            return
        run = self._create(name, tags)
        self.log(run.info.run_id, params=params)
        self.run_id, self.began, self._inherited = run.info.run_id, run.info.start_time / 1000, dict(inherited)
        if data:
            self._log_data(data)

    def _resume(self, run_id: str, inherited: Mapping[str, object]) -> bool:
        """Continues the study's run and reads its children; returns False if there is no such run."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException:
            return False
        if run.info.lifecycle_stage != "active" or run.info.experiment_id != self._experiment_id:
            return False
        self._client.update_run(run_id, status="RUNNING")
        self.run_id, self.began, self._inherited = run_id, run.info.start_time / 1000, dict(inherited)
        for child in self._search_children():
            key = child.data.params.get("number", child.data.tags["role"])
            self._children[key] = (child.info.run_id, child.info.status)
            if key == "dense" and child.outputs and child.outputs.model_outputs:
                self._dense_model_id = child.outputs.model_outputs[0].model_id
        return True

    def _search_children(self) -> Iterator["Run"]:
        query, token = f"tags.`mlflow.parentRunId` = '{self.parent}'", None
        while True:
            page = self._client.search_runs([self._experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _create(self, name: str, tags: Mapping[str, str], started: float | None = None) -> "Run":
        return self._client.create_run(
            self._experiment_id,
            run_name=name,
            start_time=_milliseconds(started),
            tags={"mlflow.source.name": "autocompress", "mlflow.source.type": "LOCAL", **_user(), **tags},
        )

    def child(
        self,
        key: str,
        name: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        params: Mapping[str, object] | None = None,
        *,
        curves: Mapping[str, Iterable[float]] | None = None,
        status: Status = "FINISHED",
    ) -> None:
        """Logs a child run as a whole; replaces one of the same key that failed or was cut short.

        The run ``"dense"`` has the dense model as its output; the parent run and all trials have it as their
        input.

        Args:
            key: The trial's number, or ``"dense"``.
            name: The name of the run.
            metrics: Its metrics; ``seconds`` determines the time at which it began.
            tags: Its tags.
            params: Its parameters, beside the inherited ones.
            curves: Metrics with several steps, by name.
            status: Its final status.
        """
        old_run_id, old_status = self._children.get(key, ("", ""))
        if old_status == "FINISHED":
            return
        params = self._inherited | dict(params or {})
        tags = {"mlflow.parentRunId": self.parent, "scheme": str(params.get("scheme", "")), **tags}
        run_id = self._create(name, tags, time.time() - metrics.get("seconds", 0.0)).info.run_id
        model_id = self._add_dense_model(run_id) if key == "dense" else None
        self.log(run_id, metrics=metrics, params=params, curves=curves or {}, model_id=model_id)
        if key != "dense":
            self._log_dense_as_input(run_id)
        self._client.set_terminated(run_id, status)
        if old_run_id:
            self._client.delete_run(old_run_id)
        self._children[key] = (run_id, status)

    def _add_dense_model(self, run_id: str) -> str:
        """Registers the dense model in MLflow as an external model, without its files; returns its id."""
        from mlflow.entities import LoggedModelOutput

        tags = {"mlflow.model.isExternal": "true"}
        logged = self._client.create_logged_model(self._experiment_id, "dense", source_run_id=run_id, tags=tags)
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        self._dense_model_id = str(logged.model_id)
        self._log_dense_as_input(self.parent)
        return self._dense_model_id

    def _log_dense_as_input(self, run_id: str) -> None:
        from mlflow.entities import LoggedModelInput

        if self._dense_model_id is not None:
            self._client.log_inputs(run_id, models=[LoggedModelInput(self._dense_model_id)])

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, object] | None = None,
        curves: Mapping[str, Iterable[float]] | None = None,
        step: int = 0,
        at: float | None = None,
        model_id: str | None = None,
    ) -> None:
        """Writes metrics and parameters in one batch, which is one commit; in several if curves are very long.

        Args:
            run_id: The run.
            metrics: Numbers by name.
            params: Parameters by name.
            curves: Metrics with several steps by name, each a list of numbers from step 0 on.
            step: The step of ``metrics``.
            at: The time of ``metrics`` in seconds since the epoch; by default now.
            model_id: The model that ``metrics`` belong to.
        """
        from mlflow.entities import Metric, Param

        now = _milliseconds(at)
        points = [
            Metric(_UNFIT.sub("_", key), _rounded(value), now, step, model_id=model_id, run_id=run_id)
            for key, value in (metrics or {}).items()
        ]
        points += [
            Metric(f"recovery/{name}", value, now, i)
            for name, curve in (curves or {}).items()
            for i, value in enumerate(curve)
        ]
        parameters = [Param(key, str(value)) for key, value in (params or {}).items()]
        self._client.log_batch(run_id, points[:_METRICS_IN_A_BATCH], parameters)
        for start in range(_METRICS_IN_A_BATCH, len(points), _METRICS_IN_A_BATCH):
            self._client.log_batch(run_id, points[start : start + _METRICS_IN_A_BATCH])

    def _log_data(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs the splits as inputs of the parent run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for name, split in data.items():
            digest = (split.get("sha256") or "")[:16] or f"n={split['n']}"
            profile = f'{{"num_rows": {split["n"]}}}'
            dataset = Dataset(f"{self._experiment} {name}", digest, "local", "{}", profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
        self._client.log_inputs(self.parent, inputs)

    def log_model(self, file: Path, scratch: Path, register: str | None) -> None:
        """Logs the answer as an MLflow model.

        Through the client: ``mlflow.pytorch.log_model`` would use MLflow's global state.

        Args:
            file: The exported program.
            scratch: A folder for temporary files.
            register: The name to register the model under; None for none.
        """
        from mlflow.entities import LoggedModelOutput

        params = self._client.get_run(self.parent).data.params
        logged = self._client.create_logged_model(
            self._experiment_id, "compressed", source_run_id=self.parent, params=params
        )
        status: Literal["READY", "FAILED"] = "FAILED"
        try:
            with tempfile.TemporaryDirectory(dir=scratch, prefix=".mlflow-") as folder:
                directory = Path(folder) / "model"
                save_model(file, directory, run_id=self.parent, model_id=logged.model_id)
                self._client.log_model_artifacts(logged.model_id, str(directory))
            status = "READY"
        finally:
            self._client.finalize_logged_model(logged.model_id, status)
        self._client.log_outputs(self.parent, [LoggedModelOutput(logged.model_id, step=0)])
        self.model_id = logged.model_id
        if register:
            self._register(register, logged)

    def _register(self, name: str, logged: "LoggedModel") -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A server only takes a model's id as the source; the client of a database would look the id up in the
        # global tracking store.
        by_id = self._client.tracking_uri.startswith("http")
        source = f"models:/{logged.model_id}" if by_id else logged.artifact_location
        self._client.create_model_version(name, source, run_id=self.parent, model_id=logged.model_id)

    def conclude(self, verdict: str, artifacts: Iterable[Path]) -> None:
        """Sets the verdict as the parent run's description, and logs the study's files."""
        self._client.set_tag(self.parent, "mlflow.note.content", verdict)
        for path in artifacts:
            if path.is_dir():
                self._client.log_artifacts(self.parent, str(path), path.name)
            else:
                self._client.log_artifact(self.parent, str(path))

    def close(self, status: Status) -> None:
        """Ends the parent run, if there is one, and forgets the store's client."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id, status)
        del _opened[self._key]


def perform(
    runs: Runs, method: Callable[Concatenate[Runs, P], None], /, *args: P.args, **kwargs: P.kwargs
) -> tuple[Runs, str]:
    """Calls a method of a study's runs in this process. Does not raise.

    Returns:
        The runs after the call, and the error's message, empty if there was none.
    """
    try:
        with quiet_mlflow():
            runs.connect()
            method(runs, *args, **kwargs)
    except Exception as error:  # returned as text, as not every exception of MLflow's can be pickled
        return runs, str(error).strip() or type(error).__name__
    return runs, ""


def _rounded(value: float) -> float:
    """A number with six significant digits, as MLflow's UI prints all; whole numbers are unchanged."""
    return value if float(value).is_integer() else float(f"{value:.6g}")


def _milliseconds(at: float | None = None) -> int:
    return int(1000 * (time.time() if at is None else at))


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container's user may have no name
        return {}
