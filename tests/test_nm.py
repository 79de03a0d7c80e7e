import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from autocompress.conformance.testing_models import some_models
from autocompress.scheme import Compose, Scheme
from autocompress.schemes import NMPrune, Quantize16
from autocompress.task import Task
from autocompress.testing import SchemeConformance
from autocompress.trial import TrialSpec, run_trial


class TestNMPrune(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return NMPrune()


class TestOneOfThreeByGradients(SchemeConformance):
    models = some_models("residual", "flattened", "tied")

    def make_scheme(self) -> Scheme:
        return NMPrune(n=1, m=3, criterion="taylor")


class TestNMPruneQuantize16(SchemeConformance):
    models = some_models("concatenated", "depthwise", "attention")

    def make_scheme(self) -> Scheme:
        return Compose(NMPrune(), Quantize16(dtype="bf16"))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 5)])
def test_the_nearest_pattern_is_kept(n: int, m: int) -> None:
    """Brute force over all the patterns of M weights."""
    torch.manual_seed(0)
    model = nn.Linear(3 * m, 6)
    scheme = NMPrune(n=n, m=m)
    theta = scheme.pi(dict(model.named_parameters()), 1.0, scheme.analyze(model, torch.zeros(1, 3 * m)))
    for w, kept in zip(model.weight.detach().view(-1, m), theta.support["weight"].view(-1, m), strict=True):
        nearest = max(
            itertools.combinations(range(m), n), key=lambda places: float(w[list(places)].square().sum())
        )
        assert tuple(kept.nonzero()[:, 0].tolist()) == nearest
    assert theta.kept == 6 * 3 * n + 6


def test_the_pattern_runs_along_the_inputs_at_each_position_of_the_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(10, 6, 3)
    facts = NMPrune().analyze(model, torch.zeros(1, 10, 4, 4))
    kept = NMPrune().pi(dict(model.named_parameters()), 1.0, facts).support["weight"]
    assert kept.shape == (6, 10, 3, 3)
    assert (kept[:, :4].sum(1) == 2).all() and (kept[:, 4:8].sum(1) == 2).all()
    assert kept[:, 8:].all()  # what is left of 10 after two times 4


def test_layers_with_few_inputs_and_skipped_ones_are_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    facts = NMPrune(skip=["3"]).analyze(model, torch.zeros(1, 3, 8, 8))
    assert list(facts.shapes) == ["2.weight"]
    with pytest.raises(ValueError, match="NMPrune finds no weights in this model with at least m=4 inputs"):
        NMPrune().analyze(model[:2], torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2, 1)])
def test_no_such_pattern(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, m={m}; n must be at least 1 and below m"):
        NMPrune(n=n, m=m)


def test_a_trial_learns_within_the_pattern(tiny_task: Task, make_spec: Callable[..., TrialSpec]) -> None:
    facts = NMPrune().analyze(tiny_task.model, tiny_task.example_input)
    lowest = NMPrune().lowest_density(facts)
    result = run_trial(make_spec(scheme=NMPrune(), density=lowest))
    assert result.density == pytest.approx(lowest) and lowest < 0.8
    assert result.model is not None and not NMPrune().takes_density  # so a study has one trial
    w = result.model.get_parameter("3.weight").detach()
    assert ((w[:, :4] != 0).sum(1) == 2).all() and w[:, 4:].all()
