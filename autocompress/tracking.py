"""Logs studies to MLflow: one parent run per study, one child run per trial.

All studies of an output directory share one database there, unless they are logged to a server: see
`autocompress.experiments.mlflow_store`. A study never reads anything from MLflow and never fails because of it: if
logging fails, the user is warned once and the study goes on.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Concatenate, ParamSpec

from autocompress.experiments.mlflow_runs import Runs, Status, perform
from autocompress.experiments.mlflow_store import without_secrets
from autocompress.experiments.system_metrics import SystemMonitor
from autocompress.measurement import Measurement
from autocompress.processes.aside import WORTH_S, Aside
from autocompress.trial import TrialResult

P = ParamSpec("P")

MEANWHILE = "the study goes on; its own directory has everything"

_FAILURES_IN_A_ROW = 3  # after which logging is given up
_NO_ANSWER = ("Max retries exceeded", "Connection refused", "timed out")  # parts of long errors of HTTP clients
_INHERITED = ("scheme", "seed", "sampler", "objective", "max_drop", "recovery.epochs")  # repeated in trials' runs
COSTS = (  # fields of `Measurement` that every run logs as metrics
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


def _queued(method: Callable[Concatenate["Tracker", P], None]) -> Callable[Concatenate["Tracker", P], None]:
    """Makes a method return at once and run later in the tracker's thread, in order; errors become a warning."""

    def enqueue(self: "Tracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        self._enqueue(functools.partial(method, self, *args, **kwargs))

    functools.update_wrapper(enqueue, method)
    return enqueue


class Tracker:
    """Logs one study to MLflow, from a thread of its own or in the background process of the study.

    Importing MLflow and opening its database take seconds of Python, which in a thread would hold up the training.
    So with ``aside`` nothing is written until `proceed` is called, once the background process has been started or
    is known not to be worth its start.

    No method raises or waits for MLflow, except that `finish` and `flush` wait until everything so far is written.
    Arguments are read later: do not change a mapping that was passed.

    Args:
        out: The output directory; the database and the artifacts are written there and nowhere else.
        experiment: The MLflow experiment, one per task.
        uri: A server to log to instead of the database in ``out``.
        device: The study's device, whose load is logged with the machine's; None logs no load.
        aside: The background process; by default everything is written from this process, at once.
        meanwhile: The part of the warning that tells what becomes of the study.
        on_warning: Called with one sentence the first time that MLflow fails; ``warnings.warn`` by default.

    Attributes:
        has_begun: Whether `start` was called.
    """

    def __init__(
        self,
        out: Path,
        experiment: str,
        *,
        uri: str | None = None,
        device: str | None = None,
        aside: Aside | None = None,
        meanwhile: str = MEANWHILE,
        on_warning: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._out = out.absolute()
        self._uri, self._meanwhile = uri, meanwhile
        self._on_warning = on_warning
        self._warned = False
        self._failures = 0
        self._runs = Runs(self._out, experiment, uri)
        self._aside, self._decided = aside or Aside(), Event()
        if aside is None:
            self._decided.set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self.has_begun = False
        self._monitor = SystemMonitor(device, self._load) if device is not None else None
        if self._monitor is not None:
            self._monitor.start()

    @property
    def run_id(self) -> str | None:
        """The id of the parent run, which `start` takes when the study is resumed; None if there is none yet."""
        return self._runs.run_id

    def proceed(self) -> None:
        """Begins to write: in the background process if it has been started, in this process otherwise."""
        self._decided.set()

    def flush(self) -> None:
        """Waits until everything so far is written."""
        self.proceed()
        with contextlib.suppress(RuntimeError):  # raised after `finish`, when nothing is left to write
            self._worker.submit(int).result()

    def start(
        self,
        study_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str] | None = None,
        *,
        data: Mapping[str, Mapping[str, Any]] | None = None,
        run_id: str | None = None,
    ) -> None:
        """Opens the parent run.

        Args:
            study_name: The name of the run.
            params: The study's settings. The scheme, the seed and others are repeated in every trial's run.
            tags: Further tags of the parent run.
            data: The splits by name, each with the number of samples ``n`` and, if it was hashed, ``sha256``.
            run_id: The parent run of a study that is resumed: it is continued, and trials that it has already are
                not logged again. If it is not in the database, a new run is begun.
        """
        inherited = {key: params[key] for key in _INHERITED if key in params}
        tags = {"role": "study", "scheme": str(params.get("scheme", "")), **(tags or {})}
        self.has_begun = True
        self._connect()
        self._open(study_name, params, tags, inherited, data or {}, run_id)

    @_queued
    def dense(self, score: float, measurement: Measurement, value: float, seconds: float = 0.0) -> None:
        """Logs the dense baseline as a child run, with the metrics of a trial.

        Args:
            score: The metric on val.
            measurement: The dense model's measurement.
            value: The objective.
            seconds: Time that scoring and measuring took.
        """
        metrics = metrics_of(score, measurement) | {
            "drop_pp": 0.0,
            "drop_se_pp": 0.0,
            "feasible": 1.0,
            "rejected": 0.0,
            "steps": 0.0,
            "value": value,
            "seconds": seconds,
        }
        tags = {"role": "dense", "state": "complete", "feasible": "true"}
        self._have(Runs.child, "dense", "dense", metrics, tags)

    @_queued
    def trial(
        self,
        result: TrialResult,
        best_density: float | None = None,
        posterior: Mapping[str, float] | None = None,
        params: Mapping[str, object] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Logs a finished trial as a child run, and the search's state after it as a step of the parent run.

        Args:
            result: The trial's result.
            best_density: The density of the study's answer so far.
            posterior: Quantiles of the threshold's density, and other estimates, by name.
            params: Parameters of the trial that differ from, or are not among, the study's.
            scores: Further scores, by name.
        """
        metrics = metrics_of(result.score, result.measurement) | {
            "density": result.density,
            "drop_pp": 100 * result.drop,
            "drop_se_pp": 100 * result.drop_se,
            "feasible": float(result.feasible),
            "rejected": float(result.rejected),
            "steps": float(result.steps),
            "value": result.value,
            **{f"value_{i}": value for i, value in enumerate(result.values[1:], start=2)},
            "seconds": result.seconds,
            **{f"constraint/{checked.metric}": checked.value for checked in result.constraints},
            **(scores or {}),
        }
        state = "rejected" if result.rejected else "complete"
        tags = {"role": "trial", "state": state, "feasible": str(result.feasible).lower()}
        if not result.feasible:
            tags["reason"] = _reason(result)
        self._have(
            Runs.child,
            str(result.number),
            f"trial {result.number:03d} · {result.density:.3g}",
            metrics,
            tags,
            {
                "number": result.number,
                "density_asked": f"{result.density_asked:.6g}",
                **result.params,
                **(params or {}),
            },
            curves=result.curves,
        )
        progress = {f"posterior/{name}": value for name, value in (posterior or {}).items()}
        if best_density is not None:
            progress["best_density"] = best_density
        if progress:  # empty for a trial of an earlier run of the study, which has logged it
            self._have(Runs.log, self._runs.parent, metrics=progress, step=result.number)

    @_queued
    def failed(self, number: int, reason: str, params: Mapping[str, object] | None = None) -> None:
        """Logs a trial that ended without a result.

        Args:
            number: The trial's number in its study.
            reason: One sentence, shown as the run's description.
            params: Parameters of the trial that differ from, or are not among, the study's.
        """
        tags = {"role": "trial", "state": "failed", "mlflow.note.content": reason, "reason": reason[:500]}
        name = f"trial {number:03d} · failed"
        self._have(Runs.child, str(number), name, {}, tags, {"number": number, **(params or {})}, status="FAILED")

    def _load(self, metrics: Mapping[str, float]) -> None:
        with contextlib.suppress(RuntimeError):  # after `finish`
            self._worker.submit(self._log_load, metrics, time.time())

    def finish(
        self,
        status: Status = "FINISHED",
        verdict: str = "",
        metrics: Mapping[str, float] | None = None,
        artifacts: Iterable[Path] = (),
        model: Path | None = None,
        register: str | None = None,
    ) -> None:
        """Closes the parent run, if one was begun, and waits until everything is written.

        Args:
            status: How the study ended.
            verdict: One sentence, shown as the run's description.
            metrics: Final metrics; those named ``compressed_...`` are attached to the model too.
            artifacts: Small files and directories.
            model: The answer as a torch.export file; logged as an MLflow model.
            register: The name to register the model under.
        """
        self.proceed()
        if self._monitor is not None:
            self._monitor.stop()
        if self.has_begun:
            if model is not None:
                self._log_model(model, register)
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
            call()
            self._failures = 0
        except Exception as error:  # whatever it is, the study goes on
            self._failures += 1
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self._uri and any(words in reason for words in _NO_ANSWER):
                reason = f"{self._uri} does not answer"
            meanwhile = f" ({self._meanwhile})" if self._meanwhile else ""
            self._on_warning(f"MLflow: {without_secrets(reason)}{meanwhile}")

    def _log_load(self, metrics: Mapping[str, float], at: float) -> None:
        """Writes one reading of the machine's load, unless the last write failed: it is not worth another wait."""
        runs = self._runs
        if runs.run_id is None or self._failures or at < runs.began:
            return
        try:
            self._have(Runs.log, runs.run_id, metrics=metrics, step=int(at - runs.began), at=at)
        except Exception as error:
            self._failures += 1
            self._warn(error)

    @_queued
    def _connect(self) -> None:
        self._failures = _FAILURES_IN_A_ROW - 1  # if connecting fails, nothing else is tried
        if not self._decided.wait(WORTH_S):
            self._aside.start()  # the first trial takes long enough to make the process worth its start
        self._have(Runs.connect)

    @_queued
    def _open(self, *args: Any) -> None:
        self._have(Runs.open, *args)

    def _have(self, method: Callable[Concatenate[Runs, P], None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls a method of the study's `Runs`, in the background process if there is one.

        Raises:
            RuntimeError: If it fails, with the error's message.
        """
        self._runs, problem = self._aside.call(perform, self._runs, method, *args, **kwargs)
        if problem:
            raise RuntimeError(problem)

    @_queued
    def _log_model(self, model: Path, register: str | None) -> None:
        if self._runs.run_id is not None:  # otherwise opening the run has failed, with a warning
            self._have(Runs.log_model, model, self._out, register)

    @_queued
    def _conclude(self, verdict: str, metrics: Mapping[str, float], artifacts: tuple[Path, ...]) -> None:
        run_id, model_id = self._runs.run_id, self._runs.model_id
        if run_id is None:  # opening the run has failed, with a warning
            return
        model_metrics = {key: value for key, value in metrics.items() if key.startswith("compressed_")}
        # The answer's metrics under the names that trials use, too, so that studies and trials share a table.
        row = {key: metrics[f"compressed_{key}"] for key in ("score", *COSTS) if f"compressed_{key}" in metrics}
        if "drop_val_pp" in metrics:
            row |= {"drop_pp": metrics["drop_val_pp"], "feasible": 1.0}
        self._have(Runs.log, run_id, metrics=model_metrics, model_id=model_id)
        self._have(Runs.log, run_id, metrics={k: v for k, v in metrics.items() if k not in model_metrics} | row)
        self._have(Runs.conclude, verdict, artifacts)

    @_queued
    def _close(self, status: Status) -> None:
        self._have(Runs.close, status)


def _reason(result: TrialResult) -> str:
    """The reason, in words, why a trial is not feasible."""
    violations = [f"{checked.shown} violates {checked.text}" for checked in result.constraints if not checked.met]
    given_up = "given up early: " if result.rejected else ""
    return given_up + ("; ".join(violations) or f"loses {100 * result.drop:.2f} on val, which is beyond the bound")


def metrics_of(score: float, measurement: Measurement, prefix: str = "") -> dict[str, float]:
    """A model's metrics under the names that all runs use; fields that were not measured are left out.

    Args:
        score: The metric.
        measurement: The model's measurement.
        prefix: Put before every name: ``"dense_"`` or ``"compressed_"`` for `Tracker.finish`.
    """
    measured = {key: getattr(measurement, key) for key in COSTS}
    known = {"score": score} | {key: float(value) for key, value in measured.items() if value is not None}
    return {f"{prefix}{key}": value for key, value in known.items()}


def final_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The final metrics of the parent run, from the content of a study's ``result.json``."""
    metrics = {"seconds": float(found["seconds"])}
    for who, cost in found["measurements"].items():
        metrics |= metrics_of(found["scores"][who]["val"], Measurement.from_json(cost), f"{who}_")
    if found["answer"] is not None:
        for key, name in (("val", "drop_val_pp"), ("test", "drop_test_pp"), ("upper", "drop_upper_pp")):
            if found["drop_pp"][key] is not None:
                metrics[name] = float(found["drop_pp"][key])
    if found["threshold"]:
        metrics |= {"threshold_low": found["threshold"][0], "threshold_high": found["threshold"][1]}
    if found["posterior"] and found["posterior"]["p_feasible"] is not None:
        metrics["p_feasible"] = found["posterior"]["p_feasible"]
    return metrics
