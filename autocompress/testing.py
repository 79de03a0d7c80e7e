"""Conformance: the tests that every scheme must pass, one of ours or a third party's.

A test module inherits them; for a scheme that removes single weights this is all it needs::

    from autocompress.testing import SchemeConformance

    class TestMyScheme(SchemeConformance):
        def make_scheme(self):
            return MyScheme()

pytest then runs every check below on every model of `SchemeConformance.models`.
"""

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor, nn

from autocompress.conformance.fingerprints import fingerprint, theta_digest
from autocompress.conformance.second_process import digest_elsewhere
from autocompress.conformance.testing_models import (
    CLASSES,
    INPUT_SHAPE,
    MODELS,
    as_users_leave_it,
    attention,
    concatenated,
    depthwise,
    flattened,
    gated,
    grouped,
    lived_in,
    plain,
    residual,
    tied,
)
from autocompress.conformance.testing_tools import (
    Case,
    Rounded,
    assert_equivalent_theta,
    assert_names,
    assert_no_empty_layer,
    assert_no_trace,
    assert_same_tensors,
    assert_same_theta,
    count_left_behind,
    find_facts,
    leaving_layers_whole,
    masked_model,
    middle_density,
    refused,
    relative_error,
    run,
    telling,
    telling_error,
    written_and_read,
)
from autocompress.scheme import Compose, Masking, Scheme, Staged, Theta

__all__ = [
    "CLASSES",
    "Case",
    "SchemeConformance",
    "attention",
    "concatenated",
    "depthwise",
    "find_facts",
    "fingerprint",
    "flattened",
    "gated",
    "grouped",
    "lived_in",
    "masked_model",
    "plain",
    "refused",
    "residual",
    "run",
    "telling",
    "telling_error",
    "tied",
]

DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


class SchemeConformance:
    """The checks. Inherit it in a class whose name pytest collects, and override `make_scheme`.

    A model is skipped if `analyze` refuses it with a ValueError that names the scheme, but there must be one that
    the scheme can compress. A scheme for certain architectures sets its own ``models`` and their ``input_shape``.

    Attributes:
        densities: The densities of checks that run at several.
        models: Functions that make the models, by name.
        input_shape: The shape of a sample.
        trials: Number of trials in the check for memory leaks.
    """

    __test__ = False  # pytest collects only the classes that inherit it
    densities: ClassVar[tuple[float, ...]] = DENSITIES
    models: ClassVar[Mapping[str, Callable[[], nn.Module]]] = MODELS
    input_shape: ClassVar[tuple[int, ...]] = INPUT_SHAPE
    trials: ClassVar[int] = 20
    _cases: ClassVar[dict[str, Case | ValueError]]

    def __init_subclass__(cls) -> None:
        cls.__test__ = cls.__dict__.get("__test__", True)
        cls._cases = {}

    def make_scheme(self) -> Scheme:
        """The scheme to check. Must be overridden."""
        raise NotImplementedError(f"{type(self).__name__} must say which scheme it checks: override make_scheme")

    def unit_size(self, case: Case) -> int:
        """The largest number of parameters that the scheme removes at once: 1 for single weights."""
        return 1

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Parametrizes each check with the models and the densities that it takes."""
        densities = self.densities if self.make_scheme().takes_density else (1.0,)
        for argument, values in (("model_name", tuple(self.models)), ("density", densities)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)

    def case(self, model_name: str) -> Case:
        """A model with the scheme's analysis, made once; skips the test if the scheme refuses the model."""
        if model_name not in self._cases:
            scheme, model, x = self.make_scheme(), self.fresh_model(model_name), self.batch(4)
            try:
                with leaving_layers_whole():
                    self._cases[model_name] = Case(scheme, model, x, find_facts(scheme, model, x))
            except ValueError as error:
                assert_names(scheme, error)
                self._cases[model_name] = error
        case = self._cases[model_name]
        if isinstance(case, ValueError):
            raise SkipTest(str(case))
        return case

    def projected(self, model_name: str) -> tuple[Scheme, Case, Theta]:
        """The scheme, the case, and the compressed weights at a medium density."""
        case = self.case(model_name)
        return case.scheme, case, case.pi(case.middle)

    def realized(self, model_name: str) -> tuple[nn.Module, nn.Module, Case]:
        """The masked model, the realized model and the case; all checks share them, so do not change them."""
        case = self.case(model_name)
        return *case.realized(case.middle), case

    def fresh_model(self, model_name: str, seed: int = 0) -> nn.Module:
        """A new model of that name; equal seeds give equal weights."""
        return lived_in(self.models[model_name](), seed, self.input_shape)

    def batch(self, n: int) -> Tensor:
        """A batch of ``n`` samples, the same ones each time."""
        return torch.randn(n, *self.input_shape, generator=torch.Generator().manual_seed(1))

    def first_case(self) -> Case:
        """The case of the first model that the scheme can compress."""
        for name in self.models:
            try:
                return self.case(name)
            except SkipTest:
                continue
        raise AssertionError("the scheme finds nothing to compress in any of the models")

    # The C step.

    def test_is_a_scheme(self) -> None:
        """The scheme implements the protocol, and can compress at least one of the models.

        Its spec, as it is stored in records and with models, makes an equal scheme: its parameters are literals.
        """
        assert isinstance(self.make_scheme(), Scheme)
        assert self.make_scheme().tolerance > 0
        assert written_and_read(self.make_scheme()) == self.make_scheme()
        self.first_case()

    def test_meets_the_density_from_below(self, model_name: str, density: float) -> None:
        """The kept parameters miss the target by less than one unit, from below; too low a target is refused."""
        case = self.case(model_name)
        if not case.scheme.takes_density:
            assert case.pi(density).kept == round(case.lowest * case.params)
        elif density < case.lowest:
            with refused(naming=case.lowest):
                case.scheme.pi(case.weights, density, case.facts)
        else:
            kept = case.pi(density).kept
            assert kept / case.params <= density
            assert kept > density * case.params - self.unit_size(case)

    def test_reaches_its_lowest_density_and_no_lower(self, model_name: str) -> None:
        """`lowest_density` can be reached, and nothing below it; density 1 can be reached, too."""
        case = self.case(model_name)
        assert case.pi(1.0).kept <= case.params
        assert 0 < case.lowest <= 1
        assert case.pi(case.lowest).kept == round(case.lowest * case.params)
        if case.scheme.takes_density:
            with refused(naming=case.lowest):
                case.scheme.pi(case.weights, 0.99 * case.lowest, case.facts)

    def test_density_can_differ_by_module(self) -> None:
        """A `Staged` scheme with a lower density in one module has a spec, too, and meets the density."""
        case = self.first_case()
        if not isinstance(case.scheme, Staged):
            return
        name = next(name.rpartition(".")[0] for name, w in case.weights.items() if w.dim() > 1)
        staged = case.scheme.staged({name: 0.5})
        assert written_and_read(staged) == staged != case.scheme
        with leaving_layers_whole():
            facts = find_facts(staged, case.model, case.x)
        density = middle_density(staged, facts)
        assert staged.pi(case.weights, density, facts).kept / case.params <= density

    def test_pi_is_idempotent(self, model_name: str, density: float) -> None:
        """A second C step changes neither plan nor support nor weights."""
        case = self.case(model_name)
        theta = case.pi(density)
        again = case.scheme.pi(case.scheme.delta(theta), max(density, case.lowest), case.facts)
        assert_equivalent_theta(case.scheme, again, theta)

    def test_training_on_the_support_keeps_it(self, model_name: str, density: float) -> None:
        """However training changes kept entries, the same ones are kept, so that the polish can freeze them."""
        case = self.case(model_name)
        theta = case.pi(density)
        generator = torch.Generator().manual_seed(2)
        moved = {}
        for name, w in case.scheme.delta(theta).items():
            factor = 1 + torch.rand(w.shape, generator=generator)
            moved[name] = torch.where(theta.support.get(name, torch.tensor(True)), w * factor, w)
        again = case.scheme.pi(moved, max(density, case.lowest), case.facts)
        assert (again.plan, again.kept) == (theta.plan, theta.kept)
        assert_same_tensors(again.support, theta.support)

    def test_pi_is_deterministic(self, model_name: str) -> None:
        """Equal weights give equal results, also with facts that are found anew.

        The new facts come from a larger batch, under ``no_grad``, and a model with frozen parameters. The weights
        and the global random generator are left unchanged. Earlier calls have no influence: a recovery that is
        resumed, and the next trial, have not made them.
        """
        case, weights = self.case(model_name), self.case(model_name).weights
        frozen = copy.deepcopy(case.model).requires_grad_(False)
        with torch.no_grad(), leaving_layers_whole():
            facts = find_facts(self.make_scheme(), frozen, case.x, example=len(case.x))
        with torch.inference_mode():
            theta = self.make_scheme().pi(weights, case.middle, facts)
        assert_same_theta(theta, case.pi(case.middle))
        assert_no_trace(self.make_scheme(), case, facts)
        assert_same_tensors(weights, case.weights)

    def test_another_process_finds_the_same(self, model_name: str) -> None:
        """The result is the same, bit for bit, in a new process, where sets and hashes have another order."""
        case = self.case(model_name)
        elsewhere = digest_elsewhere(case.scheme, case.model, case.x)
        assert elsewhere == theta_digest(case.pi(case.middle))

    def test_delta_is_w_on_the_support_and_zero_off_it(self, model_name: str) -> None:
        """The decompressed weights have the dense names, shapes and type.

        A matrix without a free entry is compressed as a whole: it must be nearer to w than zero is. A `Masking`
        scheme sets entries to zero and changes no other.
        """
        case = self.case(model_name)
        masks = isinstance(case.scheme, Masking) and case.scheme.masks
        theta = case.pi(case.middle)
        decompressed = case.scheme.delta(theta)
        assert decompressed.keys() == case.weights.keys()
        for name, w in case.weights.items():
            value = decompressed[name]
            assert (value.shape, value.dtype) == (w.shape, w.dtype), name
            support = theta.support.get(name, torch.ones_like(w, dtype=torch.bool))
            assert not masks or torch.equal(value, w * support), f"{name} is not w with zeros"
            if support.any() or w.dim() < 2:
                torch.testing.assert_close(value[support], w[support], rtol=case.scheme.tolerance, atol=1e-6)
                assert not value[~support].any(), f"{name} is not zero off its support"
            else:
                assert (value - w).norm() < w.norm(), f"{name} is bound to what is no nearer than zero"

    def test_support_is_masks_of_the_weights(self, model_name: str) -> None:
        """Support and ``drawn`` name parameters; the masks are bool and have the parameters' shapes."""
        case = self.case(model_name)
        theta = case.pi(case.middle)
        support = theta.support
        assert theta.drawn <= case.weights.keys()
        assert support.keys() <= case.weights.keys()
        for name, mask in support.items():
            assert (mask.dtype, mask.shape) == (torch.bool, case.weights[name].shape), name

    def test_theta_does_not_change_with_the_weights(self, model_name: str) -> None:
        """θ shares no memory with the weights that it was made from, which training goes on changing."""
        case, weights = self.case(model_name), self.case(model_name).weights
        theta = case.scheme.pi(weights, case.middle, case.facts)
        for w in weights.values():
            w.zero_()
        assert_same_theta(theta, case.pi(case.middle))

    def test_facts_and_scheme_can_be_sent_to_another_process(self, model_name: str) -> None:
        """Both survive pickle, and give the same result after it."""
        case = self.case(model_name)
        sent, facts = pickle.loads(pickle.dumps((case.scheme, case.facts)))
        assert sent == case.scheme
        assert_same_theta(sent.pi(case.weights, middle_density(sent, facts), facts), case.pi(case.middle))

    # The realized model.

    def test_kept_counts_the_realized_model(self, model_name: str) -> None:
        """``theta.kept`` is the number of nonzero parameters of the realized model; shared ones count once."""
        case = self.case(model_name)
        for density in (self.densities[0], case.middle, case.lowest):
            kept, (_, realized) = case.pi(density).kept, case.realized(density)
            assert type(kept) is int
            assert kept == sum(int(p.count_nonzero()) for p in realized.parameters())

    def test_realized_computes_what_the_masked_model_computes(self, model_name: str, density: float) -> None:
        """Outputs are equal within the scheme's tolerance: in eval mode, after training, for any batch size."""
        case = self.case(model_name)
        masked, realized = case.realized(density)
        for x in (case.x, case.x[:1]):
            outputs, expected = run(realized, x), run(masked, x)
            assert (outputs.shape, outputs.dtype) == (expected.shape, expected.dtype)
            assert relative_error(outputs, expected) <= case.scheme.tolerance

    def test_dense_model_is_left_untouched(self, model_name: str) -> None:
        """Weights, buffers, gradients, ``requires_grad``, modes, settings and hooks stay the same, bit for bit.

        The model is as users may leave it: modules in different modes, a frozen parameter, a hook, weights in
        another memory layout. None of that changes the result either.
        """
        case = self.case(model_name)
        scheme, model = self.make_scheme(), as_users_leave_it(copy.deepcopy(case.model))
        before = fingerprint(model)
        with leaving_layers_whole():
            facts = find_facts(scheme, model, case.x)
        assert fingerprint(model) == before, "analyze changed the model"
        theta = scheme.pi({n: p.detach() for n, p in model.named_parameters()}, case.middle, facts)
        assert_equivalent_theta(scheme, theta, case.pi(case.middle))
        assert fingerprint(model) == before, "pi or delta changed the model"
        realized = scheme.realize(model, theta, facts)
        run(realized, case.x)
        with torch.no_grad():
            for p in realized.parameters():
                p.zero_()
        assert fingerprint(model) == before, "realize changed the model, or shares memory with it"

    def test_realized_takes_over_mode_and_what_is_trainable(self, model_name: str) -> None:
        """Modules keep their mode and parameters their ``requires_grad``; there are no gradients.

        None of that changes the outputs.
        """
        case = self.case(model_name)
        masked = as_users_leave_it(copy.deepcopy(case.realized(case.middle)[0]))
        realized = case.scheme.realize(masked, case.pi(case.middle), case.facts)
        modes = {name: module.training for name, module in masked.named_modules()}
        inner = next((m for m in realized.modules() if type(m) is type(masked)), realized)  # behind a wrapper
        for name, module in inner.named_modules():
            assert module.training == modes.get(name, module.training), f"{name!r} is in another mode"
        assert all(p.is_leaf and p.grad is None for p in realized.parameters())
        for masked_p in masked.parameters():
            masked_p.requires_grad_(False)
        still = case.scheme.realize(masked.train(), case.pi(case.middle), case.facts)
        assert all(module.training for module in still.modules())
        assert not any(p.requires_grad for p in still.parameters())
        for masked_p in masked.parameters():
            masked_p.requires_grad_(True)
        again = case.scheme.realize(masked.eval(), case.pi(case.middle), case.facts)
        assert not any(module.training for module in again.modules())
        assert all(p.requires_grad for p in again.parameters())
        assert relative_error(run(still.eval(), case.x), run(again, case.x)) <= case.scheme.tolerance

    def test_plan_and_state_dict_rebuild_the_model(self, model_name: str) -> None:
        """The plan as JSON, a dense model with any weights and the state dict suffice to rebuild the model."""
        case = self.case(model_name)
        _, realized = case.realized(case.middle)
        for density in (1.0, case.lowest, case.middle):
            plan = json.loads(json.dumps(dict(case.pi(density).plan), allow_nan=False))
        other = self.fresh_model(model_name, seed=3)
        rebuilt = case.scheme.realize(other, Theta({}, {}, 0, plan), case.facts)
        rebuilt.load_state_dict(realized.state_dict())
        assert torch.equal(run(rebuilt, case.x), run(realized, case.x))

    def test_realized_copies_and_pickles(self, model_name: str) -> None:
        """A deep copy and a pickled copy compute the same and share no memory with the original."""
        case = self.case(model_name)
        _, realized = case.realized(case.middle)
        expected = run(realized, case.x)
        for clone in (copy.deepcopy(realized), pickle.loads(pickle.dumps(realized))):
            assert torch.equal(run(clone, case.x), expected)
            with torch.no_grad():
                for p in clone.parameters():
                    p.zero_()
        assert torch.equal(run(realized, case.x), expected)

    def test_realized_trains(self, model_name: str) -> None:
        """In train mode, a backward pass gives every parameter a finite gradient."""
        case = self.case(model_name)
        realized = copy.deepcopy(case.realized(case.middle)[1]).train()
        outputs = realized(case.x)
        assert outputs.shape == run(case.model, case.x).shape
        nn.functional.cross_entropy(outputs, torch.arange(len(case.x)) % outputs.shape[1]).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, p in realized.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name

    def test_no_layer_is_empty(self, model_name: str, density: float) -> None:
        """No layer loses its last channel or weight."""
        assert_no_empty_layer(self.case(model_name).realized(density)[1])

    def test_composes(self, model_name: str) -> None:
        """In a composition, the next part works on the scheme's result; both are decompressed in reverse order."""
        case = self.case(model_name)
        try:
            both, facts = Compose(case.scheme, Rounded()), [case.facts, None]
        except ValueError as error:
            raise SkipTest(f"nothing may come behind it: {error}") from None
        if isinstance(case.scheme, Compose):
            facts = [*case.facts, None]
        alone, theta = case.pi(case.middle), both.pi(case.weights, case.middle, facts)
        assert theta.kept == alone.kept
        assert_same_tensors(theta.support, alone.support)
        rounded = Theta(Rounded().pi(alone.values, 1.0, None).values, alone.support, alone.kept, alone.plan)
        assert_same_tensors(both.delta(theta), case.scheme.delta(rounded))
        masked = masked_model(both, case.model, theta)
        realized = both.realize(masked, theta, facts)
        assert relative_error(run(realized, case.x), run(masked, case.x)) <= case.scheme.tolerance

    def test_retains_nothing(self) -> None:
        """Trials leave no tensors and modules in memory."""
        case, scheme = self.first_case(), self.make_scheme()

        def trials(n: int) -> None:
            for _ in range(n):
                theta = scheme.pi(case.weights, case.middle, case.facts)
                run(scheme.realize(masked_model(scheme, case.model, theta), theta, case.facts), case.x)

        trials(1)  # caches that are filled once are allowed
        assert count_left_behind(lambda: trials(self.trials)) < self.trials
