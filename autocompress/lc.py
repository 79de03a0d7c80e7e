"""Learning-compression: trains a network's weights w and their compressed form θ towards each other.

    minimize L(w)  subject to  w = θ, θ compressed

Carreira-Perpiñán & Idelbayev, "Learning-Compression Algorithms for Neural Net Pruning" (CVPR 2018), in the
augmented-Lagrangian form of Condensa (Joseph et al., arXiv:1911.02497). It alternates, for a growing penalty μ
and multipliers λ:

    L step       w ← argmin  L(w) − λᵀ(w − θ) + μ/2 ‖w − θ‖²
    multipliers  λ ← λ − μ (w − θ)
    C step       θ ← Π(w − λ/μ)

Four things make it fit a budget of a few epochs. The density falls step by step from 1 to its target, so that
no C step cuts deep. Entries that θ keeps are free (θ follows w there, and λ = 0), so that the penalty only
pulls at what is about to go. The quadratic term is taken implicitly after each optimizer step, which is stable
for every μ, up to μ = ∞: hard masks, and the frozen support of the polish. And a scheme may measure distance in
the metric of the loss: the L step keeps a running mean of squared gradients for it.

Where θ stores other numbers than weights, the factors of a low rank, it is those that the polish trains.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.arguments import check_fields, flag, number, optional, whole
from autocompress.learning.learner import Learner, Penalty, Precision
from autocompress.learning.polish import Hopeless, free_entries, freeze, polish, score_compressed, settle
from autocompress.learning.shrunk import Shrunk
from autocompress.learning.state import AGREED, Recovered, State
from autocompress.learning.training import MAX_GRADIENT, Optimizer, n_steps
from autocompress.scheme import Facts, Scheme, Theta, Weights, as_numbers, can_be_hard, is_hard, observe
from autocompress.splits import Split
from autocompress.task import Task

SOFT = 1.0  # the first penalty where weights are drawn to θ
ESTIMATED = 2  # gradient steps behind each C step from which on multipliers are worth something
WIDE = 5.0  # norm at which gradients are clipped: where much is pruned, large steps lead out of a high loss
PEAK_LR = {"sgd": 0.1, "adamw": 0.001}


@torch.no_grad()
def c_step(
    scheme: Scheme, weights: Weights, multipliers: Weights, mu: float, density: float, facts: Facts
) -> Theta:
    """The C step θ = Π(w − λ/μ). Weights without multipliers have λ = 0."""
    shifted = {name: w.detach() for name, w in weights.items()}
    shifted |= {name: shifted[name].sub(multiplier, alpha=1 / mu) for name, multiplier in multipliers.items()}
    return scheme.pi(shifted, density, facts)


@torch.no_grad()
def residual(weights: Weights, theta: Weights, bound: Mapping[str, Tensor]) -> float:
    """The primal residual ‖w − θ‖ / ‖w‖, w − θ over the entries that are bound to θ."""
    if not bound:
        return 0.0
    away = [(weights[name] - theta[name]).mul_(as_numbers(is_bound)).norm() for name, is_bound in bound.items()]
    size = [weights[name].norm() for name in bound]
    return float(torch.stack(away).norm() / torch.stack(size).norm().clamp_min(1e-12))


@dataclass(frozen=True)
class LearningCompression:
    """The L-C optimizer and its budget.

    Args:
        epochs: Gradient steps of a whole recovery, in passes over the training data.
        steps: The same, counted in steps; it overrides ``epochs``.
        c_steps: How often the weights are compressed, if the budget has a gradient step for each.
        alternating: Share of the steps in which L and C alternate; the rest polishes on a frozen support.
        mu: The first penalty, in units of 1 / (learning rate x steps of one L step): at 1 a weight that the
            loss does not care for shrinks to about 1/e of its distance from θ in one L step. Infinity keeps
            w at θ from the first C step on: gradual pruning with hard masks. None is what suits the scheme and
            the budget: infinity for one that removes whole channels (`autocompress.scheme.Hard`), and for one that
            makes single weights zero (`autocompress.scheme.Masking`) where a single gradient step lies behind
            each C step, too little to estimate multipliers; 1 otherwise.
        mu_growth: Factor on μ from one C step to the next, as long as w and θ differ. What counts is where μ ends:
            with fewer C steps it must be larger.
        augmented: Whether there are multipliers: the augmented Lagrangian; without them the quadratic penalty.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: Peak learning rate; it follows one cosine over all the steps. None is 0.1 for SGD, 0.001 for AdamW.
        momentum: Nesterov momentum of SGD; the first moment's decay of AdamW.
        weight_decay: L2 penalty of SGD; decoupled decay of AdamW.
        max_gradient: Norm at which gradients are clipped. None is what suits the scheme: 1 where whole channels go
            at once, 5 otherwise. While weights are drawn to θ in L steps of a single gradient step it is 1.
        distill: Weight of distillation from the dense model, against the task's own loss.
        temperature: Softens the classes that are distilled.
        precision: What gradients are computed in: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` under autocast.
            ``"auto"`` is bf16 on GPUs that have it and fp32 elsewhere.
        compile: Whether the forward pass goes through `torch.compile`.
        score_steps: Whether the metric on val is scored after each C step and its L step, with everything that
            is bound at θ, and logged as ``lc_score``: one pass over val each.
    """

    epochs: float = 45
    steps: int | None = None
    c_steps: int = 24
    alternating: float = 0.6
    mu: float | None = None
    mu_growth: float = 1.095
    augmented: bool = True
    optimizer: Optimizer = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_gradient: float | None = None
    distill: float = 0.5
    temperature: float = 2.0
    precision: Precision = "auto"
    compile: bool = False
    score_steps: bool = False

    def __post_init__(self) -> None:
        numbers = ("epochs", "alternating", "mu_growth", "momentum", "weight_decay", "distill", "temperature")
        check_fields(self, **dict.fromkeys(numbers, number), c_steps=whole, steps=optional(whole))
        check_fields(self, **dict.fromkeys(("mu", "lr", "max_gradient"), optional(number)))
        check_fields(self, **dict.fromkeys(("augmented", "compile", "score_steps"), flag))
        if math.isinf(self.epochs):
            raise ValueError(f"epochs={self.epochs}; it must be a finite number")
        for name in ("epochs", "c_steps", "mu", "mu_growth", "lr", "max_gradient", "temperature"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)}; it must be positive")
        for name in ("alternating", "distill", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must lie between 0 and 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}; it must be at least 1")
        allowed = {"optimizer": ("sgd", "adamw"), "precision": ("auto", "fp32", "bf16", "fp16")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}; it must be one of {', '.join(values)}")

    @property
    def method(self) -> str:
        """What it is called: ``"lc"``, the plain way that it is with these settings, or ``"auto"``."""
        if not self.alternating:
            return "rewind"
        if self.mu is None:
            return "auto"
        return "gradual" if math.isinf(self.mu) else "lc"

    def suiting(self, scheme: Scheme, train: Split) -> "LearningCompression":
        """The same with the penalty and the norm that suit a scheme and the budget, where none is given."""
        _, steps = self.schedule(self.n_steps(train))
        is_hasty = steps < ESTIMATED and can_be_hard(scheme)
        mu = self.mu or (math.inf if is_hard(scheme) or is_hasty else SOFT)
        narrow = is_hard(scheme) and math.isinf(mu)
        return replace(self, mu=mu, max_gradient=self.max_gradient or (MAX_GRADIENT if narrow else WIDE))

    @property
    def first_mu(self) -> float:
        """The penalty that begins, in the units of ``mu``: that where weights are drawn to θ, if none is given."""
        return self.mu or SOFT

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, which the optimizer settles where none is given."""
        return PEAK_LR[self.optimizer] if self.lr is None else self.lr

    def recover(
        self,
        model: nn.Module,
        scheme: Scheme,
        facts: Facts,
        density: float,
        task: Task,
        seed: int,
        *,
        start: State | None = None,
        checkpoint: Callable[[State], None] | None = None,
        hopeless: Hopeless | None = None,
    ) -> Recovered:
        """Compresses ``model`` in place to ``density`` while training it on ``task.train``.

        Args:
            model: A copy of the dense model, on the device to train on.
            scheme: Supplies the C step.
            facts: What the scheme found out about the model.
            density: The target; at least the scheme's lowest.
            task: The data, the loss, and the dense model as the teacher.
            seed: Seeds the order of the batches.
            start: Goes on from there: from a checkpoint of this very recovery, bit for bit, or from a denser
                model (`State.warm`), whose weights and support are a head start.
            checkpoint: Is handed the state after each L step, and at the end.
            hopeless: Is shown the compressed model in the middle of the polish, and says whether to give it up.

        Returns:
            θ; the model carries its decompressed weights and recalibrated BatchNorm statistics.

        Raises:
            FloatingPointError: If the training diverged, see `autocompress.learning.training.Descent`.
        """
        suited = self.suiting(scheme, task.train)
        learner = Learner(suited, model, task, seed)
        state, w = start or State(), learner.weights
        learner.restore(state.learner)
        penalty, state = state.penalty, replace(state, penalty=Penalty.none(), learner=None)
        c_steps, steps = self.schedule(learner.descent.steps)
        left = Shrunk(scheme, learner)
        hard: Penalty | None = None
        while state.c_steps < c_steps and not state.has_agreed(density):
            target = self.density_at((state.c_steps + 1) / c_steps, density, state.initial)
            mu = suited.first_mu * state.growth / (self.peak_lr * max(1, steps))
            facts = observe(scheme, learner.evidence(provisional=steps > 1 and target > density), facts)
            plan, penalty, hard, apart = self.constrain(scheme, w, penalty, mu, target, facts)
            loss = left.l_step(steps, penalty, plan, facts)
            logged = {"lc_density": target, "lc_residual": apart, "lc_loss": loss}
            if hard is not None:
                logged["lc_score"] = score_compressed(task, model, hard)
            state = state.after(self.mu_growth if apart > AGREED else 1.0, **logged)
            if checkpoint:
                checkpoint(replace(state, penalty=penalty, learner=learner.snapshot()))
        del penalty, hard
        facts = observe(scheme, learner.evidence(), facts)
        given_up_at = polish(scheme, learner, freeze(scheme, w, density, facts), facts, task, seed, hopeless)
        theta = settle(scheme, learner, density, facts, task)
        if checkpoint:
            checkpoint(replace(state, learner=learner.snapshot()))
        return Recovered(theta, state.curves, learner.descent.taken, given_up_at)

    def shortened(self, initial: float, density: float, train: Split) -> "LearningCompression":
        """The recovery that starts from a model of density ``initial``: a head start needs fewer steps.

        A quarter of the steps trains anew, and another quarter goes with every factor e that the density falls; it
        is never more than the whole budget. As the density has less far to fall, half as large a share of them
        alternates, and more polishes.
        """
        share = min(1.0, (1 + math.log(max(1.0, initial / density))) / 4)
        steps, c_steps = round(share * self.n_steps(train)), round(share * self.c_steps)
        return replace(self, steps=max(1, steps), c_steps=max(1, c_steps), alternating=self.alternating / 2)

    def constrain(
        self, scheme: Scheme, weights: Weights, penalty: Penalty, mu: float, density: float, facts: Facts
    ) -> tuple[Mapping[str, Any], Penalty, Penalty | None, float]:
        """Multipliers and C step: θ's plan, the next penalty, the same at μ = ∞ if scored, and the residual."""
        multipliers = penalty.multipliers(weights) if self.augmented else {}
        theta = c_step(scheme, weights, multipliers, mu, density, facts)
        values = scheme.delta(theta)
        free = free_entries(theta)
        next_penalty = Penalty.towards(values, free, multipliers, mu)
        hard = Penalty.towards(values, free, {}, math.inf) if self.score_steps else None
        return theta.plan, next_penalty, hard, residual(weights, values, next_penalty.bound)

    def n_steps(self, train: Split) -> int:
        """Gradient steps of the whole budget."""
        return self.steps or n_steps(train, self.epochs)

    def schedule(self, steps: int) -> tuple[int, int]:
        """How many C steps there are in a budget of gradient steps, and the gradient steps after each."""
        alternating = int(steps * self.alternating)
        c_steps = max(1, min(self.c_steps, alternating)) if self.alternating else 0
        return c_steps, alternating // max(1, c_steps)

    def density_at(self, progress: float, density: float, initial: float = 1.0) -> float:
        """From ``initial`` to ``density`` as ``progress`` goes from 0 to 1, fast first and then slowly.

        The cubic of Zhu & Gupta, "To Prune, or Not to Prune" (2017), applied to the density's logarithm.
        """
        if progress >= 1:
            return density
        return float(initial * (density / initial) ** (1 - (1 - progress) ** 3))
