"""The end of every recovery: w is compressed to its final density, then trained with the support of θ frozen."""

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

LOOK = 0.5  # share of the polish after which a recovery may be given up

Hopeless: TypeAlias = Callable[[nn.Module], bool]
"""Whether to give a recovery up, by its compressed model in the middle of the polish."""


@torch.no_grad()
def freeze(scheme: Scheme, weights: Weights, density: float, facts: Facts) -> Theta:
    """Projects w in place and returns θ: θ = Π(w), w ← Δ(θ)."""
    theta = scheme.pi({name: w.detach() for name, w in weights.items()}, density, facts)
    for name, value in scheme.delta(theta).items():
        weights[name].copy_(value)
    return theta


def free_entries(theta: Theta) -> dict[str, Tensor]:
    """Per weight that θ binds, True where the entry is free and False where it is drawn to θ (bool)."""
    drawn = {name: torch.zeros_like(theta.values[name], dtype=torch.bool) for name in theta.drawn}
    return {**theta.support, **drawn}


def frozen(scheme: Scheme, theta: Theta) -> Penalty:
    """The penalty of the polish (μ = ∞): entries outside of the support stay at θ."""
    return Penalty.towards(scheme.delta(theta), free_entries(theta), {}, math.inf)


@torch.no_grad()
def score_compressed(task: Task, model: nn.Module, hard: Penalty) -> float:
    """The metric on val with the bound entries of ``hard`` (μ = ∞) set to θ; the model is restored afterwards."""
    weights: Weights = dict(model.named_parameters())
    before = {name: weights[name].clone() for name in hard.bound}
    hard.apply(weights, lr=1.0)
    with heard_by(None):  # the evaluation reports no progress of its own
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
    """Trains w for the rest of the budget with the support of θ frozen.

    Where θ stores other tensors in the place of weights (factors), those are trained, see `polish_stored`.

    Args:
        scheme: Supplies Δ.
        learner: Trains the model, which carries Δ(θ).
        theta: The compressed weights.
        facts: What the scheme found out about the model.
        task: The data.
        seed: Seeds the order of the batches where other tensors than weights are trained.
        hopeless: Is shown the model after half of the steps, and says whether to give the recovery up.

    Returns:
        The share of the polish after which ``hopeless`` gave it up; None if it was completed.
    """
    if not theta.values.keys() <= learner.weights.keys():
        polish_stored(scheme, learner, theta, facts, task, seed)
        return None
    penalty, plan, left = frozen(scheme, theta), theta.plan, Shrunk(scheme, learner)
    del theta  # frees a copy of the weights
    learner.descent.remembers = False  # which entries are kept no longer depends on gradients
    if hopeless is not None:
        left.l_step(round(LOOK * learner.descent.steps_left), penalty, plan, facts)
        recalibrate_batchnorm(learner.model, task.train)
        if hopeless(learner.model):
            return LOOK
    left.l_step(learner.descent.steps_left, penalty, plan, facts)
    return None


def polish_stored(scheme: Scheme, learner: Learner, theta: Theta, facts: Facts, task: Task, seed: int) -> None:
    """Trains the tensors that θ stores in the place of weights: the parameters of the realized model.

    There is no penalty on them, and w ← Δ(θ) at the end. Of a composition only the first part is realized; the
    others are applied to w afterwards, by `settle`.
    """
    part, theta, facts = by_part(scheme, theta, facts)[0]
    stored = Learner(learner.recipe, part.realize(learner.model, theta, facts), task, seed + 1)
    # The optimizer starts afresh; the learning rate continues its cycle.
    stored.descent.load_state_dict({}, learner.descent.taken, learner.descent.slowed)
    stored.l_step(stored.descent.steps_left, Penalty.none())
    learner.descent.taken = stored.descent.taken
    with torch.no_grad():
        for name, value in part.delta(replace(theta, values=dict(stored.weights))).items():
            learner.weights[name].copy_(value)


def settle(scheme: Scheme, learner: Learner, density: float, facts: Facts, task: Task) -> Theta:
    """Ends a recovery: w ← Δ(θ), with BatchNorm's statistics recomputed; returns θ.

    The scheme observes the data once more before the last projection: the ranges of activations must be those of
    the model that ships.
    """
    freeze(scheme, learner.weights, density, facts)
    recalibrate_batchnorm(learner.model, task.train)
    return freeze(scheme, learner.weights, density, observe(scheme, learner.evidence(last=True), facts))
