"""A study, from the question to the artifact: the whole job in the order in which it happens."""

import functools
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from autocompress.bundle import Provenance, rebuild
from autocompress.certify import CONFIDENCE, certifiable_drop, certify, conclude
from autocompress.constraint import Constraint, parse_constraints
from autocompress.data import digits
from autocompress.deployed import deployed
from autocompress.dimensions import Search, on_model, parse_dimensions
from autocompress.environment import provenance
from autocompress.export import Export, check_formats, export
from autocompress.files import read_json, write_json
from autocompress.goal import Objective, as_objective
from autocompress.interrupt import gentle_interrupt
from autocompress.layers import compare_layers
from autocompress.macs import count_macs
from autocompress.measurement import Measurement, compare, measure
from autocompress.mend import restore, set_aside_if_damaged
from autocompress.mlflow_store import without_secrets
from autocompress.parcel import pack_shared
from autocompress.per_class import per_class
from autocompress.posterior import Posterior
from autocompress.progress import span
from autocompress.recovery import Recovery, make_recovery, settings_of, with_settings
from autocompress.report import write_report
from autocompress.result import DEFAULT_TRIALS, Beginning, Result, Settings, Silent, Watcher
from autocompress.runtimes import check_runtime, shown_runtimes
from autocompress.samplers import check_sampler
from autocompress.scheme import AUTO, Facts, Scheme, Weights, as_schemes, describe
from autocompress.search import (
    TOLERANCE,
    Plan,
    add_dense,
    adopt,
    failures,
    open_study,
    set_sampler,
)
from autocompress.search import search as run_search
from autocompress.selection import answer, finished, posterior
from autocompress.space import DENSITY, Configuration, Space
from autocompress.storage import (
    StudyFolder,
    check_name,
    new_folder,
    prepare_out,
    resume_folder,
)
from autocompress.task import Task
from autocompress.tracking import MEANWHILE, Tracker, final_metrics
from autocompress.training import n_steps, threads_for
from autocompress.trial import Bound, TrialResult, TrialSpec, can_be_cheap
from autocompress.workers import InProcess, LocalWorkers, Remote, visible_gpus

if TYPE_CHECKING:  # an extra
    from autocompress.cluster import ClusterWorkers

DISAGREEMENT = 0.02  # share of samples on which a model and its compressed form typically disagree
LOWEST_DENSITY = 0.002  # of the search, where the scheme itself could go lower


def tune(
    task: Task | None = None,
    scheme: str | Scheme | Sequence[str | Scheme] = "StructPrune",
    max_drop: float = 0.01,
    *,
    constraints: Sequence[str | Constraint] = (),
    drop: Literal["absolute", "relative"] = "absolute",
    objective: str | Objective | Callable[[Measurement], float] | None = None,
    trials: int = DEFAULT_TRIALS,
    timeout: float | None = None,
    epochs_total: float | None = None,
    tolerance: float = TOLERANCE,
    confidence: float = CONFIDENCE,
    epochs: float | None = None,
    recovery: str | Recovery = "lc",
    cheap_trials: bool = False,
    search: Search = "",
    sampler: str | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 1,
    cluster: str | None = None,
    runtime: str = "eager",
    profile_device: str | None = None,
    out: str | Path = "autocompress-runs",
    name: str | None = None,
    resume: str | None = None,
    watcher: Watcher | None = None,
    tracking_uri: str | None = None,
    register: str | None = None,
    formats: Sequence[str] = (),
    command: str | None = None,
) -> Result:
    """Finds the best compressed model that loses at most ``max_drop``, proves it on test, and saves it.

    Args:
        task: What to compress; by default the digits, see `autocompress.digits`.
        scheme: How to compress: a name, a sum of names, or a `Scheme`; of several the search chooses one,
            and ``"auto"`` is a choice of those that suit the model.
        max_drop: What may be lost of the task's metric, as a fraction: 0.01 is one point.
        constraints: What else the compressed model must reach, such as ``"sensitivity>=0.95"``.
        drop: Whether ``max_drop`` counts points or shares of the dense model's score.
        objective: What to optimize: a name, ``file.py:name``, an `Objective` or a function of a `Measurement`; by
            default the density, of several schemes the size, by which they compare.
        trials: How many trials, at most.
        timeout: Seconds after which no further trial begins.
        epochs_total: Passes over the training data by all trials together after which no further one begins.
        tolerance: The search ends when the lowest feasible density is known to within this share of it, with 80%
            probability: 0.15 is 15%.
        confidence: Of the verdict on test, between 0.5 and 1.
        epochs: Gradient steps of one trial's recovery, in passes over the training data.
        recovery: How a trial compresses and trains: a name of `autocompress.recovery.RECOVERIES`, or a
            `LearningCompression` with settings of your own; ``epochs`` replaces its budget.
        cheap_trials: Whether a trial starts from the nearest denser model, with fewer steps, and gives up when it
            cannot meet the bound any more. By default each recovers from the dense model, with the whole budget
            and to its end.
        search: What to vary beside the density: ``{"criterion": ["l1", "l2"], "lr": (0.01, 0.3),
            "stage-density": None}`` with a list of values, a range, or None for those that make sense; or in a
            line, ``"criterion=l1,l2; lr=0.01..0.3; stage-density"``.
        sampler: What to try next: threshold, gp, tpe, bisection, grid or random; by default threshold, or gp where
            ``search`` has a range.
        seed: Seeds the search and the trials.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        workers: Trials at a time, each in a process of its own with a GPU or a share of the CPU's threads; 1 runs
            them in this process.
        cluster: The address of a Dask scheduler whose workers run the trials, such as ``"tcp://scheduler:8786"``.
        runtime: What runs the model where objectives measure latency: ``"eager"``, ``"compile"`` or
            ``"onnxruntime"``.
        profile_device: Where latency, memory and energy are measured; by default ``device``.
        out: The folder for all studies; nothing is written outside it.
        name: The study's name; by default made of the task, the scheme and the time.
        resume: The name of a study to go on with, in place of ``name``.
        watcher: Is told how it goes.
        tracking_uri: An MLflow server to log to in place of the database in ``out``. A study that is resumed
            goes on with its own.
        register: Registers the answer, which is logged as an MLflow model, under this name.
        formats: In which formats to write the answer besides the usual ones: ``("executorch",)``.
        command: What was typed, for the report.

    Raises:
        ValueError: If an argument is not usable; the message says what is allowed.
    """
    recovery = make_recovery(recovery) if isinstance(recovery, str) else recovery
    recovery = with_settings(recovery, epochs=epochs) if epochs is not None else recovery
    schemes = as_schemes(scheme)
    dimensions = parse_dimensions(search, schemes, recovery)
    settings = Settings(
        schemes=schemes,
        dimensions=dimensions,
        bound=Bound(max_drop, relative=_is_relative(drop)),
        objective=as_objective(objective or ("density" if len(schemes) == 1 else "size")),
        is_auto=scheme == AUTO,
        # An unknown name is refused before the training; what the space is on the model is not known yet.
        sampler=check_sampler(sampler, Space(schemes, recovery, (0.5,) * len(schemes), dimensions)),
        recovery=recovery,
        seed=seed,
        trials=trials,
        timeout_s=timeout,
        epochs_total=epochs_total,
        device=usable_device(device),
        runtime=check_runtime(runtime, usable_device(profile_device or device)),
        profile_device=usable_device(profile_device) if profile_device else None,
        tolerance=tolerance,
        confidence=confidence,
        workers=workers,
        formats=check_formats(formats),
        cheap_trials=cheap_trials,
        cluster=cluster,
    )
    watcher = watcher or Silent()
    if name is not None:
        check_name(name)
    home = prepare_out(Path(out))
    if task is None:
        watcher.doing("training the dense model, or taking it from the cache")
        task = digits(cache=home / "cache")
    task.check()
    settings = replace(settings, constraints=parse_constraints(constraints, task.classes))
    identity = settings.identity(task)
    asked = {**settings.budget(), "task_options": task.options}
    if resume:
        folder = resume_folder(home, resume, identity)
        folder.update_settings(asked)
    else:
        folder = new_folder(home, name, {**identity, "provenance": provenance(task, command), **asked})
    tracking_uri = tracking_uri or read_json(folder.settings_file).get("tracking_uri")
    folder.update_settings({"tracking_uri": tracking_uri and without_secrets(tracking_uri)})
    elsewhere = "" if str(out) == "autocompress-runs" else f" --out {shlex.quote(str(out))}"
    meanwhile = f"{MEANWHILE}; autocompress replay {folder.path.name}{elsewhere} logs it later"
    tracker = functools.partial(
        Tracker,
        home,
        task.name,
        uri=tracking_uri,
        device=settings.device,
        meanwhile=meanwhile,
        on_warning=watcher.warned,
    )
    try:
        return Study(settings, task.on(settings.device), folder, watcher, tracker, register).run()
    finally:
        if resume or folder.journal_file.exists():
            folder.close()
        else:  # it ended before its first trial: the name shall be free again
            folder.discard()


class Study:
    """One study in one folder.

    Args:
        settings: What is asked.
        task: The task, its model on the study's device.
        folder: Where the study lives.
        watcher: Is told how it goes.
        make_tracker: Opens MLflow.
        register: Where given, the name under which MLflow registers the answer.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        folder: StudyFolder,
        watcher: Watcher,
        make_tracker: Callable[[], Tracker],
        register: str | None = None,
    ) -> None:
        self.settings, self.task, self.folder, self.watcher = settings, task, folder, watcher
        self.sent, self.device = task, settings.device  # of the trials
        self.cluster = connect(settings.cluster) if settings.cluster else None
        self.register = register
        self.began = time.perf_counter()
        watcher.doing("analyzing the dense model")
        self._facts: dict[str, Facts] = {}
        # Before the tracker: its thread imports MLflow, and threads share Python's warning filters.
        self.space, self.notes = self._open_space()
        self.tracker = make_tracker()
        self.records: list[TrialResult] = []
        self.lost: set[int] = set()  # trials whose record or weights are damaged

    def run(self) -> Result:
        """Does the whole job."""
        macs = count_macs(self.task.model, self.task.example_input) * self.task.train.batch_size
        try:
            with threads_for(macs, self.settings.device):
                return self._run()
        except BaseException as error:
            self.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        finally:
            if self.cluster is not None:
                self.cluster.close()

    def _run(self) -> Result:
        settings, task = self.settings, self.task
        self.watcher.doing("measuring the dense model")
        self.dense = task.evaluate(task.model, task.val)
        self.dense_cost, self.timing = self._measure_dense()
        self.plan = Plan(
            self.space,
            settings.bound,
            settings.trials,
            settings.timeout_s,
            tolerance=settings.tolerance,
            steps=n_steps(task.train, settings.epochs_total) if settings.epochs_total else None,
        )
        dense_value = settings.objective(self.dense_cost)
        self.dense_checked = tuple(constraint.check(self.dense) for constraint in settings.constraints)
        self.folder.update_settings({"dense_value": dense_value})
        self._report_beginning(dense_value)
        if problem := set_aside_if_damaged(self.folder):
            self.watcher.warned(problem)
        self.study = open_study(self.folder.journal_file, settings.objective.direction)
        set_sampler(self.study, settings.sampler, self.plan, settings.seed)
        add_dense(self.study, self.space, dense_value, settings.bound, self.dense_checked)
        adopt(self.study, settings.bound, self.folder)
        restore(self.study, self.space, settings.bound, self.folder)
        self._go_on()
        with self._executor() as executor, gentle_interrupt(self.watcher.warned) as asked_to_stop:
            plan = replace(self.plan, workers=executor.size)
            stopped = run_search(self.study, plan, self._spec, executor, self.folder, self, asked_to_stop)
        return self._conclude(stopped)

    def _executor(self) -> InProcess | Remote:
        """Where the trials run."""
        if self.cluster is not None:
            self.sent, self.device = self.task.on("cpu"), self.cluster.device
            shared, payload = pack_shared(vars(self._any_spec()))
            self.cluster.open(payload)
            return Remote(self.cluster, shared)
        workers = self.settings.workers
        if workers == 1:
            return InProcess()
        self.sent = self.task.on("cpu")
        shared, payload = pack_shared(vars(self._any_spec()))
        gpus = visible_gpus() if self.settings.device != "cpu" else []
        threads = max(1, torch.get_num_threads() // workers)
        return Remote(LocalWorkers(workers, payload, threads=threads, gpus=gpus), shared)

    def _open_space(self) -> tuple[Space, tuple[str, ...]]:
        """What the search may choose from on this model, and what the schemes cannot compress in it."""
        settings, lows, notes = self.settings, [], dict[str, None]()
        schemes = []
        for scheme in settings.schemes:
            try:
                facts, said = analyze(scheme, self.task)
            except ValueError as error:
                if not settings.is_auto:
                    raise
                notes[f"{describe(scheme)} is left out: {error}"] = None
                continue
            schemes.append(scheme)
            self._facts[describe(scheme)] = facts
            lows.append(max(scheme.lowest_density(facts), LOWEST_DENSITY) if scheme.takes_density else 1.0)
            notes |= dict.fromkeys(said)
        dimensions = on_model(settings.dimensions, self.task.model)
        if not schemes:
            raise ValueError(f"no scheme of {AUTO} finds anything in this model that it can compress")
        space = Space(tuple(schemes), settings.recovery, tuple(lows), dimensions)
        check_sampler(settings.sampler, space)
        if len(space.arms) > 1 and settings.trials < 2 * len(space.arms):
            notes[
                f"{len(space.arms)} combinations are tried; {settings.trials} trials are few, "
                f"{2 * len(space.arms)} or more can tell them apart"
            ] = None
        return space, tuple(notes)

    def _facts_of(self, scheme: Scheme) -> Facts:
        """What a scheme found out about the model, once for each."""
        spec = describe(scheme)
        if spec not in self._facts:
            self._facts[spec] = analyze(scheme, self.task)[0]
        return self._facts[spec]

    def _measure_dense(self) -> tuple[Measurement, bool]:
        """What the dense model costs, and whether the objective needs more than can be counted."""
        counted = measure(self.task.model, self.task.example_input, self.settings.measured_on, timing=False)
        try:
            self.settings.objective(counted)
        except ValueError:
            where, runtime = self.settings.measured_on, self.settings.runtime
            timed = measure(self.task.model, self.task.example_input, where, runtimes=(runtime,))
            self.settings.objective(timed)  # what fails here would fail in every trial
            return timed, True
        return counted, False

    def _report_beginning(self, dense_value: float) -> None:
        settings, identity = self.settings, self.settings.identity(self.task)
        self.watcher.began(
            Beginning(
                name=self.folder.path.name,
                task=self.task,
                settings=settings,
                folder=self.folder.path,
                dense=self.dense_cost,
                dense_score=self.dense.score,
                low=self.space.low,
                notes=(*self.task.notes, *self.notes, *self._prospect()),
            )
        )
        asked = read_json(self.folder.settings_file)
        recovery = {f"recovery.{name}": value for name, value in identity.pop("recovery").items()}
        self.tracker.start(
            self.folder.path.name,
            {**identity, **recovery, "trials": settings.trials, "device": settings.device},
            data=asked.get("provenance", {}).get("data"),
            run_id=asked.get("mlflow_run"),
        )
        self.tracker.dense(self.dense.score, self.dense_cost, dense_value)

    def _prospect(self) -> tuple[str, ...]:
        """Which constraints the dense model misses; what the test data can certify, where it can be foreseen."""
        n, bound = self.task.test.n_samples, self.settings.bound
        missed = tuple(one.warning for one in self.dense_checked if not one.met)
        if self.task.metric.correct is None or bound.relative:
            return missed
        confidence = self.settings.confidence
        observed = certifiable_drop(n, bound.max_drop, DISAGREEMENT, confidence)
        where = f"with {n} test samples, and models that disagree on {DISAGREEMENT:.0%} of them"
        if observed is None:
            return (*missed, f"{where}, no drop can be certified to be within {100 * bound.max_drop:g} pp")
        amount = f"{100 * abs(observed):.2f} pp"
        must = f"drop at most {amount}" if observed >= 0 else f"gain at least {amount}"
        within = f"to be certified within {100 * bound.max_drop:g} pp with {100 * confidence:g}% confidence"
        return (*missed, f"{where}, the answer must {must} on test {within}")

    def _spec(self, number: int, chosen: Configuration) -> TrialSpec:
        settings, facts = self.settings, self._facts_of(chosen.scheme)
        density = max(chosen.density, chosen.scheme.lowest_density(facts))
        cheap = settings.cheap_trials and can_be_cheap(settings.recovery) and self.space.low < 1
        return TrialSpec(
            number=number,
            density=density,
            task=self.sent,
            scheme=chosen.scheme,
            facts=facts,
            recovery=chosen.recovery,
            objective=settings.objective,
            bound=settings.bound,
            dense=self.dense,
            seed=int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0]),
            device=self.device,
            timing=self.timing,
            constraints=settings.constraints,
            start=self.folder.start(density, self._alike(chosen)) if cheap else None,
            cheap=cheap,
            dense_cost=self.dense_cost,
            runtime=settings.runtime,
            profile_device=settings.profile_device,
            params=chosen.params,
        )

    def _any_spec(self) -> TrialSpec:
        """A trial for what all have in common."""
        return self._spec(0, self.space.configuration(self.space.dense_params))

    def _alike(self, chosen: Configuration) -> set[int]:
        """The trials that differ from a configuration in density alone: it can start from what they left."""
        return {
            record.number for record in self.records if record.params == chosen.params and self.space.is_finite
        }

    def _go_on(self) -> None:
        """Passes on the trials of an earlier run of the study."""
        for trial in finished(self.study):
            try:
                self.records.append(self.folder.load_trial(trial.number))
            except ValueError as error:
                self._lose(trial.number, error)
        if self.records:
            self._remember_run()
        best = self._best()
        belief = self._belief(best)
        for record in self.records:
            self.watcher.trial(record, best, belief)
            self.tracker.trial(record)

    def _lose(self, number: int, error: Exception) -> None:
        self.lost.add(number)
        self.watcher.warned(f"trial {number} cannot be the answer: {error}")

    def trial(self, result: TrialResult) -> None:
        """Passes a finished trial on to the watcher and to MLflow."""
        self.records.append(replace(result, model=None))
        best = self._best()
        belief = self._belief(best)
        self.watcher.trial(self.records[-1], best, belief)
        beliefs = {f"threshold_{p:02.0f}": belief.threshold(p / 100) for p in (10, 50, 90)} if belief else {}
        if belief is not None and best is not None:
            beliefs["p_feasible"] = belief.p_feasible(best.density_asked)
        self.tracker.trial(self.records[-1], best.density if best else None, beliefs)
        if len(self.records) == 1:
            self._remember_run()

    def _remember_run(self) -> None:
        self.folder.update_settings({"mlflow_run": self.tracker.run_id})

    def failed(self, number: int, reason: str) -> None:
        """Passes a failed trial on."""
        self.watcher.failed(number, reason)
        self.tracker.failed(number, reason)

    def _best(self) -> TrialResult | None:
        """The record of what the answer would be now."""
        chosen = answer(self.study, self.space, self.settings.bound, self.lost)
        return next((r for r in self.records if chosen and r.number == chosen.number), None)

    def _belief(self, best: TrialResult | None) -> Posterior | None:
        """What is known of the threshold, of several arms that of the answer's."""
        arm = self.space.arm_of(best.params) if best else None
        return posterior(self.study, self.space, self.settings.bound, arm)

    def _conclude(self, stopped: str) -> Result:
        """Judges the answer on test, measures it beside the dense model, and saves everything."""
        best, state = self._best_on_disk()
        if best is None:
            result = self._without_answer(stopped)
        else:
            self.watcher.doing("judging the answer on test")
            result = self._with_answer(best, state, stopped)
        write_json(self.folder.result_file, result.to_json(), sealed=True)
        self.watcher.doing("writing the report")
        try:
            reported = write_report(self.folder.path, ours=True)
        except Exception as error:  # the study is saved, and its report can be written at any time
            again = f"autocompress report {result.name} tries again"
            self.watcher.warned(f"no report: {type(error).__name__}: {error} ({again})")
            reported = ()
        self._log_result(result, best, reported)
        return result

    def _best_on_disk(self) -> tuple[TrialResult | None, Weights]:
        """The best trial whose weights are whole, and these."""
        while (best := self._best()) is not None:
            try:
                return best, self.folder.load_weights(best.number)
            except (OSError, ValueError) as error:
                self._lose(best.number, error)
        return None, {}

    def _with_answer(self, best: TrialResult, state: Weights, stopped: str) -> Result:
        task, settings, scheme = self.task, self.settings, self._scheme_of(best)
        rebuilt = rebuild(scheme, task.model, self._facts_of(scheme), best.plan, best.density, state)
        model = deployed(rebuilt, task.example_input)
        with span(0, 0.5):
            dense_test = task.evaluate(task.model, task.test)
        with span(0.5, 1):
            test = task.evaluate(model, task.test)
        bound = settings.bound
        certificate = certify(
            task.metric, dense_test, test, bound.max_drop, relative=bound.relative, confidence=settings.confidence
        )
        judged = tuple(constraint.judge(test) for constraint in settings.constraints)
        outcome, sentence = conclude(certificate, judged)
        self.watcher.doing("measuring the answer beside the dense model")
        costs = compare(
            [task.model, rebuilt],
            task.example_input,
            settings.measured_on,
            dense_params=self.dense_cost.params,
            params=[None, best.measurement.params],
            runtimes=shown_runtimes(settings.runtime, settings.measured_on),
        )
        scores = {
            "dense": {"val": self.dense.score, "test": dense_test.score},
            "compressed": {"val": best.score, "test": test.score},
        }
        layers = compare_layers(task.model, rebuilt)
        model = model.cpu()
        self.watcher.doing("exporting the answer")
        exported = self._export(rebuilt, best, scores, sentence)
        return self._result(
            stopped,
            verdict=outcome,
            sentence=sentence,
            certificate=certificate,
            model=model,
            density=best.density,
            drop_val=best.drop,
            measurements=dict(zip(("dense", "compressed"), costs, strict=True)),
            scores=scores,
            exported=exported,
            per_class=per_class(dense_test, test, task.classes),
            constraints=tuple(zip(best.constraints, judged, strict=True)),
            answer=best.number,
            layers=layers,
        )

    def _scheme_of(self, trial: TrialResult) -> Scheme:
        return self.space.configuration({DENSITY: trial.density_asked, **trial.params}).scheme

    def _without_answer(self, stopped: str) -> Result:
        dense = {"val": self.dense.score}
        return self._result(
            stopped,
            verdict="not met",
            sentence=self._nearest_miss(),
            certificate=None,
            model=self.task.model,
            density=1.0,
            drop_val=0.0,
            measurements={"dense": self.dense_cost},
            scores={"dense": dense},
            exported=Export((), {}),
        )

    def _nearest_miss(self) -> str:
        """What came nearest to the bound, and what would help, in words for the command line and Python alike."""
        unit, epochs = self.settings.unit, settings_of(self.settings.recovery).get("epochs")
        bound = f"{100 * self.settings.bound.max_drop:g}{unit}"
        if not self.records:
            return f"Not met: no trial finished, so nothing but the dense model is known to lose at most {bound}."
        nearest = min(self.records, key=lambda r: r.effective_drop(self.settings.bound.max_drop)[0])
        besides = "".join(f" and has {one.metric} {one.value:.4f}" for one in nearest.constraints)
        meeting = "".join(f" and meets {one.text}" for one in nearest.constraints)
        longer = f"more epochs of recovery than {epochs:g}" if epochs else "a recovery that trains"
        return (
            f"Not met: of {len(self.records)} trials none loses at most {bound}{meeting} on val; "
            f"the nearest loses "
            f"{100 * nearest.drop:.2f}{unit}{besides} at density {nearest.density:.3g}. What may help: a larger "
            f"drop, {longer}, another scheme than {self.settings.scheme}, or more trials "
            f"than {self.settings.trials}."
        )

    def _result(self, stopped: str, **found: Any) -> Result:
        belief = self._belief(self._best()) if self.records else None
        return Result(
            name=self.folder.path.name,
            records=tuple(self.records),
            threshold=belief.interval() if belief else None,
            belief=belief,
            failures=tuple(failures(self.study)),
            stopped=stopped,
            seconds=time.perf_counter() - self.began,
            folder=self.folder.path,
            **found,
        )

    def _export(self, model: nn.Module, best: TrialResult, scores: Mapping[str, Any], sentence: str) -> Export:
        provenance = Provenance(
            scheme=describe(self._scheme_of(best)),
            plan=best.plan,
            density=best.density,
            task=self.task.name,
            architecture=self.task.architecture,
            classes=self.task.classes,
            preprocessing=self.task.preprocessing,
            input=self.task.input,
            results={"metric": self.task.metric.name, "scores": scores, "verdict": sentence},
        )
        formats = self.settings.formats
        exported = export(model, self.task.example_input, self.folder.best, provenance, formats=formats)
        for name, reason in exported.refused.items():
            self.watcher.warned(f"{name} is not offered: {reason}")
        return exported

    def _log_result(self, result: Result, best: TrialResult | None, reported: Sequence[Path]) -> None:
        self.watcher.doing("logging to MLflow")
        winner = next((one.path for one in result.exported.artifacts if one.format == "pt2"), None)
        if self.register and winner is None:
            self.watcher.warned(f"nothing is registered as {self.register!r}: there is no model.pt2 to register")
        self.tracker.finish(
            "KILLED" if result.interrupted else "FINISHED",
            result.sentence,
            final_metrics(result.to_json()),
            [self.folder.result_file, *reported],
            winner,
            register=self.register,
        )


def connect(address: str) -> "ClusterWorkers":
    """The workers of the cluster at that address.

    Raises:
        ValueError: If it cannot be used, or Dask is not installed.
    """
    try:
        from autocompress.cluster import ClusterWorkers
    except ImportError as error:
        raise ValueError(f"cluster={address!r} needs Dask ({error}); pip install 'autocompress[dask]'") from None
    return ClusterWorkers(address)


def analyze(scheme: Scheme, task: Task) -> tuple[Facts, tuple[str, ...]]:
    """The scheme's facts of the dense model, and what it warned of: layers that it cannot compress."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = scheme.analyze(task.model, task.example_input)
    return facts, tuple(str(warning.message) for warning in caught)


def _is_relative(drop: str) -> bool:
    if drop not in ("absolute", "relative"):
        raise ValueError(f"drop={drop!r}; it must be 'absolute' or 'relative'")
    return drop == "relative"


def usable_device(device: str) -> str:
    """The device that was asked for; ``auto`` is the first GPU where there is one.

    Raises:
        ValueError: If it is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device={device!r}; it must be auto, cpu, cuda or cuda:i") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}; it must be auto, cpu, cuda or cuda:i")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this machine has no GPU that torch can use; try cpu")
    return device
