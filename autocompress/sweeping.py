"""`autocompress.sweep`: runs a trial for each of schemes × densities × repeats, without a search."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.arguments import flag, function, instance, listing, number, path, several, takes, text, whole
from autocompress.data import checked_task
from autocompress.disk.environment import provenance
from autocompress.disk.files import DEFAULT_OUT, read_json, write_json
from autocompress.disk.storage import (
    StudyFolder,
    check_free,
    new_folder,
    prepare_out,
    resume_folder,
    study_settings,
)
from autocompress.formats.bundle import rebuild
from autocompress.gauges.devices import usable_device
from autocompress.gauges.gpu import GpuWindow
from autocompress.gauges.macs import count_macs
from autocompress.goal import as_objective
from autocompress.learning.training import threads_for
from autocompress.measurement import Measurement, measure
from autocompress.metrics import Metric, MetricLike, as_metric
from autocompress.plugins import write_files_as
from autocompress.processes.interrupt import gentle_interrupt
from autocompress.progress import Listener, heard_by
from autocompress.recovery import Recovery, as_recovery
from autocompress.scheme import Facts, Scheme, parse_scheme
from autocompress.search import INTERRUPTED
from autocompress.studies.analysis import analyze
from autocompress.sweeps.sweep_files import write_sweep
from autocompress.sweeps.sweep_grid import Cell, distinct_densities, distinct_schemes
from autocompress.sweeps.sweep_result import DENSE, Sweep
from autocompress.sweeps.sweep_settings import SweepSettings
from autocompress.task import Evaluation, Task
from autocompress.terminal.display import SECONDS_BETWEEN_LINES, Footer
from autocompress.tracking import COSTS, Tracker
from autocompress.trial import Bound, RealizationError, TrialResult, TrialSpec, run_trial

DENSITIES = (0.5, 0.25, 0.1, 0.05)
COMPLETE = "the sweep is complete"
GPU_EVERY_S = 0.5
ANY_DROP = Bound(0.999)  # all trials of a sweep are feasible


@takes(
    densities=several(number.such_as("0.5")),
    repeats=whole,
    also=several(instance("a metric's name, a Metric or a function", str, Metric, Callable)),
    epochs=number,
    timing=flag,
    seed=whole,
    out=path,
    name=text,
    resume=text,
    progress=function,
    tracking_uri=text,
    command=text,
)
def sweep(
    task: Task | Callable[[], Task] | None = None,
    schemes: str | Scheme | Sequence[str | Scheme] = "StructPrune",
    densities: float | Sequence[float] = DENSITIES,
    *,
    repeats: int = 1,
    also: MetricLike | Sequence[MetricLike] = (),
    recovery: str | Recovery = "auto",
    epochs: float | None = None,
    timing: bool = True,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path = DEFAULT_OUT,
    name: str | None = None,
    resume: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
    tracking_uri: str | None = None,
    command: str | None = None,
) -> Sweep:
    """Compresses with every scheme to every density, and scores each model on val and test.

    Example:
        ``ac.sweep(task, ["Prune", "StructPrune"], [0.5, 0.1], repeats=3).table``

    Args:
        task: The task, or a function that makes it, see `autocompress.tune`; by default the digits.
        schemes: The schemes: names, sums of names, comma-separated lists of these, or `Scheme` objects. One that
            takes no density is run once per repeat.
        densities: The target densities, each above 0 and at most 1.
        repeats: Number of runs of each scheme and density, with different seeds. The first runs of all share one
            seed, as do the second runs, and so on, so that compared models have seen the data in the same order.
        also: Further metrics to score, such as ``"sensitivity"``.
        recovery: The recovery of each trial, see `autocompress.tune`. One with ``score_steps=True`` also logs the
            score on val by L-C step.
        epochs: Budget of one recovery, in passes over the training data.
        timing: Whether latency, memory and energy are measured, too.
        seed: Seeds the trials.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        out: The folder of all studies and sweeps; nothing is written outside it.
        name: The sweep's name; by default made of the task and the time.
        resume: The name of a sweep to resume; ``name`` is ignored then.
        progress: Called with each line of progress.
        tracking_uri: An MLflow server to log to instead of the database in ``out``.
        command: The command line, for the record.

    Raises:
        ValueError: If an argument is not usable; the message says what is allowed.
    """
    if resume:
        write_files_as(study_settings(Path(out).resolve(), resume, "sweep").get("files", {}))
    recovery = as_recovery(recovery, epochs)
    settings = SweepSettings(
        distinct_schemes(schemes),
        distinct_densities(densities),
        repeats,
        recovery,
        timing,
        seed,
        usable_device(device),
    )
    home = prepare_out(Path(out))
    if name is not None and not resume:
        check_free(home, name)
    for metric in listing(also):
        if isinstance(metric, str) and "[" not in metric:  # the classes in brackets are not known yet
            as_metric(metric)
    task = checked_task(task, home, progress)
    settings = replace(settings, metrics=_further_metrics(also, task))
    identity = settings.identity(task)
    folder = resume_folder(home, resume, identity) if resume else new_folder(home, name, identity)
    further_settings = {"files": settings.files(task)}
    if not resume:
        further_settings |= {"provenance": provenance(task, command), "task_options": task.options}
    folder.update_settings(further_settings)
    tracker = functools.partial(
        Tracker, home, task.name, uri=tracking_uri, device=settings.device, on_warning=progress
    )
    try:
        return Sweeping(task.on(settings.device), settings, folder, progress).run(tracker)
    finally:
        if resume or folder.has_begun:
            folder.close()
        else:  # so that its name can be used again
            folder.discard()


def _further_metrics(also: MetricLike | Sequence[MetricLike], task: Task) -> tuple[Metric, ...]:
    """The metrics; ValueError if one is given twice or is the task's own, as they name the table's columns."""
    metrics = tuple(as_metric(metric, task.classes) for metric in listing(also))
    names = [task.metric.name, *(metric.name for metric in metrics)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the metric {twice!r} is asked for twice; name each once, and the task's own not again")
    return metrics


class Sweeping:
    """A sweep in its folder, in which each trial is stored before the next begins.

    Args:
        task: The task, its model on the sweep's device.
        settings: The sweep's settings.
        folder: The sweep's folder.
        progress: Called with each line of progress.
    """

    def __init__(
        self, task: Task, settings: SweepSettings, folder: StudyFolder, progress: Callable[[str], None]
    ) -> None:
        self.task, self.settings, self.folder, self.progress = task, settings, folder, progress
        self.run_id: str | None = None  # MLflow's parent run, as stored in the folder

    def run(self, make_tracker: Callable[[], Tracker]) -> Sweep:
        """Runs the trials that are not on disk yet, then writes the tables and the figure of all."""
        macs = count_macs(self.task.model, self.task.example_input) * self.task.train.batch_size
        with threads_for(macs, self.settings.device):
            facts = {}
            for name, scheme in self.settings.schemes.items():
                facts[name], notes = analyze(scheme, self.task)
                for note in (*self.task.notes, *notes):
                    self.progress(f"note: {note}")
            self.tracker = make_tracker()
            try:
                return self._run(facts)
            except BaseException as error:
                self.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                with contextlib.suppress(OSError):  # the disk may be what failed
                    self._save_run_id()
                raise

    def _run(self, facts: Mapping[str, Facts]) -> Sweep:
        self._start_tracking()
        results, (cells, failed) = [self._dense()], self._reachable(facts)
        stopped = COMPLETE
        with gentle_interrupt(self.progress) as asked_to_stop:
            try:
                for done, cell in enumerate(cells, start=1):
                    if asked_to_stop():
                        raise KeyboardInterrupt
                    try:
                        results.append(self._trial(cell, facts[cell.scheme]))
                    except (RealizationError, FloatingPointError, torch.OutOfMemoryError) as error:
                        failed.append(self._failed(cell, str(error)))
                    else:
                        left = np.mean([result["row"]["seconds"] for result in results[1:]]) * (len(cells) - done)
                        line = f"trial {cell.number:>3}  {self._line(results[-1])}  about {left:.0f} s left"
                        self.progress(line)
                    self._save_run_id()
            except KeyboardInterrupt:
                stopped = INTERRUPTED
        return self._conclude(results, failed, stopped)

    def _reachable(self, facts: Mapping[str, Facts]) -> tuple[list[Cell], list[dict[str, Any]]]:
        """The cells whose scheme can reach the density; of the others, the first runs as failed cells."""
        cells, schemes = self.settings.cells, self.settings.schemes
        lowest = {name: scheme.lowest_density(facts[name]) for name, scheme in schemes.items()}
        reachable = [c for c in cells if not schemes[c.scheme].takes_density or c.density >= lowest[c.scheme]]
        unreachable = [cell for cell in cells if cell not in reachable and cell.repeat == 1]
        return reachable, [
            self._failed(cell, f"it cannot be reached; the lowest possible here is {lowest[cell.scheme]:.4g}")
            for cell in unreachable
        ]

    def _failed(self, cell: Cell, reason: str) -> dict[str, Any]:
        """Reports and logs a failed cell; returns its entry in `Sweep.failed`."""
        failure = {**cell.key, "reason": reason}
        self.progress(f"trial {cell.number:>3}  {Sweep.failure(failure)}")
        self.tracker.failed(cell.number, reason, {"scheme": cell.scheme, "repeat": cell.repeat})
        return failure

    def _line(self, cell: Mapping[str, Any]) -> str:
        row, name = cell["row"], self.task.metric.name
        scores = f"{name} {row[f'{name}_val']:.4f} on val, {row[f'{name}_test']:.4f} on test"
        return f"{row['scheme']}  density {row['density']:.4g}  {scores}  {row['seconds']:.1f} s"

    def _start_tracking(self) -> None:
        settings = read_json(self.folder.settings_file)
        not_params = ("provenance", "recovery", "mlflow_run", "kind", "files")
        params = {k: v for k, v in settings.items() if k not in not_params}
        params |= {f"recovery.{name}": value for name, value in settings["recovery"].items()}
        data, run_id = settings.get("provenance", {}).get("data"), settings.get("mlflow_run")
        self.tracker.start(self.folder.path.name, params, {"role": "sweep"}, data=data, run_id=run_id)

    def _save_run_id(self) -> None:
        """Stores the id of MLflow's parent run in the folder, so that the sweep continues it when resumed."""
        if self.run_id is None:
            self.tracker.flush()
            self.run_id = self.tracker.run_id
            if self.run_id is not None:
                self.folder.update_settings({"mlflow_run": self.run_id})

    def _dense(self) -> dict[str, Any]:
        """Evaluates and measures the dense model; returns its cell, number 0, from disk if it is there."""
        self.progress("measuring the dense model")
        task = self.task
        self.dense = task.evaluate(task.model, task.val)
        test = task.evaluate(task.model, task.test)
        self._settle()
        cost = measure(task.model, task.example_input, self.settings.device, timing=self.settings.timing)
        self.tracker.dense(self.dense.score, cost, cost.density)
        row = self._row(Cell(0, DENSE, 1.0, 1), cost, self.dense, test, seconds=0.0)
        return self._load(0) or self._save(0, {"row": row, "curves": {}, "timeline": []})

    def _trial(self, cell: Cell, facts: Facts) -> dict[str, Any]:
        """Runs a cell's trial, or loads it if it is on disk; returns the cell as in `Sweep.cells`."""
        if stored := self._load(cell.number):
            self._log(cell, self.folder.load_trial(cell.number), stored["row"])
            return stored
        self._settle()
        gpu = GpuWindow(torch.device(self.settings.device), every_s=GPU_EVERY_S)
        with gpu as window, heard_by(self._progress_lines(f"trial {cell.number:>3}  {cell.scheme}")):
            result = run_trial(self._spec(cell, facts))
        model = result.model
        assert model is not None, "only a trial loaded from disk has none"
        on_device = model.to(self.settings.device)
        val, test = (self.task.evaluate(on_device, split) for split in (self.task.val, self.task.test))
        row = self._row(cell, result.measurement, val, test, result.seconds)
        self.folder.save_trial(replace(result, model=on_device.cpu()))
        self._log(cell, result, row)
        timeline = [
            [sample.seconds, sample.free_bytes, sample.utilization_pct] for sample in window.usage.timeline
        ]
        curves = {name: list(values) for name, values in result.curves.items()}
        return self._save(cell.number, {"row": row, "curves": curves, "timeline": timeline})

    def _settle(self) -> None:
        """Before timing, waits for MLflow's thread, whose imports would slow down what is timed."""
        if self.settings.timing:
            self.tracker.flush()

    def _progress_lines(self, what: str) -> Listener:
        """A listener that reports the progress of a long trial in a line from time to time."""
        footer, printed_at = Footer(what), time.monotonic()

        def listen(done: float) -> None:
            nonlocal printed_at
            footer.advance(done)
            if time.monotonic() - printed_at >= SECONDS_BETWEEN_LINES:
                printed_at = time.monotonic()
                self.progress(str(footer.__rich__()))

        return listen

    def _spec(self, cell: Cell, facts: Facts) -> TrialSpec:
        return TrialSpec(
            number=cell.number,
            density=cell.density,
            task=self.task,
            scheme=self.settings.schemes[cell.scheme],
            facts=facts,
            recovery=self.settings.recovery,
            objectives=(as_objective("density"),),
            bound=ANY_DROP,
            dense=self.dense,
            seed=int(np.random.SeedSequence([self.settings.seed, cell.repeat]).generate_state(1)[0]),
            device=self.settings.device,
            timing=self.settings.timing,
        )

    def _row(
        self, cell: Cell, cost: Measurement, val: Evaluation, test: Evaluation, seconds: float
    ) -> dict[str, Any]:
        """The row of a cell in `Sweep.trials`."""
        scores = {}
        for metric in (self.task.metric, *self.settings.metrics):
            for split, evaluation in (("val", val), ("test", test)):
                scores[f"{metric.name}_{split}"] = _finite(metric.score(evaluation.targets, evaluation.outputs))
        costs = {name: getattr(cost, name) for name in COSTS}
        return {**cell.key, **scores, **costs, "device": cost.device, "seconds": seconds}

    def _log(self, cell: Cell, result: TrialResult, row: Mapping[str, Any]) -> None:
        scores = {name: row[name] for name in row if name.endswith(("_val", "_test")) and row[name] is not None}
        params = {"scheme": cell.scheme, "repeat": cell.repeat}
        self.tracker.trial(replace(result, model=None), params=params, scores=scores)

    def _file(self, number: int) -> Path:
        return self.folder.trial(number) / "cell.json"

    def _load(self, number: int) -> dict[str, Any] | None:
        file = self._file(number)
        return read_json(file) if file.is_file() else None

    def _save(self, number: int, cell: dict[str, Any]) -> dict[str, Any]:
        """Writes a cell, as the last file of its trial: a trial that has this file is complete."""
        self.folder.trial(number).mkdir(parents=True, exist_ok=True)
        write_json(self._file(number), cell)
        return cell

    def _conclude(
        self, cells: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]], stopped: str
    ) -> Sweep:
        """Writes the result and its files, and ends the tracking."""
        task = self.task
        result = Sweep(
            name=self.folder.path.name,
            task=task.name,
            metric=task.metric.name,
            higher_is_better=task.metric.higher_is_better,
            also=tuple(metric.name for metric in self.settings.metrics),
            n_test=task.test.n_samples,
            cells=tuple(cells),
            failed=tuple(failed),
            stopped=stopped,
            seconds=sum(cell["row"]["seconds"] for cell in cells),
            device=cells[0]["row"]["device"],
            folder=self.folder.path,
        )
        write_json(self.folder.result_file, result.to_json())
        files = write_sweep(result)
        self.tracker.finish(
            "KILLED" if result.interrupted else "FINISHED",
            f"{len(cells) - 1} models; {stopped}",
            artifacts=[self.folder.result_file, *files],
        )
        self._save_run_id()
        return result


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def load_model(found: Sweep, number: int, task: Task) -> nn.Module:
    """The compressed model of a sweep's trial, in eval mode on the CPU.

    Args:
        found: The sweep.
        number: The number of the trial, as in `Sweep.trials`; 0 is the dense model.
        task: The sweep's task.

    Raises:
        ValueError: If the trial is not on disk.
    """
    on_cpu = task.on("cpu")
    if number == 0:
        return on_cpu.model
    folder = StudyFolder(found.folder)
    try:
        trial, state = folder.load_trial(number), folder.load_weights(number)
    finally:
        folder.close()
    spec = next(cell["row"]["scheme"] for cell in found.cells if cell["row"]["number"] == number)
    scheme = parse_scheme(spec, run_files=False)
    facts, _ = analyze(scheme, on_cpu)
    return rebuild(scheme, on_cpu.model, facts, trial.plan, trial.density, state)
