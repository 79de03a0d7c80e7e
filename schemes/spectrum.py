"""The singular values of a weight, and the nearest weight of a lower rank as two factors.

Both come from the eigenvectors of the Gram matrix of the shorter side, which is some thirty times as fast as the
singular value decomposition of a convolution. Squares cost digits: in 32 bits the energies are right to about
1e-6 of the largest, in 64 bits to rounding in the weights themselves. 32 bits do where none of the energies that
are kept is near that: then the error of the nearest weight is within 1e-6 of what it can be.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLEAR = 1e-4  # of the largest energy: far above rounding in 32 bits
SQUARES = (1e-28, 1e34)  # between which the squares of 32 bits keep their digits
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight, as the matrix (out, everything else).

    Attributes:
        energies: Their squares, the largest first; zero where the value is rounding alone. On the CPU.
        matrix: The matrix.
        basis: The singular vectors of the shorter side, as columns in the same order.
    """

    energies: Tensor
    matrix: Tensor
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor, *, rank: int | None = None) -> "Spectrum":
        """Decomposes a weight, in as few bits as do.

        Args:
            weight: The weight, of shape ``(out, ...)``.
            rank: How many singular values are to be kept. None: not known yet, see `tells`.
        """
        found = cls._in(torch.float32, weight) if _multiplies_exactly(weight) else None
        if found is None or (rank is not None and not found.tells(rank)):
            return cls._in(torch.float64, weight)
        return found

    @classmethod
    def _in(cls, dtype: torch.dtype, weight: Tensor) -> "Spectrum":
        matrix = _as_matrix(weight.detach()).to(torch.promote_types(weight.dtype, dtype))
        gram = _gram(matrix if len(matrix) <= matrix.shape[1] else matrix.T)
        largest = float(gram.diagonal().max())
        if dtype == torch.float32 and not SQUARES[0] < largest < SQUARES[1]:
            return cls._in(torch.float64, weight)
        energies, basis = torch.linalg.eigh(gram)
        energies, basis = energies.flip(0), basis.flip(1)
        rounding = 8 * torch.finfo(weight.dtype).eps
        energies = torch.where(energies > rounding**2 * energies[0], energies, 0.0)
        return cls(energies.cpu(), matrix, basis)

    def tells(self, rank: int) -> bool:
        """Whether the bits do to keep so many singular values."""
        return self.matrix.dtype == torch.float64 or bool(self.energies[rank - 1] >= CLEAR * self.energies[0])

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Two weights whose product is the nearest one of that rank (Eckart & Young), of equal norm.

        Args:
            weight: The weight, of shape ``(out, in, ...)``.
            rank: How many singular values are kept.

        Returns:
            Weights of the shapes ``(rank, in, ...)`` and ``(out, rank, 1, ...)``.
        """
        basis = self.basis[:, :rank]
        # Each vector is known but for its sign: the largest entry is made positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        root = self.energies[:rank].pow(0.25).to(basis).clamp_min(TINY)
        if len(self.matrix) <= self.matrix.shape[1]:
            first, second = (basis.T @ self.matrix) / root[:, None], basis * root
        else:
            first, second = (basis * root).T, (self.matrix @ basis) / root
        second = second.reshape(len(weight), rank, *[1] * (weight.dim() - 2))
        return _as_weight(first.to(weight.dtype), weight), second.to(weight.dtype).contiguous()


def _inputs_last(weight: Tensor) -> bool:
    """Whether the inputs lie next to each other in memory. A spectrum does not depend on the columns' order."""
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def _as_matrix(weight: Tensor) -> Tensor:
    """The matrix (out, everything else), its columns in the order of the memory if that saves a copy."""
    return (weight.movedim(1, -1) if _inputs_last(weight) else weight).flatten(1)


def _as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    """Undoes `_as_matrix` for a matrix of other rows."""
    if _inputs_last(like):
        return matrix.reshape(-1, *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return matrix.reshape(-1, *like.shape[1:]).contiguous()


def _multiplies_exactly(weight: Tensor) -> bool:
    """Whether products of 32 bits are computed in 32 bits, which a GPU can be told not to do."""
    return not weight.is_cuda or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")


def _gram(matrix: Tensor) -> Tensor:
    """The products of a matrix's rows with each other."""
    if matrix.is_cuda:
        return matrix @ matrix.T
    rows = matrix.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # what is out of range is looked for
        return torch.from_numpy(rows @ rows.T)  # NumPy computes one half and mirrors it; PyTorch computes both
