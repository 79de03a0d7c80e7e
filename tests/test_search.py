import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from autocompress.disk.optuna_store import open_study
from autocompress.disk.storage import StudyFolder
from autocompress.goal import as_objective
from autocompress.lc import LearningCompression
from autocompress.metrics import Metric, accuracy
from autocompress.processes.workers import InProcess
from autocompress.sampler import APART, ThresholdSampler
from autocompress.schemes import Quantize16, StructPrune
from autocompress.search import (
    BUDGET_SPENT,
    INTERRUPTED,
    TOLERANCE,
    Plan,
    add_dense,
    adopt,
    search,
)
from autocompress.searching.selection import answer, candidates, finished, front, posterior, shortlist
from autocompress.searching.space import Configuration, Space
from autocompress.trial import Bound, TrialResult, TrialSpec, run_trial
from autocompress.verdict.constraint import Constraint, parse_constraint

MakeSpec = Callable[..., TrialSpec]
BOUND = Bound(0.05)
LOW = 0.15  # the tiny network can go to 0.131
QUICK = LearningCompression(epochs=1, c_steps=1, lr=0.05)


def space(low: float = LOW) -> Space:
    """The density alone."""
    return Space((StructPrune() if low < 1 else Quantize16(),), QUICK, (low,))


class Log:
    """Keeps what a search reports."""

    def __init__(self) -> None:
        self.results: list[TrialResult] = []
        self.failures: list[tuple[int, str]] = []
        self.begun: list[int] = []

    def begins(self, number: int) -> None:
        self.begun.append(number)

    def trial(self, result: TrialResult) -> None:
        self.results.append(result)

    def failed(self, number: int, reason: str) -> None:
        self.failures.append((number, reason))


class Home:
    """A study in a folder, and the search that runs in it."""

    def __init__(self, path: Path, make_spec: MakeSpec) -> None:
        self.path = path
        self._make_spec = make_spec
        self.folder = StudyFolder(path)
        self.log = Log()
        self.study = self.opened()
        add_dense(self.study, space(), [1.0], BOUND)

    def opened(self, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
        study = open_study(self.path / "journal.log", "minimize")
        study.sampler = sampler or optuna.samplers.RandomSampler(seed=0)
        return study

    def spec(self, number: int, density: float, **changes: Any) -> TrialSpec:
        return self._make_spec(number, density, bound=BOUND, **({"recovery": QUICK} | changes))

    def search(self, trials: int, executor: Executor | None = None, **plan: Any) -> str:
        changes, low = plan.pop("spec", {}), plan.pop("low", LOW)

        def make_spec(number: int, chosen: Configuration) -> TrialSpec:
            return self.spec(number, chosen.density, **changes)

        return search(
            self.study,
            Plan(**({"space": space(low), "bound": BOUND, "trials": trials} | plan)),
            make_spec,
            executor or InProcess(),
            self.folder,
            self.log,
        )

    @property
    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.study.get_trials(deepcopy=False)]


@pytest.fixture
def home(tmp_path: Path, make_spec: MakeSpec) -> Iterator[Home]:
    home = Home(tmp_path / "study", make_spec)
    yield home
    home.folder.close()


# The loop


def test_the_budget_of_trials_is_kept_and_each_is_saved_before_it_counts(home: Home) -> None:
    assert home.search(3) == BUDGET_SPENT
    assert [result.number for result in home.log.results] == [1, 2, 3]
    for trial, result in zip(finished(home.study), home.log.results, strict=True):
        assert home.folder.load_trial(trial.number) == replace(result, model=None)
        assert LOW <= trial.params["density"] <= 1
        assert (trial.number, trial.value) == (result.number, result.density)
        assert trial.user_attrs["drop"] == result.drop
        assert trial.constraints["drop"] == pytest.approx(result.drop - 0.05)
    assert home.search(3) == BUDGET_SPENT  # trials of an earlier run count
    assert len(home.log.results) == 3
    assert home.search(5) == BUDGET_SPENT
    assert [result.number for result in home.log.results] == home.log.begun == [1, 2, 3, 4, 5]


def test_a_constraint_makes_a_trial_infeasible_and_pushes_the_search_to_denser_models(home: Home) -> None:
    unreachable = Constraint(Metric("accuracy", accuracy.score), at_least=True, value=1.01)
    home.search(2, spec={"constraints": (unreachable,)})
    for trial, result in zip(finished(home.study), home.log.results, strict=True):
        (checked,) = result.constraints
        assert not result.feasible and checked.value == result.score
        assert trial.constraints["accuracy>=1.01"] == checked.excess > 0
        assert trial.constraints["drop"] == pytest.approx(result.drop - 0.05)
        assert trial.user_attrs["drop"] == max(result.drop, 0.05 + checked.excess) > 0.05
        assert home.folder.load_trial(trial.number) == replace(result, model=None)
    assert answer(home.study, space(), BOUND) is None
    belief = posterior(home.study, space(), BOUND)
    assert belief is not None and belief.p_feasible(min(r.density for r in home.log.results)) < 0.2


def test_a_constraint_that_is_met_with_room_changes_nothing(home: Home, make_spec: MakeSpec) -> None:
    easy = run_trial(make_spec(constraints=(parse_constraint("accuracy>=0.01"),)))
    plain = run_trial(make_spec())
    assert easy.effective_drop(0.1) == plain.effective_drop(0.1) == (plain.drop, plain.drop_se)
    assert easy.feasible == plain.feasible


def test_the_dense_model_is_trial_zero_and_free(home: Home) -> None:
    add_dense(home.study, space(), [1.0], BOUND)  # as on resuming
    (dense,) = home.study.trials
    assert (dense.number, dense.value, dense.state) == (0, 1.0, TrialState.COMPLETE)
    assert dense.params == {"density": 1.0}
    assert dense.user_attrs["drop"] == 0.0
    assert dense.constraints == {"drop": -0.05}
    assert finished(home.study) == []
    assert home.study.best_trial.number == 0


def test_the_same_seed_makes_the_same_search(tmp_path: Path, make_spec: MakeSpec) -> None:
    found = []
    for name in ("a", "b"):
        home = Home(tmp_path / name, make_spec)
        home.study = home.opened(ThresholdSampler(LOW, BOUND.max_drop, seed=3))
        stopped = home.search(4)
        found.append((stopped, [replace(result, model=None, seconds=0.0) for result in home.log.results]))
        home.folder.close()
    assert found[0] == found[1]


def test_no_trial_begins_after_the_time_is_up(home: Home) -> None:
    assert home.search(3, timeout_s=1e-9) == "the time is up"
    assert home.log.results == []
    assert home.search(3, timeout_s=3600) == BUDGET_SPENT


def test_no_trial_begins_after_the_steps_are_spent(home: Home) -> None:
    home.search(1)
    (first,) = home.log.results
    assert first.steps > 0
    assert home.search(9, steps=first.steps + 1) == "the budget of epochs is spent"
    assert len(home.log.results) == 2
    assert home.search(3, steps=None) == BUDGET_SPENT


def test_a_scheme_without_a_density_is_tried_once(home: Home) -> None:
    stopped = home.search(5, low=1.0, spec={"scheme": Quantize16()})
    assert stopped == "the scheme has no density to search over"
    (result,) = home.log.results
    assert result.density == result.density_asked == 1.0
    plan = space(1.0), BOUND
    assert posterior(home.study, *plan) is None
    chosen = answer(home.study, *plan)
    assert (chosen is not None) == result.feasible


def test_a_search_that_knows_ends_with_a_trial_at_its_answer(home: Home) -> None:
    """Every density is feasible: it goes to the lowest one and stops long before its budget is spent."""
    home.study = home.opened(ThresholdSampler(0.5, 0.9, seed=0))
    stopped = home.search(20, low=0.5, bound=Bound(0.9), spec={"recovery": LearningCompression(epochs=2)})
    assert stopped != BUDGET_SPENT
    assert len(home.log.results) < 10
    chosen = answer(home.study, space(0.5), Bound(0.9))
    assert chosen is not None and chosen.user_attrs["density"] <= 0.5 * (1 + TOLERANCE)


def test_the_last_trials_are_spared_where_the_answer_is_found(home: Home) -> None:
    home.study = home.opened(ThresholdSampler(LOW, BOUND.max_drop))
    for density, drop in ((0.9, 0.0), (0.6, 0.002), (0.45, 0.01), (0.36, 0.02), (0.3, 0.04), (0.21, 0.07)):
        told(home.study, density, drop, drop_se=0.008, kept=0.99 * density)
    stopped = home.search(8)
    assert (
        stopped == "density 0.297 is within the bound with 90% probability, and within 15% of the lowest that is"
    )
    assert home.log.results == []
    assert (
        home.search(8, tolerance=1e-3) == BUDGET_SPENT
    )  # within a thousandth it is not, and there are more to try
    assert len(home.log.results) == 2


def test_a_density_that_can_be_a_much_sparser_answer_is_tried_before_the_last_trials(home: Home) -> None:
    home.study = home.opened(sampler := ThresholdSampler(LOW, BOUND.max_drop))
    told(home.study, 0.9, 0.0)
    told(home.study, 0.3, 0.055, drop_se=0.01)
    belief = sampler.posterior(home.study.trials)
    assert 0.9 / belief.threshold(0.9) > 1.5
    assert home.search(12, InterruptedAt(1)) == INTERRUPTED
    assert home.study.trials[-1].params["density"] == pytest.approx(belief.threshold(0.9))


def test_the_last_trial_repeats_none_that_was_nearly_the_answer(home: Home) -> None:
    home.study = home.opened(sampler := ThresholdSampler(LOW, BOUND.max_drop))
    for density, drop in ((0.9, 0.0), (0.3, 0.055), (0.35, 0.04)):
        told(home.study, density, drop, drop_se=0.01)
    assert sampler.posterior(home.study.trials).threshold(0.9) == pytest.approx(0.35, rel=0.005)
    assert home.search(4, InterruptedAt(1)) == INTERRUPTED
    assert home.study.trials[-1].params["density"] == pytest.approx(0.35 * math.exp(APART))


def test_a_trial_goes_to_the_threshold_where_no_answer_can_be_much_sparser(home: Home) -> None:
    home.study = home.opened(sampler := ThresholdSampler(LOW, BOUND.max_drop))
    for density, drop in ((0.45, 0.02), (0.25, 0.1)):
        told(home.study, density, drop, drop_se=0.01)
    belief = sampler.posterior(home.study.trials)
    assert 1.1 < 0.45 / belief.threshold(0.9) < 1.3
    assert home.search(12, InterruptedAt(1)) == INTERRUPTED
    assert home.study.trials[-1].params["density"] < 0.98 * belief.threshold(0.9)


# What goes wrong


def test_a_diverged_trial_is_recorded_and_the_search_goes_on(home: Home) -> None:
    diverging = LearningCompression(epochs=4, lr=1e20)
    assert home.search(2, spec={"recovery": diverging}) == BUDGET_SPENT
    assert home.states[1:] == [TrialState.FAIL] * 2
    assert [number for number, _ in home.log.failures] == [1, 2]
    assert all("diverged" in reason for _, reason in home.log.failures)
    assert "diverged" in home.study.trials[1].user_attrs["reason"]
    assert answer(home.study, space(), BOUND) is None
    assert home.search(3) == BUDGET_SPENT  # failed trials count against the budget
    assert [result.number for result in home.log.results] == [3]


def test_an_error_that_is_no_trials_own_ends_the_search(home: Home) -> None:
    def fails(measurement: object) -> float:
        raise KeyError("x")

    with pytest.raises(ValueError, match="the objective 'fails' raised"):
        home.search(3, spec={"objectives": (as_objective(fails),)})
    assert home.states == [TrialState.COMPLETE, TrialState.RUNNING]
    assert home.search(1) == BUDGET_SPENT  # what was running runs again
    assert [result.number for result in home.log.results] == [1]


class InterruptedAt(InProcess):
    """Ctrl-C while call number ``n`` runs."""

    def __init__(self, n: int) -> None:
        self._left = n

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return super().submit(fn, *args, **kwargs)


def test_an_interrupted_search_keeps_what_it_has_and_can_go_on(home: Home) -> None:
    assert home.search(4, InterruptedAt(3)) == INTERRUPTED
    assert [result.number for result in home.log.results] == [1, 2]
    assert home.states == [TrialState.COMPLETE] * 3 + [TrialState.RUNNING]
    proposed = home.study.trials[3].params
    home.study = home.opened()
    assert home.search(4) == BUDGET_SPENT
    assert [result.number for result in home.log.results] == [1, 2, 3, 4]
    assert home.study.trials[3].params == proposed


class Together(Executor):
    """Runs its calls only when ``n`` have come in, the last one first."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        self.most = max(self.most, len(self._waiting))
        if len(self._waiting) == self._n:
            while self._waiting:
                last, call = self._waiting.pop()
                last.set_result(call())
        return future


def test_trials_at_a_time_are_never_more_than_the_workers(home: Home) -> None:
    executor = Together(3)
    assert home.search(6, executor, workers=3) == BUDGET_SPENT
    assert executor.most == 3
    assert sorted(result.number for result in home.log.results) == [1, 2, 3, 4, 5, 6]
    for trial in finished(home.study):  # each trial was told its own result
        assert trial.value == home.folder.load_trial(trial.number).density
        assert home.folder.load_trial(trial.number).density_asked == trial.params["density"]


# What a killed run leaves


def test_trials_that_were_running_are_adopted_or_run_again(home: Home) -> None:
    saved, unsaved, damaged = (home.study.ask() for _ in range(3))
    densities = [trial.suggest_float("density", LOW, 1.0, log=True) for trial in (saved, unsaved, damaged)]
    result = run_trial(home.spec(1, densities[0]))
    home.folder.save_trial(result)
    home.folder.save_trial(run_trial(home.spec(3, densities[2])))
    record = home.folder.trial(3) / "trial.json"
    record.write_text(record.read_text()[:50])
    home.study = home.opened()
    adopt(home.study, BOUND, home.folder)
    assert home.states == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING] * 2
    (adopted,) = finished(home.study)
    assert (adopted.number, adopted.value) == (1, result.density)
    assert adopted.user_attrs["drop"] == result.drop
    assert adopted.constraints["drop"] == pytest.approx(result.drop - 0.05)
    assert home.search(3) == BUDGET_SPENT
    assert [result.density_asked for result in home.log.results] == densities[1:]
    assert home.states == [TrialState.COMPLETE] * 4


# The answer


def told(
    study: optuna.Study,
    density: float,
    drop: float,
    drop_se: float = 0.004,
    value: float | None = None,
    kept: float | None = None,
) -> int:
    """Enters a finished trial, asked for ``density`` and with ``kept`` where that is another; its number."""
    study.add_trial(
        optuna.trial.create_trial(
            values=(density if value is None else value,),
            params={"density": density},
            distributions={"density": FloatDistribution(LOW, 1.0, log=True)},
            user_attrs={
                "drop": drop,
                "drop_se": drop_se,
                "density": density if kept is None else kept,
                "feasible": drop <= BOUND.max_drop,
            },
            constraints={"drop": drop - BOUND.max_drop},
        )
    )
    return len(study.trials) - 1


def test_a_lucky_trial_is_not_the_answer(home: Home) -> None:
    """0.2 looks feasible by a hair among worse neighbours: the answer is the smallest that is so with 90%."""
    for density, drop in ((0.9, 0.0), (0.6, 0.002), (0.21, 0.07), (0.19, 0.08), (0.18, 0.09)):
        told(home.study, density, drop)
    safe = told(home.study, 0.4, 0.004)
    lucky = told(home.study, 0.2, 0.049)
    plan = space(), BOUND
    belief, chosen = posterior(home.study, *plan), answer(home.study, *plan)
    assert home.study.best_trial.number == lucky
    assert belief is not None and belief.p_feasible(0.2) < 0.9 <= belief.p_feasible(0.4)
    assert chosen is not None and chosen.number == safe


def test_candidates_are_the_answer_now_and_what_more_trials_may_make_of_it(home: Home) -> None:
    plan = space(), BOUND
    assert candidates(home.study, *plan) == []
    first = told(home.study, 0.9, 0.0)
    assert candidates(home.study, *plan) == [first]
    second = told(home.study, 0.6, 0.002)
    for density, drop in ((0.21, 0.07), (0.19, 0.08), (0.18, 0.09)):
        told(home.study, density, drop)
    safe, lucky = told(home.study, 0.4, 0.004), told(home.study, 0.2, 0.049)
    assert candidates(home.study, *plan) == [safe, lucky, second]
    assert candidates(home.study, *plan, lost={lucky}) == [safe, second]


def test_among_the_probable_the_objective_decides_in_its_direction(tmp_path: Path) -> None:
    for direction, expected in (("minimize", 0.7), ("maximize", 0.9)):
        study = open_study(tmp_path / f"{direction}.log", direction)
        add_dense(study, space(), [0.5], BOUND)
        for density, value in ((0.7, 1.0), (0.8, 2.0), (0.9, 3.0)):
            told(study, density, 0.0, value=value)
        chosen = answer(study, space(), BOUND)
        assert chosen is not None and chosen.params["density"] == expected


def test_of_trials_that_are_as_good_the_one_that_lost_least_answers(home: Home) -> None:
    told(home.study, 0.7, 0.002, value=0.700)
    safer = told(home.study, 0.7, 0.0, value=0.703)
    told(home.study, 0.7, -0.01, value=0.710)
    chosen = answer(home.study, space(), BOUND)
    assert chosen is not None and chosen.number == safer


def test_without_a_probable_trial_the_most_probable_answers(home: Home) -> None:
    told(home.study, 0.9, 0.09)
    likelier = told(home.study, 0.8, 0.0499)
    told(home.study, 0.7, 0.12)
    told(home.study, 0.6, 0.0499)
    plan = space(), BOUND
    belief, chosen = posterior(home.study, *plan), answer(home.study, *plan)
    assert belief is not None and belief.p_feasible(0.6) < belief.p_feasible(0.8) < 0.9
    assert chosen is not None and chosen.number == likelier


def test_the_shortlist_falls_back_on_denser_trials_that_lost_no_more(home: Home) -> None:
    told(home.study, 0.9, -0.002)
    told(home.study, 0.85, 0.0)
    worse = told(home.study, 0.8, 0.02)
    safer = told(home.study, 0.7, 0.004)
    chosen = told(home.study, 0.5, 0.01)
    told(home.study, 0.6, 0.2)
    told(home.study, 0.3, 0.0)  # sparser than what was chosen

    def numbers(lost: tuple[int, ...] = ()) -> list[int]:
        return [t.number for t in shortlist(home.study, space(), home.study.trials[chosen], lost)]

    assert numbers() == [safer - 2, safer, chosen]
    assert numbers(lost=(safer,)) == [1, safer - 2, chosen]
    assert worse not in numbers()
    assert [t.number for t in shortlist(home.study, space(), home.study.trials[1])] == [1]


def test_of_several_objectives_there_is_a_front_and_its_knee_answers(
    tmp_path: Path,
) -> None:
    study = open_study(tmp_path / "journal.log", "minimize", "maximize")
    add_dense(study, space(), [10.0, 1.0], BOUND)
    drops = [0.0, 0.0, 0.0, 0.0, 0.2]
    values = [(4.0, 1.0), (5.0, 4.0), (9.0, 5.0), (6.0, 3.0), (1.0, 9.0)]  # the fourth is beaten by the second
    for i, (drop, (first, second)) in enumerate(zip(drops, values, strict=True)):
        study.add_trial(
            optuna.trial.create_trial(
                values=[first, second],
                params={"density": 0.5 + i / 10},
                distributions={"density": FloatDistribution(LOW, 1.0, log=True)},
                user_attrs={"drop": drop, "drop_se": 0.004, "density": 0.5 + i / 10, "feasible": drop <= 0.05},
            )
        )
    assert [trial.number for trial in front(study)] == [1, 2, 3]
    chosen = answer(study, space(), BOUND)
    assert chosen is not None and chosen.number == 2  # 5 / 4 is the least


def test_the_dense_model_is_no_answer(home: Home) -> None:
    plan = space(), BOUND
    assert answer(home.study, *plan) is None
    told(home.study, 0.5, 0.2)
    assert answer(home.study, *plan) is None


def test_structured_densities_are_met_from_below(home: Home) -> None:
    home.search(3, spec={"scheme": StructPrune(min_keep=1)})
    assert all(result.density <= result.density_asked for result in home.log.results)
