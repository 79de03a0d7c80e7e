"""Search: ask for a density, submit a trial, tell the study what came of it."""

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from autocompress.constraint import Checked
from autocompress.goal import Direction
from autocompress.posterior import Posterior
from autocompress.sampler import ThresholdSampler, make_sampler
from autocompress.storage import StudyFolder
from autocompress.trial import Bound, RealizationError, TrialResult, TrialSpec, run_trial

PROBABILITY = 0.9  # with which the answer's true drop shall be within the bound
ALIKE = 0.01  # values that differ by less, relative to the better one, are as good as each other
TOLERANCE = 0.15  # share of the threshold's density to within which it shall be known, unless told otherwise
BUDGET_SPENT = "the budget of trials is spent"
INTERRUPTED = "interrupted"


class Events(Protocol):
    """What a search reports as it goes."""

    def trial(self, result: TrialResult) -> None:
        """A trial has finished; it is saved and the study knows of it."""

    def failed(self, number: int, reason: str) -> None:
        """A trial ended without a result."""


@dataclass(frozen=True)
class Plan:
    """What is searched and for how long.

    Attributes:
        low: The lowest density to propose; 1 when the scheme has no density to search over.
        bound: What may be lost.
        trials: Trials in all, those of an earlier run of the study included.
        timeout_s: Seconds after which no further trial begins; None for no limit.
        workers: Trials at a time.
        tolerance: The search ends when the threshold's density is known to within this share.
    """

    low: float
    bound: Bound
    trials: int
    timeout_s: float | None = None
    workers: int = 1
    tolerance: float = TOLERANCE


class _Held(JournalFileSymlinkLock):
    """No lock: the study's folder has one, and Optuna's own would outlive a killed process for half a minute."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def open_study(journal: Path, direction: Direction | None = None) -> optuna.Study:
    """The study kept in ``journal``: as it was left, to be read; or to go on with, where a direction is given."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if direction is None:
        return optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend(str(journal))))
    _drop_half_line(journal)
    storage = JournalStorage(JournalFileBackend(str(journal), _Held(str(journal))))
    return optuna.create_study(storage=storage, direction=direction, study_name="study", load_if_exists=True)


def _drop_half_line(journal: Path) -> None:
    """Takes back a last line that a killed process did not write to its end: another would be appended to it."""
    if journal.is_file() and not (written := journal.read_bytes()).endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(written.rfind(b"\n") + 1)


def set_sampler(study: optuna.Study, name: str, plan: Plan, seed: int) -> None:
    """Gives the study its sampler, which goes on where the study's trials end."""
    study.sampler = make_sampler(name, low=min(plan.low, 0.99), max_drop=plan.bound.max_drop, seed=seed)


def add_dense(study: optuna.Study, value: float, bound: Bound, constraints: Sequence[Checked] = ()) -> None:
    """Enters the dense model as the study's trial 0: density 1 and nothing lost, at no cost."""
    if study.get_trials(deepcopy=False):
        return
    study.add_trial(
        optuna.trial.create_trial(
            value=value,
            params={"density": 1.0},
            distributions={"density": FloatDistribution(1e-6, 1.0, log=True)},
            user_attrs={"drop": 0.0, "drop_se": 0.0, "dense": True},
            constraints={"drop": -bound.max_drop, **{one.text: one.excess for one in constraints}},
        )
    )


def search(
    study: optuna.Study,
    plan: Plan,
    make_spec: Callable[[int, float], TrialSpec],
    executor: Executor,
    folder: StudyFolder,
    events: Events,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Runs trials until the answer is known well enough or the budget is spent; returns which, in words.

    Trials that run when a search is cut short are left as they are: the next search of the study runs them again,
    at their densities and with their seeds, and so comes to the same answer.

    Args:
        study: An Optuna study with the dense model as trial 0.
        plan: What is searched and for how long.
        make_spec: The trial of that number at that density.
        executor: Runs the trials: in this process, a pool, or a cluster.
        folder: Keeps every trial before the study knows of it, so that a kill loses none.
        events: Is told of every trial, in the order in which they finish.
        asked_to_stop: Whether no further trial shall begin; those that run are waited for.
    """
    deadline = time.monotonic() + plan.timeout_s if plan.timeout_s else None
    cut_short = _running(study)
    pending: dict[Future[TrialResult], optuna.Trial] = {}

    def reason_to_stop() -> str | None:
        if asked_to_stop():
            return INTERRUPTED
        if deadline is not None and time.monotonic() > deadline:
            return "the time is up"
        return None if cut_short else _reason_to_stop(study, plan)

    try:
        while True:
            stop = None
            while len(pending) < plan.workers and (stop := reason_to_stop()) is None:
                trial = cut_short.pop(0) if cut_short else study.ask()
                density = trial.suggest_float("density", plan.low, 1.0, log=True) if plan.low < 1 else 1.0
                pending[executor.submit(run_trial, make_spec(trial.number, density))] = trial
            if not pending:
                return stop or BUDGET_SPENT
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                _tell(study, pending.pop(future), future, plan.bound, folder, events)
    except KeyboardInterrupt:
        return INTERRUPTED


def adopt(study: optuna.Study, bound: Bound, folder: StudyFolder) -> None:
    """Counts the trials that a killed run had saved but not told the study of."""
    for trial in _running(study):
        with contextlib.suppress(ValueError):  # not saved, or not whole: it will run again
            _record(study, trial, folder.load_trial(trial.number), bound)


def _running(study: optuna.Study) -> list[optuna.Trial]:
    return [optuna.Trial(study, trial._trial_id) for trial in _states(study, TrialState.RUNNING)]


def _begun(study: optuna.Study) -> int:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return len(states) - states.count(TrialState.WAITING) - 1  # one is the dense model


def _reason_to_stop(study: optuna.Study, plan: Plan) -> str | None:
    """Why no further trial shall begin, in words. Sees to it that the last ones settle the answer."""
    left = plan.trials - _begun(study)
    if left <= 0:
        return BUDGET_SPENT
    if plan.low == 1:
        return "the scheme has no density to search over" if _begun(study) else None
    if isinstance(study.sampler, optuna.samplers.GridSampler) and study.sampler.is_exhausted(study):
        return "the grid is complete"
    if not isinstance(study.sampler, ThresholdSampler) or not finished(study):
        return None
    known = study.sampler.done(study.get_trials(deepcopy=False), plan.tolerance)
    if known or left <= max(1, plan.trials // 4):
        density = _missing(study, plan)
        if density is not None and not _is_running(study, density):
            study.enqueue_trial({"density": density}, skip_if_exists=True)
            return None
    return known


def _is_running(study: optuna.Study, density: float) -> bool:
    """Whether a trial runs at about that density."""
    running = [trial.params.get("density", 1.0) for trial in _states(study, TrialState.RUNNING)]
    return any(abs(one / density - 1) <= TOLERANCE for one in running)


def _states(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _missing(study: optuna.Study, plan: Plan) -> float | None:
    """The density at which the answer should lie, if no trial near it is known to be feasible."""
    belief, best = posterior(study, plan), answer(study, plan)
    assert belief is not None
    density = belief.threshold(PROBABILITY)
    if best is not None and belief.p_feasible(best.params["density"]) >= PROBABILITY:
        return density if best.params["density"] > (1 + plan.tolerance) * density else None
    return density


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    future: "Future[TrialResult]",
    bound: Bound,
    folder: StudyFolder,
    events: Events,
) -> None:
    """Enters a finished trial into the study. What failed for a reason of its own is recorded as failed."""
    try:
        result = future.result()
    except (RealizationError, FloatingPointError, torch.OutOfMemoryError, BrokenExecutor) as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.FAIL)
        events.failed(trial.number, str(error))
        return
    folder.save_trial(result)
    _record(study, trial, result, bound)
    events.trial(result)


def _record(study: optuna.Study, trial: optuna.Trial, result: TrialResult, bound: Bound) -> None:
    attributes, constraints = entry_of(result, bound)
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for name, excess in constraints.items():
        if name not in trial.constraints:  # a killed process may have set some
            trial.set_constraint(name, excess)
    study.tell(trial, result.value)


def entry_of(result: TrialResult, bound: Bound) -> tuple[dict[str, Any], dict[str, float]]:
    """A trial's user attributes and constraints in the study."""
    drop, drop_se = result.effective_drop(bound.max_drop)
    names = ("score", "density", "feasible", "rejected", "seconds", "steps", "start")
    attributes = {name: getattr(result, name) for name in names}
    # Without a constraint the trial would count as feasible.
    constraints = {"drop": (drop if result.rejected else result.drop) - bound.max_drop}
    constraints |= {one.text: one.excess for one in result.constraints}
    return {**attributes, "noise": result.measurement.noise, "drop": drop, "drop_se": drop_se}, constraints


def failures(study: optuna.Study) -> list[tuple[int, str]]:
    """The number and the reason of each trial that ended without a result."""
    failed = _states(study, TrialState.FAIL)
    return [(trial.number, trial.user_attrs.get("reason", "cut short")) for trial in failed]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The study's finished trials without the dense model."""
    return [trial for trial in _states(study, TrialState.COMPLETE) if not trial.user_attrs.get("dense")]


def posterior(study: optuna.Study, plan: Plan) -> Posterior | None:
    """What the trials say about the lowest feasible density; None for a scheme without a density."""
    if plan.low == 1:
        return None
    sampler = study.sampler
    if not isinstance(sampler, ThresholdSampler):
        sampler = ThresholdSampler(plan.low, plan.bound.max_drop)
    return sampler.posterior(study.get_trials(deepcopy=False))


def answer(study: optuna.Study, plan: Plan, lost: Collection[int] = ()) -> FrozenTrial | None:
    """The trial that the search answers with; None if none is feasible on val.

    Not the study's best trial, which its own selection has made look better than it is, but the best of those
    whose true drop is within the bound with a probability of 90% given all the trials; of several that are as good
    as that to a percent, or to what their latencies are known to, the one that lost least. Failing that the most
    probable one.

    Args:
        study: The study.
        plan: What is searched.
        lost: Trials whose record or weights are damaged: what they found counts, but they cannot be the answer.
    """
    feasible = [t for t in finished(study) if t.user_attrs["feasible"] and t.number not in lost]
    belief = posterior(study, plan)
    if not feasible or belief is None:
        return feasible[0] if feasible else None
    p = {trial.number: belief.p_feasible(trial.params["density"]) for trial in feasible}
    probable = [trial for trial in feasible if p[trial.number] >= PROBABILITY]
    if not probable:
        return max(feasible, key=lambda trial: p[trial.number])
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    best = min(sign * (trial.value or 0.0) for trial in probable)
    noise = {trial.number: max(ALIKE, trial.user_attrs.get("noise", 0.0)) for trial in probable}
    alike = [t for t in probable if sign * (t.value or 0.0) - best <= noise[t.number] * abs(best)]
    return min(alike, key=lambda trial: trial.user_attrs["drop"])
