"""Low-rank factorization: a layer becomes two thinner ones, so the model is smaller and faster on any runtime."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from autocompress.scheme import Theta, Weights, automatic, register_scheme

from .criteria import at_least_float32
from .exchange import exchangeable_layers, two_layers
from .patterns import checked_skip, modules_matching
from .rank_choice import Matrices, choose_ranks
from .spectrum import TINY, Spectrum


@automatic
@register_scheme
@dataclass(frozen=True)
class LowRank:
    """Factorizes linear layers and convolutions by singular values; the ranks follow from the density.

    A linear layer becomes two. A convolution, as the matrix (out, in x kernel), becomes one with ``rank``
    filters and a 1x1 convolution behind it (Denton et al., "Exploiting Linear Structure Within Convolutional
    Networks for Efficient Evaluation", NeurIPS 2014). The ranks of all layers are chosen together, by the share
    of a layer's energy (the sum of its squared singular values) that is lost per parameter saved, much as in the
    C step of Idelbayev & Carreira-Perpiñán, "Low-Rank Compression of Neural Nets: Learning the Rank of Each
    Layer" (CVPR 2020). A layer whose two factors would not be smaller stays whole; the classifier is a layer
    like any other. Grouped and transposed convolutions, layers that share their weights, and layers whose
    weights are read from outside (the projections of `torch.nn.MultiheadAttention`) stay whole.

    Args:
        min_rank: The rank that every layer keeps at least.
        skip: Layers that are left whole: names of modules, globs or types, as ``["conv1", "Linear"]``.
    """

    min_rank: int = 1
    skip: Sequence[str] = ()
    takes_density: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        if self.min_rank < 1:
            raise ValueError(f"min_rank={self.min_rank}; every layer must keep at least rank 1")
        object.__setattr__(self, "skip", checked_skip(self.skip))

    def analyze(self, model: nn.Module, example_input: Tensor) -> Matrices:
        """Finds the layers that are larger than their two factors of rank ``min_rank``."""
        shapes, skipped = {}, modules_matching(model, self.skip, "skip")
        for name, layer in exchangeable_layers(model, example_input).items():
            if name in skipped:
                continue
            m, n = layer.weight.shape[0], layer.weight[0].numel()
            if self.min_rank * (m + n) < m * n:
                shapes[name] = (m, n)
        if not shapes:
            raise ValueError("LowRank finds no layer in this model that two factors would be smaller than")
        return Matrices(shapes, sum(p.numel() for p in model.parameters()), self.min_rank)

    def lowest_density(self, facts: Matrices) -> float:
        """The density at which every layer that can be factorized has rank ``min_rank``."""
        return facts.lowest_density

    def pi(self, weights: Weights, density: float, facts: Matrices) -> Theta:
        """Keeps the leading singular values: the nearest matrices (Eckart & Young) of the ranks chosen.

        A factorized weight is stored as its two factors, under their names in the realized model; none of its
        entries is free.
        """
        spectra = {layer: Spectrum.of(weights[_weight(layer)]) for layer in facts.shapes}
        ranks = choose_ranks(_shares(spectra), density, facts)
        while unclear := [layer for layer, rank in ranks.items() if not spectra[layer].tells(rank)]:
            spectra |= {layer: Spectrum.of(weights[_weight(layer)], rank=ranks[layer]) for layer in unclear}
            ranks = choose_ranks(_shares(spectra), density, facts)
        factorized = {layer: rank for layer, rank in ranks.items() if facts.is_factorized(layer, rank)}
        replaced = {_weight(layer): weights[_weight(layer)] for layer in factorized}
        values = {name: w.clone() for name, w in weights.items() if name not in replaced}
        for (layer, rank), weight in zip(factorized.items(), replaced.values(), strict=True):
            values |= zip(_factors(layer), spectra[layer].factors(weight, rank), strict=True)
            _rename(values, _name(layer, "bias"), _name(layer, "1.bias"))
        support = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in replaced.items()}
        return Theta(values, support, facts.total(ranks), {"ranks": factorized})

    def delta(self, theta: Theta) -> Weights:
        """The weights, with the product of its factors for each that was factorized."""
        values = dict(theta.values)
        for layer in theta.plan["ranks"]:
            first, second = (values.pop(name) for name in _factors(layer))
            product = at_least_float32(second.flatten(1)) @ at_least_float32(first.flatten(1))
            values[_weight(layer)] = product.to(first.dtype).view(len(second), *first.shape[1:])
            _rename(values, _name(layer, "1.bias"), _name(layer, "bias"))
        return values

    def realize(self, model: nn.Module, theta: Theta, facts: Matrices) -> nn.Module:
        """Puts two layers in the place of each that was factorized."""
        model = copy.deepcopy(model)
        for layer, rank in theta.plan["ranks"].items():
            whole: Any = model.get_submodule(layer)
            weight = whole.weight.detach()
            two = two_layers(whole, *Spectrum.of(weight, rank=rank).factors(weight, rank))
            if not layer:
                return two
            model.set_submodule(layer, two)
        return model


def _shares(spectra: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    """Each layer's energies as shares of their sum: BatchNorm would undo a factor on the weight anyway."""
    energies = {layer: spectrum.energies.double() for layer, spectrum in spectra.items()}
    return {layer: e / e.sum().clamp_min(TINY) for layer, e in energies.items()}


def _name(layer: str, parameter: str) -> str:
    """The full name of a layer's parameter; the model itself is named ``""``."""
    return f"{layer}.{parameter}".lstrip(".")


def _weight(layer: str) -> str:
    return _name(layer, "weight")


def _factors(layer: str) -> tuple[str, str]:
    """The names of the two weights of a factorized layer."""
    return _name(layer, "0.weight"), _name(layer, "1.weight")


def _rename(values: Weights, old: str, new: str) -> None:
    if old in values:
        values[new] = values.pop(old)
