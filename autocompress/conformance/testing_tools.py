"""The tools of the conformance suite: what a scheme finds and makes of a model, cases, assertions."""

import copy
import gc
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.conformance.fingerprints import theta_digest
from autocompress.conformance.testing_models import CLASSES
from autocompress.notation import terms
from autocompress.scheme import (
    Compose,
    Evidence,
    Facts,
    Scheme,
    Theta,
    Weights,
    describe,
    observe,
    parts_of,
)


def find_facts(scheme: Scheme, model: nn.Module, x: Tensor, example: int = 1) -> Facts:
    """A scheme's facts of a model, after it has observed a batch if it looks at data.

    Args:
        scheme: The scheme.
        model: The model.
        x: The batch that it may observe.
        example: The number of samples of the batch that are the example input.
    """
    return look(scheme, model, x, scheme.analyze(model, x[:example]))


def look(scheme: Scheme, model: nn.Module, x: Tensor, facts: Facts, *, briefly: bool = False) -> Facts:
    """The facts after the scheme has observed a batch: as at the end of training or, if ``briefly``, during it."""
    batch = x, torch.arange(len(x)) % CLASSES
    evidence = Evidence(model, lambda: [batch], nn.functional.cross_entropy, last=not briefly, provisional=briefly)
    return observe(scheme, evidence, facts)


@contextmanager
def leaving_layers_whole() -> Iterator[None]:
    """Ignores a scheme's warnings about layers that it leaves whole, for a ``with`` block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def written_and_read(scheme: Scheme) -> Scheme:
    """The scheme made again from its text by `describe`, as `parse_scheme` does for registered schemes."""
    given = [term.parameters for term in terms(describe(scheme))]
    parts = [type(part)(**one) for part, one in zip(parts_of(scheme), given, strict=True)]
    return Compose(*parts) if isinstance(scheme, Compose) else parts[0]


def middle_density(scheme: Scheme, facts: Facts) -> float:
    """A density between the lowest and dense, for checks that take one; 1 for a scheme without a density."""
    return math.sqrt(scheme.lowest_density(facts)) if scheme.takes_density else 1.0


def weights_of(model: nn.Module) -> Weights:
    """A copy of all the model's parameters, by name: the input of a C step."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def masked_model(scheme: Scheme, model: nn.Module, theta: Theta) -> nn.Module:
    """A copy of the dense model that carries the decompressed θ: the realized model must have its outputs."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in scheme.delta(theta).items():
            masked.get_parameter(name).copy_(value)
    return masked


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's outputs without gradients, in the mode that it is in."""
    with torch.no_grad():
        outputs: Tensor = model(x)
    return outputs


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value, both as magnitudes."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@torch.no_grad()
def telling(model: nn.Module, x: Tensor, *, centred: bool = False) -> nn.Module:
    """Scales every layer, in place, so that its outputs differ between samples; returns the model in eval mode.

    After Mishkin & Matas, "All you need is a good init" (2016), and Krähenbühl et al., "Data-dependent
    Initializations of CNNs" (2016). The outputs of random weights hardly depend on the sample, less so if most are
    zero; then a network that lost the wrong channels has the same outputs as the right one.

    Args:
        model: The model; weights that are zero stay so.
        x: A batch of two samples or more.
        centred: Whether the mean of each channel is subtracted by its bias, if it has one: then no channel is
            always on the dead side of its activation. In deep networks this adds rounding errors.
    """

    def scale(layer: Any, _: object, output: Tensor) -> Tensor:
        spread = float((output - output.mean(0)).std())
        factor = 1 / spread if spread else 1.0
        channels = -1 if isinstance(layer, nn.Linear) else 1
        last = output.movedim(channels, -1)
        shifts = centred and layer.bias is not None
        mean = last.flatten(0, -2).mean(0) if shifts else 0.0  # 0 for a channel of zeros, whose bias stays 0
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.sub_(mean).mul_(factor)
        return ((last - mean) * factor).movedim(-1, channels)

    weighing = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    hooks = [module.register_forward_hook(scale) for module in weighing]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    model.train()(x)
    for hook in hooks:
        hook.remove()
    return model.eval()


def telling_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to how much the expected outputs differ between samples."""
    differ = float((expected - expected.mean(0)).abs().max())
    assert differ > 3e-4 * float(expected.abs().max())  # float32 resolves a thousandth of that
    return float((actual - expected).abs().max()) / differ


@dataclass(frozen=True)
class Case:
    """A model that checks run on, with cached results; no check changes any of them.

    Attributes:
        scheme: The scheme under test.
        model: The model in eval mode.
        x: A batch of four samples.
        facts: What the scheme found out about the model.
    """

    scheme: Scheme
    model: nn.Module
    x: Tensor
    facts: Facts
    _thetas: dict[float, Theta] = field(default_factory=dict)
    _realized: dict[float, tuple[nn.Module, nn.Module]] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """A copy of all the model's parameters, by name: the input of a C step."""
        return weights_of(self.model)

    @property
    def params(self) -> int:
        """The number of the model's parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def lowest(self) -> float:
        """The lowest density of the scheme on this model."""
        return self.scheme.lowest_density(self.facts)

    @property
    def middle(self) -> float:
        """A density between the lowest and dense, see `middle_density`."""
        return middle_density(self.scheme, self.facts)

    def pi(self, density: float) -> Theta:
        """The C step at a density, or at the lowest if that is higher."""
        density = max(density, self.lowest)
        if density not in self._thetas:
            self._thetas[density] = self.scheme.pi(self.weights, density, self.facts)
        return self._thetas[density]

    def realized(self, density: float) -> tuple[nn.Module, nn.Module]:
        """The masked and the realized model at a density, or at the lowest if that is higher."""
        density = max(density, self.lowest)
        if density not in self._realized:
            theta = self.pi(density)
            masked = masked_model(self.scheme, self.model, theta)
            self._realized[density] = masked, self.scheme.realize(masked, theta, self.facts)
        return self._realized[density]


class Rounded:
    """Rounds weights to 16 bits and keeps them in 32: the second part of a composition."""

    takes_density = False
    tolerance = 1e-5

    def analyze(self, model: nn.Module, example_input: Tensor) -> None:
        """Nothing."""

    def lowest_density(self, facts: None) -> float:
        """Every parameter is kept."""
        return 1.0

    def pi(self, weights: Weights, density: float, facts: None) -> Theta:
        """Rounds the values that the part before it stores."""
        values = {name: w.bfloat16().to(w.dtype) for name, w in weights.items()}
        return Theta(values, {}, sum(w.numel() for w in weights.values()))

    def delta(self, theta: Theta) -> Weights:
        """The rounded weights."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: None) -> nn.Module:
        """A copy: the weights are rounded already."""
        return copy.deepcopy(model)


# Assertions.


@contextmanager
def refused(naming: float) -> Iterator[None]:
    """Expects a ValueError in a ``with`` block whose message names the number ``naming``, to three digits."""
    try:
        yield
    except ValueError as error:
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", str(error))]
        named = any(math.isclose(number, naming, rel_tol=1e-3) for number in numbers)
        assert named, f"the error must name the lowest density, {naming:.4g}; it says: {error}"
    else:
        raise AssertionError("a density below the lowest was not refused")


def assert_names(scheme: Scheme, refusal: ValueError) -> None:
    """Fails if an error names neither the scheme nor a class that it inherits: then it may be unintended."""
    names = {base.__name__ for part in parts_of(scheme) for base in type(part).__mro__[:-1]}
    if not any(name in str(refusal) for name in names):
        own = type(parts_of(scheme)[0]).__name__
        raise AssertionError(
            f"a refusal must name the scheme, as '{own} finds no ...' does; this one says: {refusal}"
        ) from refusal


def assert_no_empty_layer(model: nn.Module) -> None:
    """Fails if a parameter has a dimension of size 0 or a weight matrix nothing but zeros."""
    for name, p in model.named_parameters():
        assert p.numel() > 0, f"{name} has shape {tuple(p.shape)}"
        assert p.dim() < 2 or p.any(), f"{name} is all zeros"


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fails unless both hold the same names with equal tensors."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_same_theta(actual: Theta, expected: Theta) -> None:
    """Fails unless two C steps gave the same result, bit for bit."""
    assert (actual.plan, actual.kept) == (expected.plan, expected.kept)
    assert_same_tensors(actual.support, expected.support)
    assert_same_tensors(actual.values, expected.values)


def assert_equivalent_theta(scheme: Scheme, actual: Theta, expected: Theta) -> None:
    """Fails unless two C steps keep the same entries and decompress to the same weights, within the tolerance."""
    assert (actual.plan, actual.kept) == (expected.plan, expected.kept)
    assert_same_tensors(actual.support, expected.support)
    weights = scheme.delta(actual)
    for name, value in scheme.delta(expected).items():
        assert relative_error(weights[name], value) <= scheme.tolerance, name


def assert_no_trace(scheme: Scheme, case: Case, facts: Facts) -> None:
    """Fails if a C step or an observation affects later ones, or the global random number generator."""
    torch.rand(1)  # so that seeding the generator anew would change its state
    state, weights = torch.get_rng_state(), case.weights
    theta = scheme.pi(weights, case.middle, facts)
    digest = theta_digest(theta)
    scheme.pi(weights, case.lowest, facts)
    facts = look(scheme, case.model, 2 * case.x, facts, briefly=True)
    scheme.pi(weights, case.middle, facts)
    assert theta_digest(theta) == digest, "a C step changes the result of one before it"
    facts = look(scheme, case.model, case.x, facts)
    assert theta_digest(scheme.pi(weights, case.middle, facts)) == digest, "a C step depends on those before it"
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator is drawn from, or seeded"


def count_left_behind(work: Callable[[], None]) -> int:
    """The number of tensors and modules created by ``work`` that are still alive after it.

    Subclasses of tensors do not count: torch's own caches keep some that hold no memory.
    """
    gc.freeze()  # excludes the objects that exist already, which saves seconds
    try:
        work()
        gc.collect()
        return sum(
            type(thing) in (Tensor, nn.Parameter) or issubclass(type(thing), nn.Module)
            for thing in gc.get_objects()
        )
    finally:
        gc.unfreeze()
