"""Selection: which of a study's trials is its answer, and with which probability a trial meets the bound."""

import math
from collections.abc import Collection

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from autocompress.sampler import ThresholdSampler, asked_density
from autocompress.searching.arms import ArmSampler, of_arm
from autocompress.searching.posterior import SE_FLOOR, TRAINING_NOISE, Posterior
from autocompress.searching.space import Arm, Space
from autocompress.trial import Bound

PROBABILITY = 0.9  # with which the answer's true drop must be within the bound
SMALLEST = 1e-12  # stands for an objective of 0 or less, which has no logarithm
SHORTLIST = 3  # the most trials that are scored on test
ALIKE = 0.01  # objectives that differ by less, relative to the better one, count as equal


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The study's finished trials without the dense model."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if not trial.user_attrs.get("dense")]


def posterior(study: optuna.Study, space: Space, bound: Bound, arm: Arm | None = None) -> Posterior | None:
    """The posterior of an arm's lowest feasible density, given its trials.

    Args:
        study: The study.
        space: What it searches.
        bound: What may be lost.
        arm: One of the space's arms; may be left out where it has just one.

    Returns:
        None where there is no drop curve: the scheme takes no density, or there are no arms as a dimension is a
        range.
    """
    if arm is None:
        arm = space.arms[0] if len(space.arms) == 1 else None
    if arm is None or arm.low == 1:
        return None
    seed = study.sampler.seed if isinstance(study.sampler, ThresholdSampler | ArmSampler) else 0
    return ThresholdSampler(arm.low, bound.max_drop, seed).posterior(of_arm(arm, study.get_trials(deepcopy=False)))


def p_feasible(study: optuna.Study, space: Space, bound: Bound, trial: FrozenTrial) -> float:
    """The probability that a finished trial's true drop is within the bound.

    It comes from the drop curve of the trial's arm or, where there is none, from its own drop and the noise in it.
    """
    return _p_feasible(posterior(study, space, bound, space.arm_of(trial.params)), bound, trial)


def _p_feasible(belief: Posterior | None, bound: Bound, trial: FrozenTrial) -> float:
    if belief is not None:
        return belief.p_feasible(asked_density(trial))
    noise = math.hypot(max(SE_FLOOR, trial.user_attrs.get("drop_se") or 0.0), TRAINING_NOISE)
    return float(ndtr((bound.max_drop - trial.user_attrs["drop"]) / noise))


def answer(study: optuna.Study, space: Space, bound: Bound, lost: Collection[int] = ()) -> FrozenTrial | None:
    """The trial that the search answers with; None if none is feasible on val.

    It is the best of the trials whose true drop is within the bound with a probability of 90% given all trials.
    The study's best observed trial is not used: being selected makes it look better than it is. Of trials whose
    objective is as good to within a percent, or to within the noise of their latencies, it is the one that lost
    least. If no trial has a probability of 90%, it is the most probable one. Several objectives are multiplied, so
    that no other such trial is better in all of them.

    Args:
        study: The study.
        space: The space that it searches.
        bound: The bound on the drop.
        lost: Trials whose record or weights are damaged: their results count, but they cannot be the answer.
    """
    feasible = [t for t in finished(study) if t.user_attrs["feasible"] and t.number not in lost]
    if not feasible:
        return None
    of_arms = [(trial, space.arm_of(trial.params)) for trial in feasible]
    p: dict[int, float] = {}
    for arm in (*space.arms, None):
        mine = [trial for trial, its_arm in of_arms if its_arm is arm]
        belief = posterior(study, space, bound, arm) if mine else None
        p |= {trial.number: _p_feasible(belief, bound, trial) for trial in mine}
    probable = [trial for trial in feasible if p[trial.number] >= PROBABILITY]
    if not probable:
        return max(feasible, key=lambda trial: p[trial.number])
    signs = _signs(study)
    if len(signs) > 1:
        logs = {t.number: [math.log(max(value, SMALLEST)) for value in t.values] for t in probable}
        return min(probable, key=lambda trial: sum(s * x for s, x in zip(signs, logs[trial.number], strict=True)))
    (sign,) = signs
    best = min(sign * trial.values[0] for trial in probable)
    noise = {trial.number: max(ALIKE, trial.user_attrs.get("noise", 0.0)) for trial in probable}
    alike = [t for t in probable if sign * t.values[0] - best <= noise[t.number] * abs(best)]
    return min(alike, key=lambda trial: trial.user_attrs["drop"])


def candidates(study: optuna.Study, space: Space, bound: Bound, lost: Collection[int] = ()) -> list[int]:
    """The numbers of up to three trials that may be the answer in the end, the likeliest first.

    They are the present answer; the best trial that met the bound on val, in case further trials make it more
    probable; and the answer without the present one, in case they make that less probable.

    Args:
        study: The study.
        space: The space that it searches.
        bound: The bound on the drop.
        lost: See `answer`.
    """
    now = answer(study, space, bound, lost)
    if now is None:
        return []
    hoped = [trial for trial in front(study) if trial.number not in lost][:1]
    following = answer(study, space, bound, {*lost, now.number})
    return list(dict.fromkeys(trial.number for trial in (now, *hoped, following) if trial is not None))


def shortlist(
    study: optuna.Study, space: Space, chosen: FrozenTrial, lost: Collection[int] = ()
) -> list[FrozenTrial]:
    """The trials that are scored on test, densest first: the search's answer comes last.

    Before it come up to two trials to fall back on if the answer cannot be certified: denser ones of its arm that
    met the bound on val, and lost no more there than the trials after them. As testing stops at the first trial
    that fails, one that looks worse on val must not come first.

    Args:
        study: The study.
        space: The space that it searches.
        chosen: The trial that `answer` returned.
        lost: See `answer`.
    """
    arm, listed = space.arm_of(chosen.params), [chosen]
    feasible = [t for t in finished(study) if t.user_attrs["feasible"] and t.number not in lost]
    for trial in sorted(feasible, key=lambda t: float(t.user_attrs["density"])):
        before = listed[-1]
        denser = trial.user_attrs["density"] > before.user_attrs["density"]
        safer = trial.user_attrs["drop"] <= before.user_attrs["drop"]
        if len(listed) < SHORTLIST and denser and safer and (arm is None or arm.holds(trial.params)):
            listed.append(trial)
    return listed[::-1]


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The Pareto front: the trials feasible on val that no other such trial dominates.

    A trial dominates another if it is as good by every objective and better by one. The best by the first
    objective comes first.
    """
    signs = _signs(study)
    feasible = [trial for trial in finished(study) if trial.user_attrs["feasible"]]
    costs = {t.number: [s * value for s, value in zip(signs, t.values, strict=True)] for t in feasible}

    def dominates(one: FrozenTrial, other: FrozenTrial) -> bool:
        a, b = costs[one.number], costs[other.number]
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    best = [trial for trial in feasible if not any(dominates(other, trial) for other in feasible)]
    return sorted(best, key=lambda trial: costs[trial.number])


def _signs(study: optuna.Study) -> list[int]:
    """For each objective 1 if it is minimized, -1 if it is maximized."""
    return [1 if direction == StudyDirection.MINIMIZE else -1 for direction in study.directions]
