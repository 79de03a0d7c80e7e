"""Low-rank factorization: a layer becomes two thinner ones, so the model is smaller and faster as it is."""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autocompress.scheme import Theta, Weights, automatic, density_error, register_scheme
from autocompress.task import device_of, evaluating

from .patterns import checked_skip, modules_matching

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
TINY = torch.finfo(torch.float32).tiny
ALIKE = 1e-3  # of the largest output: more than rounding, less than what a hook does
FACTORIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Matrices:
    """The facts of a model for low-rank factorization.

    Attributes:
        shapes: Rows and columns of the matrix of each layer that can be factorized, by the layer's name.
        n_params: Parameters of the whole model.
    """

    shapes: dict[str, tuple[int, int]]
    n_params: int

    def full_size(self, layer: str) -> int:
        """Parameters of a layer's matrix."""
        m, n = self.shapes[layer]
        return m * n

    def size(self, layer: str, rank: int) -> int:
        """Parameters of a layer's matrix as it is stored at a rank: as two factors where that is smaller."""
        return min(rank * sum(self.shapes[layer]), self.full_size(layer))

    def is_factorized(self, layer: str, rank: int) -> bool:
        """Whether two factors of that rank are smaller than the matrix."""
        return rank <= self.largest_rank(layer)

    def largest_rank(self, layer: str) -> int:
        """The largest rank of which two factors are smaller than the matrix."""
        return (self.full_size(layer) - 1) // sum(self.shapes[layer])


@automatic
@register_scheme
@dataclass(frozen=True)
class LowRank:
    """Factorizes linear layers and convolutions by singular values; the ranks follow from the density.

    A linear layer becomes two. A convolution, as the matrix (out, in x kernel), becomes one with ``rank``
    filters and a 1x1 convolution behind it (Denton et al., "Exploiting Linear Structure Within Convolutional
    Networks for Efficient Evaluation", NeurIPS 2014). How many singular values each layer keeps is settled for
    all layers together, by the share of a layer's energy that is lost per parameter saved, much as in the C
    step of Idelbayev & Carreira-Perpiñán, "Low-Rank Compression of Neural Nets: Learning the Rank of Each
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
        """Finds the layers that two factors of rank ``min_rank`` would be smaller than."""
        shapes, skipped = {}, modules_matching(model, self.skip, "skip")
        for name, layer in _own_layers(model, example_input).items():
            if name in skipped:
                continue
            m, n = layer.weight.shape[0], layer.weight[0].numel()
            if self.min_rank * (m + n) < m * n:
                shapes[name] = (m, n)
        if not shapes:
            raise ValueError("LowRank finds no layer in this model that two factors would be smaller than")
        return Matrices(shapes, sum(p.numel() for p in model.parameters()))

    def lowest_density(self, facts: Matrices) -> float:
        """The density at which every layer that can be factorized has rank ``min_rank``."""
        saved = sum(m * n - self.min_rank * (m + n) for m, n in facts.shapes.values())
        return (facts.n_params - saved) / facts.n_params

    def pi(self, weights: Weights, density: float, facts: Matrices) -> Theta:
        """Keeps the leading singular values: the nearest matrices (Eckart & Young) of the ranks chosen.

        The values have the names of the realized model's parameters: of a factorized weight, its two factors.
        None of its entries is free.
        """
        spectra = {layer: Spectrum.of(weights[_weight(layer)]) for layer in facts.shapes}
        # A share of the layer's energy, so that a scale that the BatchNorm behind it undoes does not count.
        energies = {layer: s.energies / s.energies.sum().clamp_min(TINY) for layer, s in spectra.items()}
        ranks = self.choose_ranks(energies, density, facts)
        factorized = {layer: rank for layer, rank in ranks.items() if facts.is_factorized(layer, rank)}
        values = {name: w.clone() for name, w in weights.items()}
        support = {}
        for layer, rank in factorized.items():
            whole = values.pop(_weight(layer))
            support[_weight(layer)] = torch.zeros_like(whole, dtype=torch.bool)
            values |= dict(zip(_factors(layer), spectra[layer].factors(whole, rank), strict=True))
            _rename(values, _name(layer, "bias"), _name(layer, "1.bias"))
        kept = facts.n_params + sum(facts.size(layer, r) - facts.full_size(layer) for layer, r in ranks.items())
        return Theta(values, support, kept, {"ranks": factorized})

    def choose_ranks(self, energies: Mapping[str, Tensor], density: float, facts: Matrices) -> dict[str, int]:
        """The rank of each layer.

        First down: singular values go in the order of the energy that each parameter saved costs, until what
        is left fits. Then up: the last step may have been a long one, from a whole layer to factors, and what
        fits again comes back.

        Args:
            energies: Squared singular values of each layer over their sum, the largest first.
            density: The target.
            facts: The layers.

        Raises:
            ValueError: If the target is below the lowest density.
        """
        if density < self.lowest_density(facts):
            raise density_error(density, self.lowest_density(facts))
        # Singular values of zero go whatever the target: it is free, and it makes pi idempotent.
        full = {layer: max(self.min_rank, int(e.count_nonzero())) for layer, e in energies.items()}
        ranks = dict(full)
        size = facts.n_params + sum(facts.size(layer, r) - facts.full_size(layer) for layer, r in ranks.items())
        steps = [s for layer, e in energies.items() for s in self._steps_down(layer, e, full[layer], facts)]
        for _, layer, rank in sorted(steps, key=lambda step: step[0]):
            if size / facts.n_params <= density:
                break
            rank = min(rank, ranks[layer])  # prices that differ by rounding alone may come in the wrong order
            size += facts.size(layer, rank) - facts.size(layer, ranks[layer])
            ranks[layer] = rank
        while True:
            ups = [self._step_up(layer, e, ranks[layer], full[layer], facts) for layer, e in energies.items()]
            fitting = [up for up in ups if up[0] > 0 and (size + up[3]) / facts.n_params <= density]
            if not fitting:
                return ranks
            _, layer, rank, added = max(fitting)
            size += added
            ranks[layer] = rank

    def _steps_down(
        self, layer: str, energies: Tensor, full: int, facts: Matrices
    ) -> list[tuple[float, str, int]]:
        """Ranks to go down to, with the energy lost per parameter saved, which rises from step to step.

        From a whole matrix the first step goes to the rank at which that price is lowest: factors of a rank
        just below cost much and save little.
        """
        top = min(full, facts.largest_rank(layer))
        candidates = list(range(top, self.min_rank - 1, -1))
        if full <= top:
            first, steps = full, []
        else:
            lost = energies.flip(0).cumsum(0).flip(0).tolist()  # lost[r] is what rank r loses
            saved = {rank: facts.full_size(layer) - facts.size(layer, rank) for rank in candidates}
            first = min(candidates, key=lambda rank: lost[rank] / saved[rank])
            steps = [(lost[first] / saved[first], layer, first)]
        per_rank = sum(facts.shapes[layer])
        prices = (energies / per_rank).tolist()
        return steps + [(prices[rank], layer, rank) for rank in range(first - 1, self.min_rank - 1, -1)]

    def _step_up(
        self, layer: str, energies: Tensor, rank: int, full: int, facts: Matrices
    ) -> tuple[float, str, int, int]:
        """The next rank, or the whole matrix: energy won per parameter, layer, rank, parameters added."""
        above = rank + 1 if facts.is_factorized(layer, rank + 1) else full
        added = facts.size(layer, above) - facts.size(layer, rank)
        won = float(energies[rank:above].sum()) if above <= full else 0.0
        return (won / added if added > 0 else 0.0), layer, above, added

    def delta(self, theta: Theta) -> Weights:
        """The weights, the product of the factors in place of those that were factorized."""
        values = dict(theta.values)
        for layer in theta.plan["ranks"]:
            first, second = (values.pop(name) for name in _factors(layer))
            product = second.flatten(1).double() @ first.flatten(1).double()  # rounded once, and not at each step
            values[_weight(layer)] = product.to(first.dtype).view(len(second), *first.shape[1:])
            _rename(values, _name(layer, "1.bias"), _name(layer, "bias"))
        return values

    def realize(self, model: nn.Module, theta: Theta, facts: Matrices) -> nn.Module:
        """Puts two layers in the place of each that was factorized."""
        model = copy.deepcopy(model)
        for layer, rank in theta.plan["ranks"].items():
            whole: Any = model.get_submodule(layer)
            weight = whole.weight.detach()
            two = _two_layers(whole, *Spectrum.of(weight).factors(weight, rank))
            if not layer:
                return two
            model.set_submodule(layer, two)
        return model


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight, as the matrix (out, everything else).

    Attributes:
        energies: Their squares, the largest first; zero where the value is rounding alone. On the CPU.
        basis: The singular vectors of the shorter side, as columns in the same order.
    """

    energies: Tensor
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Spectrum":
        """By the eigenvectors of the Gram matrix of the shorter side.

        That is much faster than the singular value decomposition of a convolution, and in 64 bits it is exact
        to 1e-8 of the largest singular value, below the rounding of weights of 32 bits.
        """
        matrix = weight.detach().flatten(1).double()
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        energies, basis = torch.linalg.eigh(gram)
        energies, basis = energies.flip(0), basis.flip(1)
        rounding = 8 * torch.finfo(weight.dtype).eps
        energies = torch.where(energies > rounding**2 * energies[0], energies, 0.0)
        # Each vector is known but for its sign: the largest entry is made positive.
        return cls(energies.cpu(), basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign())

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Two weights whose product is the nearest one of that rank, of equal norm.

        Args:
            weight: The weight, of shape ``(out, in, ...)``.
            rank: How many singular values are kept.

        Returns:
            Weights of the shapes ``(rank, in, ...)`` and ``(out, rank, 1, ...)``.
        """
        matrix, basis = weight.detach().flatten(1).double(), self.basis[:, :rank]
        root = self.energies[:rank].pow(0.25).to(basis.device).clamp_min(TINY)
        if len(matrix) <= matrix.shape[1]:
            first, second = (basis.T @ matrix) / root[:, None], basis * root
        else:
            first, second = (basis * root).T, (matrix @ basis) / root
        ones = [1] * (weight.dim() - 2)
        return (
            first.to(weight.dtype).reshape(rank, *weight.shape[1:]).contiguous(),
            second.to(weight.dtype).reshape(len(weight), rank, *ones).contiguous(),
        )


def _own_layers(model: nn.Module, example_input: Tensor) -> dict[str, Layer]:
    """The layers that can be exchanged: the model calls them, and uses them in no other way.

    A warning names those that something else holds on to: their weight (PyTorch's encoder layers), a hook.
    """
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if type(module) in FACTORIZABLE  # a subclass may do more with its weights
        and names[id(module.weight)] == 1
        and getattr(module, "groups", 1) == 1
    }
    traced = copy.deepcopy(model)
    called: set[str] = set()
    for name in layers:
        traced.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    x = example_input.to(device_of(traced))
    with torch.no_grad(), evaluating(traced):
        traced(x)
    layers = {name: layer for name, layer in layers.items() if name in called}
    if _computes_alike(model, layers, x):
        return layers
    free = {name: layer for name, layer in layers.items() if _computes_alike(model, {name: layer}, x)}
    held = ", ".join(sorted(layers.keys() - free.keys()))
    warnings.warn(f"left whole, as the model uses more of them than what they compute: {held}", stacklevel=3)
    return free


def _computes_alike(model: nn.Module, layers: Mapping[str, Layer], x: Tensor) -> bool:
    """Whether the model does with two layers in the place of each, one of which does nothing."""
    changed = copy.deepcopy(model).eval()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        m, n, ones = len(weight), weight[0].numel(), [1] * (weight.dim() - 2)
        same = torch.eye(min(m, n), dtype=weight.dtype, device=weight.device)
        factors = (
            (weight, same.view(m, m, *ones))
            if m <= n
            else (same.view(n, *weight.shape[1:]), weight.view(m, n, *ones))
        )
        two = _two_layers(copy.deepcopy(layer).eval(), *factors)
        if not name:
            return True
        changed.set_submodule(name, two)
    with torch.no_grad(), evaluating(model):
        try:
            outputs, expected = tree_leaves(changed(x)), tree_leaves(model(x))
        except Exception:  # code that reaches into a layer may raise anything
            return False
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(a, Tensor)]
    return all(bool((a - b).abs().max() <= ALIKE * b.abs().max()) for a, b in pairs)


def _two_layers(whole: Layer, first: Tensor, second: Tensor) -> nn.Sequential:
    """The layers with these weights that compute what ``whole`` computes with their product."""
    rank, device, dtype = len(first), first.device, first.dtype
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    if isinstance(whole, nn.Linear):
        layers: list[Any] = [
            nn.Linear(whole.in_features, rank, bias=False, **place),
            nn.Linear(rank, whole.out_features, bias=False, **place),
        ]
    else:
        kind: Any = type(whole)
        window = (whole.kernel_size, whole.stride, whole.padding, whole.dilation)
        layers = [
            kind(whole.in_channels, rank, *window, bias=False, padding_mode=whole.padding_mode, **place),
            kind(rank, whole.out_channels, 1, bias=False, **place),
        ]
    for layer, weight in zip(layers, (first, second), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=whole.weight.requires_grad)
    layers[1].bias = whole.bias
    return nn.Sequential(*layers).train(whole.training)


def _name(layer: str, parameter: str) -> str:
    """The full name of a layer's parameter; the model itself is named ``""``."""
    return f"{layer}.{parameter}".lstrip(".")


def _weight(layer: str) -> str:
    return _name(layer, "weight")


def _factors(layer: str) -> tuple[str, str]:
    """The names of the two weights that a factorized layer has."""
    return _name(layer, "0.weight"), _name(layer, "1.weight")


def _rename(values: Weights, old: str, new: str) -> None:
    if old in values:
        values[new] = values.pop(old)
