"""The choice of ranks: which singular values are removed to meet a density, for all layers together."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.scheme import density_error


@dataclass(frozen=True)
class Matrices:
    """The facts of a model for low-rank factorization: the matrices that two factors can replace.

    Attributes:
        shapes: Rows and columns of each, by the layer's name.
        n_params: Parameters of the whole model.
        min_rank: The rank that each keeps at least.
    """

    shapes: Mapping[str, tuple[int, int]]
    n_params: int
    min_rank: int = 1

    def full_size(self, layer: str) -> int:
        """Parameters of a layer's matrix."""
        m, n = self.shapes[layer]
        return m * n

    def size(self, layer: str, rank: int) -> int:
        """Parameters of a layer at a rank, stored as its matrix or as two factors, whichever is smaller."""
        return min(rank * sum(self.shapes[layer]), self.full_size(layer))

    def total(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the model at these ranks."""
        return self.n_params - sum(self.full_size(layer) - self.size(layer, rank) for layer, rank in ranks.items())

    def is_factorized(self, layer: str, rank: int) -> bool:
        """Whether a layer's two factors of that rank are smaller than its matrix."""
        return rank <= self.largest_rank(layer)

    def largest_rank(self, layer: str) -> int:
        """The largest rank at which a layer's two factors are smaller than its matrix."""
        return (self.full_size(layer) - 1) // sum(self.shapes[layer])

    @property
    def lowest_density(self) -> float:
        """The density at which every matrix has rank ``min_rank``."""
        return self.total(dict.fromkeys(self.shapes, self.min_rank)) / self.n_params


def choose_ranks(energies: Mapping[str, Tensor], density: float, matrices: Matrices) -> dict[str, int]:
    """The rank of each layer, chosen greedily for all layers together.

    First down: singular values are removed in the order of the energy lost per parameter saved, until the density
    is met. Then up: as the last step may have been a long one, from a whole matrix to factors, the singular values
    that win the most energy per parameter come back as long as they fit.

    Args:
        energies: For each layer its squared singular values over their sum, the largest first.
        density: The target.
        matrices: The layers.

    Raises:
        ValueError: If the target is below the lowest density.
    """
    if density < matrices.lowest_density:
        raise density_error(density, matrices.lowest_density)
    # Singular values of zero are always removed: it costs nothing, and makes pi idempotent.
    full = {layer: max(matrices.min_rank, int(e.count_nonzero())) for layer, e in energies.items()}
    ranks = dict(full)
    size = matrices.total(ranks)
    steps = [step for layer, e in energies.items() for step in _steps_down(layer, e, full[layer], matrices)]
    for _, layer, rank in sorted(steps, key=lambda step: step[0]):
        if size / matrices.n_params <= density:
            break
        rank = min(rank, ranks[layer])  # prices that are equal but for rounding may come in the wrong order
        size += matrices.size(layer, rank) - matrices.size(layer, ranks[layer])
        ranks[layer] = rank
    while True:
        ups = [_step_up(layer, e, ranks[layer], full[layer], matrices) for layer, e in energies.items()]
        fitting = [up for up in ups if up[0] > 0 and (size + up[3]) / matrices.n_params <= density]
        if not fitting:
            return ranks
        _, layer, rank, added = max(fitting)
        size += added
        ranks[layer] = rank


def _steps_down(layer: str, energies: Tensor, full: int, matrices: Matrices) -> list[tuple[float, str, int]]:
    """The steps down of a layer: energy lost per parameter saved (the price), layer, rank after the step.

    The price rises from step to step. The first step from a whole matrix goes to the rank of the lowest price, as
    factors of the largest rank lose energy and save few parameters.
    """
    per_rank, top = sum(matrices.shapes[layer]), min(full, matrices.largest_rank(layer))
    first, steps = full, []
    if full > top:
        ranks = torch.arange(top, matrices.min_rank - 1, -1)
        lost = energies.flip(0).cumsum(0).flip(0)[ranks]
        prices = lost / (matrices.full_size(layer) - per_rank * ranks)
        first = int(ranks[prices.argmin()])
        steps = [(float(prices.min()), layer, first)]
    one_by_one = (energies[:first] / per_rank).tolist()
    return steps + [(one_by_one[rank], layer, rank) for rank in range(first - 1, matrices.min_rank - 1, -1)]


def _step_up(
    layer: str, energies: Tensor, rank: int, full: int, matrices: Matrices
) -> tuple[float, str, int, int]:
    """The step to the next rank, or the whole matrix: energy won per parameter, layer, rank, parameters added."""
    above = rank + 1 if matrices.is_factorized(layer, rank + 1) else full
    added = matrices.size(layer, above) - matrices.size(layer, rank)
    won = float(energies[rank:above].sum()) if above <= full else 0.0
    return (won / added if added > 0 else 0.0), layer, above, added
