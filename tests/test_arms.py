"""Thompson sampling over arms, on curves and objectives that are known."""

import math
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from autocompress.disk.optuna_store import open_study
from autocompress.lc import LearningCompression
from autocompress.schemes import Prune, Quantize16, StructPrune
from autocompress.searching.arms import ALIKE, ArmSampler, Worths, of_arm
from autocompress.searching.dimensions import parse_dimensions
from autocompress.searching.samplers import SAMPLERS, check_sampler, make_sampler
from autocompress.searching.selection import answer, p_feasible
from autocompress.searching.space import DENSITY, Configuration, Space
from autocompress.trial import Bound

BOUND, LOW = 0.01, 0.01
LC = LearningCompression()
MINIMIZE = [StudyDirection.MINIMIZE]


def space(
    search: str = "criterion=l2,obd,taylor,fpgm", schemes: tuple = (StructPrune(),), low: float = LOW
) -> Space:
    lows = tuple(low if scheme.takes_density else 1.0 for scheme in schemes)
    return Space(schemes, LC, lows, parse_dimensions(search, schemes, LC))


class Simulation:
    """Each criterion's drop crosses the bound at a density of its own; the objective is the density."""

    def __init__(self, searched: Space, thresholds: dict[str, float], n: int = 0, seed: int = 0) -> None:
        self.space, self.thresholds, self.n = searched, thresholds, n
        self.rng = np.random.default_rng(seed)

    def run(self, study: optuna.Study, trials: int) -> optuna.Study:
        for _ in range(trials):
            trial = study.ask()
            self.tell(study, trial, self.space.suggest(trial))
        return study

    def tell(self, study: optuna.Study, trial: optuna.Trial, chosen: Configuration) -> None:
        depth = math.log(self.thresholds[chosen.params["criterion"]] / chosen.density)
        drop = BOUND * math.exp(3 * depth)
        se = math.sqrt(max(drop, 0.002) / self.n) if self.n else 0.0
        drop += se * self.rng.standard_normal()
        for name, value in (("drop", drop), ("drop_se", se), ("density", chosen.density)):
            trial.set_user_attr(name, value)
        trial.set_user_attr("density_asked", chosen.density)
        trial.set_user_attr("feasible", drop <= BOUND)
        trial.set_constraint("drop", drop - BOUND)
        study.tell(trial, chosen.density)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


THRESHOLDS = {"l2": 0.1, "obd": 0.04, "taylor": 0.09, "fpgm": 0.2}


@pytest.mark.parametrize("seed", range(2))
def test_the_best_arm_is_found_and_gets_most_of_the_trials(seed: int) -> None:
    searched = space()
    study = optuna.create_study(sampler=ArmSampler(searched, BOUND, seed))
    Simulation(searched, THRESHOLDS, n=5000, seed=seed).run(study, 14)
    tried = [trial.params["criterion"] for trial in study.trials]
    assert set(tried[:4]) == set(THRESHOLDS)  # each once to begin with
    assert tried.count("obd") >= 6
    chosen = answer(study, searched, Bound(BOUND))
    assert chosen is not None and chosen.params["criterion"] == "obd"
    assert 0.04 * 0.95 <= chosen.params[DENSITY] <= 0.04 * 1.3


def test_it_stops_when_the_others_cannot_be_better() -> None:
    searched = space()
    sampler = ArmSampler(searched, BOUND)
    study, simulation = optuna.create_study(sampler=sampler), Simulation(searched, THRESHOLDS, n=5000)
    for _ in range(30):
        simulation.run(study, 1)
        if stopped := sampler.done(study.trials, MINIMIZE):
            break
    assert "of the 4 combinations each is known well enough" in str(stopped)
    best = sampler.best(study.trials, MINIMIZE)
    assert best is not None and best.params == {"criterion": "obd"}


def test_a_resumed_search_proposes_the_same(tmp_path: Path) -> None:
    searched = space()
    proposals = []
    for name, at_once in (("whole", 7), ("resumed", 4)):
        simulation = Simulation(searched, THRESHOLDS)
        for _ in range(0, 8, at_once):
            study = open_study(tmp_path / f"{name}.log", "minimize")
            study.sampler = ArmSampler(searched, BOUND, seed=5)
            simulation.run(study, min(at_once, 7 - len(study.trials)))
        proposals.append([trial.params for trial in study.trials])
    assert proposals[0] == proposals[1]


def test_an_arm_without_trials_begins_where_the_others_fell() -> None:
    searched = space()
    sampler = ArmSampler(searched, BOUND)
    study, simulation = optuna.create_study(sampler=sampler), Simulation(searched, dict.fromkeys(THRESHOLDS, 0.05))
    prior = sampler._density(searched.arms[3], study.trials)
    for density in (0.2, 0.04, 0.06, 0.05):
        for arm in searched.arms[:3]:
            study.enqueue_trial(searched.params_at(arm, density))
    simulation.run(study, 12)
    begins = sampler._density(searched.arms[3], study.trials)
    assert abs(math.log(begins / 0.05)) < 0.2 < abs(math.log(prior / 0.05))
    mine = [of_arm(arm, study.trials) for arm in searched.arms]
    threshold, p = sampler.shared_beliefs(mine)[3]
    mean = p @ threshold
    # The spread between arms, and what three of them leave unknown of its centre.
    assert math.sqrt(p @ (threshold - mean) ** 2) == pytest.approx(ALIKE * math.sqrt(1 + 1 / 3), rel=0.15)


def told(study: optuna.Study, searched: Space, params: dict, values: list[float], **attrs: object) -> None:
    params = searched.dense_params | params
    attrs = {"drop": 0.0, "drop_se": 0.0, "density": params[DENSITY], "feasible": True} | attrs
    study.add_trial(
        optuna.trial.create_trial(
            values=values,
            params=params,
            distributions=searched.distributions,
            user_attrs=attrs,
            constraints={"drop": -0.1},
        )
    )


def test_what_an_arm_is_worth_is_read_off_its_trials() -> None:
    """sizes 1000 d and 500 d: the same slope of 1 in logarithms, a factor of two between the arms."""
    searched = space("criterion=l2,obd")
    study = optuna.create_study()
    told(study, searched, {DENSITY: 1.0}, [1000.0], dense=True)
    for density, criterion, size in ((0.5, "l2", 500.0), (0.1, "l2", 100.0), (0.2, "obd", 100.0)):
        told(study, searched, {DENSITY: density, "criterion": criterion}, [size])
    mine = [of_arm(arm, study.trials) for arm in searched.arms]
    assert [len(own) for own in mine] == [2, 1]
    depths = np.log(1 / np.array([0.3, 0.05]))
    worths = Worths(mine, study.trials, MINIMIZE)
    assert np.exp(worths.at(0, depths)[0]) == pytest.approx([300, 50])
    assert np.exp(worths.at(1, depths)[0]) == pytest.approx([150, 25])
    maximized = Worths(mine, study.trials, [StudyDirection.MAXIMIZE])
    assert maximized.at(0, depths) == pytest.approx(-worths.at(0, depths))
    assert np.isinf(Worths([[], mine[1]], study.trials, MINIMIZE).at(0, depths)).all()


def test_an_arm_without_a_density_is_tried_once() -> None:
    searched = space("", (Prune(), Quantize16()))
    study = optuna.create_study()
    told(study, searched, {DENSITY: 1.0}, [1.0], dense=True)
    told(study, searched, {"scheme": "Prune", DENSITY: 0.5}, [0.5])
    told(study, searched, {"scheme": "Quantize16", DENSITY: 0.3}, [0.5], density_asked=1.0, density=1.0)
    sampler = ArmSampler(searched, BOUND)
    assert sampler.open_arms(study.trials, MINIMIZE) == [0]
    # Of a trial at no density of its own only its own drop says how likely it is to hold.
    trial = study.trials[-1]
    assert p_feasible(study, searched, Bound(0.0), trial) == pytest.approx(0.5)
    assert p_feasible(study, searched, Bound(BOUND), trial) > 0.99


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_searches_lists_or_says_what_does(name: str) -> None:
    searched = space("criterion=l2,obd")
    if name == "bisection":
        with pytest.raises(ValueError, match="bisection searches the density alone, not criterion; use threshold"):
            check_sampler(name, searched)
        return
    study = optuna.create_study(sampler=make_sampler(name, searched, BOUND, seed=0))
    told(study, searched, {DENSITY: 1.0}, [1.0], dense=True)
    Simulation(searched, THRESHOLDS).run(study, 6)
    assert {trial.params["criterion"] for trial in study.trials[1:]} == {"l2", "obd"}
    assert all(set(trial.params) == {DENSITY, "criterion"} for trial in study.trials)


def test_ranges_are_for_the_samplers_of_optuna() -> None:
    searched = space("criterion; lr")
    assert check_sampler(None, searched) == "gp" and check_sampler(None, space()) == "threshold"
    for name in ("threshold", "grid"):
        with pytest.raises(
            ValueError, match=f"{name} searches lists of values, and lr is a range; write lr=A,B,C"
        ):
            check_sampler(name, searched)
    with pytest.raises(ValueError, match="threshold would try each of 72 combinations"):
        check_sampler("threshold", space("criterion; spread; normalize; lc.c_steps=8,16,32"))
    for name in ("gp", "tpe", "random"):
        study = optuna.create_study(sampler=make_sampler(name, searched, BOUND, seed=0))
        told(study, searched, {DENSITY: 1.0}, [1.0], dense=True)
        Simulation(searched, THRESHOLDS).run(study, 6)
        assert len({trial.params["lr"] for trial in study.trials}) >= 4


def test_where_there_is_no_curve_a_trial_speaks_for_itself() -> None:
    searched = space("lr")
    study = optuna.create_study()
    for drop, density in ((0.0098, 0.1), (0.002, 0.3)):
        told(study, searched, {DENSITY: density}, [density], drop=drop, drop_se=0.003)
    lucky, safe = study.trials
    assert (
        p_feasible(study, searched, Bound(BOUND), lucky)
        < 0.6
        < 0.9
        < p_feasible(study, searched, Bound(BOUND), safe)
    )
    chosen = answer(study, searched, Bound(BOUND))
    assert isinstance(chosen, FrozenTrial) and chosen.number == safe.number
