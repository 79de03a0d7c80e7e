"""Runs a study: measures the dense model, searches, judges the answer, exports it, writes the report.

While trials run, a background process (`autocompress.processes.aside.Aside`) logs to MLflow and prepares the end
of the study. Several processes (coordinators) may run the same study if it is kept in a database.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import RDBStorage

from autocompress.disk.files import called, read_json, write_json
from autocompress.disk.mend import restore, set_aside_if_damaged
from autocompress.disk.optuna_store import open_shared, open_study
from autocompress.disk.storage import StudyFolder
from autocompress.gauges.macs import count_macs
from autocompress.learning.ranks import team
from autocompress.learning.training import n_steps, threads_for
from autocompress.measurement import Measurement, measure
from autocompress.metrics import try_metric
from autocompress.processes.aside import WORTH_S, Aside
from autocompress.processes.interrupt import gentle_interrupt
from autocompress.processes.workplace import Workplace
from autocompress.report import write_report
from autocompress.search import Plan, add_dense, adopt, failures, set_sampler
from autocompress.search import search as run_search
from autocompress.searching.selection import front
from autocompress.searching.space import Configuration
from autocompress.splits import held_labels
from autocompress.studies.ahead import Ahead
from autocompress.studies.analysis import Analyses
from autocompress.studies.conclusion import Conclusion
from autocompress.studies.records import Records
from autocompress.studies.result import Result
from autocompress.studies.settings import Settings
from autocompress.studies.watcher import Beginning, Watcher
from autocompress.task import Task
from autocompress.tracking import Tracker, final_metrics
from autocompress.trial import TrialResult, TrialSpec, can_be_cheap
from autocompress.verdict.constraint import Constraint
from autocompress.verdict.limit import Limit, check_all
from autocompress.verdict.prospect import nearest_miss, one_answer, prospect


class Study:
    """One study in one folder.

    Args:
        settings: The study's settings.
        task: The task, its model on the study's device.
        folder: The study's folder.
        watcher: Receives the study's progress.
        make_tracker: Makes the MLflow tracker, which logs from the given background process once that is started.
        register: The name under which MLflow registers the answer; None to register nothing.
        database: The database of the Optuna study, for several coordinators; None for a journal in the folder.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        folder: StudyFolder,
        watcher: Watcher,
        make_tracker: Callable[[Aside], Tracker],
        register: str | None = None,
        database: RDBStorage | None = None,
    ) -> None:
        self.settings, self.task, self.folder, self.watcher = settings, task, folder, watcher
        self.workplace = Workplace(settings, task)
        self.register, self.database = register, database
        self.aside = Aside(allowed=team().size == 1 and (os.cpu_count() or 1) > 1)
        self.ahead = Ahead(self.aside, task, folder, settings.formats)
        self.began = time.perf_counter()
        watcher.doing("analyzing the dense model")
        self.analyses = Analyses(task)
        # Before the tracker, whose thread may import MLflow: both change the warning filters, which are global.
        self.space, self.analysis_notes = self.analyses.open_space(settings)
        self.tracker = make_tracker(self.aside)
        self.run_id: str | None = None  # MLflow's parent run, as stored in the folder

    def run(self) -> Result:
        """Runs the study to its end and returns its result."""
        try:
            macs = count_macs(self.task.model, self.task.example_input) * self.task.train.batch_size
            with threads_for(macs, self.settings.device):
                return self._run()
        except BaseException as error:
            if self.tracker.has_begun:
                with contextlib.suppress(OSError):  # the terminal may be what failed
                    self.watcher.doing("logging to MLflow what has finished")  # half a minute for a new database
            self.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            with contextlib.suppress(OSError):  # the disk may be what failed
                self._save_run_id()
            raise
        finally:
            self.workplace.close()
            self.ahead.close()

    def _run(self) -> Result:
        settings, task = self.settings, self.task
        self.watcher.doing("measuring the dense model")
        start = time.perf_counter()
        self.dense = task.evaluate(task.model, task.val)
        self.ahead.several_labels = self.dense.targets.ndim == 2
        evaluating_s = time.perf_counter() - start
        self.dense_cost, self.timing = self._measure_dense()
        self.plan = Plan(
            self.space,
            settings.bound,
            settings.trials,
            settings.timeout_s,
            tolerance=settings.tolerance,
            workers=self.workplace.size,
            steps=n_steps(task.train, settings.epochs_total) if settings.epochs_total else None,
        )
        dense_values = [objective(self.dense_cost) for objective in settings.objectives]
        self._try_metrics_on_test()
        self.dense_checked = check_all(settings.constraints, self.dense, self.dense_cost)
        self.folder.update_settings({"dense_value": dense_values[0]})
        self._report_beginning(dense_values[0])
        with self.folder.turn():
            self.study = self._open_study()
            set_sampler(self.study, settings.sampler, self.plan, settings.seed)
            add_dense(self.study, self.space, dense_values, settings.bound, self.dense_checked)
            adopt(self.study, settings.bound, self.folder)
            restore(self.study, self.space, settings.bound, self.folder)
        self.records = Records(
            self.study, self.space, settings.bound, self.folder, self.analyses, self.watcher.warned
        )
        self._load_records()
        self._start_aside_if_worth_it(self._expected_trial_s(evaluating_s))
        any_spec = self._spec(0, self.space.configuration(self.space.dense_params))
        with (
            self.workplace.open(vars(any_spec)) as executor,
            gentle_interrupt(self.watcher.warned) as asked_to_stop,
        ):
            stopped = run_search(self.study, self.plan, self._spec, executor, self.folder, self, asked_to_stop)
        with self.folder.turn():  # coordinators of a shared study conclude one after the other
            for result in adopt(self.study, settings.bound, self.folder):  # saved before a kill or Ctrl-C
                self.trial(result)
            self._catch_up()
            return self._conclude(stopped)

    def _open_study(self) -> optuna.Study:
        directions = [objective.direction for objective in self.settings.objectives]
        if self.database is not None:
            study_id = read_json(self.folder.settings_file)["study_id"]
            return open_shared(self.database, f"{self.folder.path.name}-{study_id}", *directions)
        if problem := set_aside_if_damaged(self.folder):
            self.watcher.warned(problem)
        return open_study(self.folder.journal_file, *directions)

    def _try_metrics_on_test(self) -> None:
        """Checks that test can be scored, by its targets alone; an error after the search would waste it."""
        targets = held_labels(self.task.test)
        if targets is None:
            return
        constrained = (one.metric for one in self.settings.constraints if isinstance(one, Constraint))
        for metric in (self.task.metric, *constrained):
            try_metric(metric, "test", targets.cpu().numpy().astype(np.int64), self.dense.outputs.shape[1])

    def _measure_dense(self) -> tuple[Measurement, bool]:
        """Measures the dense model, with times only if an objective or a limit needs more than counts.

        Returns:
            The measurement, and whether it has times.

        Raises:
            ValueError: If an objective or a limit cannot be computed even with times, as in every trial then.
        """
        counted = measure(self.task.model, self.task.example_input, self.settings.measured_on, timing=False)
        try:
            self._compute_objectives(counted)
        except ValueError:
            device, runtime = self.settings.measured_on, self.settings.runtime
            timed = measure(self.task.model, self.task.example_input, device, runtimes=(runtime,))
            self._compute_objectives(timed)
            return timed, True
        return counted, False

    def _compute_objectives(self, cost: Measurement) -> None:
        """Computes all objectives and limits, which raise ValueError if they need other measurements."""
        for objective in self.settings.objectives:
            objective(cost)
        for constraint in self.settings.constraints:
            if isinstance(constraint, Limit):
                constraint.check(cost)

    def _report_beginning(self, dense_value: float) -> None:
        settings, identity = self.settings, self.settings.identity(self.task)
        shared = self.workplace.notes if self.timing else ()
        violated = (checked for checked in self.dense_checked if not checked.met and not checked.is_cost)
        self.notes = (
            *self.task.notes,
            *self.analysis_notes,
            *team().notes,
            *shared,
            *(checked.warning for checked in violated),
            *one_answer(self.dense, self.task),
            *prospect(settings, self.task),
        )
        self.watcher.began(
            Beginning(
                name=self.folder.path.name,
                task=self.task,
                settings=settings,
                folder=self.folder.path,
                dense=self.dense_cost,
                dense_score=self.dense.score,
                low=self.space.low,
                notes=self.notes,
                workers=self.workplace.size,
            )
        )
        stored = read_json(self.folder.settings_file)
        recovery = {f"recovery.{name}": value for name, value in identity.pop("recovery").items()}
        self.tracker.start(
            self.folder.path.name,
            {**identity, **recovery, "trials": settings.trials, "device": settings.device},
            data=stored.get("provenance", {}).get("data"),
            run_id=stored.get("mlflow_run"),
        )
        self.tracker.dense(self.dense.score, self.dense_cost, dense_value)

    def _spec(self, number: int, chosen: Configuration) -> TrialSpec:
        settings, facts = self.settings, self.analyses.facts(chosen.scheme)
        density = max(chosen.density, chosen.scheme.lowest_density(facts))
        cheap = settings.cheap_trials and can_be_cheap(settings.recovery) and self.space.low < 1
        return TrialSpec(
            number=number,
            density=density,
            task=self.workplace.task,
            scheme=chosen.scheme,
            facts=facts,
            recovery=chosen.recovery,
            objectives=settings.objectives,
            bound=settings.bound,
            dense=self.dense,
            seed=int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0]),
            device=self.workplace.device,
            timing=self.timing,
            constraints=settings.constraints,
            start=self.folder.start(density, self.records.alike(chosen)) if cheap else None,
            cheap=cheap,
            dense_cost=self.dense_cost,
            runtime=settings.runtime,
            profile_device=settings.profile_device,
            params=chosen.params,
        )

    def _load_records(self) -> None:
        """Loads the trials of an earlier run or of other coordinators; reports and logs them."""
        self.records.load()
        self.resumed_with = len(self.records)
        if self.folder.shared:  # other coordinators must find the run, to log to it
            self.tracker.flush()
        self._save_run_id()
        best = self.records.best()
        belief = self.records.belief(best)
        for record in self.records:
            self.watcher.trial(record, best, belief)
            self.tracker.trial(record)

    def _catch_up(self) -> None:
        """Loads and reports the trials that have finished without a call of `trial`."""
        for record in self.records.load():
            best = self.records.best()
            self.watcher.trial(record, best, self.records.belief(best))
            if not self.folder.shared:  # the coordinators of a shared study log their own trials
                self.tracker.trial(record)

    def trial(self, result: TrialResult) -> None:
        """Reports a finished trial to the watcher and logs it to MLflow. An event of the search."""
        self.records.add(record := replace(result, model=None))
        if self.folder.shared:
            self._catch_up()
        best = self.records.best()
        belief = self.records.belief(best)
        self.watcher.trial(record, best, belief)
        estimates = {f"threshold_{p:02.0f}": belief.threshold(p / 100) for p in (10, 50, 90)} if belief else {}
        if belief is not None and best is not None:
            estimates["p_feasible"] = belief.p_feasible(best.density_asked)
        self.tracker.trial(record, best.density if best else None, estimates)
        self._save_run_id()
        self._start_aside_if_worth_it(record.seconds)
        self.tracker.proceed()  # with a trial's time known, the decision is final

    def _expected_trial_s(self, evaluating_s: float) -> float:
        """Estimates the seconds of a trial from those of evaluating val: a gradient step is 3 forward passes."""
        train, val = self.task.train, self.task.val
        n_samples = self.settings.recovery.n_steps(train) * train.batch_size
        return 3 * evaluating_s * n_samples / val.n_samples

    def _start_aside_if_worth_it(self, trial_s: float) -> None:
        """Starts the background process if the trials left, of ``trial_s`` seconds each, take long enough."""
        left_s = (self.settings.trials - len(self.records)) * trial_s / self.workplace.size
        if left_s >= WORTH_S:
            self.aside.start()
            self.tracker.proceed()

    def begins(self, number: int) -> None:
        """Prepares the end of the study in the background while a trial runs. An event of the search."""
        if self.aside.is_there and not self.timing:  # the load would distort trials' timings
            self.ahead.prepare(self.records.candidates(), self.records.whole)

    def _save_run_id(self) -> None:
        """Stores the id of MLflow's parent run in the folder, as soon as there is one."""
        if self.tracker.run_id not in (None, self.run_id):
            self.run_id = self.tracker.run_id
            self.folder.update_settings({"mlflow_run": self.run_id})

    def failed(self, number: int, reason: str) -> None:
        """Reports and logs a failed trial. An event of the search."""
        self.watcher.failed(number, reason)
        self.tracker.failed(number, reason)

    def _conclude(self, stopped: str) -> Result:
        """Judges the answer on test, measures it beside the dense model, and saves everything."""
        conclusion = Conclusion(
            self.settings,
            self.task,
            self.dense,
            self.dense_cost,
            self.dense_checked,
            self.folder,
            self.watcher,
            self.ahead,
            self.tracker.flush,
            self.timing,
        )
        shortlisted = self.records.shortlist()
        if shortlisted:
            fields = conclusion.of(shortlisted)
        else:
            fields = conclusion.of_none(nearest_miss(self.settings, tuple(self.records)))
        result = self._result(stopped, fields)
        as_json = result.to_json()
        write_json(self.folder.result_file, as_json, sealed=True)
        self._log_result(result, as_json, self._report())
        return result

    def _report(self) -> Sequence[Path]:
        """Writes the report and returns its paths; a failure is only warned of."""
        self.watcher.doing("writing the report")
        try:
            return self.aside.call(write_report, self.folder.path, ours=True)
        except Exception as error:  # the study is saved, and its report can be written at any time
            retry = f"autocompress report {called(self.folder.path)} tries again"
            self.watcher.warned(f"no report: {type(error).__name__}: {error} ({retry})")
            return ()

    def _result(self, stopped: str, fields: Mapping[str, Any]) -> Result:
        """The study's result, with ``fields`` of it from `Conclusion`."""
        belief = self.records.belief(self.records.best()) if self.records else None
        has_front = len(self.settings.objectives) > 1
        return Result(
            name=self.folder.path.name,
            records=tuple(self.records),
            threshold=belief.interval() if belief else None,
            belief=belief,
            failures=tuple(failures(self.study)),
            stopped=stopped,
            seconds=time.perf_counter() - self.began,
            resumed_with=self.resumed_with,
            folder=self.folder.path,
            notes=(*self.notes, *fields.get("notes", ())),
            objectives=self.settings.objectives if has_front else (),
            front=tuple(t.number for t in front(self.study)) if has_front else (),
            **{name: value for name, value in fields.items() if name != "notes"},
        )

    def _log_result(self, result: Result, as_json: Mapping[str, Any], report: Sequence[Path]) -> None:
        self.watcher.doing("logging to MLflow")
        model = next((file.path for file in result.exported.artifacts if file.format == "pt2"), None)
        if self.register and model is None:
            self.watcher.warned(f"nothing is registered as {self.register!r}: there is no model.pt2 to register")
        self.tracker.finish(
            "KILLED" if result.interrupted else "FINISHED",
            result.sentence,
            final_metrics(as_json),
            [self.folder.result_file, *report],
            model,
            register=self.register,
        )
        self._save_run_id()
