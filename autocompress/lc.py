"""Learning-compression: trains a network's weights w and their compressed form θ towards each other.

    minimize L(w)  subject to  w = θ, θ compressed

Carreira-Perpiñán & Idelbayev, "Learning-Compression Algorithms for Neural Net Pruning" (CVPR 2018), in the
augmented-Lagrangian form of Condensa (Joseph et al., arXiv:1911.02497). It alternates, for a growing penalty μ
and multipliers λ:

    L step       w ← argmin  L(w) − λᵀ(w − θ) + μ/2 ‖w − θ‖²
    C step       θ ← Π(w − λ/μ)
    multipliers  λ ← λ − μ (w − θ)

Three things make it fit a budget of a few epochs. The density falls step by step from 1 to its target, so that
no C step cuts deep. Entries that θ keeps are free (θ follows w there, and λ = 0), so that the penalty only
pulls at what is about to go. And the quadratic term is taken implicitly after each optimizer step, which is
stable for every μ, up to μ = ∞: the frozen support of the polish.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.scheme import Facts, Scheme, Theta, Weights
from autocompress.task import Task, device_of
from autocompress.training import (
    Descent,
    distillation_loss,
    endless_taught,
    n_steps,
    recalibrate_batchnorm,
)


@dataclass(frozen=True)
class Penalty:
    """What draws w to θ in an L step: −λᵀ(w − θ) + μ/2 ‖w − θ‖² on the entries that are not free.

    Attributes:
        mu: The penalty μ; infinity means w = θ.
        theta: The decompressed θ.
        bound: Per weight, 1.0 where the entry is drawn to θ and 0.0 where it is free.
        target: Per weight, θ + λ/μ, the point that the entries are drawn to.
    """

    mu: float
    theta: Weights
    bound: Weights
    target: Weights

    @classmethod
    def towards(cls, theta: Weights, multipliers: Weights, mu: float, bound: Weights) -> "Penalty":
        """The penalty of an L step."""
        return cls(mu, theta, bound, {name: theta[name] + multipliers[name] * bound[name] / mu for name in bound})

    @classmethod
    def frozen(cls, theta: Weights, bound: Weights) -> "Penalty":
        """The penalty at μ = ∞: what is not free stays at θ."""
        return cls(math.inf, theta, bound, {name: theta[name] for name in bound})

    @torch.no_grad()
    def apply(self, weights: Weights, lr: float) -> None:
        """One implicit gradient step on the penalty: w ← w − ημ/(1 + ημ) (w − θ − λ/μ), at learning rate η."""
        if not self.bound:
            return
        strength = 1.0 if math.isinf(self.mu) else lr * self.mu / (1 + lr * self.mu)
        drawn = [weights[name] for name in self.bound]
        away = torch._foreach_sub(drawn, [self.target[name] for name in self.bound])
        torch._foreach_mul_(away, list(self.bound.values()))
        torch._foreach_add_(drawn, away, alpha=-strength)


@torch.no_grad()
def c_step(
    scheme: Scheme, weights: Weights, multipliers: Weights, mu: float, density: float, facts: Facts
) -> Theta:
    """The C step θ = Π(w − λ/μ)."""
    shifted = {name: w.detach() - multipliers[name] / mu for name, w in weights.items()}
    return scheme.pi(shifted, density, facts)


@torch.no_grad()
def multiplier_step(multipliers: Weights, mu: float, weights: Weights, theta: Weights, bound: Weights) -> Weights:
    """The multipliers λ − μ(w − θ) on the entries that are drawn to θ, and 0 on the free ones.

    After an L step this is the gradient with which the loss resists compression, entry by entry.
    """
    zero = {name: torch.zeros_like(value) for name, value in multipliers.items() if name not in bound}
    return zero | {
        name: (multipliers[name] - mu * (weights[name] - theta[name])) * is_bound
        for name, is_bound in bound.items()
    }


def bound_entries(theta: Theta) -> Weights:
    """Per weight that θ does not keep whole: 1.0 where the entry is drawn to θ, 0.0 where it is free."""
    return {name: (~kept).float() for name, kept in theta.support.items()}


@torch.no_grad()
def residual(weights: Weights, theta: Weights, bound: Weights) -> float:
    """The primal residual ‖w − θ‖ / ‖w‖, w − θ over the entries that are not free."""
    if not bound:
        return 0.0
    away = torch.stack([((weights[name] - theta[name]) * is_bound).norm() for name, is_bound in bound.items()])
    size = torch.stack([weights[name].norm() for name in bound])
    return float(away.norm() / size.norm().clamp_min(1e-12))


@dataclass(frozen=True)
class Recovered:
    """What recovery leaves: the model it was given now carries the decompressed θ.

    Attributes:
        theta: The compressed weights.
        curves: One number per C step: the density, the primal residual, the training loss.
    """

    theta: Theta
    curves: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class LearningCompression:
    """The L-C optimizer and its budget.

    Args:
        epochs: Gradient steps of a whole recovery, in passes over the training data.
        c_steps: How often the weights are compressed, if the budget has a gradient step for each.
        alternating: Share of the steps in which L and C alternate; the rest polishes on a frozen support.
        mu: The first penalty, in units of 1 / (learning rate x steps of one L step): at 1 a weight that the
            loss does not care for shrinks to about 1/e of its distance from θ in one L step.
        mu_growth: Factor on μ from one C step to the next.
        lr: Peak learning rate of SGD; it follows one cosine over all the steps.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty.
        distill: Weight of distillation from the dense model, against the task's own loss.
        temperature: Softens the classes that are distilled.
    """

    epochs: float = 30
    c_steps: int = 16
    alternating: float = 0.6
    mu: float = 1.0
    mu_growth: float = 1.2
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("epochs", "c_steps", "mu", "mu_growth", "lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must be positive")
        for name in ("alternating", "distill", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must lie between 0 and 1")

    def recover(
        self, model: nn.Module, scheme: Scheme, facts: Facts, density: float, task: Task, seed: int
    ) -> Recovered:
        """Compresses ``model`` in place to ``density`` while training it on ``task.train``.

        Args:
            model: A copy of the dense model, on the device to train on.
            scheme: Supplies the C step.
            facts: What the scheme found out about the model.
            density: The target; at least the scheme's lowest.
            task: The data, the loss, and the dense model as the teacher.
            seed: Seeds the order of the batches.

        Returns:
            θ; the model carries its decompressed weights and recalibrated BatchNorm statistics.
        """
        learner = Learner(self, model, task, seed)
        w = learner.weights
        multipliers = {name: torch.zeros_like(p) for name, p in w.items()}
        alternating = int(learner.descent.steps * self.alternating)
        c_steps = max(1, min(self.c_steps, alternating))
        steps_per_c_step = alternating // c_steps
        curves: dict[str, list[float]] = {"lc_density": [], "lc_residual": [], "lc_loss": []}
        for k in range(c_steps):
            mu = self.mu_at(k, steps_per_c_step)
            target = self.density_at((k + 1) / c_steps, density)
            theta = c_step(scheme, w, multipliers, mu, target, facts)
            penalty = Penalty.towards(scheme.delta(theta), multipliers, mu, bound_entries(theta))
            loss = learner.l_step(steps_per_c_step, penalty)
            multipliers = multiplier_step(multipliers, mu, w, penalty.theta, penalty.bound)
            curves["lc_density"].append(target)
            curves["lc_residual"].append(residual(w, penalty.theta, penalty.bound))
            curves["lc_loss"].append(loss)
        theta = freeze(scheme, w, density, facts)
        learner.l_step(learner.descent.steps_left, Penalty.frozen(scheme.delta(theta), bound_entries(theta)))
        theta = freeze(scheme, w, density, facts)
        recalibrate_batchnorm(model, task.train)
        return Recovered(theta, {name: tuple(values) for name, values in curves.items()})

    def mu_at(self, k: int, steps: int) -> float:
        """The penalty μ of the L step after C step ``k``, in the units of the loss's curvature."""
        return self.mu * self.mu_growth**k / (self.lr * max(1, steps))

    def density_at(self, progress: float, density: float) -> float:
        """From dense to the target as ``progress`` goes from 0 to 1, fast first and then slowly.

        The cubic of Zhu & Gupta, "To Prune, or Not to Prune" (2017), applied to the density's logarithm.
        """
        return float(density ** (1 - (1 - progress) ** 3))


class Learner:
    """The L step: SGD on the task's loss and distillation, and after each of its steps one on the penalty.

    Args:
        config: Learning rate and budget.
        model: Trained in place.
        task: The data, the loss and the teacher.
        seed: Seeds the order of the batches.
    """

    def __init__(self, config: LearningCompression, model: nn.Module, task: Task, seed: int) -> None:
        self.config = config
        self.model = model.train()
        self.weights: Weights = dict(model.named_parameters())
        steps = n_steps(task.train, config.epochs)
        self.descent = Descent(model, steps, config.lr, config.momentum, config.weight_decay)
        self._loss = task.loss
        self._device = device_of(model)
        self._batches = endless_taught(task.train, task.model, torch.Generator().manual_seed(seed))

    def l_step(self, steps: int, penalty: Penalty) -> float:
        """Takes gradient steps under ``penalty``; returns their mean loss (without the penalty)."""
        total = torch.zeros((), device=self._device)
        for _ in range(steps):
            loss = self._task_loss(*next(self._batches))
            lr = self.descent.step(loss)
            penalty.apply(self.weights, lr)
            total += loss.detach()
        mean = float(total) / max(1, steps)
        finite = torch.stack([w.isfinite().all() for w in self.weights.values()]).all()
        if not math.isfinite(mean) or not finite:
            raise FloatingPointError(f"the training diverged (loss {mean}); try a smaller learning rate")
        return mean

    def _task_loss(self, x: Tensor, y: Tensor, taught: Tensor) -> Tensor:
        logits = self.model(x.to(self._device))
        loss = self._loss(logits, y.to(self._device))
        if not self.config.distill:
            return loss
        taught, several = taught.to(self._device), y.ndim == 2
        distilled = distillation_loss(logits, taught, self.config.temperature, several_labels=several)
        return (1 - self.config.distill) * loss + self.config.distill * distilled


@torch.no_grad()
def freeze(scheme: Scheme, weights: Weights, density: float, facts: Facts) -> Theta:
    """θ = Π(w), and w ← Δ(θ)."""
    theta = scheme.pi({name: w.detach() for name, w in weights.items()}, density, facts)
    for name, value in scheme.delta(theta).items():
        weights[name].copy_(value)
    return theta
