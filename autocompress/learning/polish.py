"""The end of every recovery: w is compressed for good, and trained on with the support of θ frozen."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from autocompress.learning.learner import Learner, Penalty
from autocompress.learning.shrunk import Shrunk
from autocompress.learning.training import recalibrate_batchnorm
from autocompress.progress import heard_by
from autocompress.scheme import Facts, Scheme, Theta, Weights, by_part, observe
from autocompress.task import Task

LOOK = 0.5  # share of the polish at which a recovery may be given up

Hopeless: TypeAlias = Callable[[nn.Module], bool]


@torch.no_grad()
def freeze(scheme: Scheme, weights: Weights, density: float, facts: Facts) -> Theta:
    """θ = Π(w), and w ← Δ(θ)."""
    theta = scheme.pi({name: w.detach() for name, w in weights.items()}, density, facts)
    for name, value in scheme.delta(theta).items():
        weights[name].copy_(value)
    return theta


def free_entries(theta: Theta) -> dict[str, Tensor]:
    """Per weight that θ binds: True where the entry is free, False where it is drawn to θ."""
    drawn = {name: torch.zeros_like(theta.values[name], dtype=torch.bool) for name in theta.drawn}
    return {**theta.support, **drawn}


def frozen(scheme: Scheme, theta: Theta) -> Penalty:
    """The penalty of the polish, μ = ∞: what is not on the support stays at θ."""
    return Penalty.towards(scheme.delta(theta), free_entries(theta), {}, math.inf)


@torch.no_grad()
def score_compressed(task: Task, model: nn.Module, hard: Penalty) -> float:
    """The metric on val with everything at θ that ``hard`` (μ = ∞) binds; the model stays as it was."""
    weights: Weights = dict(model.named_parameters())
    before = {name: weights[name].clone() for name in hard.bound}
    hard.apply(weights, lr=1.0)
    with heard_by(None):  # of the training's progress it is no part
        score = task.evaluate(model, task.val).score
    for name, value in before.items():
        weights[name].copy_(value)
    return score


def polish(
    scheme: Scheme,
    learner: Learner,
    theta: Theta,
    facts: Facts,
    task: Task,
    seed: int,
    hopeless: Hopeless | None = None,
) -> float | None:
    """Spends the rest of the budget on w with θ's support frozen, or on what θ stores in the place of weights.

    Returns:
        The share of it at which ``hopeless`` gave it up; None if it never did.
    """
    if not theta.values.keys() <= learner.weights.keys():
        polish_stored(scheme, learner, theta, facts, task, seed)
        return None
    penalty, plan, left = frozen(scheme, theta), theta.plan, Shrunk(scheme, learner)
    del theta  # a copy of the weights
    learner.descent.remembers = False  # what is kept does not depend on gradients any more
    if hopeless is not None:
        left.l_step(round(LOOK * learner.descent.steps_left), penalty, plan, facts)
        recalibrate_batchnorm(learner.model, task.train)
        if hopeless(learner.model):
            return LOOK
    left.l_step(learner.descent.steps_left, penalty, plan, facts)
    return None


def polish_stored(scheme: Scheme, learner: Learner, theta: Theta, facts: Facts, task: Task, seed: int) -> None:
    """Trains what θ stores in the place of weights: the parameters of the model that the scheme realizes.

    They are trained as they are, free of any penalty, and become w = Δ(θ) at the end. Of a composition the first
    part is realized; what the others do to its values they do once more when w is frozen.
    """
    part, theta, facts = by_part(scheme, theta, facts)[0]
    stored = Learner(learner.recipe, part.realize(learner.model, theta, facts), task, seed + 1)
    # The optimizer begins anew; the learning rate goes on from where it is.
    stored.descent.load_state_dict({}, learner.descent.taken, learner.descent.slowed)
    stored.l_step(stored.descent.steps_left, Penalty.none())
    learner.descent.taken = stored.descent.taken
    with torch.no_grad():
        for name, value in part.delta(replace(theta, values=dict(stored.weights))).items():
            learner.weights[name].copy_(value)


def settle(scheme: Scheme, learner: Learner, density: float, facts: Facts, task: Task) -> Theta:
    """The end of a recovery: w ← Δ(θ), with BatchNorm's statistics computed anew for it.

    Then the scheme looks once more: what it saw of activations must be those of the model that ships.
    """
    freeze(scheme, learner.weights, density, facts)
    recalibrate_batchnorm(learner.model, task.train)
    return freeze(scheme, learner.weights, density, observe(scheme, learner.evidence(last=True), facts))
