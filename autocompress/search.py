"""Search: ask for a configuration, submit a trial, tell the study what came of it."""

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

TOLERANCE = 0.15  # share of the threshold's density to within which it shall be known, unless told otherwise
SPARSER = 1.3  # how many times sparser a density must be to be tried for the answer before the last trials
HOPELESS = 0.1  # probability up to which a density is not worth a last trial
BUDGET_SPENT = "the budget of trials is spent"
INTERRUPTED = "interrupted"
TIME_IS_UP = "the time is up"
WAIT_FOR_OTHERS_S = 1.0  # between two looks at whether another coordinator's last trials have finished


class Events(Protocol):
    """What a search reports as it goes."""

    def begins(self, number: int) -> None:
        """A trial is about to run."""

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
        tolerance: The search ends when the threshold's density is known to within this share; in the last quarter
            of its trials also when its answer is within it of the lowest density that has a probability of 90%.
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
    """Gives the study its sampler, which goes on where the study's trials end."""
    study.sampler = make_sampler(name, plan.space, plan.bound.max_drop, seed, plan.tolerance)


def add_dense(
    study: optuna.Study, space: Space, values: Sequence[float], bound: Bound, constraints: Sequence[Checked] = ()
) -> None:
    """Enters the dense model as the study's trial 0: density 1 and nothing lost, at no cost."""
    if study.get_trials(deepcopy=False):
        return
    study.add_trial(
        optuna.trial.create_trial(
            values=values,
            params=space.dense_params,
            distributions=space.distributions,
            user_attrs={"drop": 0.0, "drop_se": 0.0, "dense": True, **_cost_excess(constraints)},
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
    at their densities and with their seeds, and so comes to the same answer. Where several coordinators share the
    study, each runs those that one that died has left, and returns when no other has any left to wait for.

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
    pending: dict[Future[TrialResult], optuna.Trial] = {}

    def begin() -> str | None:
        """Submits a trial, or says why none shall begin."""
        if asked_to_stop():
            return INTERRUPTED
        if deadline is not None and time.monotonic() > deadline:
            return TIME_IS_UP
        with folder.turn():
            for result in adopt(study, plan.bound, folder):  # of another coordinator, which has died
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
    """Counts the trials that a killed coordinator had saved but not told the study of, and returns them."""
    adopted = []
    for trial in _abandoned(study, folder):
        with contextlib.suppress(ValueError):  # not saved, or not whole: it will run again
            result = folder.load_trial(trial.number)
            _record(study, trial, result, bound)
            adopted.append(result)
        folder.give_back(trial.number)
    return adopted


def _abandoned(study: optuna.Study, folder: StudyFolder) -> Iterator[optuna.Trial]:
    """Claims, one after the other, the trials that were begun and that nobody runs."""
    for trial in _states(study, TrialState.RUNNING):
        if not folder.claim(trial.number):
            continue
        if study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
            yield optuna.Trial(study, trial._trial_id)
        else:  # whoever ran it was done just now
            folder.give_back(trial.number)


def _begun(study: optuna.Study) -> int:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return len(states) - states.count(TrialState.WAITING) - 1  # one is the dense model


def _reason_to_stop(study: optuna.Study, plan: Plan) -> str | None:
    """Why no further trial shall begin, in words. Sees to it that some of them can be the answer."""
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
    return _settled(study, plan, arm, left, known) if arm else known


def _settled(study: optuna.Study, plan: Plan, arm: Arm, left: int, known: str | None) -> str | None:
    """Why no further trial shall begin, in words, ``known`` among them. Else the next one may be for the answer.

    The last trials go to the lowest density that has the answer's probability. So does any of a study with one
    curve while that is much lower than the answer's: what is proposed for knowledge can hardly be the answer.
    """
    of_one_curve, is_last = isinstance(study.sampler, ThresholdSampler), left <= max(1, plan.trials // 4)
    if not (known or is_last or of_one_curve):
        return None
    density, found = _where_the_answer_is(study, plan, arm)
    sparser = asked_density(found) / density if density and found else None
    is_there = sparser is not None and sparser <= 1 + plan.tolerance
    is_wanted = not is_there if known or is_last else sparser is not None and sparser > SPARSER
    if density is not None and is_wanted and not _is_running(study, arm, density):
        study.enqueue_trial(plan.space.params_at(arm, _untried(study, arm, density)), skip_if_exists=True)
        return None
    if found and is_there and left <= plan.trials // 4 and of_one_curve:
        realized = found.user_attrs["density"]  # as the tables have it, not as it was asked
        probable = f"density {realized:.3g} is within the bound with {PROBABILITY:.0%} probability"
        return known or f"{probable}, and within {plan.tolerance:.0%} of the lowest that is"
    return known


def _untried(study: optuna.Study, arm: Arm, density: float) -> float:
    """The lowest density from this one up that is no experiment of the arm's again."""
    for tried in sorted(asked_density(trial) for trial in of_arm(arm, finished(study))):
        if abs(math.log(density / tried)) < APART:
            density = tried * math.exp(APART)
    return min(1.0, density)


def _is_running(study: optuna.Study, arm: Arm, density: float) -> bool:
    """Whether a trial of the arm runs at about that density."""
    running = of_arm(arm, _states(study, TrialState.RUNNING))
    return any(abs(trial.params["density"] / density - 1) <= TOLERANCE for trial in running)


def _states(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _where_the_answer_is(study: optuna.Study, plan: Plan, arm: Arm) -> tuple[float | None, FrozenTrial | None]:
    """Where an arm's answer should lie, if anywhere, as a density; its answer, where that is feasible with 90%."""
    belief, best = posterior(study, plan.space, plan.bound, arm), answer(study, plan.space, plan.bound)
    if belief is None:
        return None, None
    own = of_arm(arm, _states(study, TrialState.COMPLETE))
    density, affordable = belief.threshold(PROBABILITY), math.exp(-affordable_depth(own))
    if affordable < density and belief.p_feasible(affordable) <= HOPELESS:
        return None, None
    own_best = best if best is not None and arm.holds(best.params) else None
    probable = own_best is not None and belief.p_feasible(asked_density(own_best)) >= PROBABILITY
    return min(density, affordable), own_best if probable else None


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
        if name not in trial.constraints:  # a killed process may have set some
            trial.set_constraint(name, excess)
    study.tell(trial, result.values)


def entry_of(result: TrialResult, bound: Bound) -> tuple[dict[str, Any], dict[str, float]]:
    """A trial's user attributes and constraints in the study."""
    drop, drop_se = result.effective_drop(bound.max_drop)
    names = ("score", "density", "density_asked", "feasible", "rejected", "seconds", "steps", "start")
    attributes = {name: getattr(result, name) for name in names} | {"drop": drop, "drop_se": drop_se}
    # Without a constraint the trial would count as feasible.
    constraints = {"drop": (drop if result.rejected else result.drop) - bound.max_drop}
    constraints |= {one.text: one.excess for one in result.constraints}
    attributes |= {"noise": result.measurement.noise, **_cost_excess(result.constraints)}
    return attributes, constraints


def _cost_excess(constraints: Sequence[Checked]) -> dict[str, float]:
    """The largest excess of costs over their limits, at most 0 where all are met; nothing without limits."""
    costs = [one.excess for one in constraints if one.is_cost]
    return {"cost_excess": max(costs)} if costs else {}


def failures(study: optuna.Study) -> list[tuple[int, str]]:
    """The number and the reason of each trial that ended without a result."""
    failed = _states(study, TrialState.FAIL)
    return [(trial.number, trial.user_attrs.get("reason", "cut short")) for trial in failed]
