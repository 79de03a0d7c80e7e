"""Unstructured pruning: single weights become zero. The file shrinks; the arithmetic does not."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autocompress.scheme import Theta, Weights, density_error, register_scheme

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of linear and convolutional layers by name; one that several layers share comes once."""
    parameters = dict(model.named_parameters())
    named = model.named_modules()  # the model itself is named ""
    names = (f"{name}.weight".lstrip(".") for name, module in named if isinstance(module, PRUNABLE))
    return {name: parameters[name] for name in names if name in parameters}


@dataclass(frozen=True)
class Layers:
    """The facts of a model for unstructured pruning.

    Attributes:
        prunable: Names of the weights that may become zero.
        n_prunable: How many entries they have.
        n_others: Parameters that are always kept: biases, normalisation.
    """

    prunable: tuple[str, ...]
    n_prunable: int
    n_others: int


@register_scheme
@dataclass(frozen=True)
class Prune:
    """Sets the weights of smallest magnitude to zero (one threshold for the whole network).

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015). Weights
    of linear and convolutional layers are pruned; biases and normalisation are kept and count as parameters.

    Args:
        min_keep: Weights that every layer keeps at least.
    """

    min_keep: int = 1
    takes_density: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        if self.min_keep < 1:
            raise ValueError(f"min_keep={self.min_keep}; every layer must keep at least 1 weight")

    def analyze(self, model: nn.Module, example_input: Tensor) -> Layers:
        """Finds the weights of linear and convolutional layers."""
        sizes = {name: w.numel() for name, w in prunable_weights(model).items() if w.numel() > self.min_keep}
        if not sizes:
            raise ValueError("Prune finds no linear or convolutional weights in this model")
        n_prunable = sum(sizes.values())
        return Layers(tuple(sizes), n_prunable, sum(p.numel() for p in model.parameters()) - n_prunable)

    def lowest_density(self, facts: Layers) -> float:
        """The density at which every layer has ``min_keep`` weights left."""
        kept = facts.n_others + self.min_keep * len(facts.prunable)
        return kept / (facts.n_others + facts.n_prunable)

    def pi(self, weights: Weights, density: float, facts: Layers) -> Theta:
        """Keeps the largest weights: the nearest point, in the Euclidean norm, with that many non-zeros."""
        n_params = facts.n_prunable + facts.n_others
        n_kept = int(density * n_params) + 1
        while n_kept / n_params > density:  # not the product's rounding decides, but the density reached
            n_kept -= 1
        n_kept -= facts.n_others
        if n_kept < self.min_keep * len(facts.prunable):
            raise density_error(density, self.lowest_density(facts))
        magnitudes = []
        for name in facts.prunable:  # the largest weights of each layer are never out of the running
            magnitude = weights[name].abs().flatten()
            magnitude[magnitude.topk(self.min_keep).indices] = torch.inf
            magnitudes.append(magnitude)
        ranked = torch.cat(magnitudes)
        chosen = torch.zeros_like(ranked, dtype=torch.bool)
        chosen[ranked.topk(n_kept, sorted=False).indices] = True
        masks = torch.split(chosen, [m.numel() for m in magnitudes])
        kept = {name: mask.view_as(weights[name]) for name, mask in zip(facts.prunable, masks, strict=True)}
        values = {name: w * kept[name] if name in kept else w.clone() for name, w in weights.items()}
        return Theta(values, kept, n_kept + facts.n_others)

    def delta(self, theta: Theta) -> Weights:
        """The weights, zero where they were pruned."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Layers) -> nn.Module:
        """A copy: the zeros are in the weights, and the saved file stores them as a bit mask."""
        return copy.deepcopy(model)
