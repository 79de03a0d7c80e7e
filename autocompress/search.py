"""Search: asks the sampler for a configuration, submits a trial, tells the study its result.

A *coordinator* is a process that runs `search`; several may share one study. The *answer* is the trial that the
study would report now, see `autocompress.searching.selection`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from autocompress.disk.storage import StudyFolder
from autocompress.sampler import APART, ThresholdSampler, affordable_depth, asked_density
from autocompress.searching.arms import ArmSampler, of_arm
from autocompress.searching.samplers import make_sampler
from autocompress.searching.selection import PROBABILITY, answer, finished, posterior
from autocompress.searching.space import Arm, Configuration, Space
from autocompress.trial import Bound, RealizationError, TrialResult, TrialSpec, run_trial
from autocompress.verdict.constraint import Checked

TOLERANCE = 0.15  # default relative precision to which the threshold's density is to be known
SPARSER = 1.3  # an answer this many times sparser than the present one is tried for before the last trials, too
HOPELESS = 0.1  # densities with at most this probability of being within the bound are not tried for the answer
BUDGET_SPENT = "the budget of trials is spent"
INTERRUPTED = "interrupted"
TIME_IS_UP = "the time is up"
WAIT_FOR_OTHERS_S = 1.0  # interval at which to check whether other coordinators' last trials have finished


class Events(Protocol):
    """Callbacks of a search."""

    def begins(self, number: int) -> None:
        """Called before a trial is submitted."""

    def trial(self, result: TrialResult) -> None:
        """Called after a trial has finished, has been saved and has been told to the study."""

    def failed(self, number: int, reason: str) -> None:
        """Called after a trial has ended without a result."""


@dataclass(frozen=True)
class Plan:
    """The search space, the bound and the budget of a search.

    Attributes:
        space: The configurations that trials may have.
        bound: The largest allowed drop.
        trials: Number of trials, including those of an earlier run of the study.
        timeout_s: Seconds after which no further trial begins; None for no limit.
        workers: Number of trials that run at a time.
        tolerance: The search ends when the 80% interval of the threshold's density is relatively this narrow; in
            the last quarter of its trials also when its answer is within this fraction of the lowest density that
            is within the bound with a probability of 90%.
        steps: Gradient steps of all trials together after which no further one begins; None for no limit.
    """

    space: Space
    bound: Bound
    trials: int
    timeout_s: float | None = None
    workers: int = 1
    tolerance: float = TOLERANCE
    steps: int | None = None


def set_sampler(study: optuna.Study, name: str, plan: Plan, seed: int) -> None:
    """Sets the study's sampler, which depends on the study's trials alone and so continues an earlier search."""
    study.sampler = make_sampler(name, plan.space, plan.bound.max_drop, seed, plan.tolerance)


def add_dense(
    study: optuna.Study, space: Space, values: Sequence[float], bound: Bound, constraints: Sequence[Checked] = ()
) -> None:
    """Adds the dense model to an empty study as trial 0, of density 1 and drop 0.

    Args:
        study: The Optuna study; left unchanged if it has trials already.
        space: The search space.
        values: The dense model's objectives.
        bound: The largest allowed drop.
        constraints: The constraints, checked on the dense model.
    """
    if study.get_trials(deepcopy=False):
        return
    study.add_trial(
        optuna.trial.create_trial(
            values=values,
            params=space.dense_params,
            distributions=space.distributions,
            user_attrs={"drop": 0.0, "drop_se": 0.0, "dense": True, **_cost_excess(constraints)},
            constraints={"drop": -bound.max_drop, **{checked.text: checked.excess for checked in constraints}},
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
    """Runs trials until the answer is known well enough or the budget is spent.

    Trials that are running when a search is cut short stay in the state RUNNING: the next search of the study runs
    them again, with their densities and seeds, and so arrives at the same answer. If several coordinators share
    the study, each also runs the trials that a killed one has left, and returns when all trials are finished.

    Args:
        study: An Optuna study with the dense model as trial 0.
        plan: The search space, the bound and the budget.
        make_spec: Makes the spec of a trial from its number and its configuration.
        executor: Runs the trials: in this process, a pool, or a cluster.
        folder: The study's folder, where each trial is saved before the study is told, so that a kill loses none.
        events: Receives all events, in the order in which trials finish.
        asked_to_stop: Returns whether no further trial shall begin; running ones are waited for.

    Returns:
        The reason why the search ended, in words.
    """
    deadline = time.monotonic() + plan.timeout_s if plan.timeout_s else None
    pending: dict[Future[TrialResult], optuna.Trial] = {}

    def begin() -> str | None:
        """Submits a trial, or returns the reason why none is to begin."""
        if asked_to_stop():
            return INTERRUPTED
        if deadline is not None and time.monotonic() > deadline:
            return TIME_IS_UP
        with folder.turn():
            for result in adopt(study, plan.bound, folder):  # trials of another coordinator that was killed
                events.trial(result)
            trial = next(_abandoned(study, folder), None)
            if trial is None:
                if reason := _reason_to_stop(study, plan):
                    return reason
                trial = study.ask()
                folder.claim(trial.number)
            spec = make_spec(trial.number, plan.space.suggest(trial))
        events.begins(trial.number)
        pending[executor.submit(run_trial, spec)] = trial
        return None

    try:
        while True:
            stop = None
            while len(pending) < plan.workers and (stop := begin()) is None:
                pass
            if pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    _tell(study, pending.pop(future), future, plan.bound, folder, events)
            elif stop in (INTERRUPTED, TIME_IS_UP) or not _states(study, TrialState.RUNNING):
                return stop or BUDGET_SPENT
            else:
                time.sleep(WAIT_FOR_OTHERS_S)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        folder.give_back()


def adopt(study: optuna.Study, bound: Bound, folder: StudyFolder) -> list[TrialResult]:
    """Tells the study the results that a killed coordinator had saved but not told, and returns them."""
    adopted = []
    for trial in _abandoned(study, folder):
        with contextlib.suppress(ValueError):  # not saved, or incomplete: it will run again
            result = folder.load_trial(trial.number)
            _record(study, trial, result, bound)
            adopted.append(result)
        folder.give_back(trial.number)
    return adopted


def _abandoned(study: optuna.Study, folder: StudyFolder) -> Iterator[optuna.Trial]:
    """Claims, one after the other, the trials in state RUNNING that no coordinator has claimed."""
    for trial in _states(study, TrialState.RUNNING):
        if not folder.claim(trial.number):
            continue
        if study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
            yield optuna.Trial(study, trial._trial_id)
        else:  # it finished between the two looks, and its coordinator gave the claim back
            folder.give_back(trial.number)


def _n_begun(study: optuna.Study) -> int:
    """The number of trials that have begun, without the dense model's trial 0."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return len(states) - states.count(TrialState.WAITING) - 1


def _reason_to_stop(study: optuna.Study, plan: Plan) -> str | None:
    """The reason why no further trial is to begin, if any; otherwise may enqueue the next one, see `_settled`."""
    n_left = plan.trials - _n_begun(study)
    if n_left <= 0:
        return BUDGET_SPENT
    if plan.steps is not None and sum(t.user_attrs.get("steps", 0) for t in finished(study)) >= plan.steps:
        return "the budget of epochs is spent"
    if plan.space.low == 1 and len(plan.space.arms) == 1:
        return "the scheme has no density to search over" if _n_begun(study) else None
    if isinstance(study.sampler, optuna.samplers.GridSampler) and study.sampler.is_exhausted(study):
        return "the grid is complete"
    if not isinstance(study.sampler, ThresholdSampler | ArmSampler) or not finished(study):
        return None
    trials = study.get_trials(deepcopy=False)
    if isinstance(study.sampler, ArmSampler):
        arm, reason = study.sampler.best(trials, study.directions), study.sampler.done(trials, study.directions)
    else:
        arm, reason = plan.space.arms[0], study.sampler.done(trials, plan.tolerance)
    return _settled(study, plan, arm, n_left, reason) if arm else reason


def _settled(study: optuna.Study, plan: Plan, arm: Arm, n_left: int, reason: str | None) -> str | None:
    """The reason why no further trial is to begin; None after enqueuing a trial that may become the answer.

    The sampler's proposals serve to locate the threshold, where a trial is feasible with 50% probability only; the
    answer must be feasible with 90%. So the last quarter of the trials, and those after the sampler is done, try
    the lowest density with 90% until the answer is near it. With one curve (`ThresholdSampler`), so does any trial
    while that density is much lower than the answer's.

    Args:
        study: The Optuna study.
        plan: The search space, the bound and the budget.
        arm: The arm whose answer is sought.
        n_left: Trials left in the budget.
        reason: The sampler's reason why no proposal of its own is worth a trial, if any.
    """
    has_one_curve, is_last = isinstance(study.sampler, ThresholdSampler), n_left <= max(1, plan.trials // 4)
    if not (reason or is_last or has_one_curve):
        return None
    density, best = _target_and_answer(study, plan, arm)
    ratio = asked_density(best) / density if density and best else None
    is_reached = ratio is not None and ratio <= 1 + plan.tolerance
    is_wanted = not is_reached if reason or is_last else ratio is not None and ratio > SPARSER
    if density is not None and is_wanted and not _is_running(study, arm, density):
        study.enqueue_trial(plan.space.params_at(arm, _untried(study, arm, density)), skip_if_exists=True)
        return None
    if best and is_reached and n_left <= plan.trials // 4 and has_one_curve:
        realized = best.user_attrs["density"]  # the one in tables, not the target
        probable = f"density {realized:.3g} is within the bound with {PROBABILITY:.0%} probability"
        return reason or f"{probable}, and within {plan.tolerance:.0%} of the lowest that is"
    return reason


def _untried(study: optuna.Study, arm: Arm, density: float) -> float:
    """The lowest density, at least ``density``, that differs from all that the arm has tried."""
    for tried in sorted(asked_density(trial) for trial in of_arm(arm, finished(study))):
        if abs(math.log(density / tried)) < APART:
            density = tried * math.exp(APART)
    return min(1.0, density)


def _is_running(study: optuna.Study, arm: Arm, density: float) -> bool:
    """Whether a trial of the arm is running at about that density."""
    running = of_arm(arm, _states(study, TrialState.RUNNING))
    return any(abs(trial.params["density"] / density - 1) <= TOLERANCE for trial in running)


def _states(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _target_and_answer(study: optuna.Study, plan: Plan, arm: Arm) -> tuple[float | None, FrozenTrial | None]:
    """The density that the arm's answer should have, and its present answer; each None if there is none.

    The density is the lowest one that is within the bound with 90% probability, or the highest that the limits on
    costs allow if that is lower. The answer counts only if it is within the bound with 90% probability itself.
    """
    curve, best = posterior(study, plan.space, plan.bound, arm), answer(study, plan.space, plan.bound)
    if curve is None:
        return None, None
    own = of_arm(arm, _states(study, TrialState.COMPLETE))
    density, affordable = curve.threshold(PROBABILITY), math.exp(-affordable_depth(own))
    if affordable < density and curve.p_feasible(affordable) <= HOPELESS:
        return None, None
    own_best = best if best is not None and arm.holds(best.params) else None
    is_probable = own_best is not None and curve.p_feasible(asked_density(own_best)) >= PROBABILITY
    return min(density, affordable), own_best if is_probable else None


def _tell(
    study: optuna.Study,
    trial: optuna.Trial,
    future: "Future[TrialResult]",
    bound: Bound,
    folder: StudyFolder,
    events: Events,
) -> None:
    """Saves a finished trial and tells the study; a trial that failed is recorded as failed, with the reason."""
    try:
        result = future.result()
    except (RealizationError, FloatingPointError, torch.OutOfMemoryError, BrokenExecutor) as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.FAIL)
        folder.give_back(trial.number)
        events.failed(trial.number, str(error))
        return
    folder.save_trial(result)
    _record(study, trial, result, bound)
    folder.give_back(trial.number)
    events.trial(result)


def _record(study: optuna.Study, trial: optuna.Trial, result: TrialResult, bound: Bound) -> None:
    attributes, constraints = entry_of(result, bound)
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for name, excess in constraints.items():
        if name not in trial.constraints:  # a killed process may have set it, and it can be set only once
            trial.set_constraint(name, excess)
    study.tell(trial, result.values)


def entry_of(result: TrialResult, bound: Bound) -> tuple[dict[str, Any], dict[str, float]]:
    """A trial's user attributes and constraints in the study."""
    drop, drop_se = result.effective_drop(bound.max_drop)
    names = ("score", "density", "density_asked", "feasible", "rejected", "seconds", "steps", "start")
    attributes = {name: getattr(result, name) for name in names} | {"drop": drop, "drop_se": drop_se}
    # Optuna counts a trial without constraints as feasible.
    constraints = {"drop": (drop if result.rejected else result.drop) - bound.max_drop}
    constraints |= {checked.text: checked.excess for checked in result.constraints}
    attributes |= {"noise": result.measurement.noise, **_cost_excess(result.constraints)}
    return attributes, constraints


def _cost_excess(constraints: Sequence[Checked]) -> dict[str, float]:
    """The user attribute ``cost_excess``, the largest log ratio of a cost to its limit; empty without limits."""
    excesses = [checked.excess for checked in constraints if checked.is_cost]
    return {"cost_excess": max(excesses)} if excesses else {}


def failures(study: optuna.Study) -> list[tuple[int, str]]:
    """The number and the reason of each trial that ended without a result."""
    failed = _states(study, TrialState.FAIL)
    return [(trial.number, trial.user_attrs.get("reason", "cut short")) for trial in failed]
