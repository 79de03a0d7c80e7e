import copy
import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress import schemes
from autocompress.gauges.macs import count_params
from autocompress.lc import LearningCompression, c_step, residual
from autocompress.learning.learner import IN_CACHE, Learner, Penalty
from autocompress.learning.polish import free_entries, freeze, frozen, polish_stored
from autocompress.learning.state import Recovered, State
from autocompress.learning.training import Optimizer, n_steps
from autocompress.scheme import Compose, Facts, Scheme, Theta
from autocompress.schemes import LowRank, Quantize8, Quantize16
from autocompress.splits import Batch, TensorSplit
from autocompress.task import Task
from autocompress.testing import masked_model

# By magnitude: without a look at data.
Prune = partial(schemes.Prune, criterion="l2")
StructPrune = partial(schemes.StructPrune, criterion="l2", normalize="mean")


def StructPruneQuantize16() -> Compose:  # the scheme's name
    return Compose(StructPrune(), Quantize16())


# The three updates, against numbers worked out by hand.


class KeepOne:
    """Keeps the largest entry of each weight: a C step that can be done by hand."""

    def pi(self, weights: dict[str, Tensor], density: float, facts: None) -> Theta:
        kept = {name: w.abs() == w.abs().max() for name, w in weights.items()}
        return Theta({name: w * kept[name] for name, w in weights.items()}, kept, len(weights))


def test_c_step_projects_w_minus_multipliers_over_mu() -> None:
    # w - λ/μ = (1 - 4/2, 0.5 + 3/2, -1.5 - 0) = (-1, 2, -1.5), of which the second is the largest.
    weights = {"w": torch.tensor([1.0, 0.5, -1.5])}
    multipliers = {"w": torch.tensor([4.0, -3.0, 0.0])}
    theta = c_step(KeepOne(), weights, multipliers, mu=2.0, density=0.3, facts=None)
    assert theta.values["w"].tolist() == [0.0, 2.0, 0.0]
    assert theta.support["w"].tolist() == [False, True, False]
    assert weights["w"].tolist() == [1.0, 0.5, -1.5]


def test_multipliers_follow_the_residual_where_theta_binds() -> None:
    # θ = 0, μ = 2, λ = (1, -, 0): λ - μ(w - θ) = (1 - 2 (3 - 0), -, 0 - 2 (-1 - 0)) = (-5, -, 2).
    support = {"w": torch.tensor([False, True, False])}
    penalty = Penalty.towards(
        {"w": torch.tensor([0.0, 4.0, 0.0])}, support, {"w": torch.tensor([1.0, 0.0, 0.0])}, mu=2.0
    )
    new = penalty.multipliers({"w": torch.tensor([3.0, 9.0, -1.0]), "b": torch.tensor([1.0])})
    assert new["w"].tolist() == [-5.0, 0.0, 2.0]
    assert list(new) == ["w"]  # nothing of b is bound
    assert Penalty.towards({"w": torch.zeros(3)}, support, {}, math.inf).multipliers({"w": torch.ones(3)}) == {}


def test_penalty_takes_an_implicit_step() -> None:
    # Drawn to θ + λ/μ = 1 + 2/4 = 1.5 with ημ/(1 + ημ) = 0.4/1.4 = 2/7: 5 - 2/7 x 3.5 = 4. The rest is free.
    theta, multipliers = {"w": torch.tensor([1.0, 9.0])}, {"w": torch.tensor([2.0, 0.0])}
    penalty = Penalty.towards(theta, {"w": torch.tensor([False, True])}, multipliers, 4.0)
    assert penalty.target["w"].tolist() == [1.5, 0.0]
    weights = {"w": torch.tensor([5.0, 6.0]), "b": torch.tensor([8.0])}
    penalty.apply(weights, lr=0.1)
    torch.testing.assert_close(weights["w"], torch.tensor([4.0, 6.0]))
    assert weights["b"].tolist() == [8.0]


def test_the_implicit_step_minimizes_the_proximal_problem() -> None:
    """w' = argmin 1/(2η) (w' - w)² - λ(w' - θ) + μ/2 (w' - θ)², checked by its derivative."""
    w, theta, multiplier, mu, lr = 5.0, 1.0, 2.0, 4.0, 0.1
    weights = {"w": torch.tensor([w], dtype=torch.float64)}
    one = torch.ones(1, dtype=torch.float64)
    Penalty.towards({"w": theta * one}, {"w": one < 0}, {"w": multiplier * one}, mu).apply(weights, lr)
    new = float(weights["w"])
    assert (new - w) / lr - multiplier + mu * (new - theta) == pytest.approx(0, abs=1e-12)


def test_penalty_at_the_ends() -> None:
    theta, support = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([False, True])}
    weights = {"w": torch.tensor([5.0, 6.0])}
    Penalty.towards(theta, support, {}, 3.0).apply(weights, lr=0.0)
    assert weights["w"].tolist() == [5.0, 6.0]  # without a step nothing moves
    hard = Penalty.towards(theta, support, {}, math.inf)
    assert math.isinf(hard.mu)
    hard.apply(weights, lr=0.1)
    assert weights["w"].tolist() == [0.0, 6.0]  # at μ = ∞ what is bound is at θ
    hard.apply(weights, lr=0.0)
    assert weights["w"].tolist() == [0.0, 6.0]
    Penalty.none().apply(weights, lr=0.1)  # nothing is bound: a scheme without a support
    assert weights["w"].tolist() == [0.0, 6.0]


def test_a_target_is_its_own_mask() -> None:
    """With exact zeros: what is drawn to zero and what is free are told apart, and a free entry keeps its bits."""
    theta, multipliers = (
        torch.tensor([0.0, -0.0, 0.0, 7.0, -7.0, 0.0]),
        torch.tensor([4.0, 0.0, 0.0, 0.0, -0.0, 0.0]),
    )
    is_free = torch.tensor([False, False, False, True, True, True])
    penalty = Penalty.towards({"w": theta}, {"w": is_free}, {"w": multipliers}, 2.0)
    assert not penalty.to_zero
    assert penalty.target["w"].tolist() == [2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.equal(penalty.bound["w"], ~is_free)
    weights = {"w": torch.tensor([1.0, 2.0, -4.0, 5.0, -0.0, -6.0])}
    assert penalty.multipliers(weights)["w"].tolist() == [2.0, -4.0, 8.0, 0.0, 0.0, 0.0]
    penalty.apply(weights, lr=0.5)  # by ημ/(1 + ημ) = 1/2
    assert weights["w"].tolist() == [1.5, 1.0, -2.0, 5.0, -0.0, -6.0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_weights_are_drawn_part_by_part(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w, theta, multipliers = (torch.randn(70, 1000, 3, 3, generator=generator).to(dtype) for _ in range(3))
    assert w.numel() > 2 * IN_CACHE
    is_free, point = torch.rand(w.shape, generator=generator) < 0.3, theta + multipliers / 4
    penalty = Penalty.towards({"w": theta}, {"w": is_free}, {"w": multipliers * ~is_free}, 4.0)
    weights = {"w": w.clone(memory_format=memory_format)}
    penalty.apply(weights, lr=0.25)
    assert torch.equal(weights["w"][is_free], w[is_free])
    torch.testing.assert_close(weights["w"], torch.where(is_free, w, (w + point) / 2))


def test_a_penalty_on_some_weights_leaves_the_others() -> None:
    theta = {"a": torch.zeros(1), "b": torch.ones(1), "c": torch.ones(1)}
    whole = Penalty.towards(theta, {name: torch.tensor([False]) for name in theta}, {}, math.inf)
    weights = {name: torch.tensor([5.0]) for name in theta}
    whole.only(["a", "b"]).apply(weights, lr=0.1)
    assert {name: float(w) for name, w in weights.items()} == {"a": 0.0, "b": 1.0, "c": 5.0}


def test_weights_on_a_coarse_grid_are_drawn_to_it_whole() -> None:
    values = {"pruned": torch.zeros(2, dtype=torch.bfloat16), "free": torch.zeros(2)}
    support = {name: torch.tensor([True, False]) for name in values}
    free = free_entries(Theta(values, support, 2, drawn=frozenset({"pruned"})))
    assert {name: is_free.tolist() for name, is_free in free.items()} == {
        "pruned": [False, False],
        "free": [True, False],
    }


def test_lc_draws_weights_of_two_bits_to_their_grid(tiny_task: Task) -> None:
    scheme, model = Quantize8(bits=2), copy.deepcopy(tiny_task.model)
    facts = scheme.analyze(model, tiny_task.example_input)
    recovery = LearningCompression(epochs=60, c_steps=10, lr=0.05, alternating=1.0)
    recovered = recovery.recover(model, scheme, facts, 1.0, tiny_task, 0)
    first, *_, last = recovered.curves["lc_residual"]
    assert last < 0.2 * first
    for name, value in scheme.delta(recovered.theta).items():
        assert torch.equal(model.get_parameter(name), value)


def test_residual() -> None:
    bound = {"w": torch.tensor([[False, True], [True, False]])}
    weights = {"w": torch.tensor([[2.0, 3.0], [4.0, 2.0]]), "b": torch.tensor([100.0])}
    # The bound entries are 3 and 4 away from θ = 0; the norm of w is sqrt(4 + 9 + 16 + 4).
    zero = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
    assert residual(weights, zero, bound) == pytest.approx(5 / math.sqrt(33))
    assert residual(weights, zero, {}) == 0.0


# The L step on problems that have a closed form.


@pytest.mark.parametrize("mu", [0.5, 20.0, 1e6])
def test_l_step_reaches_the_minimum_of_the_augmented_lagrangian(mu: float) -> None:
    """L(w) = a/2 (w - c)²: the minimum of L - λ(w - θ) + μ/2 (w - θ)² is (a c + λ + μ θ) / (a + μ)."""
    a, c, theta, multiplier, lr = 3.0, 2.0, -1.0, 0.7, 0.05
    w = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    penalty = Penalty.towards({"w": theta * one}, {"w": one < 0}, {"w": multiplier * one}, mu)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad((a / 2 * (w - c) ** 2).sum(), w)
        with torch.no_grad():
            w -= lr * gradient
        penalty.apply({"w": w}, lr)
    # Exactly, whatever the learning rate: the gradient step and the implicit one share this fixed point.
    stationary = (a * c + multiplier + mu * theta) / (a + mu)
    assert float(w.detach()) == pytest.approx(stationary, abs=1e-9)


class Regression(nn.Module):
    """Outputs of a linear model as logits of one "class"."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square().mean() / 2


def regression(seed: int, correlation: float, n: int = 64, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, generator=generator)
    x = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * torch.randn(
        n, features, generator=generator
    )
    truth = torch.randn(features, generator=generator)
    return x, x @ truth + 0.1 * torch.randn(n, generator=generator)


def least_squares(x: Tensor, y: Tensor, support: tuple[int, ...]) -> tuple[float, Tensor]:
    """The smallest loss with these features, and the weights."""
    w = torch.zeros(x.shape[1])
    w[list(support)] = torch.linalg.lstsq(x[:, list(support)], y[:, None]).solution[:, 0]
    return float(((x @ w - y) ** 2).mean() / 2), w


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_recovery_solves_best_subset_regression(seed: int, correlation: float) -> None:
    """Least squares with 3 of 6 weights: the optimum over all 20 supports, found by brute force."""
    x, y = regression(seed, correlation)
    ranked = sorted(
        (least_squares(x, y, support) for support in itertools.combinations(range(6), 3)), key=lambda r: r[0]
    )
    model = Regression(6)
    with torch.no_grad():
        model.linear.weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.T)
    task = Task(model, (x, y), (x, y), (x, y), loss=squared_error)
    recovery = LearningCompression(epochs=600, lr=0.05, momentum=0.0, weight_decay=0.0, distill=0.0)
    compressed = copy.deepcopy(model)
    scheme = Prune()
    recovery.recover(compressed, scheme, scheme.analyze(model, x[:1]), 0.5, task, seed=0)
    w = compressed.linear.weight.detach()[0]
    support = tuple(w.nonzero()[:, 0].tolist())
    assert len(support) == 3
    # It is a KKT point: the weights are the best there are on their support ...
    loss, best = least_squares(x, y, support)
    torch.testing.assert_close(w, best, atol=2e-3, rtol=0)
    # ... and no support is better; with correlated features, of which the problem has local minima, one may be.
    allowed = ranked[0][0] if correlation == 0 else ranked[1][0]
    assert loss <= allowed * (1 + 1e-4)


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_both_lagrangians_and_optimizers_solve_it(augmented: bool, optimizer: Optimizer) -> None:
    x, y = regression(0, 0.0)
    best = min(
        (least_squares(x, y, support) for support in itertools.combinations(range(6), 3)), key=lambda r: r[0]
    )
    model = Regression(6)
    with torch.no_grad():
        model.linear.weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.T)
    task = Task(model, (x, y), (x, y), (x, y), loss=squared_error)
    recovery = LearningCompression(
        epochs=600, lr=0.05, momentum=0.0, weight_decay=0.0, distill=0.0, augmented=augmented, optimizer=optimizer
    )
    recovery.recover(model, Prune(), Prune().analyze(model, x[:1]), 0.5, task, seed=0)
    torch.testing.assert_close(model.linear.weight.detach()[0], best[1], atol=2e-3, rtol=0)


# Recovery as a whole.


QUICK = LearningCompression(epochs=6, c_steps=3, lr=0.05, mu=1.0)


def recovered(
    task: Task, scheme: Scheme, density: float, config: LearningCompression = QUICK, seed: int = 0
) -> tuple[Recovered, nn.Module, Facts]:
    torch.manual_seed(0)
    facts = scheme.analyze(task.model, task.example_input)
    model = copy.deepcopy(task.model)
    return config.recover(model, scheme, facts, density, task, seed), model, facts


@pytest.mark.parametrize("scheme", [Prune(), StructPrune()])
@pytest.mark.parametrize("density", [0.6, 0.3])
def test_recovered_model_is_compressed(tiny_task: Task, scheme: Scheme, density: float) -> None:
    found, model, facts = recovered(tiny_task, scheme, density)
    assert 0 < found.theta.kept / count_params(tiny_task.model) <= density
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), found.theta.values[name]), name
        if name in found.theta.support:
            assert not p.detach()[~found.theta.support[name]].any(), name
    again = scheme.pi({name: p.detach() for name, p in model.named_parameters()}, density, facts)
    assert again.plan == found.theta.plan and again.kept == found.theta.kept


def test_recovery_of_a_composition_leaves_numbers_of_16_bits(tiny_task: Task) -> None:
    found, model, _ = recovered(tiny_task, StructPruneQuantize16(), 0.4)
    assert found.theta.kept / count_params(tiny_task.model) <= 0.4
    for p in model.parameters():
        assert torch.equal(p.detach(), p.detach().bfloat16().float())


def test_the_support_is_frozen_in_the_polish(tiny_task: Task) -> None:
    """From the freeze on no gradient step moves what was pruned, and the kept weights do move."""
    scheme, config = StructPrune(), QUICK
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    model = copy.deepcopy(tiny_task.model)
    learner = Learner(config, model, tiny_task, seed=0)
    theta = freeze(scheme, learner.weights, 0.4, facts)
    before = {name: w.detach().clone() for name, w in learner.weights.items()}
    learner.l_step(5, frozen(scheme, theta))
    for name, w in learner.weights.items():
        pruned = ~theta.support[name] if name in theta.support else torch.zeros_like(w, dtype=torch.bool)
        assert not w.detach()[pruned].any(), name
        assert (w.detach() != before[name])[~pruned].any(), name


def test_running_means_of_gradients_end_with_the_c_steps(tiny_task: Task) -> None:
    """What the polish keeps does not depend on them, and they would cost a pass over memory a step."""
    scheme, states = schemes.Prune(criterion="obd"), list[State]()
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    QUICK.recover(copy.deepcopy(tiny_task.model), scheme, facts, 0.4, tiny_task, 0, checkpoint=states.append)
    *_, earlier, last_step, end = [state.learner.under("optimizer") for state in states if state.learner]
    means = [name for name in end if name.startswith("moment2/")]
    assert means
    assert all(torch.equal(last_step[name], end[name]) for name in means)
    assert not all(torch.equal(earlier[name], end[name]) for name in means)


def test_the_dense_model_is_untouched(tiny_task: Task) -> None:
    before = copy.deepcopy(tiny_task.model.state_dict())
    recovered(tiny_task, StructPrune(), 0.3)
    assert all(torch.equal(before[name], t) for name, t in tiny_task.model.state_dict().items())
    assert not any(module.training for module in tiny_task.model.modules())


def test_same_seed_same_weights_bit_for_bit(tiny_task: Task) -> None:
    (a, model_a, _), (b, model_b, _) = (recovered(tiny_task, StructPrune(), 0.4, seed=5) for _ in range(2))
    assert a.theta.plan == b.theta.plan
    assert a.curves == b.curves
    assert all(torch.equal(t, model_b.state_dict()[name]) for name, t in model_a.state_dict().items())
    _, other, _ = recovered(tiny_task, StructPrune(), 0.4, seed=6)
    assert any(not torch.equal(t, other.state_dict()[name]) for name, t in model_a.state_dict().items())


class CountedSplit:
    """Passes batches on and counts those that training took."""

    def __init__(self, split: object) -> None:
        self._split = split
        self.taken = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._split, name)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        for batch in self._split.batches(generator):
            self.taken += generator is not None
            yield batch


@pytest.mark.parametrize(
    "config", [QUICK, LearningCompression(epochs=2.5, c_steps=7), LearningCompression(epochs=1)]
)
def test_the_budget_is_kept_exactly(tiny_task: Task, config: LearningCompression) -> None:
    x, y = next(tiny_task.train.batches())
    small_batches = Task(tiny_task.model, (x, y), (x, y), (x, y))
    small_batches.train = CountedSplit(TensorSplit(x, y, 12))
    recovered(small_batches, StructPrune(), 0.4, config)
    assert small_batches.train.taken == n_steps(TensorSplit(x, y, 12), config.epochs) == round(5 * config.epochs)


def test_density_falls_to_the_target(tiny_task: Task) -> None:
    config = LearningCompression(c_steps=5)
    densities = [config.density_at((k + 1) / 5, 0.1) for k in range(5)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == 0.1
    # After C step k + 1 of 5 the share of log density that is gone is 1 - (1 - (k + 1) / 5)³.
    assert densities[0] == pytest.approx(0.1 ** (1 - 0.8**3))
    assert config.density_at(0.2, 0.1, initial=0.4) == pytest.approx(0.4 * 0.25 ** (1 - 0.8**3))
    found, _, _ = recovered(tiny_task, StructPrune(), 0.3, LearningCompression(epochs=12, c_steps=5))
    assert [len(values) for values in found.curves.values()] == [5, 5, 5]
    assert found.curves["lc_density"][-1] == 0.3


@pytest.mark.parametrize("mu", [1.0, math.inf])
def test_steps_are_scored_as_if_compressed_and_nothing_else_changes(tiny_task: Task, mu: float) -> None:
    config = LearningCompression(epochs=12, c_steps=4, mu=mu, score_steps=True)
    scheme, model, states = StructPrune(), copy.deepcopy(tiny_task.model), list[State]()
    facts = scheme.analyze(model, tiny_task.example_input)
    found = config.recover(model, scheme, facts, 0.3, tiny_task, 0, checkpoint=states.append)
    for state, score in zip(states[:4], found.curves["lc_score"], strict=True):
        assert state.learner is not None
        at_step = copy.deepcopy(tiny_task.model)
        at_step.load_state_dict(state.learner.under("model"))
        with torch.no_grad():
            for name, bound in state.penalty.bound.items():
                at_step.get_parameter(name)[bound] = 0  # what θ binds of a pruned network is zero
        assert tiny_task.evaluate(at_step, tiny_task.val).score == score
    plain, unscored, _ = recovered(tiny_task, scheme, 0.3, replace(config, score_steps=False))
    assert plain.curves.keys() == found.curves.keys() - {"lc_score"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, unscored.state_dict()[name]), name


def test_mu_grows_while_w_and_theta_differ(tiny_task: Task) -> None:
    states: list[State] = []
    config = LearningCompression(epochs=12, c_steps=5, mu=2.0, mu_growth=3.0, lr=0.1)
    scheme = StructPrune()
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    model = copy.deepcopy(tiny_task.model)
    config.recover(model, scheme, facts, 0.3, tiny_task, 0, checkpoint=states.append)
    _, steps = config.schedule(config.n_steps(tiny_task.train))
    assert all(residual > 0.01 for residual in states[-1].curves["lc_residual"])
    mus = [state.penalty.mu for state in states[:-1]]
    assert mus == pytest.approx([2.0 * 3.0**k / (0.1 * steps) for k in range(5)])


def test_a_budget_of_few_steps_takes_fewer_c_steps(tiny_task: Task) -> None:
    found, _, _ = recovered(tiny_task, StructPrune(), 0.5, LearningCompression(epochs=1, c_steps=1000))
    assert 1 <= len(found.curves["lc_density"]) < 1000
    assert found.curves["lc_density"][-1] == pytest.approx(0.5)


class AtOnce(LearningCompression):
    """Compresses to the target from the first C step on."""

    def density_at(self, progress: float, density: float, initial: float = 1.0) -> float:
        return density


def test_w_and_theta_come_together(tiny_task: Task) -> None:
    """At a fixed density the primal residual falls to nothing while μ grows; once they agree it polishes."""
    config = AtOnce(epochs=60, c_steps=40, lr=0.05, mu=1.0, mu_growth=2.0)
    found, _, _ = recovered(tiny_task, StructPrune(), 0.5, config)
    residuals = found.curves["lc_residual"]
    assert residuals[0] > 0.1 and residuals[-1] <= 1e-3
    assert len(residuals) < 40


def test_batchnorm_statistics_are_those_of_the_compressed_model(tiny_task: Task) -> None:
    found, model, facts = recovered(tiny_task, Prune(), 0.5)
    x = tiny_task.train.x
    inputs: list[Tensor] = []
    model[1].register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0].detach()))
    with torch.no_grad():
        model.eval()(x)
    expected = inputs[0].mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].running_var, inputs[0].var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    realized = Prune().realize(masked_model(Prune(), model, found.theta), found.theta, facts)
    torch.testing.assert_close(realized[1].running_mean, expected, atol=1e-5, rtol=1e-4)


def test_a_scheme_without_density_is_polished_only(tiny_task: Task) -> None:
    found, model, _ = recovered(tiny_task, Quantize16(dtype="bf16"), 1.0)
    assert found.theta.kept == count_params(tiny_task.model)
    assert set(found.curves["lc_residual"]) == {0.0} and len(found.curves["lc_residual"]) == 1
    assert all(torch.equal(p.detach(), p.detach().bfloat16().float()) for p in model.parameters())


@pytest.mark.parametrize("scheme", [LowRank(), Compose(LowRank(), Quantize16(dtype="bf16"))], ids=["fp32", "bf16"])
def test_factors_are_trained_in_the_polish(tiny_task: Task, scheme: Scheme) -> None:
    """None of a factorized weight's entries is free, and yet it goes on learning, at its rank."""
    config = LearningCompression(epochs=20, c_steps=4, lr=0.05)
    found, model, facts = recovered(tiny_task, scheme, 0.6, config)
    _, at_freeze, _ = recovered(tiny_task, scheme, 0.6, replace(config, epochs=12, alternating=1.0))
    first = found.theta.plan["parts"][0] if isinstance(scheme, Compose) else found.theta.plan
    assert first["ranks"] and found.theta.kept / count_params(tiny_task.model) <= 0.6
    for layer, rank in first["ranks"].items():
        w = model.get_parameter(f"{layer}.weight").detach().flatten(1)
        assert int((torch.linalg.svdvals(w) > 1e-5 * w.norm()).sum()) == rank
        assert not torch.equal(w, at_freeze.get_parameter(f"{layer}.weight").detach().flatten(1))
    x, y = tiny_task.train.x, tiny_task.train.y
    with torch.no_grad():
        assert tiny_task.loss(model.eval()(x), y) < tiny_task.loss(at_freeze.eval()(x), y)
    masked = masked_model(scheme, model, found.theta)
    realized = scheme.realize(masked, found.theta, facts)
    torch.testing.assert_close(realized.eval()(x), masked.eval()(x), rtol=0, atol=scheme.tolerance * 10)


def test_a_loss_that_is_scaled_goes_on_so(tiny_task: Task) -> None:
    recipe = LearningCompression(steps=4, precision="fp16")
    begun, resumed = (Learner(recipe, copy.deepcopy(tiny_task.model), tiny_task, 0) for _ in range(2))
    begun.l_step(1, Penalty.none())
    assert begun._scaler is not None and resumed._scaler is not None
    begun._scaler.update(2.0**10)  # as where gradients have overflowed
    resumed.restore(begun.snapshot())
    assert begun.l_step(3, Penalty.none()) == resumed.l_step(3, Penalty.none())
    assert resumed._scaler.state_dict() == begun._scaler.state_dict()
    assert all(torch.equal(w, begun.weights[name]) for name, w in resumed.weights.items())


def test_factors_are_trained_at_the_learning_rate_that_is_left(tiny_task: Task) -> None:
    """Also where it has fallen for good, after a gradient that was not finite."""
    learner = Learner(LearningCompression(steps=8), copy.deepcopy(tiny_task.model), tiny_task, 0)
    scheme = LowRank()
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    theta = freeze(scheme, learner.weights, 0.6, facts)
    for slowed, is_trained in ((0.0, False), (1.0, True)):
        learner.descent.taken, learner.descent.slowed = 4, slowed
        polish_stored(scheme, learner, theta, facts, tiny_task, 0)
        found = scheme.delta(theta)
        assert learner.descent.taken == 8
        assert is_trained != all(torch.allclose(w, found[name]) for name, w in learner.weights.items())


def test_frozen_parameters_are_not_trained(tiny_task: Task) -> None:
    tiny_task.model[1].weight.requires_grad_(False)
    _, model, _ = recovered(tiny_task, Prune(), 0.5)
    assert torch.equal(model[1].weight, tiny_task.model[1].weight)
    assert not torch.equal(model[4].weight, tiny_task.model[4].weight)


def test_recovery_is_worth_its_epochs(tiny_task: Task) -> None:
    """The loss on train after recovery is far below that of the same compression without training."""
    scheme, density = StructPrune(), 0.4
    _, model, facts = recovered(tiny_task, scheme, density, LearningCompression(epochs=30, lr=0.05))
    weights = {name: p.detach() for name, p in tiny_task.model.named_parameters()}
    one_shot = masked_model(scheme, tiny_task.model, scheme.pi(weights, density, facts))
    x, y = tiny_task.train.x, tiny_task.train.y
    with torch.no_grad():
        losses = [float(tiny_task.loss(m.eval()(x), y)) for m in (tiny_task.model, model, one_shot)]
    assert losses[1] < 0.5 * losses[2]


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, pytest.param({"compile": True}, marks=pytest.mark.slow)], ids=str
)
def test_forward_passes_in_bf16_or_compiled_train_as_well(tiny_task: Task, settings: dict[str, Any]) -> None:
    scheme, config = StructPrune(), LearningCompression(epochs=30, lr=0.05)
    x, y = tiny_task.train.x, tiny_task.train.y
    _, plain, _ = recovered(tiny_task, scheme, 0.4, config)
    found, model, _ = recovered(tiny_task, scheme, 0.4, replace(config, **settings))
    assert found.theta.kept / count_params(tiny_task.model) <= 0.4
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)  # it was not float32, op by op
    with torch.no_grad():
        losses = [float(tiny_task.loss(m.eval()(x), y)) for m in (plain, model)]
    assert losses[1] < losses[0] + 0.1


def test_divergence_is_an_error(tiny_task: Task) -> None:
    with pytest.raises(FloatingPointError, match="the training diverged"):
        recovered(tiny_task, Prune(), 0.5, LearningCompression(epochs=20, lr=1e20))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("epochs", 0),
        ("epochs", math.nan),
        ("c_steps", 0),
        ("mu", -1.0),
        ("mu_growth", 0),
        ("lr", 0),
        ("temperature", 0),
        ("alternating", 1.5),
        ("distill", -0.1),
        ("momentum", 2),
    ],
)
def test_settings_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value}; it must"):
        LearningCompression(**{argument: value})


# Going on from a checkpoint.


def with_dropout(task: Task) -> Task:
    """Training that draws random numbers of its own."""
    model = nn.Sequential(nn.Dropout(0.2), *copy.deepcopy(task.model)).eval()
    x, y = task.train.x, task.train.y
    return Task(model, TensorSplit(x, y, 12), (x, y), (x, y))


@pytest.mark.parametrize("scheme", [Prune(), StructPruneQuantize16(), StructPrune(criterion="l2")])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    tiny_task: Task, scheme: Scheme, optimizer: Optimizer, tmp_path: Path
) -> None:
    task, states = with_dropout(tiny_task), []
    config = LearningCompression(epochs=6, c_steps=5, lr=0.05, optimizer=optimizer)
    facts = scheme.analyze(task.model, task.example_input)
    torch.manual_seed(0)
    model = copy.deepcopy(task.model)
    whole = config.recover(model, scheme, facts, 0.4, task, 3, checkpoint=states.append)
    assert [state.c_steps for state in states] == [1, 2, 3, 4, 5, 5]
    for i in (0, 3):
        states[i].save(tmp_path / "state")
        torch.manual_seed(99)
        other = copy.deepcopy(task.model)
        again = config.recover(other, scheme, facts, 0.4, task, 3, start=State.load(tmp_path / "state"))
        assert again.theta.plan == whole.theta.plan and again.curves == whole.curves
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kept", [{}, {"state": "{}"}, {"state": '{"c_steps": 1}'}])
def test_what_is_no_checkpoint_of_this_version_is_said_in_one_line(kept: dict[str, str], tmp_path: Path) -> None:
    save_file({"mask/weight": torch.zeros(1)}, tmp_path / "state", metadata=kept)
    with pytest.raises(
        ValueError, match=r"state is not a checkpoint of this version \(.*; begin the recovery anew"
    ):
        State.load(tmp_path / "state")


def test_a_checkpoint_is_not_moved_by_what_follows(tiny_task: Task) -> None:
    states: list[State] = []
    seen = []

    def keep(state: State) -> None:
        states.append(state)
        seen.append({name: t.clone() for name, t in state.learner.tensors.items()})

    facts = Prune().analyze(tiny_task.model, tiny_task.example_input)
    QUICK.recover(copy.deepcopy(tiny_task.model), Prune(), facts, 0.4, tiny_task, 0, checkpoint=keep)
    assert len(states) == 4
    for state, tensors in zip(states, seen, strict=True):
        assert all(torch.equal(t, tensors[name]) for name, t in state.learner.tensors.items())


def test_a_warm_start_begins_at_the_density_and_support_of_the_denser_run(tiny_task: Task) -> None:
    scheme, further = StructPrune(), []
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    model = copy.deepcopy(tiny_task.model)
    denser = QUICK.recover(model, scheme, facts, 0.5, tiny_task, 0)
    start = State.warm(0.5, model.state_dict())
    other = copy.deepcopy(tiny_task.model)
    found = QUICK.recover(other, scheme, facts, 0.2, tiny_task, 1, start=start, checkpoint=further.append)
    assert found.theta.kept / count_params(tiny_task.model) <= 0.2
    densities = found.curves["lc_density"]
    assert densities[0] == pytest.approx(0.5 * (0.2 / 0.5) ** (1 - (2 / 3) ** 3)) and densities[-1] == 0.2
    for name, kept in found.theta.support.items():
        assert not (kept & ~denser.theta.support[name]).any(), name  # what was gone stays gone
    assert found.steps == further[-1].learner.numbers["taken"] == QUICK.n_steps(tiny_task.train)


def test_a_head_start_needs_fewer_steps(tiny_task: Task) -> None:
    whole = LearningCompression(steps=400, c_steps=32)
    for initial, density, share in ((0.1, 0.1, 0.25), (0.1, 0.1 / math.e, 0.5), (1.0, 0.001, 1.0)):
        short = whole.shortened(initial, density, tiny_task.train)
        assert (short.steps, short.c_steps, short.alternating) == (400 * share, 32 * share, 0.3)


@pytest.mark.parametrize(("at", "taken"), [(0.5, 4), (None, 5)])
def test_a_hopeless_recovery_is_given_up_in_its_polish(tiny_task: Task, at: float | None, taken: int) -> None:
    scheme = StructPrune()
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    model = copy.deepcopy(tiny_task.model)

    def hopeless(shown: nn.Module) -> bool:
        assert sum(p.count_nonzero() for p in shown.parameters()) <= 0.4 * count_params(shown)
        return at is not None

    config = LearningCompression(steps=5, c_steps=3)
    found = config.recover(model, scheme, facts, 0.4, tiny_task, 0, hopeless=hopeless)
    assert (found.given_up_at, found.steps) == (at, taken)
    assert found.theta.kept <= 0.4 * count_params(model)  # it is compressed all the same


@pytest.mark.parametrize(("scheme", "n_copies"), [(Prune(), 0), (Compose(schemes.Prune(criterion="obd")), 1)])
def test_recovery_holds_at_most_two_copies_of_the_weights(
    tiny_task: Task, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, n_copies: int
) -> None:
    """Beside what plain training holds: θ + λ/μ, and squared gradients for a criterion that asks for them.

    In the polish, a byte per weight for what is bound in the place of θ + λ/μ.
    """
    held = []
    l_step = Learner.l_step

    def large() -> dict[int, int]:
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() > 1e5}

    def counting(self: Learner, steps: int, penalty: Penalty) -> float:
        held.append(sum(nbytes for at, nbytes in large().items() if at not in others))
        return l_step(self, steps, penalty)

    gc.collect()
    others = large()  # what a failed test has left
    wide = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 4000), nn.ReLU(), nn.Linear(4000, 5)).eval()
    task = Task(wide, tiny_task.train, tiny_task.val, tiny_task.test)
    config = LearningCompression(steps=8, c_steps=3, mu=1.0, distill=0.0)
    facts = scheme.analyze(wide, task.example_input)
    gc.collect()
    monkeypatch.setattr(Learner, "l_step", counting)
    config.recover(copy.deepcopy(wide), scheme, facts, 0.3, task, 0)
    size = 4 * wide[1].weight.numel()
    training = 4 * size  # the dense model, the weights, their gradients and momentum
    fisher = n_copies * size
    assert max(held[: config.c_steps]) == training + fisher + size
    assert held[-1] == training + fisher + 0.25 * size
