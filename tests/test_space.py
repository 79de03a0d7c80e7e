"""What a search may vary: reading it, what is refused, and what a trial's parameters stand for."""

import pickle
import re
from typing import Any

import optuna
import pytest
import torchvision
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn

from autocompress.lc import LearningCompression
from autocompress.models import SmallResNet
from autocompress.recovery import make_recovery
from autocompress.scheme import Compose, as_schemes, describe, parse_schemes
from autocompress.schemes import LowRank, Prune, Quantize16, StructPrune
from autocompress.searching.dimensions import on_model, parse_dimensions, stages
from autocompress.searching.space import DENSITY, Arm, Space
from autocompress.studies.analysis import analyze
from autocompress.task import Task

LC = LearningCompression()


def parsed(search: Any, *schemes: Any, recovery: Any = LC) -> dict[str, Any]:
    return {one.name: one.distribution for one in parse_dimensions(search, schemes or (StructPrune(),), recovery)}


def test_lists_ranges_and_names_alone_become_distributions() -> None:
    text = "criterion=l1,obd; lr=0.01..0.3; lc.mu; align=1..8; skip=[],['conv1']; lc.augmented; distill"
    found = parsed(text)
    assert found["criterion"] == CategoricalDistribution(["l1", "obd"])
    assert found["lr"] == FloatDistribution(0.01, 0.3, log=True)
    assert found["lc.mu"] == FloatDistribution(0.1, 10, log=True)  # around its value of 1
    assert found["align"] == IntDistribution(1, 8)
    assert found["skip"] == CategoricalDistribution(["[]", "['conv1']"])
    assert found["lc.augmented"] == CategoricalDistribution([True, False])
    assert found["distill"] == FloatDistribution(0.0, 1.0)


def test_python_says_the_same_with_lists_tuples_and_none() -> None:
    text = parsed("criterion=l1,obd; lr=0.01..0.3; align=1..8; skip=[],['conv1']; spread; stage-density")
    given = {
        "criterion": ["l1", "obd"],
        "lr": (0.01, 0.3),
        "align": (1, 8),
        "skip": [[], ["conv1"]],
        "spread": None,
        "stage-density": None,
    }
    assert parsed(given) == text


def test_what_is_written_out_means_the_same_again() -> None:
    dimensions = parse_dimensions(
        "criterion; lr; stage-density; skip=[],['conv1']; align=1,8", (StructPrune(),), LC
    )
    text = "; ".join(one.text for one in dimensions)
    assert text.startswith("criterion=obd,l2,taylor,fpgm; lr=0.01..0.3; stage-density=0.25..4; skip=[],['conv1']")
    assert parse_dimensions(text, (StructPrune(),), LC) == dimensions


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            "criterium=l1",
            r"there is nothing called 'criterium' to vary \(there is: criterion, .*stage-density, lc.epochs",
        ),
        ("criterion=", "criterion has no values"),
        ("criterion=l1,magnitude", "criterion=magnitude: .*l1"),
        ("criterion=l1,l1", "criterion has l1 twice"),
        ("criterion=l1; criterion=l2", "criterion is given twice"),
        ("lr; lc.lr", "lr is given twice"),
        ("lr=0.3..0.01", "the first end must be below"),
        ("lr=a..b", "write a range as LOW..HIGH"),
        ("lr=-1,0.1", "lr=-1: .*positive"),
        ("lr=0..1", r"lr=0.0: .*positive"),
        ("min_keep", "min_keep needs values"),
        ("lc.epochs", "lc.epochs needs values"),
        ("stage-density=0,1", "relative densities above 0"),
        ("criterion=l1 l2", "write values with commas"),
        ("Prune.criterion=l1", "nothing called 'Prune.criterion'"),
        ({"lr": (0.1, 0.2, 0.3)}, "a range is two finite numbers"),
        ({"lr": []}, "lr needs values"),
    ],
)
def test_what_cannot_be_varied_is_refused_in_one_line(search: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parsed(search)
    assert str(error.value).startswith("search: ") and "\n" not in str(error.value)


def test_a_parameter_must_suit_every_scheme_that_has_it() -> None:
    schemes = (StructPrune(), Prune(), LowRank())
    assert set(parsed("criterion=l2,obd", *schemes)) == {"criterion"}
    with pytest.raises(ValueError, match=r"criterion=fpgm: .*Prune"):
        parsed("criterion=fpgm,l2", *schemes)
    assert set(parsed("StructPrune.criterion=fpgm,l2; Prune.criterion=l2,obd", *schemes)) == {
        "StructPrune.criterion",
        "Prune.criterion",
    }
    with pytest.raises(ValueError, match="LowRank takes no densities by stage"):
        parsed("stage-density", *schemes)
    with pytest.raises(ValueError, match="there is nothing called 'lr'"):
        parsed("lr", recovery=make_recovery("none"))


def test_schemes_are_listed_with_commas() -> None:
    assert parse_schemes("StructPrune(align=8), Prune+Quantize16") == (
        StructPrune(align=8),
        Compose(Prune(), Quantize16()),
    )
    assert as_schemes(["LowRank", Prune()]) == (LowRank(), Prune())
    for given, message in (
        ("Prune, Prune", "listed twice"),
        ([], "empty list"),
        ("Prune, Nothing", "unknown scheme"),
    ):
        with pytest.raises(ValueError, match=message):
            as_schemes(given)
    for endless in ("-" * 100_000 + "1", "1+" * 900 + "1", "Prune\0"):
        with pytest.raises(ValueError, match=r"is not a scheme; write a name|write names, parameters as"):
            parse_schemes(endless)


def test_auto_is_what_registers_for_it() -> None:
    found = {describe(scheme) for scheme in parse_schemes("auto")}
    assert {"StructPrune", "Prune", "LowRank", "StructPrune+Quantize8"} <= found
    assert all(scheme.takes_density for scheme in parse_schemes("auto"))


# Stages


def test_a_model_is_analyzed_where_it_is_compressed(tiny_task: Task) -> None:
    """A device without numbers stands in for a GPU: a model there takes no batch of the CPU's."""

    class Looks(Prune):
        def analyze(self, model: nn.Module, example_input: Tensor) -> str:
            return str(model(example_input).device)

    assert analyze(Looks(), tiny_task.on("meta")) == ("meta", ())


def test_stages_are_the_children_with_weights() -> None:
    assert stages(SmallResNet()) == [("stem",), ("stages.0",), ("stages.1",), ("stages.2",)]
    resnet = torchvision.models.resnet18(weights=None)
    assert stages(resnet) == [("conv1",), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    wrapped = nn.Sequential(resnet)
    assert stages(wrapped) == [(f"0.{names[0]}",) for names in stages(resnet)]


def test_many_layers_in_a_row_are_put_together_in_their_order() -> None:
    row = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    found = stages(row)
    assert len(found) == 6
    assert [name for stage in found for name in stage] == [str(i) for i in range(19)]  # all but the classifier


def test_a_stage_is_relative_to_the_first_and_reaches_the_scheme() -> None:
    (one,) = parse_dimensions("stage-density", (StructPrune(),), LC)
    dimensions = on_model([one], SmallResNet())
    names = [f"stage-density.stages.{i}" for i in range(3)]
    assert [d.name for d in dimensions] == names
    space = Space((Compose(StructPrune(), Quantize16()),), LC, (0.01,), dimensions)
    chosen = space.configuration({DENSITY: 0.1, **dict(zip(names, (1.0, 2.0, 0.5), strict=True))})
    assert describe(chosen.scheme) == (
        "StructPrune(spread={'stages.0': 1.0, 'stages.1': 2.0, 'stages.2': 0.5})+Quantize16"
    )
    with pytest.raises(ValueError, match="needs a model of several stages"):
        on_model([one], nn.Sequential(nn.Linear(3, 3)))


# The space


def space(search: str = "", *schemes: Any) -> Space:
    schemes = schemes or (StructPrune(),)
    lows = tuple(0.01 * (i + 1) if scheme.takes_density else 1.0 for i, scheme in enumerate(schemes))
    return Space(schemes, LC, lows, parse_dimensions(search, schemes, LC))


def test_arms_are_the_combinations_that_differ() -> None:
    assert space().arms == (Arm({}, 0.01),)
    found = space("criterion=l2,obd; lc.augmented", StructPrune(), LowRank(), Quantize16()).arms
    of_struct = [arm.params for arm in found if arm.params["scheme"] == "StructPrune"]
    assert of_struct == [
        {"scheme": "StructPrune", "criterion": c, "lc.augmented": a} for c in ("l2", "obd") for a in (True, False)
    ]
    assert [(arm.params, arm.low) for arm in found if arm.params["scheme"] == "LowRank"] == [
        ({"scheme": "LowRank", "lc.augmented": a}, 0.02) for a in (True, False)
    ]
    assert {arm.low for arm in found if arm.params["scheme"] == "Quantize16"} == {1.0}
    assert space("lr").arms == ()


SEARCHED = "criterion=l2,obd; lr=0.01..0.3; StructPrune.skip=[],['stem']"


def test_parameters_become_a_configuration_and_survive_pickle() -> None:
    choices = space(SEARCHED, StructPrune(), LowRank(), Quantize16())
    params = {"scheme": "StructPrune", "criterion": "obd", "lr": 0.05, "StructPrune.skip": "['stem']"}
    chosen = pickle.loads(pickle.dumps(choices.configuration({DENSITY: 0.3, **params})))
    assert chosen.scheme == StructPrune(criterion="obd", skip=("stem",))
    assert chosen.recovery == LearningCompression(lr=0.05)
    assert (chosen.density, chosen.params) == (0.3, params)
    low_rank = choices.configuration({DENSITY: 0.01, **params, "scheme": "LowRank"})
    assert (low_rank.scheme, low_rank.density) == (LowRank(), 0.02)  # as low as it goes
    assert choices.configuration({DENSITY: 0.3, **params, "scheme": "Quantize16"}).density == 1.0


def test_optuna_chooses_in_every_dimension() -> None:
    choices = space("criterion=l2,obd; lr=0.01..0.3; align=1..8", StructPrune(), LowRank())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        chosen = choices.suggest(trial)
        assert trial.distributions == choices.distributions
        assert chosen.params == {name: value for name, value in trial.params.items() if name != DENSITY}
        assert re.fullmatch(r"StructPrune\(.*|StructPrune|LowRank", describe(chosen.scheme))
        study.tell(trial, 0.0)
    assert choices.dense_params.keys() == choices.distributions.keys()
