"""Everything autocompress says to MLflow: one parent run per study, one child run per trial.

All studies of an output directory share one database there, unless they are logged to a server: see
`autocompress.experiments.mlflow_store`. MLflow is an account of the study, never its memory: what it cannot take
is warned of once and left out.
"""

import contextlib
import functools
import re
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

_FAILURES_IN_A_ROW = 3
_UNFIT = re.compile(r"[^\w./ -]")  # in the name of a metric
_NO_ANSWER = ("Max retries exceeded", "Connection refused", "timed out")  # in what an HTTP client says at length
_INHERITED = ("scheme", "seed", "sampler", "objective", "max_drop", "recovery.epochs")  # by each trial
COSTS = (
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
    """Makes a method return at once and run, guarded, in the tracker's thread, after what came before it."""

    def enqueue(self: "Tracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        self._enqueue(functools.partial(method, self, *args, **kwargs))

    functools.update_wrapper(enqueue, method)
    return enqueue


class Tracker:
    """Logs one study to MLflow, from a thread of its own, or by way of the process beside the study's.

    MLflow's import and its database take seconds of Python, which a thread would take from the training. So with
    ``aside`` nothing is written until `proceed` tells that this process has been started, or is not worth it.

    No method raises or waits for MLflow, except that `finish` and `flush` wait until everything said so far is
    written. Arguments are read later: do not change a mapping that was passed.

    Args:
        out: The output directory; the database and the artifacts live in it and nothing is written elsewhere.
        experiment: The MLflow experiment, one per task.
        uri: A server to log to in place of the database in ``out``.
        device: Where the study computes: its load and this machine's are logged as they go. None logs no load.
        aside: The process beside the study's; by default all is written from this one, at once.
        meanwhile: What the warning says of the study.
        on_warning: Gets one sentence the first time that MLflow fails; ``warnings.warn`` by default.

    Attributes:
        has_begun: Whether `start` was called: until then there is nothing to write.
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
        """The parent run, to be handed to `start` when the study is resumed; None when there is none yet."""
        return self._runs.run_id

    def proceed(self) -> None:
        """Begins to write: by way of ``aside`` if it was started, and from this process otherwise."""
        self._decided.set()

    def flush(self) -> None:
        """Waits until everything said so far is written."""
        self.proceed()
        with contextlib.suppress(RuntimeError):  # after `finish` nothing is left to write
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
            study_name: Names the run.
            params: What was asked of the study. The scheme, the seed and others are repeated in every trial's run.
            tags: Further tags of the parent run.
            data: The splits by name, each with ``n``, its samples, and ``sha256`` where it was hashed.
            run_id: The parent run of a study that is resumed: it goes on, and trials it has already are not
                logged again. A run that is not in the database is begun anew.
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
            measurement: What the dense model costs.
            value: The objective.
            seconds: What scoring and measuring took.
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
        """Logs a finished trial as a child run, and what the search now believes as a step on the parent.

        Args:
            result: What the trial found.
            best_density: The lowest feasible density so far.
            posterior: Quantiles of the density at the bound, and other beliefs, by name.
            params: What else the trial was run with; by default what it has of the study.
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
            **{_UNFIT.sub("_", f"constraint/{one.metric}"): one.value for one in result.constraints},
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
        if progress:  # a trial of an earlier run has none: what was believed then is there
            self._have(Runs.log, self._runs.parent, metrics=progress, step=result.number)

    @_queued
    def failed(self, number: int, reason: str, params: Mapping[str, object] | None = None) -> None:
        """Logs a trial that ended without a result.

        Args:
            number: The trial's number in its study.
            reason: One sentence, shown as the run's description.
            params: What the trial was run with; by default what it has of the study.
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
            model: The winner as a torch.export file; logged as an MLflow model.
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
        """Writes one reading of the machine; where writing has just failed it is not worth another wait."""
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
        self._failures = _FAILURES_IN_A_ROW - 1  # without a database there is nothing to try again
        if not self._decided.wait(WORTH_S):
            self._aside.start()  # the first trial alone takes so long that it is worth it
        self._have(Runs.connect)

    @_queued
    def _open(self, *args: Any) -> None:
        self._have(Runs.open, *args)

    def _have(self, method: Callable[Concatenate[Runs, P], None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls a method of the study's runs where MLflow is.

        Raises:
            RuntimeError: If it fails; in its own words.
        """
        self._runs, problem = self._aside.call(perform, self._runs, method, *args, **kwargs)
        if problem:
            raise RuntimeError(problem)

    @_queued
    def _log_model(self, model: Path, register: str | None) -> None:
        if self._runs.run_id is not None:  # otherwise it has been warned of
            self._have(Runs.log_model, model, self._out, register)

    @_queued
    def _conclude(self, verdict: str, metrics: Mapping[str, float], artifacts: tuple[Path, ...]) -> None:
        run_id, model_id = self._runs.run_id, self._runs.model_id
        if run_id is None:  # it has been warned of
            return
        of_model = {key: value for key, value in metrics.items() if key.startswith("compressed_")}
        # Under the names that trials use as well, so that a study has a row in the same table: its answer's.
        row = {key: metrics[f"compressed_{key}"] for key in ("score", *COSTS) if f"compressed_{key}" in metrics}
        if "drop_val_pp" in metrics:
            row |= {"drop_pp": metrics["drop_val_pp"], "feasible": 1.0}
        self._have(Runs.log, run_id, metrics=of_model, model_id=model_id)
        self._have(Runs.log, run_id, metrics={k: v for k, v in metrics.items() if k not in of_model} | row)
        self._have(Runs.conclude, verdict, artifacts)

    @_queued
    def _close(self, status: Status) -> None:
        self._have(Runs.close, status)


def _reason(result: TrialResult) -> str:
    """Why a trial is not feasible."""
    missed = [f"{one.shown} violates {one.text}" for one in result.constraints if not one.met]
    given_up = "given up early: " if result.rejected else ""
    return given_up + ("; ".join(missed) or f"loses {100 * result.drop:.2f} on val, which is beyond the bound")


def metrics_of(score: float, measurement: Measurement, prefix: str = "") -> dict[str, float]:
    """A model's metrics as every run names them; what was not measured is left out.

    Args:
        score: The metric.
        measurement: What the model costs.
        prefix: Put before every name: ``"dense_"`` or ``"compressed_"`` for `Tracker.finish`.
    """
    measured = {key: getattr(measurement, key) for key in COSTS}
    known = {"score": score} | {key: float(value) for key, value in measured.items() if value is not None}
    return {f"{prefix}{key}": value for key, value in known.items()}


def final_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """What the parent run says in the end, from the content of a study's ``result.json``."""
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
