"""Everything autocompress says to MLflow: one parent run per study, one child run per trial.

All studies of an output directory share one database there, see `autocompress.mlflow_store`. MLflow is an
account of the study, never its memory: what it cannot take is warned of once and left out.
"""

import contextlib
import functools
import getpass
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec

from torch import Tensor, nn

from autocompress.measurement import Measurement
from autocompress.mlflow_store import open_store, quiet_mlflow, save_model
from autocompress.task import Task
from autocompress.trial import TrialResult

if TYPE_CHECKING:  # MLflow takes a second to import; the tracker's own thread does it
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]
P = ParamSpec("P")

_FAILURES_IN_A_ROW = 3
_COSTS = (
    "density",
    "params",
    "size_bytes",
    "macs",
    "latency_ms",
    "throughput_per_s",
    "peak_memory_bytes",
    "gpu_memory_bytes",
    "gpu_utilization_pct",
    "gpu_power_w",
    "energy_j",
)
_METRICS_IN_A_BATCH = 1000  # MLflow refuses more


def _queued(method: Callable[Concatenate["Tracker", P], None]) -> Callable[Concatenate["Tracker", P], None]:
    """Makes a method return at once and run, guarded, in the tracker's thread, after what came before it."""

    def enqueue(self: "Tracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        self._enqueue(functools.partial(method, self, *args, **kwargs))

    functools.update_wrapper(enqueue, method)
    return enqueue


class Tracker:
    """Logs one study to MLflow, from a thread of its own.

    No method raises or waits for MLflow, except that `finish`, `flush` and `run_id` wait until everything
    said so far is written. Arguments are read later: do not change a mapping that was passed.

    Args:
        out: The output directory; the database and the artifacts live in it and nothing is written elsewhere.
        experiment: The MLflow experiment, one per task.
        on_warning: Gets one sentence the first time that MLflow fails; ``warnings.warn`` by default.
    """

    def __init__(self, out: Path, experiment: str, *, on_warning: Callable[[str], None] = warnings.warn) -> None:
        self._out = out.absolute()
        self._on_warning = on_warning
        self._warned = False
        self._failures = 0
        self._run_id: str | None = None
        self._model_id: str | None = None
        self._children: dict[str, tuple[str, str]] = {}
        self._inherited: dict[str, object] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._connect(experiment)

    @property
    def run_id(self) -> str | None:
        """The parent run, to be handed to `start` when the study is resumed; None when there is none.

        Waits for `start`.
        """
        self.flush()
        return self._run_id

    def flush(self) -> None:
        """Waits until everything said so far is written."""
        with contextlib.suppress(RuntimeError):  # after `finish` nothing is left to write
            self._worker.submit(int).result()

    @_queued
    def start(
        self,
        study_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str] | None = None,
        *,
        task: Task | None = None,
        run_id: str | None = None,
    ) -> None:
        """Opens the parent run.

        Args:
            study_name: Names the run.
            params: What was asked of the study. ``scheme`` and ``seed`` are repeated in every trial's run.
            tags: Further tags of the parent run.
            task: Its data sets are logged by name and number of samples.
            run_id: The parent run of a study that is resumed: it goes on, and trials it has already are not
                logged again. A run that is not in the database is begun anew.
        """
        self._inherited = {key: params[key] for key in ("scheme", "seed") if key in params}
        if run_id is not None and self._resume(run_id):
            return
        run = self._create_run(study_name, {"role": "study", **(tags or {})})
        self._log(run.info.run_id, params=params)
        self._run_id = run.info.run_id
        if task is not None:
            self._log_data(task)

    @_queued
    def dense(self, score: float, measurement: Measurement, value: float, seconds: float = 0.0) -> None:
        """Logs the dense baseline as a child run, with the metrics of a trial.

        Args:
            score: The metric on val.
            measurement: What the dense model costs.
            value: The objective.
            seconds: What scoring and measuring took.
        """
        metrics = metrics_of(score, measurement) | {
            "drop_pp": 0.0,
            "drop_se_pp": 0.0,
            "feasible": 1.0,
            "value": value,
            "seconds": seconds,
        }
        self._child("dense", "dense", metrics, {"role": "dense", "state": "complete", "feasible": "true"})

    @_queued
    def trial(
        self,
        result: TrialResult,
        best_density: float | None = None,
        posterior: Mapping[str, float] | None = None,
        params: Mapping[str, object] | None = None,
    ) -> None:
        """Logs a finished trial as a child run, and what the search now believes as a step on the parent.

        Args:
            result: What the trial found.
            best_density: The lowest feasible density so far.
            posterior: Quantiles of the density at the bound, by name.
            params: What else the trial was run with; by default the study's scheme and seed.
        """
        metrics = metrics_of(result.score, result.measurement) | {
            "density": result.density,
            "drop_pp": 100 * result.drop,
            "drop_se_pp": 100 * result.drop_se,
            "feasible": float(result.feasible),
            "value": result.value,
            "seconds": result.seconds,
        }
        self._child(
            str(result.number),
            f"trial {result.number:03d} · {result.density:.3g}",
            metrics,
            {"role": "trial", "state": "complete", "feasible": str(result.feasible).lower()},
            {"number": result.number, "density_asked": f"{result.density_asked:.6g}", **(params or {})},
            curves=result.curves,
        )
        progress = {f"posterior/{name}": value for name, value in (posterior or {}).items()}
        if best_density is not None:
            progress["best_density"] = best_density
        self._log(self._parent, metrics=progress, step=result.number)

    @_queued
    def failed(self, number: int, reason: str, params: Mapping[str, object] | None = None) -> None:
        """Logs a trial that ended without a result.

        Args:
            number: The trial's number in its study.
            reason: One sentence, shown as the run's description.
            params: What the trial was run with; by default the study's scheme and seed.
        """
        tags = {"role": "trial", "state": "failed", "mlflow.note.content": reason}
        name = f"trial {number:03d} · failed"
        self._child(str(number), name, {}, tags, {"number": number, **(params or {})}, status="FAILED")

    def finish(
        self,
        status: Status = "FINISHED",
        verdict: str = "",
        metrics: Mapping[str, float] | None = None,
        artifacts: Iterable[Path] = (),
        model: nn.Module | None = None,
        example_input: Tensor | None = None,
    ) -> None:
        """Closes the parent run and waits until everything is written.

        Args:
            status: How the study ended.
            verdict: One sentence, shown as the run's description.
            metrics: Final metrics; those named ``compressed_...`` are attached to the model too.
            artifacts: Small files and directories.
            model: The winner, in eval mode on the CPU; logged as an MLflow model.
            example_input: A batch for it, at least one sample. Needed with ``model``.
        """
        if model is not None and example_input is not None:
            self._log_model(model, example_input)
        self._conclude(verdict, metrics or {}, tuple(artifacts))
        self._close(status)
        self._worker.shutdown()

    # What follows runs in the tracker's thread, and raises.

    def _enqueue(self, call: Callable[[], None]) -> None:
        try:
            self._worker.submit(self._guarded, call)
        except RuntimeError as error:  # after `finish`, or while the interpreter shuts down
            self._warn(error)

    def _guarded(self, call: Callable[[], None]) -> None:
        if self._failures >= _FAILURES_IN_A_ROW:
            return
        try:
            with quiet_mlflow():
                call()
            self._failures = 0
        except Exception as error:  # whatever it is, the study goes on
            self._failures += 1
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._on_warning(f"MLflow: {reason} (the study goes on; its own directory has everything)")

    @_queued
    def _connect(self, experiment: str) -> None:
        self._failures = _FAILURES_IN_A_ROW - 1  # without a database there is nothing to try again
        self._client, self._experiment_id = open_store(self._out, experiment)

    @property
    def _parent(self) -> str:
        if self._run_id is None:
            raise RuntimeError("the study's run could not be opened")
        return self._run_id

    def _resume(self, run_id: str) -> bool:
        """Goes on with the study's run if it is there; remembers which trials it has."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException:
            return False
        if run.info.lifecycle_stage != "active" or run.info.experiment_id != self._experiment_id:
            return False
        self._client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        for child in self._search_children():
            key = child.data.params.get("number", child.data.tags["role"])
            self._children[key] = (child.info.run_id, child.info.status)
        return True

    def _search_children(self) -> Iterator["Run"]:
        query, token = f"tags.`mlflow.parentRunId` = '{self._parent}'", None
        while True:
            page = self._client.search_runs([self._experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _create_run(self, name: str, tags: Mapping[str, str], started: float | None = None) -> "Run":
        return self._client.create_run(
            self._experiment_id,
            run_name=name,
            start_time=_milliseconds(started),
            tags={"mlflow.source.name": "autocompress", "mlflow.source.type": "LOCAL", **_user(), **tags},
        )

    def _child(
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
        """Logs one whole child run. One that failed or was cut short under the same key is replaced."""
        old_run_id, old_status = self._children.get(key, ("", ""))
        if old_status == "FINISHED":
            return
        params = self._inherited | dict(params or {})
        tags = {"mlflow.parentRunId": self._parent, "scheme": str(params.get("scheme", "")), **tags}
        run_id = self._create_run(name, tags, time.time() - metrics.get("seconds", 0.0)).info.run_id
        self._log(run_id, metrics=metrics, params=params, curves=curves or {})
        self._client.set_terminated(run_id, status)
        if old_run_id:
            self._client.delete_run(old_run_id)
        self._children[key] = (run_id, status)

    def _log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, object] | None = None,
        curves: Mapping[str, Iterable[float]] | None = None,
        step: int = 0,
        model_id: str | None = None,
    ) -> None:
        """Writes in one batch, which is one commit, unless the curves are very long."""
        from mlflow.entities import Metric, Param

        now = _milliseconds()
        points = [
            Metric(key, _rounded(value), now, step, model_id=model_id, run_id=run_id)
            for key, value in (metrics or {}).items()
        ]
        points += [
            Metric(f"curves/{name}", value, now, at)
            for name, curve in (curves or {}).items()
            for at, value in enumerate(curve)
        ]
        said = [Param(key, str(value)) for key, value in (params or {}).items()]
        self._client.log_batch(run_id, points[:_METRICS_IN_A_BATCH], said)
        for start in range(_METRICS_IN_A_BATCH, len(points), _METRICS_IN_A_BATCH):
            self._client.log_batch(run_id, points[start : start + _METRICS_IN_A_BATCH])

    def _log_data(self, task: Task) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._client.log_inputs(
            self._parent,
            [
                DatasetInput(
                    # A digest would cost a pass over the data; its size says enough beside its name.
                    Dataset(
                        f"{task.name} {name}",
                        f"n={split.n_samples}",
                        "local",
                        "{}",
                        profile=f'{{"num_rows": {split.n_samples}}}',
                    ),
                    [InputTag("mlflow.data.context", name)],
                )
                for name, split in (("train", task.train), ("val", task.val), ("test", task.test))
            ],
        )

    @_queued
    def _log_model(self, model: nn.Module, example_input: Tensor) -> None:
        """Logs the winner through the client; ``mlflow.pytorch.log_model`` would go by global state."""
        from mlflow.entities import LoggedModelOutput

        params = self._client.get_run(self._parent).data.params
        logged = self._client.create_logged_model(
            self._experiment_id, "compressed", source_run_id=self._parent, params=params
        )
        status: Literal["READY", "FAILED"] = "FAILED"
        try:
            with tempfile.TemporaryDirectory(dir=self._out, prefix=".mlflow-") as scratch:
                directory = Path(scratch) / "model"
                save_model(model, example_input, directory, run_id=self._parent, model_id=logged.model_id)
                self._client.log_model_artifacts(logged.model_id, str(directory))
            status = "READY"
        finally:
            self._client.finalize_logged_model(logged.model_id, status)
        self._client.log_outputs(self._parent, [LoggedModelOutput(logged.model_id, step=0)])
        self._model_id = logged.model_id

    @_queued
    def _conclude(self, verdict: str, metrics: Mapping[str, float], artifacts: tuple[Path, ...]) -> None:
        if self._run_id is None:  # the study ended before it began, or it has been warned of
            return
        of_model = {key: value for key, value in metrics.items() if key.startswith("compressed_")}
        # Under the names that trials use as well, so that a study has a row in the same table. Not the score:
        # a study's is from test, a trial's from val.
        row = {key: metrics[f"compressed_{key}"] for key in _COSTS if f"compressed_{key}" in metrics}
        self._log(self._parent, metrics=of_model, model_id=self._model_id)
        self._log(self._parent, metrics={k: v for k, v in metrics.items() if k not in of_model} | row)
        self._client.set_tag(self._parent, "mlflow.note.content", verdict)
        for path in artifacts:
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self._parent, str(path))

    @_queued
    def _close(self, status: Status) -> None:
        if self._run_id is not None:
            self._client.set_terminated(self._parent, status)


def metrics_of(score: float, measurement: Measurement, prefix: str = "") -> dict[str, float]:
    """A model's metrics as every run names them; what was not measured is left out.

    Args:
        score: The metric.
        measurement: What the model costs.
        prefix: Put before every name: ``"dense_"`` or ``"compressed_"`` for `Tracker.finish`.
    """
    measured = {key: getattr(measurement, key) for key in _COSTS}
    known = {"score": score} | {key: float(value) for key, value in measured.items() if value is not None}
    return {f"{prefix}{key}": value for key, value in known.items()}


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
