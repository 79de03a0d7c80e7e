"""Unstructured pruning: single weights become zero. The file shrinks; the arithmetic does not."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Theta, Weights, as_numbers, automatic, density_error, register_scheme

from .criteria import (
    ENTRY_CRITERIA,
    EntryCriterion,
    Observed,
    check_criterion,
    entry_scores,
    observe_entries,
)
from .patterns import checked_min_keep, checked_skip, modules_matching, per_module
from .ranking import best, best_by_lamp, best_with_floors
from .spread import Spread, allocate, as_lamp, checked_spread, relative_density

IN_UNITS_OF_LOSS = ("obd", "taylor")
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def prunable_weights(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of linear and convolutional layers by name, without ``skip``; a shared weight is listed once."""
    parameters, skipped = dict(model.named_parameters()), modules_matching(model, skip, "skip")
    named = model.named_modules()  # the model itself is named ""
    layers = (layer for layer, module in named if isinstance(module, PRUNABLE) and layer not in skipped)
    names = (f"{layer}.weight".lstrip(".") for layer in layers)
    return {name: parameters[name] for name in names if name in parameters}


def other_parameters(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The other parameters by name, without ``skip``: biases, normalisation, embeddings."""
    weights, skipped = prunable_weights(model), modules_matching(model, skip, "skip")
    return {
        name: p
        for name, p in model.named_parameters()
        if name not in weights and name.rpartition(".")[0] not in skipped
    }


# LAMP scores compare single weights of all layers; within a pattern they rank as l2 does.
PatternCriterion: TypeAlias = Literal["l1", "l2", "taylor", "obd", "random"]


@dataclass(frozen=True)
class Patterned:
    """The facts of a model for schemes that prune in a pattern: blocks, N of every M.

    Attributes:
        shapes: The shape of each weight that the pattern fits, by name.
        n_params: Parameters of the whole model.
        observed: What the criterion observed on data, if it needs any.
    """

    shapes: dict[str, torch.Size]
    n_params: int
    observed: Observed | None = None


@dataclass(frozen=True)
class Layers:
    """The facts of a model for unstructured pruning.

    Attributes:
        prunable: Names of the parameters whose entries may become zero.
        sizes: The number of entries of each.
        floors: The number of entries that each keeps at least.
        relative: The relative density of each, for spreads that use it.
        n_others: Entries of all other parameters, which are kept: those of skipped layers, for instance.
        observed: What the criterion observed on data.
    """

    prunable: tuple[str, ...]
    sizes: tuple[int, ...]
    floors: tuple[int, ...]
    relative: tuple[float, ...]
    n_others: int
    observed: Observed | None = None

    @property
    def n_params(self) -> int:
        """Parameters of the whole model."""
        return sum(self.sizes) + self.n_others


@automatic
@register_scheme
@dataclass(frozen=True)
class Prune:
    """Sets the least important weights to zero: the smallest ones, or by another criterion.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015). Weights
    of linear and convolutional layers are pruned. Under ``obd`` and ``taylor``, which measure the effect of any
    parameter on the loss, so are biases and normalisation; under other criteria these are kept. They count as
    parameters either way.

    Args:
        criterion: What makes a weight important, see `autocompress.schemes.criteria.entry_scores`.
        spread: How the density is spread over the layers: ``global`` (one threshold for the whole network),
            ``uniform`` (the same density in each), ``erk`` (Erdős-Rényi kernel: small layers stay denser),
            ``lamp`` (one threshold on each score over those that are no smaller in its layer), or relative
            densities by module, as ``{"layer1.*": 1.0, "layer4.*": 0.3}``: layer4 is to be 0.3 times as dense
            as layer1, as far as no layer is more than whole. Modules without a match have 1, and the sum
            always meets the density asked for.
        min_keep: Weights that every layer keeps at least, biases and the like aside; or by module, as
            ``{"fc": 100}``, and 1 elsewhere.
        skip: Layers that are left whole: names of modules, globs or types, as ``["conv1", "Linear"]``.
    """

    criterion: EntryCriterion = "obd"
    spread: Spread = "global"
    min_keep: int | Mapping[str, int] = 1
    skip: Sequence[str] = ()
    takes_density: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5
    searched: ClassVar[Mapping[str, Sequence[object]]] = {
        "criterion": ("obd", "l2", "taylor"),
        "spread": ("global", "erk", "lamp"),
    }

    def __post_init__(self) -> None:
        check_criterion(self, self.criterion, ENTRY_CRITERIA)
        object.__setattr__(self, "spread", checked_spread(self.spread))
        object.__setattr__(self, "min_keep", checked_min_keep(self.min_keep, "weight"))
        object.__setattr__(self, "skip", checked_skip(self.skip))

    def staged(self, relative: Mapping[str, float]) -> "Prune":
        """The same scheme with relative densities by module."""
        return replace(self, spread=relative)

    def analyze(self, model: nn.Module, example_input: Tensor) -> Layers:
        """Finds the weights of linear and convolutional layers, and what may be pruned beside them."""
        floors, floor_elsewhere = per_module(model, self.min_keep, 1, "min_keep")
        densities, _ = per_module(model, self.spread if isinstance(self.spread, Mapping) else {}, 1.0, "spread")
        layers = []
        weights = prunable_weights(model, self.skip)
        others = other_parameters(model, self.skip) if self.criterion in IN_UNITS_OF_LOSS else {}
        for name, weight in (weights | others).items():
            layer = name.rpartition(".")[0]
            floor = floors.get(layer, floor_elsewhere) if weight.dim() > 1 else 0
            if weight.numel() > floor:
                density = relative_density(self.spread, [weight.shape], densities, [layer])
                layers.append((name, weight.numel(), floor, density))
        if not layers:
            raise ValueError("Prune finds no linear or convolutional weights in this model that it can prune")
        names, sizes, kept, relative = zip(*layers, strict=True)
        return Layers(names, sizes, kept, relative, sum(p.numel() for p in model.parameters()) - sum(sizes))

    def observe(self, evidence: Evidence, facts: Layers) -> Layers:
        """Looks at gradients, if the criterion needs them."""
        return replace(facts, observed=observe_entries(self.criterion, evidence, facts.prunable))

    def lowest_density(self, facts: Layers) -> float:
        """The density at which every layer has ``min_keep`` weights left."""
        return (facts.n_others + sum(facts.floors)) / facts.n_params

    def pi(self, weights: Weights, density: float, facts: Layers) -> Theta:
        """Keeps the most important weights; with ``l2`` that is the nearest point with so many non-zeros."""
        n_kept = int(density * facts.n_params) + 1
        while n_kept / facts.n_params > density:  # the density that is reached decides, however the product rounds
            n_kept -= 1
        n_kept -= facts.n_others
        if n_kept < sum(facts.floors):
            raise density_error(density, self.lowest_density(facts))
        criterion, spread = as_lamp(self.criterion, self.spread)
        scored = entry_scores(criterion, weights, facts.prunable, facts.observed)
        scores = list(scored.values())
        if criterion not in ("l1", "l2"):  # zeros are removed first, which makes pi idempotent
            for name, score in scored.items():
                if weights[name].count_nonzero() < score.numel():
                    score.masked_fill_(weights[name] == 0, -1)
        if spread == "global":
            masks = best_with_floors(scores, n_kept, facts.floors)
        elif spread == "lamp":
            masks = best_by_lamp(scores, n_kept, facts.floors)
        else:
            n_each = allocate(n_kept, facts.sizes, facts.relative, facts.floors)
            masks = [best([score], n)[0] for score, n in zip(scores, n_each, strict=True)]
        kept = dict(zip(facts.prunable, masks, strict=True))
        values = {name: w.clone() for name, w in weights.items() if name not in kept}
        for name, score in scored.items():  # the memory of the scores is used again
            values[name] = torch.mul(weights[name], as_numbers(kept[name]), out=score).to(weights[name].dtype)
        return Theta(values, kept, n_kept + facts.n_others)

    def delta(self, theta: Theta) -> Weights:
        """The weights, zero where they were pruned."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Layers) -> nn.Module:
        """A copy: the zeros are in the weights, and the saved file stores them as a bit mask."""
        return copy.deepcopy(model)
