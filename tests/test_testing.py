"""The conformance suite finds what it is for: each broken scheme here fails the check that is named with it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest import SkipTest

import pytest
import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Facts, Scheme, Theta, Weights
from autocompress.schemes import LowRank, NeuronPrune, Prune, StructPrune
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


class Aliasing(Prune):
    """Keeps the very tensors that training goes on changing."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        return replace(theta, values=theta.values | {n: w for n, w in weights.items() if n not in theta.support})


class HashOrdered(Prune):
    """Breaks ties by the hash of a string, which each process draws anew."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        noise = torch.Generator().manual_seed(hash("any string") % 2**31)
        drawn = {n: w * (1 + torch.rand(w.shape, generator=noise) / 10) for n, w in weights.items()}
        support = super().pi(drawn, density, facts).support
        values = {n: w * support[n] if n in support else w.clone() for n, w in weights.items()}
        return Theta(values, support, super().pi(weights, density, facts).kept)


class CountsBatches(Prune):
    """Finds other facts in a larger batch."""

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        facts = super().analyze(model, example_input)
        return replace(facts, prunable=facts.prunable[: -len(example_input)])


class NeedsAutograd(Prune):
    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        model(example_input).sum().backward()
        return super().analyze(model, example_input)


class Frozen(Prune):
    """Does not see a layer that is frozen."""

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        facts = super().analyze(model, example_input)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        sizes = dict(zip(facts.prunable, facts.sizes, strict=True))
        return replace(facts, prunable=tuple(n for n in sizes if n not in frozen))


class Evaluating(Prune):
    """Puts the user's model in eval mode, and leaves it there."""

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        return super().analyze(model.eval(), example_input)


class Hooked(Prune):
    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        next(model.modules()).register_forward_hook(lambda *_: None)
        return super().analyze(model, example_input)


class Gradients(Prune):
    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        with torch.enable_grad():
            model(example_input).sum().backward()
        return super().analyze(model, example_input)


class Resized(StructPrune):
    """Changes what a layer says of its width, not its weights."""

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        facts = super().analyze(model, example_input)
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).out_channels -= 1
        return facts


class Contiguous(Prune):
    """Tidies the memory layout of the model that it was only to look at."""

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        for p in model.parameters():
            p.data = p.data.contiguous()
        return super().analyze(model, example_input)


class MemoryOrder(Prune):
    """Reads weights in the order in which they lie in memory."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        rows = {n: torch.empty(w.shape, device="meta").stride() for n, w in weights.items()}
        return super().pi({n: w.as_strided(w.shape, rows[n]) for n, w in weights.items()}, density, facts)


class Untied(Prune):
    """Gives each layer that shared a weight one of its own."""

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized = super().realize(model, theta, facts)
        for module in realized.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.detach().clone(), p.requires_grad))
        return realized


class Leaking(Prune):
    """Remembers every model that it made."""

    made: ClassVar[list[nn.Module]] = []

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        self.made.append(super().realize(model, theta, facts))
        return self.made[-1]


class OneBatchSize(Prune):
    """Can only run the batch size that it has seen first."""

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized, seen = super().realize(model, theta, facts), []

        def check(_: nn.Module, arguments: tuple[Tensor]) -> None:
            seen.append(len(arguments[0]))
            assert seen[0] == seen[-1]

        realized.register_forward_pre_hook(check)
        return realized


class Unpicklable(Prune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized = super().realize(model, theta, facts)
        realized.register_forward_hook(lambda *_: None)
        return realized


class KeepsGradients(Prune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized = super().realize(model, theta, facts)
        for p in realized.parameters():
            p.grad = torch.zeros_like(p)
        return realized


class Remembers(Prune):
    """Realizes the weights that it saw last, not those that a scheme behind it has made of them."""

    seen: ClassVar[Weights] = {}

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        self.seen.update(theta.values)
        return theta

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized = super().realize(model, theta, facts)
        with torch.no_grad():
            for name, p in realized.named_parameters():
                p.copy_(self.seen[name])
        return realized


class NoNearer(LowRank):
    """Factors of the right shapes, of another matrix."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        factors = {name for name in theta.values if name not in weights}
        return replace(theta, values={n: w + 10 * (n in factors) for n, w in theta.values.items()})


class MiscountedWhereDense(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        return replace(theta, kept=theta.kept - (density == 0.5))


class InexactCount(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        return replace(theta, kept=float(theta.kept))


class NeverWhole(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        if density == 1:
            raise IndexError("there is no entry behind the last")
        return super().pi(weights, density, facts)


class SetPlanWhereSparse(StructPrune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        is_lowest = density == self.lowest_density(facts)
        return replace(theta, plan={**theta.plan, "seen": {density}}) if is_lowest else theta


class DrawsTheUnknown(Prune):
    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        return replace(super().pi(weights, density, facts), drawn=frozenset({"no.weight"}))


class SeedsAll(Prune):
    """Seeds the generator that dropout and the order of the data draw from, too."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        torch.manual_seed(0)
        return super().pi(weights, density, facts)


class OneRoom(Prune):
    """Writes each result into the memory of the one before."""

    room: ClassVar[dict[str, Weights]] = {}

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        theta = super().pi(weights, density, facts)
        room = self.room.setdefault(str(facts), {name: torch.empty_like(w) for name, w in theta.values.items()})
        return replace(theta, values={name: room[name].copy_(w) for name, w in theta.values.items()})


class NeverBack(Prune):
    """Does not bring back what a sparser C step has taken out."""

    gone: ClassVar[dict[str, Weights]] = {}

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        gone = self.gone.setdefault(str(facts), {})
        theta = super().pi({n: w * gone.get(n, 1) for n, w in weights.items()}, density, facts)
        gone.update(theta.support)
        return theta


class LooksOnce(Prune):
    def observe(self, evidence: Evidence, facts: Facts) -> Facts:
        assert evidence.last
        return facts


class OnlyWhileEvaluating(StructPrune):
    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        realized = super().realize(model, theta, facts)
        if model.training:
            with torch.no_grad():
                list(realized.parameters())[-1].add_(0.01)
        return realized


class OneDensity(Prune):
    def staged(self, relative: Mapping[str, float]) -> Prune:
        return self


class NoMask(LowRank):
    masks = True


@dataclass(frozen=True)
class Typed(Prune):
    """What is written of it cannot be read."""

    dtype: torch.dtype = torch.float32


class Nothing(Prune):
    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        raise ValueError("nothing here")


def suite_of(scheme: Scheme) -> SchemeConformance:
    """The suite, on three networks at two densities."""

    class Suite(SchemeConformance):
        __test__ = False
        densities = (0.5, 0.02)
        models: ClassVar = {name: SchemeConformance.models[name] for name in ("plain", "residual", "tied")}

        def make_scheme(self) -> Scheme:
            return scheme

    return Suite()


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
    except SkipTest:
        return False
    except Exception:  # an assertion, or whatever the broken scheme runs into
        return True
    return False


@pytest.mark.parametrize(
    ("scheme", "check"),
    [
        (TooDense(), "test_meets_the_density_from_below"),
        (TooSparse(), "test_meets_the_density_from_below"),
        (VagueError(criterion="l2"), "test_meets_the_density_from_below"),
        (VagueError(criterion="l2"), "test_reaches_its_lowest_density_and_no_lower"),
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
        (Aliasing(criterion="l2"), "test_theta_does_not_change_with_the_weights"),
        (HashOrdered(), "test_another_process_finds_the_same"),
        (CountsBatches(), "test_pi_is_deterministic"),
        (NeedsAutograd(), "test_pi_is_deterministic"),
        (Frozen(), "test_pi_is_deterministic"),
        (Evaluating(), "test_dense_model_is_left_untouched"),
        (Hooked(), "test_dense_model_is_left_untouched"),
        (Gradients(), "test_dense_model_is_left_untouched"),
        (Resized(), "test_dense_model_is_left_untouched"),
        (Contiguous(), "test_dense_model_is_left_untouched"),
        (MemoryOrder(), "test_dense_model_is_left_untouched"),
        (Untied(), "test_kept_counts_the_realized_model"),
        (Leaking(), "test_retains_nothing"),
        (OneBatchSize(), "test_realized_computes_what_the_masked_model_computes"),
        (Unpicklable(), "test_realized_copies_and_pickles"),
        (KeepsGradients(), "test_realized_takes_over_mode_and_what_is_trainable"),
        (Remembers(), "test_composes"),
        (NoNearer(), "test_delta_is_w_on_the_support_and_zero_off_it"),
        (MiscountedWhereDense(), "test_kept_counts_the_realized_model"),
        (InexactCount(), "test_kept_counts_the_realized_model"),
        (NeverWhole(), "test_reaches_its_lowest_density_and_no_lower"),
        (SetPlanWhereSparse(), "test_plan_and_state_dict_rebuild_the_model"),
        (DrawsTheUnknown(), "test_support_is_masks_of_the_weights"),
        (SeedsAll(), "test_pi_is_deterministic"),
        (OneRoom(criterion="l2"), "test_pi_is_deterministic"),
        (NeverBack(criterion="l2"), "test_pi_is_deterministic"),
        (LooksOnce(criterion="l2"), "test_pi_is_deterministic"),
        (OnlyWhileEvaluating(), "test_realized_takes_over_mode_and_what_is_trainable"),
        (OneDensity(), "test_density_can_differ_by_module"),
        (NoMask(), "test_delta_is_w_on_the_support_and_zero_off_it"),
        (Typed(dtype=torch.float16), "test_is_a_scheme"),
        (Nothing(), "test_is_a_scheme"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_scheme_fails(scheme: Scheme, check: str) -> None:
    assert any(fails(run) for name, run in checks(suite_of(scheme)) if name == check)


def test_a_model_is_skipped_where_the_scheme_refuses_it_and_not_where_it_slips() -> None:
    class Slips(Prune):
        def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
            _, _ = (m for m in model.modules() if isinstance(m, nn.Conv2d))
            return super().analyze(model, example_input)

    suite = suite_of(Slips())
    suite.case("plain")
    with pytest.raises(AssertionError, match=r"must name the scheme, as 'Slips finds no .* too many values"):
        suite.case("residual")
    with pytest.raises(SkipTest, match="NeuronPrune finds no"):
        suite_of(NeuronPrune()).case("plain")


def test_a_sound_scheme_passes() -> None:
    assert not [name for name, run in checks(suite_of(Prune(criterion="l2"))) if fails(run)]


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
