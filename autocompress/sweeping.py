"""A sweep: schemes × densities × repeats, each a trial of its own, as a table and a figure. Nothing is sought."""

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
ANY_DROP = Bound(0.999)  # a sweep refuses no model


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
    progress: Callable[[str], None] = lambda said: None,
    tracking_uri: str | None = None,
    command: str | None = None,
) -> Sweep:
    """Compresses with every scheme to every density, and scores each model on val and test.

    Example:
        ``ac.sweep(task, ["Prune", "StructPrune"], [0.5, 0.1], repeats=3).table``

    Args:
        task: What to compress, or what makes it, see `autocompress.tune`; by default the digits.
        schemes: How to compress: names, sums of names, lists of these with commas, or schemes. One that takes no
            density is run once a repeat.
        densities: Parameters to keep over those of the dense model, each above 0 and at most 1.
        repeats: Runs of each scheme and density, that differ in the seed. Run 1 of all of them shares one seed, so
            do all run 2: what is compared had the same luck with the order of the data.
        also: Further metrics to score, such as ``"sensitivity"``.
        recovery: How a trial compresses and trains, see `autocompress.tune`. One with ``score_steps=True`` also
            logs the score on val by L-C step.
        epochs: Gradient steps of one recovery, in passes over the training data.
        timing: Whether latency, memory and energy are measured, too.
        seed: Seeds the trials.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        out: The folder for all studies and sweeps; nothing is written outside it.
        name: The sweep's name; by default made of the task and the time.
        resume: The name of a sweep to go on with, in place of ``name``.
        progress: Is told how it goes, a line at a time.
        tracking_uri: An MLflow server to log to in place of the database in ``out``.
        command: What was typed, for the record.

    Raises:
        ValueError: If an argument is not usable; the message says what is allowed.
    """
    if resume:
        write_files_as(study_settings(Path(out).resolve(), resume, "sweep").get("files", {}))
    recovery = as_recovery(recovery, epochs)
    listed, levels = distinct_schemes(schemes), distinct_densities(densities)
    settings = SweepSettings(listed, levels, repeats, recovery, timing, seed, usable_device(device))
    home = prepare_out(Path(out))
    if name is not None and not resume:
        check_free(home, name)
    for one in listing(also):
        if isinstance(one, str) and "[" not in one:  # whether a class is known is not known yet
            as_metric(one)
    task = checked_task(task, home, progress)
    settings = replace(settings, metrics=_others(also, task))
    identity = settings.identity(task)
    folder = resume_folder(home, resume, identity) if resume else new_folder(home, name, identity)
    more = {"files": settings.files(task)}
    if not resume:
        more |= {"provenance": provenance(task, command), "task_options": task.options}
    folder.update_settings(more)
    tracker = functools.partial(
        Tracker, home, task.name, uri=tracking_uri, device=settings.device, on_warning=progress
    )
    try:
        return Sweeping(task.on(settings.device), settings, folder, progress).run(tracker)
    finally:
        if resume or folder.has_begun:
            folder.close()
        else:  # the name shall be free again
            folder.discard()


def _others(also: MetricLike | Sequence[MetricLike], task: Task) -> tuple[Metric, ...]:
    """The further metrics, each once and beside the task's own: their columns are named by them."""
    metrics = tuple(as_metric(one, task.classes) for one in listing(also))
    names = [task.metric.name, *(metric.name for metric in metrics)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the metric {twice!r} is asked for twice; name each once, and the task's own not again")
    return metrics


class Sweeping:
    """A sweep in its folder: each trial is on disk before the next begins.

    Args:
        task: What is compressed, its model on the device.
        settings: What is asked.
        folder: Where the sweep lives.
        progress: Is told how it goes, a line at a time.
    """

    def __init__(
        self, task: Task, settings: SweepSettings, folder: StudyFolder, progress: Callable[[str], None]
    ) -> None:
        self.task, self.settings, self.folder, self.progress = task, settings, folder, progress
        self.run_id: str | None = None  # in MLflow, as the folder has it

    def run(self, make_tracker: Callable[[], Tracker]) -> Sweep:
        """Runs what is not on disk yet, and writes the table and the figure of what there is."""
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
                    self._remember_run()
                raise

    def _run(self, facts: Mapping[str, Facts]) -> Sweep:
        self._start_tracking()
        found, (cells, failed) = [self._dense()], self._reachable(facts)
        stopped = COMPLETE
        with gentle_interrupt(self.progress) as asked_to_stop:
            try:
                for done, cell in enumerate(cells, start=1):
                    if asked_to_stop():
                        raise KeyboardInterrupt
                    try:
                        found.append(self._trial(cell, facts[cell.scheme]))
                    except (RealizationError, FloatingPointError, torch.OutOfMemoryError) as error:
                        failed.append(self._failed(cell, str(error)))
                    else:
                        left = np.mean([one["row"]["seconds"] for one in found[1:]]) * (len(cells) - done)
                        self.progress(f"trial {cell.number:>3}  {self._line(found[-1])}  about {left:.0f} s left")
                    self._remember_run()
            except KeyboardInterrupt:
                stopped = INTERRUPTED
        return self._conclude(found, failed, stopped)

    def _reachable(self, facts: Mapping[str, Facts]) -> tuple[list[Cell], list[dict[str, Any]]]:
        """The cells whose scheme can be so sparse, and of the others the first run as failed."""
        cells, schemes = self.settings.cells, self.settings.schemes
        lowest = {name: scheme.lowest_density(facts[name]) for name, scheme in schemes.items()}
        can = [c for c in cells if not schemes[c.scheme].takes_density or c.density >= lowest[c.scheme]]
        cannot = [cell for cell in cells if cell not in can and cell.repeat == 1]
        return can, [
            self._failed(cell, f"it cannot be reached; the lowest possible here is {lowest[cell.scheme]:.4g}")
            for cell in cannot
        ]

    def _failed(self, cell: Cell, reason: str) -> dict[str, Any]:
        one = {**cell.key, "reason": reason}
        self.progress(f"trial {cell.number:>3}  {Sweep.failure(one)}")
        self.tracker.failed(cell.number, reason, {"scheme": cell.scheme, "repeat": cell.repeat})
        return one

    def _line(self, cell: Mapping[str, Any]) -> str:
        row, name = cell["row"], self.task.metric.name
        scores = f"{name} {row[f'{name}_val']:.4f} on val, {row[f'{name}_test']:.4f} on test"
        return f"{row['scheme']}  density {row['density']:.4g}  {scores}  {row['seconds']:.1f} s"

    def _start_tracking(self) -> None:
        asked = read_json(self.folder.settings_file)
        others = ("provenance", "recovery", "mlflow_run", "kind", "files")
        params = {k: v for k, v in asked.items() if k not in others}
        params |= {f"recovery.{name}": value for name, value in asked["recovery"].items()}
        data, run = asked.get("provenance", {}).get("data"), asked.get("mlflow_run")
        self.tracker.start(self.folder.path.name, params, {"role": "sweep"}, data=data, run_id=run)

    def _remember_run(self) -> None:
        """Writes down the run in MLflow, once it is known: a sweep that is resumed goes on with it."""
        if self.run_id is None:
            self.tracker.flush()
            self.run_id = self.tracker.run_id
            if self.run_id is not None:
                self.folder.update_settings({"mlflow_run": self.run_id})

    def _dense(self) -> dict[str, Any]:
        """The dense model's cell; its number is 0."""
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
        """A cell's trial: from disk, if it is there."""
        if kept := self._load(cell.number):
            self._log(cell, self.folder.load_trial(cell.number), kept["row"])
            return kept
        self._settle()
        gpu = GpuWindow(torch.device(self.settings.device), every_s=GPU_EVERY_S)
        with gpu as window, heard_by(self._now_and_then(f"trial {cell.number:>3}  {cell.scheme}")):
            result = run_trial(self._spec(cell, facts))
        model = result.model
        assert model is not None, "a trial that has just run has its model"
        on_device = model.to(self.settings.device)
        val, test = (self.task.evaluate(on_device, split) for split in (self.task.val, self.task.test))
        row = self._row(cell, result.measurement, val, test, result.seconds)
        self.folder.save_trial(replace(result, model=on_device.cpu()))
        self._log(cell, result, row)
        timeline = [[at.seconds, at.free_bytes, at.utilization_pct] for at in window.usage.timeline]
        curves = {name: list(values) for name, values in result.curves.items()}
        return self._save(cell.number, {"row": row, "curves": curves, "timeline": timeline})

    def _settle(self) -> None:
        """Waits for MLflow, whose imports take Python from whatever is timed beside them."""
        if self.settings.timing:
            self.tracker.flush()

    def _now_and_then(self, what: str) -> Listener:
        """Says how far a long trial has come."""
        footer, said_at = Footer(what), time.monotonic()

        def heard(done: float) -> None:
            nonlocal said_at
            footer.advance(done)
            if time.monotonic() - said_at >= SECONDS_BETWEEN_LINES:
                said_at = time.monotonic()
                self.progress(str(footer.__rich__()))

        return heard

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
        scores = {}
        for metric in (self.task.metric, *self.settings.metrics):
            for split, seen in (("val", val), ("test", test)):
                scores[f"{metric.name}_{split}"] = _finite(metric.score(seen.targets, seen.outputs))
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
        """Writes a cell, after all else of its trial: where it is the trial is whole."""
        self.folder.trial(number).mkdir(parents=True, exist_ok=True)
        write_json(self._file(number), cell)
        return cell

    def _conclude(
        self, found: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]], stopped: str
    ) -> Sweep:
        task = self.task
        result = Sweep(
            name=self.folder.path.name,
            task=task.name,
            metric=task.metric.name,
            higher_is_better=task.metric.higher_is_better,
            also=tuple(metric.name for metric in self.settings.metrics),
            n_test=task.test.n_samples,
            cells=tuple(found),
            failed=tuple(failed),
            stopped=stopped,
            seconds=sum(cell["row"]["seconds"] for cell in found),
            device=found[0]["row"]["device"],
            folder=self.folder.path,
        )
        write_json(self.folder.result_file, result.to_json())
        files = write_sweep(result)
        self.tracker.finish(
            "KILLED" if result.interrupted else "FINISHED",
            f"{len(found) - 1} models; {stopped}",
            artifacts=[self.folder.result_file, *files],
        )
        self._remember_run()
        return result


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def load_model(found: Sweep, number: int, task: Task) -> nn.Module:
    """The compressed model of a sweep's trial, in eval mode on the CPU.

    Args:
        found: The sweep.
        number: Of the trial, as in `Sweep.trials`; 0 is the dense model.
        task: What was compressed.

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
    written = next(cell["row"]["scheme"] for cell in found.cells if cell["row"]["number"] == number)
    scheme = parse_scheme(written, run_files=False)
    facts, _ = analyze(scheme, on_cpu)
    return rebuild(scheme, on_cpu.model, facts, trial.plan, trial.density, state)
