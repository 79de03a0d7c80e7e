"""Conformance: the tests that every scheme must pass, ours or a third party's. Inherit them.

In a test module, and nothing more for a scheme that removes single weights::

    from autocompress.testing import SchemeConformance

    class TestMyScheme(SchemeConformance):
        def make_scheme(self):
            return MyScheme()

pytest then runs every check below on every model of `SchemeConformance.models`.
"""

import copy
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Facts, Scheme, Theta, Weights, observe

CLASSES = 5
DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _head(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class _Added(nn.Module):
    """What ``body`` makes of x, added to x or to its shortcut."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Concatenated(nn.Module):
    """x, and behind it what ``body`` makes of it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.body(x))], dim=1)


class _Gated(nn.Module):
    """x, each channel times a gate that sees all of them (squeeze and excitation)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))


def plain() -> nn.Module:
    """Convolutions, each with BatchNorm and ReLU, and a classifier."""
    return nn.Sequential(_conv_bn(3, 12), nn.ReLU(), _conv_bn(12, 16, stride=2), nn.ReLU(), _head(16))


def residual() -> nn.Module:
    """Residual blocks, with and without a convolution in the shortcut."""
    first = nn.Sequential(_conv_bn(8, 8), nn.ReLU(), _conv_bn(8, 8))
    second = nn.Sequential(_conv_bn(8, 16, stride=2), nn.ReLU(), _conv_bn(16, 16))
    return nn.Sequential(
        _conv_bn(3, 8), nn.ReLU(), _Added(first), _Added(second, _conv_bn(8, 16, 1, stride=2)), _head(16)
    )


def concatenated() -> nn.Module:
    """Layers that read all the layers before them."""
    layers = (_Concatenated(_conv_bn(8, 6)), _Concatenated(_conv_bn(14, 6)), _conv_bn(20, 12, 1))
    return nn.Sequential(_conv_bn(3, 8), nn.ReLU(), *layers, nn.ReLU(), _head(12))


def depthwise() -> nn.Module:
    """Inverted residual blocks: expand, filter each channel by itself, project, add."""

    def inverted(channels: int, expanded: int) -> nn.Module:
        filtered = _conv_bn(expanded, expanded, groups=expanded)
        return nn.Sequential(
            _conv_bn(channels, expanded, 1), nn.ReLU6(), filtered, nn.ReLU6(), _conv_bn(expanded, channels, 1)
        )

    return nn.Sequential(_conv_bn(3, 8), nn.ReLU6(), _Added(inverted(8, 20)), _Added(inverted(8, 24)), _head(8))


def flattened() -> nn.Module:
    """A linear layer that reads every position of every channel, and hidden neurons behind it."""
    features = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(8 * 2 * 2, 24), nn.ReLU(), nn.Linear(24, CLASSES))


def gated() -> nn.Module:
    """Squeeze and excitation between convolutions."""
    return nn.Sequential(
        _conv_bn(3, 12), nn.ReLU(), _Gated(12, 4), _conv_bn(12, 16), nn.ReLU(), _Gated(16, 4), _head(16)
    )


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` as if it had been trained: no parameter is zero, BatchNorm is not the identity; in eval mode.

    Args:
        model: Takes batches of shape ``(n, 3, 8, 8)``; changed in place.
        seed: Seeds the parameters and the batches.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    bound = math.sqrt(6 / p[0].numel())
                    p.copy_(uniform(p, -bound, bound))
                elif isinstance(module, nn.BatchNorm2d) and name == "weight":
                    p.copy_(uniform(p, 0.5, 1.5))
                else:
                    p.copy_(uniform(p, -0.5, 0.5))
        model.train()
        for _ in range(3):
            model(torch.randn(16, 3, 8, 8, generator=generator) * 2 + 0.5)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A model that a check runs on.

    Attributes:
        model: In eval mode; no check changes it.
        x: A batch of shape ``(4, 3, 8, 8)``.
        facts: What the scheme found out about the model.
    """

    model: nn.Module
    x: Tensor
    facts: Facts

    @property
    def weights(self) -> Weights:
        """A copy of all the model's parameters, by name: what a C step is given."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def params(self) -> int:
        """How many parameters the model has."""
        return sum(w.numel() for w in self.weights.values())


class SchemeConformance:
    """The checks. Inherit it in a class whose name pytest collects, and say which scheme to check.

    A model in which the scheme finds nothing to compress is skipped, but there must be one in which it does.
    """

    __test__ = False  # pytest is to collect what inherits it
    densities: ClassVar[tuple[float, ...]] = DENSITIES
    models: ClassVar[Mapping[str, Callable[[], nn.Module]]] = {
        make.__name__: make for make in (plain, residual, concatenated, depthwise, flattened, gated)
    }
    _cases: ClassVar[dict[str, Case | ValueError]]

    def __init_subclass__(cls) -> None:
        cls.__test__ = cls.__dict__.get("__test__", True)
        cls._cases = {}

    def make_scheme(self) -> Scheme:
        """The scheme to check. Must be overridden."""
        raise NotImplementedError(f"{type(self).__name__} must say which scheme it checks: override make_scheme")

    def unit_size(self, case: Case) -> int:
        """The most parameters that go at a time: 1 when single weights go; override it for larger units."""
        return 1

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs every check on every model, and those of a density at every density."""
        densities = self.densities if self.make_scheme().takes_density else (1.0,)
        for argument, values in (("model_name", tuple(self.models)), ("density", densities)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)

    def case(self, model_name: str) -> Case:
        """The model of that name, analyzed once for all checks."""
        if model_name not in self._cases:
            model = lived_in(self.models[model_name]())
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            try:
                self._cases[model_name] = Case(model, x, find_facts(self.make_scheme(), model, x))
            except ValueError as error:
                self._cases[model_name] = error
        case = self._cases[model_name]
        if isinstance(case, ValueError):
            raise SkipTest(str(case))
        return case

    def projected(self, model_name: str) -> tuple[Scheme, Case, Theta]:
        """The scheme, the model, and its compressed weights at a density in the middle of what is possible."""
        scheme, case = self.make_scheme(), self.case(model_name)
        density = middle_density(scheme, case.facts)
        return scheme, case, scheme.pi(case.weights, density, case.facts)

    def realized(self, model_name: str) -> tuple[nn.Module, nn.Module, Case]:
        """The masked model, the realized model and what they were made from."""
        scheme, case, theta = self.projected(model_name)
        masked = masked_model(scheme, case.model, theta)
        return masked, scheme.realize(masked, theta, case.facts), case

    # The C step.

    def test_is_a_scheme(self) -> None:
        """It has all of the protocol, and finds something to compress in one of the models at least."""
        assert isinstance(self.make_scheme(), Scheme)
        assert self.make_scheme().tolerance > 0
        for name in self.models:
            try:
                self.case(name)
            except SkipTest:
                continue
            return
        raise AssertionError("the scheme finds nothing to compress in any of the models")

    def test_meets_the_density_from_below(self, model_name: str, density: float) -> None:
        """What is kept is at most what was asked, by less than a unit; too low a target is refused."""
        scheme, case = self.make_scheme(), self.case(model_name)
        lowest = scheme.lowest_density(case.facts)
        if density < lowest:
            with refused(naming=lowest):
                scheme.pi(case.weights, density, case.facts)
            return
        kept = scheme.pi(case.weights, density, case.facts).kept
        assert kept / case.params <= density
        assert kept > density * case.params - self.unit_size(case)

    def test_reaches_its_lowest_density_and_no_lower(self, model_name: str) -> None:
        """`lowest_density` is a density, can be asked for, and is the lowest."""
        scheme, case = self.make_scheme(), self.case(model_name)
        lowest = scheme.lowest_density(case.facts)
        assert 0 < lowest <= 1
        theta = scheme.pi(case.weights, lowest, case.facts)
        assert theta.kept == round(lowest * case.params)
        assert_no_empty_layer(scheme.realize(masked_model(scheme, case.model, theta), theta, case.facts))
        if scheme.takes_density:
            with refused(naming=lowest):
                scheme.pi(case.weights, 0.99 * lowest, case.facts)

    def test_pi_is_idempotent(self, model_name: str, density: float) -> None:
        """Compressing what is compressed changes nothing: plan, support, values."""
        scheme, case = self.make_scheme(), self.case(model_name)
        density = max(density, scheme.lowest_density(case.facts))
        theta = scheme.pi(case.weights, density, case.facts)
        assert_same_theta(scheme.pi(scheme.delta(theta), density, case.facts), theta)

    def test_training_on_the_support_keeps_it(self, model_name: str, density: float) -> None:
        """However the kept entries move, the same ones are kept: the support stays frozen in the polish."""
        scheme, case = self.make_scheme(), self.case(model_name)
        density = max(density, scheme.lowest_density(case.facts))
        theta = scheme.pi(case.weights, density, case.facts)
        generator = torch.Generator().manual_seed(2)
        moved = {
            name: w * (1 + torch.rand(w.shape, generator=generator)) for name, w in scheme.delta(theta).items()
        }
        again = scheme.pi(moved, density, case.facts)
        assert (again.plan, again.kept) == (theta.plan, theta.kept)
        assert_same_tensors(again.support, theta.support)

    def test_pi_is_deterministic(self, model_name: str) -> None:
        """The same weights, and facts found anew, give the same result; the weights are left as they were."""
        scheme, case, theta = self.projected(model_name)
        weights = copy.deepcopy(case.weights)
        facts = find_facts(self.make_scheme(), copy.deepcopy(case.model), case.x)
        density = middle_density(scheme, facts)
        assert_same_theta(self.make_scheme().pi(weights, density, facts), theta)
        assert_same_tensors(weights, case.weights)

    def test_delta_is_w_on_the_support_and_zero_off_it(self, model_name: str) -> None:
        """The decompressed weights have the dense names, shapes and type."""
        scheme, case, theta = self.projected(model_name)
        decompressed = scheme.delta(theta)
        assert decompressed.keys() == case.weights.keys()
        for name, w in case.weights.items():
            value = decompressed[name]
            assert (value.shape, value.dtype) == (w.shape, w.dtype), name
            support = theta.support.get(name, torch.ones_like(w, dtype=torch.bool))
            torch.testing.assert_close(value[support], w[support], rtol=scheme.tolerance, atol=1e-6)
            assert not value[~support].any(), f"{name} is not zero off its support"

    def test_support_is_masks_of_the_weights(self, model_name: str) -> None:
        """The support names parameters, has their shapes, and covers exactly what is kept."""
        _, case, theta = self.projected(model_name)
        assert theta.support.keys() <= case.weights.keys()
        for name, mask in theta.support.items():
            assert (mask.dtype, mask.shape) == (torch.bool, case.weights[name].shape), name
            assert mask.any(), f"nothing is kept of {name}"

    def test_facts_and_scheme_can_be_sent_to_another_process(self, model_name: str) -> None:
        """Both survive pickle, and give the same result after it."""
        scheme, case, theta = self.projected(model_name)
        sent, facts = pickle.loads(pickle.dumps((scheme, case.facts)))
        assert sent == scheme
        assert_same_theta(sent.pi(case.weights, middle_density(scheme, facts), facts), theta)

    # The realized model.

    def test_kept_counts_the_realized_model(self, model_name: str) -> None:
        """``theta.kept`` is the parameters that the realized model has and that are not zero."""
        scheme, case, theta = self.projected(model_name)
        realized = scheme.realize(masked_model(scheme, case.model, theta), theta, case.facts)
        assert theta.kept == sum(int(p.count_nonzero()) for p in realized.parameters())

    def test_realized_computes_what_the_masked_model_computes(self, model_name: str, density: float) -> None:
        """In eval mode, with BatchNorm statistics that are not trivial, within the scheme's tolerance."""
        scheme, case = self.make_scheme(), self.case(model_name)
        density = max(density, scheme.lowest_density(case.facts))
        theta = scheme.pi(case.weights, density, case.facts)
        masked = masked_model(scheme, case.model, theta)
        outputs = run(scheme.realize(masked, theta, case.facts), case.x)
        expected = run(masked, case.x)
        assert (outputs.shape, outputs.dtype) == (expected.shape, expected.dtype)
        error = float((outputs - expected).abs().max() / expected.abs().max())
        assert error <= scheme.tolerance

    def test_dense_model_is_left_untouched(self, model_name: str) -> None:
        """Weights, buffers, gradients, what is trainable and each module's mode, bit for bit."""
        self.case(model_name)  # skips what the scheme refuses
        scheme, model = self.make_scheme(), lived_in(self.models[model_name]())
        x = torch.randn(1, 3, 8, 8)
        for i, module in enumerate(model.modules()):
            module.training = i % 2 == 0
        next(model.parameters()).requires_grad_(False)
        before = fingerprint(model)
        facts = find_facts(scheme, model, x)
        assert fingerprint(model) == before, "analyze or observe changed the model"
        theta = scheme.pi(
            {n: p.detach() for n, p in model.named_parameters()}, middle_density(scheme, facts), facts
        )
        scheme.delta(theta)
        assert fingerprint(model) == before, "pi changed the model"
        realized = scheme.realize(model, theta, facts)
        run(realized, x)
        with torch.no_grad():
            for p in realized.parameters():
                p.zero_()
        assert fingerprint(model) == before, "realize changed the model, or shares memory with it"

    def test_realized_takes_over_mode_and_what_is_trainable(self, model_name: str) -> None:
        """A frozen parameter stays frozen, a model in train mode stays in it."""
        scheme, case, theta = self.projected(model_name)
        masked = masked_model(scheme, case.model, theta)
        frozen = next(name for name, _ in masked.named_parameters())
        masked.get_parameter(frozen).requires_grad_(False)
        realized = scheme.realize(masked.train(), theta, case.facts)
        assert all(module.training for module in realized.modules())
        trainable = [p.requires_grad for p in realized.parameters()]
        assert trainable == [p.requires_grad for p in masked.parameters()]
        assert not any(module.training for module in scheme.realize(masked.eval(), theta, case.facts).modules())

    def test_plan_and_state_dict_rebuild_the_model(self, model_name: str) -> None:
        """From the plan as JSON, a dense model with any weights and the state dict alone."""
        scheme, case, theta = self.projected(model_name)
        realized = scheme.realize(masked_model(scheme, case.model, theta), theta, case.facts)
        plan = json.loads(json.dumps(dict(theta.plan)))
        other = lived_in(self.models[model_name](), seed=3)
        rebuilt = scheme.realize(other, Theta({}, {}, 0, plan), case.facts)
        rebuilt.load_state_dict(realized.state_dict())
        assert torch.equal(run(rebuilt, case.x), run(realized, case.x))

    def test_realized_deep_copies(self, model_name: str) -> None:
        """A copy computes the same and is independent."""
        _, realized, case = self.realized(model_name)
        expected = run(realized, case.x)
        clone = copy.deepcopy(realized)
        assert torch.equal(run(clone, case.x), expected)
        with torch.no_grad():
            for p in clone.parameters():
                p.zero_()
        assert torch.equal(run(realized, case.x), expected)

    def test_realized_trains(self, model_name: str) -> None:
        """Forward in train mode and backward; every parameter gets a finite gradient."""
        _, realized, case = self.realized(model_name)
        realized.train()
        outputs = realized(case.x)
        assert outputs.shape == (len(case.x), CLASSES)
        nn.functional.cross_entropy(outputs, torch.arange(len(case.x)) % CLASSES).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, p in realized.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name

    def test_no_layer_is_empty(self, model_name: str, density: float) -> None:
        """No layer loses its last channel or weight."""
        scheme, case = self.make_scheme(), self.case(model_name)
        density = max(density, scheme.lowest_density(case.facts))
        theta = scheme.pi(case.weights, density, case.facts)
        assert_no_empty_layer(scheme.realize(masked_model(scheme, case.model, theta), theta, case.facts))


def find_facts(scheme: Scheme, model: nn.Module, x: Tensor) -> Facts:
    """What the scheme finds out about the model and, if it looks at data, about the batch ``x``."""
    batch = (x, torch.arange(len(x)) % CLASSES)
    evidence = Evidence(model, lambda: [batch], nn.functional.cross_entropy)
    return observe(scheme, evidence, scheme.analyze(model, x[:1]))


def middle_density(scheme: Scheme, facts: Facts) -> float:
    """A density between the lowest and dense, for checks that take one; 1 for a scheme without a density."""
    return math.sqrt(scheme.lowest_density(facts)) if scheme.takes_density else 1.0


def masked_model(scheme: Scheme, model: nn.Module, theta: Theta) -> nn.Module:
    """A copy of the dense model that carries the decompressed θ: what the realized model must agree with."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in scheme.delta(theta).items():
            masked.get_parameter(name).copy_(value)
    return masked


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's outputs, without gradients and in whatever mode it is."""
    with torch.no_grad():
        outputs: Tensor = model(x)
    return outputs


def fingerprint(model: nn.Module) -> list[object]:
    """Everything about a model that must not change, in a form that compares with ``==``."""
    state = [(name, bytes(tensor.numpy())) for name, tensor in model.state_dict().items()]
    modes = [(name, module.training) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.grad is None, p.data_ptr()) for name, p in model.named_parameters()]
    return [state, modes, parameters]


@contextmanager
def refused(naming: float) -> Iterator[None]:
    """Expects a ValueError whose message names a number, to three digits."""
    try:
        yield
    except ValueError as error:
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", str(error))]
        named = any(math.isclose(number, naming, rel_tol=1e-3) for number in numbers)
        assert named, f"the error must name the lowest density, {naming:.4g}; it says: {error}"
    else:
        raise AssertionError("a density below the lowest was not refused")


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
    """Fails unless two C steps gave the same result."""
    assert (actual.plan, actual.kept) == (expected.plan, expected.kept)
    assert_same_tensors(actual.support, expected.support)
    assert_same_tensors(actual.values, expected.values)
