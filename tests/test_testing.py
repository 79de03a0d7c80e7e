"""The conformance suite finds what it is for: each broken scheme here fails the check that is named with it."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from autocompress.scheme import Facts, Scheme, Theta, Weights
from autocompress.schemes import Prune, StructPrune
from autocompress.testing import CLASSES, SchemeConformance, lived_in, refused


class TooDense(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        return super().pi(weights, min(1.0, density + 0.02), facts)


class TooSparse(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        return super().pi(weights, max(self.lowest_density(facts), 0.9 * density), facts)


class VagueError(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        if density < self.lowest_density(facts):
            raise ValueError("too low")
        return super().pi(weights, density, facts)


class Miscounted(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        return replace(theta, kept=theta.kept - 1)


class Wandering(Prune):
    """Breaks ties, and everything else, at random."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        return super().pi({n: w * torch.rand_like(w) for n, w in weights.items()}, density, facts)


class InPlace(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        for name, w in weights.items():
            w.copy_(theta.values[name])
        return theta


class NotZero(Prune):
    def delta(self, theta: Theta) -> Weights:
        return {name: w + 1e-3 for name, w in theta.values.items()}


class Aliased(Prune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        return model


class Shifted(StructPrune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized = super().realize(model, theta, facts)
        with torch.no_grad():
            list(realized.parameters())[-1].add_(0.01)
        return realized


class Thawed(StructPrune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        return super().realize(model, theta, facts).requires_grad_(True)


class TensorPlan(StructPrune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        removed = {root: torch.tensor(channels) for root, channels in theta.plan["removed"].items()}
        return replace(theta, plan={"removed": removed})

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        removed = {root: [int(c) for c in channels] for root, channels in theta.plan["removed"].items()}
        return super().realize(model, replace(theta, plan={"removed": removed}), facts)


class ForgetsItsMode(StructPrune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        return super().realize(model, theta, facts).eval()


@dataclass(frozen=True)
class LambdaFacts(Prune):
    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        facts = super().analyze(model, example_input)
        return replace(facts, n_others=LazyInt(lambda: facts.n_others))


class LazyInt(int):
    def __new__(cls, value: Callable[[], int]) -> "LazyInt":
        made = super().__new__(cls, value())
        made.value = value
        return made


class Nothing(Prune):
    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        raise ValueError("nothing here")


def failures(scheme: Scheme) -> set[str]:
    """The names of the checks that a scheme fails."""

    class Suite(SchemeConformance):
        __test__ = False
        densities = (0.5, 0.02)
        models: ClassVar = {name: SchemeConformance.models[name] for name in ("plain", "residual")}

        def make_scheme(self) -> Scheme:
            return scheme

    return {name for name, check in checks(Suite()) if fails(check)}


def checks(suite: SchemeConformance) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check with every combination of its arguments, as pytest would run them."""
    for name, check in inspect.getmembers(suite, inspect.ismethod):
        if name.startswith("test_"):
            arguments = inspect.signature(check).parameters
            for model in suite.models if "model_name" in arguments else (None,):
                for density in suite.densities if "density" in arguments else (None,):
                    given: dict[str, Any] = {"model_name": model, "density": density}
                    given = {k: v for k, v in given.items() if v is not None}
                    yield name, lambda check=check, given=given: check(**given)


def fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:  # an assertion, or whatever the broken scheme runs into; SkipTest is the suite's own
        return True
    return False


@pytest.mark.parametrize(
    ("scheme", "check"),
    [
        (TooDense(), "test_meets_the_density_from_below"),
        (TooSparse(), "test_meets_the_density_from_below"),
        (VagueError(), "test_meets_the_density_from_below"),
        (VagueError(), "test_reaches_its_lowest_density_and_no_lower"),
        (Miscounted(), "test_kept_counts_the_realized_model"),
        (Wandering(), "test_pi_is_idempotent"),
        (Wandering(), "test_pi_is_deterministic"),
        (InPlace(), "test_pi_is_deterministic"),
        (NotZero(), "test_delta_is_w_on_the_support_and_zero_off_it"),
        (Aliased(), "test_dense_model_is_left_untouched"),
        (Shifted(), "test_realized_computes_what_the_masked_model_computes"),
        (Thawed(), "test_realized_takes_over_mode_and_what_is_trainable"),
        (ForgetsItsMode(), "test_realized_takes_over_mode_and_what_is_trainable"),
        (TensorPlan(), "test_plan_and_state_dict_rebuild_the_model"),
        (LambdaFacts(), "test_facts_and_scheme_can_be_sent_to_another_process"),
        (Nothing(), "test_is_a_scheme"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_scheme_fails(scheme: Scheme, check: str) -> None:
    assert check in failures(scheme)


def test_a_sound_scheme_passes() -> None:
    assert failures(Prune()) == set()


def test_the_suite_itself_is_not_collected_and_what_inherits_it_is() -> None:
    class Inherits(SchemeConformance):
        pass

    class Abstract(SchemeConformance):
        __test__ = False

    assert not SchemeConformance.__test__ and not Abstract.__test__ and Inherits.__test__
    with pytest.raises(NotImplementedError, match="Inherits must say which scheme it checks"):
        Inherits().make_scheme()


@pytest.mark.parametrize("name", SchemeConformance.models)
def test_models_are_lived_in(name: str) -> None:
    """No trivial statistics: where BatchNorm is the identity, removing it would not show."""
    model = lived_in(SchemeConformance.models[name]())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        assert float(norm.running_mean.abs().max()) > 0.05
        assert float((norm.running_var - 1).abs().max()) > 0.05
        assert float(norm.bias.detach().abs().max()) > 0.1
    assert all(p.detach().all() for p in model.parameters())
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, CLASSES)


def test_refused_wants_the_number() -> None:
    with refused(naming=0.0123):
        raise ValueError("density 0.01 cannot be reached; the lowest is 0.0123")
    with pytest.raises(AssertionError, match=r"must name the lowest density, 0\.0123"), refused(naming=0.0123):
        raise ValueError("density 0.01 cannot be reached")
    with pytest.raises(AssertionError, match="was not refused"), refused(naming=0.0123):
        pass
