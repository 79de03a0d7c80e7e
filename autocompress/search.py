"""Search: ask for a configuration, submit a trial, tell the study what came of it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from autocompress.arms import ArmSampler, of_arm
from autocompress.constraint import Checked
from autocompress.goal import Direction
from autocompress.sampler import ThresholdSampler, asked_density
from autocompress.samplers import make_sampler
from autocompress.selection import PROBABILITY, answer, finished, posterior
from autocompress.space import Arm, Configuration, Space
from autocompress.storage import StudyFolder
from autocompress.trial import Bound, RealizationError, TrialResult, TrialSpec, run_trial

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
        space: What each trial may choose from.
        bound: What may be lost.
        trials: Trials in all, those of an earlier run of the study included.
        timeout_s: Seconds after which no further trial begins; None for no limit.
        workers: Trials at a time.
        tolerance: The search ends when the threshold's density is known to within this share.
        steps: Gradient steps of all trials together after which no further one begins; None for no limit.
    """

    space: Space
    bound: Bound
    trials: int
    timeout_s: float | None = None
    workers: int = 1
    tolerance: float = TOLERANCE
    steps: int | None = None


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
    study.sampler = make_sampler(name, plan.space, plan.bound.max_drop, seed, plan.tolerance)


def add_dense(
    study: optuna.Study, space: Space, value: float, bound: Bound, constraints: Sequence[Checked] = ()
) -> None:
    """Enters the dense model as the study's trial 0: density 1 and nothing lost, at no cost."""
    if study.get_trials(deepcopy=False):
        return
    study.add_trial(
        optuna.trial.create_trial(
            value=value,
            params=space.dense_params,
            distributions=space.distributions,
            user_attrs={"drop": 0.0, "drop_se": 0.0, "dense": True},
            constraints={"drop": -bound.max_drop, **{one.text: one.excess for one in constraints}},
        )
    )


def search(
    study: optuna.Study,
    plan: Plan,
    make_spec: Callable[[int, Configuration], TrialSpec],
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
        make_spec: The trial of that number in that configuration.
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
                spec = make_spec(trial.number, plan.space.suggest(trial))
                pending[executor.submit(run_trial, spec)] = trial
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
    if plan.steps is not None and sum(t.user_attrs.get("steps", 0) for t in finished(study)) >= plan.steps:
        return "the budget of epochs is spent"
    if plan.space.low == 1 and len(plan.space.arms) == 1:
        return "the scheme has no density to search over" if _begun(study) else None
    if isinstance(study.sampler, optuna.samplers.GridSampler) and study.sampler.is_exhausted(study):
        return "the grid is complete"
    if not isinstance(study.sampler, ThresholdSampler | ArmSampler) or not finished(study):
        return None
    trials = study.get_trials(deepcopy=False)
    if isinstance(study.sampler, ArmSampler):
        arm, known = study.sampler.best(trials, study.directions), study.sampler.done(trials, study.directions)
    else:
        arm, known = plan.space.arms[0], study.sampler.done(trials, plan.tolerance)
    if known or left <= max(1, plan.trials // 4):
        density = _missing(study, plan, arm) if arm else None
        if arm and density is not None and not _is_running(study, arm, density):
            study.enqueue_trial(plan.space.params_at(arm, density), skip_if_exists=True)
            return None
    return known


def _is_running(study: optuna.Study, arm: Arm, density: float) -> bool:
    """Whether a trial of the arm runs at about that density."""
    running = of_arm(arm, _states(study, TrialState.RUNNING))
    return any(abs(trial.params["density"] / density - 1) <= TOLERANCE for trial in running)


def _states(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _missing(study: optuna.Study, plan: Plan, arm: Arm) -> float | None:
    """The density at which an arm's answer should lie, if no trial near it is known to be feasible."""
    belief, best = posterior(study, plan.space, plan.bound, arm), answer(study, plan.space, plan.bound)
    if belief is None:
        return None
    density = belief.threshold(PROBABILITY)
    if best is not None and arm.holds(best.params):
        found = asked_density(best)
        if belief.p_feasible(found) >= PROBABILITY:
            return density if found > (1 + plan.tolerance) * density else None
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
    names = ("score", "density", "density_asked", "feasible", "rejected", "seconds", "steps", "start")
    attributes = {name: getattr(result, name) for name in names} | {"drop": drop, "drop_se": drop_se}
    # Without a constraint the trial would count as feasible.
    constraints = {"drop": (drop if result.rejected else result.drop) - bound.max_drop}
    constraints |= {one.text: one.excess for one in result.constraints}
    return {**attributes, "noise": result.measurement.noise}, constraints


def failures(study: optuna.Study) -> list[tuple[int, str]]:
    """The number and the reason of each trial that ended without a result."""
    failed = _states(study, TrialState.FAIL)
    return [(trial.number, trial.user_attrs.get("reason", "cut short")) for trial in failed]
