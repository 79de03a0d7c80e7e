"""How a study is written into MLflow: runs, their children, data sets and the model, from whichever process."""

import getpass
import math
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

_METRICS_IN_A_BATCH = 1000  # MLflow refuses more
# What this process has opened: the client and the experiment, by `Runs._key`.
_opened: dict[str, tuple["MlflowClient", str]] = {}


class Runs:
    """The runs of one study: a parent, and its children by key.

    Plain values that can be sent to another process and back; each process opens the store for itself. All methods
    may raise.

    Args:
        out: The output directory, whose database is the store.
        experiment: The experiment's name.
        uri: A server that is the store in place of the database.
    """

    def __init__(self, out: Path, experiment: str, uri: str | None) -> None:
        self._out, self._experiment, self._uri = out, experiment, uri
        self._key = uuid.uuid4().hex
        self._children: dict[str, tuple[str, str]] = {}
        self._inherited: dict[str, object] = {}
        self.run_id: str | None = None
        self.model_id: str | None = None
        self._dense_model_id: str | None = None
        self.began = math.inf  # seconds since the epoch

    def connect(self) -> None:
        """Opens the store where this process has not yet."""
        if self._key in _opened:
            return
        out, experiment, uri = self._out, self._experiment, self._uri
        _opened[self._key] = open_server(uri, experiment) if uri else open_store(out, experiment)
        if self.run_id is not None:  # another process had it open, and may have been ended as it wrote
            self._resume(self.run_id, self._inherited)

    @property
    def _client(self) -> "MlflowClient":
        return _opened[self._key][0]

    @property
    def _experiment_id(self) -> str:
        return _opened[self._key][1]

    @property
    def parent(self) -> str:
        """The study's run."""
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
        """Begins the parent run, or goes on with the one called ``run_id``.

        Args:
            name: The run's.
            params: Its parameters.
            tags: Its tags.
            inherited: Parameters that the children have, too.
            data: The splits by name: each has ``n`` and, where it was hashed, ``sha256``.
            run_id: A run to go on with, if it is there.
        """
        if run_id is not None and self._resume(run_id, inherited):
            return
        run = self._create(name, tags)
        self.log(run.info.run_id, params=params)
        self.run_id, self.began, self._inherited = run.info.run_id, run.info.start_time / 1000, dict(inherited)
        if data:
            self._log_data(data)

    def _resume(self, run_id: str, inherited: Mapping[str, object]) -> bool:
        """Goes on with the study's run if it is there; remembers which trials it has."""
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
        """Logs one whole child run. One that failed or was cut short under the same key is replaced.

        The dense model is what the run called ``"dense"`` gives, and what the study and its trials begin with.
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
            self._begin_with_dense(run_id)
        self._client.set_terminated(run_id, status)
        if old_run_id:
            self._client.delete_run(old_run_id)
        self._children[key] = (run_id, status)

    def _add_dense_model(self, run_id: str) -> str:
        """Makes the dense model known to MLflow, as one that is kept elsewhere."""
        from mlflow.entities import LoggedModelOutput

        kept_elsewhere = {"mlflow.model.isExternal": "true"}
        logged = self._client.create_logged_model(
            self._experiment_id, "dense", source_run_id=run_id, tags=kept_elsewhere
        )
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        self._dense_model_id = str(logged.model_id)
        self._begin_with_dense(self.parent)
        return self._dense_model_id

    def _begin_with_dense(self, run_id: str) -> None:
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
        """Writes in one batch, which is one commit, unless the curves are very long.

        Args:
            run_id: The run.
            metrics: Numbers by name.
            params: Parameters by name.
            curves: Numbers by name, each list from step 0 on.
            step: Of the metrics.
            at: When they were measured, in seconds since the epoch; by default now.
            model_id: The model that the metrics are of.
        """
        from mlflow.entities import Metric, Param

        now = _milliseconds(at)
        points = [
            Metric(key, _rounded(value), now, step, model_id=model_id, run_id=run_id)
            for key, value in (metrics or {}).items()
        ]
        points += [
            Metric(f"recovery/{name}", value, now, at)
            for name, curve in (curves or {}).items()
            for at, value in enumerate(curve)
        ]
        said = [Param(key, str(value)) for key, value in (params or {}).items()]
        self._client.log_batch(run_id, points[:_METRICS_IN_A_BATCH], said)
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
        """Logs the winner through the client, as ``mlflow.pytorch.log_model`` would by global state.

        Args:
            file: The exported program.
            scratch: A folder in which the files are written before they are sent.
            register: The name to register it under.
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
        # A server finds a model by its id and takes no other source; a database's own client would look for the id
        # in the global tracking store.
        by_id = self._client.tracking_uri.startswith("http")
        source = f"models:/{logged.model_id}" if by_id else logged.artifact_location
        self._client.create_model_version(name, source, run_id=self.parent, model_id=logged.model_id)

    def conclude(self, verdict: str, artifacts: Iterable[Path]) -> None:
        """The verdict as the parent's description, and the study's files."""
        self._client.set_tag(self.parent, "mlflow.note.content", verdict)
        for path in artifacts:
            if path.is_dir():
                self._client.log_artifacts(self.parent, str(path), path.name)
            else:
                self._client.log_artifact(self.parent, str(path))

    def close(self, status: Status) -> None:
        """Ends the parent run, if there is one, and lets go of the store."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id, status)
        del _opened[self._key]


def perform(
    runs: Runs, method: Callable[Concatenate[Runs, P], None], /, *args: P.args, **kwargs: P.kwargs
) -> tuple[Runs, str]:
    """Calls a method of a study's runs in this process. Does not raise.

    Returns:
        The runs as they are then, and what went wrong, if anything did.
    """
    try:
        with quiet_mlflow():
            runs.connect()
            method(runs, *args, **kwargs)
    except Exception as error:  # not every exception of MLflow's could be sent back
        return runs, str(error).strip() or type(error).__name__
    return runs, ""


def _rounded(value: float) -> float:
    """Six digits of a fraction; the UI prints all there are."""
    return value if float(value).is_integer() else float(f"{value:.6g}")


def _milliseconds(at: float | None = None) -> int:
    return int(1000 * (time.time() if at is None else at))


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container's user may have no name
        return {}
