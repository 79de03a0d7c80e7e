"""Learning-compression: trains a network's weights w and their compressed form θ towards each other.

    minimize L(w)  subject to  w = θ, θ compressed

Carreira-Perpiñán & Idelbayev, "Learning-Compression Algorithms for Neural Net Pruning" (CVPR 2018), in the
augmented-Lagrangian form of Condensa (Joseph et al., arXiv:1911.02497). It alternates, for a growing penalty μ
and multipliers λ:

    L step       w ← argmin  L(w) − λᵀ(w − θ) + μ/2 ‖w − θ‖²
    multipliers  λ ← λ − μ (w − θ)
    C step       θ ← Π(w − λ/μ)

Four modifications make it work within a few epochs:

- The density falls step by step from 1 to its target, so that each C step removes little.
- Entries that θ keeps are free (θ = w and λ = 0 there): the penalty acts only on entries about to be removed.
- The quadratic term is applied implicitly after each optimizer step, which is stable for every μ, up to μ = ∞:
  hard masks, and the frozen support of the polish.
- A scheme may measure distances in the metric of the loss; the L step keeps a running mean of squared gradients.

The *polish* is the last part of the budget: it trains the kept entries on a frozen support. Where θ replaces
weights by other parameters, such as the factors of a low-rank matrix, the polish trains those.
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

SOFT = 1.0  # the first penalty if it is finite, in the units of `LearningCompression.mu`
MIN_STEPS_FOR_MULTIPLIERS = 2  # gradient steps per C step below which multipliers are too noisy to help
WIDE = 5.0  # norm at which gradients are clipped: after heavy pruning, large steps leave the high loss sooner
PEAK_LR = {"sgd": 0.1, "adamw": 0.001}


@torch.no_grad()
def c_step(
    scheme: Scheme, weights: Weights, multipliers: Weights, mu: float, density: float, facts: Facts
) -> Theta:
    """The C step θ = Π(w − λ/μ); λ = 0 for weights without multipliers."""
    shifted = {name: w.detach() for name, w in weights.items()}
    shifted |= {name: shifted[name].sub(multiplier, alpha=1 / mu) for name, multiplier in multipliers.items()}
    return scheme.pi(shifted, density, facts)


@torch.no_grad()
def residual(weights: Weights, theta: Weights, bound: Mapping[str, Tensor]) -> float:
    """The primal residual ‖w − θ‖ / ‖w‖, with w − θ over the entries that are bound to θ.

    Args:
        weights: w by name.
        theta: Δ(θ) by name.
        bound: True at each entry that is bound to θ, by the name of the weight; other weights are left out.
    """
    if not bound:
        return 0.0
    distances = [(weights[name] - theta[name]).mul_(as_numbers(mask)).norm() for name, mask in bound.items()]
    norms = [weights[name].norm() for name in bound]
    return float(torch.stack(distances).norm() / torch.stack(norms).norm().clamp_min(1e-12))


@dataclass(frozen=True)
class LearningCompression:
    """The L-C optimizer and its budget.

    Args:
        epochs: Budget of a whole recovery, in passes over the training data.
        steps: The same budget in gradient steps; it overrides ``epochs``.
        c_steps: Number of C steps; fewer if the budget has no gradient step for each.
        alternating: Share of the gradient steps in which L and C steps alternate; the rest polishes on a frozen
            support.
        mu: The first penalty, in units of 1 / (learning rate x steps of one L step): at 1 a weight without a
            gradient shrinks to about 1/e of its distance from θ in one L step. Infinity keeps w at θ from the
            first C step on: gradual pruning with hard masks. None chooses by the scheme and the budget: infinity
            for a scheme that removes whole channels (`autocompress.scheme.Hard`), and for one that sets single
            weights to zero (`autocompress.scheme.Masking`) if there is one gradient step per C step, too few to
            estimate multipliers; 1 otherwise.
        mu_growth: Factor on μ from one C step to the next, as long as w and θ differ. Its effect depends on the
            final μ: with fewer C steps it must be larger.
        augmented: Whether to use multipliers (the augmented Lagrangian) or the quadratic penalty alone.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: Peak learning rate of one cosine cycle over all the steps. None is 0.1 for SGD, 0.001 for AdamW.
        momentum: Nesterov momentum of SGD; the first moment's decay of AdamW.
        weight_decay: L2 penalty of SGD; decoupled decay of AdamW.
        max_gradient: Norm at which gradients are clipped. None is 1 for schemes that remove whole channels at
            once, 5 otherwise. With a finite μ and L steps of a single gradient step it is always 1.
        distill: Weight of distillation from the dense model, between 0 and 1; the task's loss has the rest.
        temperature: Temperature of the distilled softmax.
        precision: Precision of the gradients' computation: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` under autocast.
            ``"auto"`` is bf16 on GPUs that have it and fp32 elsewhere.
        compile: Whether to run the forward pass through `torch.compile`.
        score_steps: Whether to score val after each C step and its L step, with all bound entries set to θ, and
            log it as ``lc_score``; it costs a pass over val each.
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
        """The name of these settings in `autocompress.recovery.RECOVERIES`: lc, gradual, rewind or auto."""
        if not self.alternating:
            return "rewind"
        if self.mu is None:
            return "auto"
        return "gradual" if math.isinf(self.mu) else "lc"

    def suiting(self, scheme: Scheme, train: Split) -> "LearningCompression":
        """These settings, with ``mu`` and ``max_gradient``, if None, chosen by the scheme and the budget."""
        _, steps = self.schedule(self.n_steps(train))
        has_few_steps = steps < MIN_STEPS_FOR_MULTIPLIERS and can_be_hard(scheme)
        mu = self.mu or (math.inf if is_hard(scheme) or has_few_steps else SOFT)
        narrow = is_hard(scheme) and math.isinf(mu)
        return replace(self, mu=mu, max_gradient=self.max_gradient or (MAX_GRADIENT if narrow else WIDE))

    @property
    def first_mu(self) -> float:
        """The first penalty, in the units of ``mu``; `SOFT` if ``mu`` is None."""
        return self.mu or SOFT

    @property
    def peak_lr(self) -> float:
        """The peak learning rate; the optimizer's default if ``lr`` is None."""
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
            facts: The result of the scheme's `analyze`.
            density: The target density; at least the scheme's lowest.
            task: The data, the loss, and the dense model as the teacher.
            seed: Seeds the order of the batches.
            start: The state to continue from: a checkpoint of this very recovery, which continues bit for bit, or
                a denser model (`State.warm`), whose weights and support are a head start.
            checkpoint: Called with the state after each L step, and at the end.
            hopeless: Called with the compressed model in the middle of the polish; the recovery ends there if it
                returns True.

        Returns:
            θ and the logs; the model carries the decompressed weights and recalibrated BatchNorm statistics.

        Raises:
            FloatingPointError: If the training diverged, see `autocompress.learning.training.Descent`.
        """
        settings = self.suiting(scheme, task.train)
        learner = Learner(settings, model, task, seed)
        state, w = start or State(), learner.weights
        learner.restore(state.learner)
        penalty, state = state.penalty, replace(state, penalty=Penalty.none(), learner=None)
        c_steps, steps = self.schedule(learner.descent.steps)
        shrunk = Shrunk(scheme, learner)
        hard: Penalty | None = None
        while state.c_steps < c_steps and not state.has_agreed(density):
            target = self.density_at((state.c_steps + 1) / c_steps, density, state.initial)
            mu = settings.first_mu * state.growth / (self.peak_lr * max(1, steps))
            facts = observe(scheme, learner.evidence(provisional=steps > 1 and target > density), facts)
            plan, penalty, hard, distance = self.constrain(scheme, w, penalty, mu, target, facts)
            loss = shrunk.l_step(steps, penalty, plan, facts)
            logged = {"lc_density": target, "lc_residual": distance, "lc_loss": loss}
            if hard is not None:
                logged["lc_score"] = score_compressed(task, model, hard)
            state = state.after(self.mu_growth if distance > AGREED else 1.0, **logged)
            if checkpoint:
                checkpoint(replace(state, penalty=penalty, learner=learner.snapshot()))
        del penalty, hard  # frees their tensors before the polish
        facts = observe(scheme, learner.evidence(), facts)
        given_up_at = polish(scheme, learner, freeze(scheme, w, density, facts), facts, task, seed, hopeless)
        theta = settle(scheme, learner, density, facts, task)
        if checkpoint:
            checkpoint(replace(state, learner=learner.snapshot()))
        return Recovered(theta, state.curves, learner.descent.taken, given_up_at)

    def shortened(self, initial: float, density: float, train: Split) -> "LearningCompression":
        """The settings of a recovery that starts from a model of density ``initial`` and needs fewer steps.

        It has (1 + ln(initial / density)) / 4 of the steps, at most all of them. As the density has less far to
        fall, L and C steps alternate in half as large a share of them, and the polish is longer.
        """
        share = min(1.0, (1 + math.log(max(1.0, initial / density))) / 4)
        steps, c_steps = round(share * self.n_steps(train)), round(share * self.c_steps)
        return replace(self, steps=max(1, steps), c_steps=max(1, c_steps), alternating=self.alternating / 2)

    def constrain(
        self, scheme: Scheme, weights: Weights, penalty: Penalty, mu: float, density: float, facts: Facts
    ) -> tuple[Mapping[str, Any], Penalty, Penalty | None, float]:
        """Updates the multipliers and takes a C step.

        Returns:
            θ's plan; the penalty of the next L step; the same penalty at μ = ∞ if ``score_steps``, else None; and
            the residual ‖w − θ‖ / ‖w‖.
        """
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
        """Divides a budget of gradient steps: the number of C steps, and the gradient steps after each."""
        alternating = int(steps * self.alternating)
        c_steps = max(1, min(self.c_steps, alternating)) if self.alternating else 0
        return c_steps, alternating // max(1, c_steps)

    def density_at(self, progress: float, density: float, initial: float = 1.0) -> float:
        """The density to reach at a ``progress`` between 0 and 1, on the way from ``initial`` to ``density``.

        The cubic schedule of Zhu & Gupta, "To Prune, or Not to Prune" (2017), for the density's logarithm: it
        falls fast first and then slowly.
        """
        if progress >= 1:
            return density
        return float(initial * (density / initial) ** (1 - (1 - progress) ** 3))
