"""The singular values of a weight, and the nearest weight of a lower rank as two factors.

Both come from the eigenvectors of the Gram matrix of the shorter side, which is some thirty times as fast as the
singular value decomposition of a convolution. Squaring costs digits: in 32 bits the energies (squared singular
values) are exact to about 1e-6 of the largest one, in 64 bits to the rounding of the weights themselves. 32 bits
suffice where all energies that are kept are far above that: then the error of the nearest weight is within 1e-6 of
its minimum.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLEAR = 1e-4  # share of the largest energy that is far above rounding in 32 bits
SQUARES = (1e-28, 1e34)  # the range in which squares in 32 bits keep their digits
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight, as the matrix (out, everything else).

    Attributes:
        energies: Their squares, the largest first; zero where they are below rounding. On the CPU.
        matrix: The matrix, in the precision of the decomposition.
        basis: The singular vectors of the shorter side, as columns in the same order.
    """

    energies: Tensor
    matrix: Tensor
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor, *, rank: int | None = None) -> "Spectrum":
        """Decomposes a weight, in 32 bits where they suffice and in 64 bits elsewhere.

        Args:
            weight: The weight, of shape ``(out, ...)``.
            rank: The number of singular values to keep. None: not known yet, see `tells`.
        """
        spectrum = cls._in(torch.float32, weight) if _multiplies_exactly(weight) else None
        if spectrum is None or (rank is not None and not spectrum.tells(rank)):
            return cls._in(torch.float64, weight)
        return spectrum

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
        """Whether the decomposition is precise enough to keep ``rank`` singular values."""
        return self.matrix.dtype == torch.float64 or bool(self.energies[rank - 1] >= CLEAR * self.energies[0])

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Two weights whose product is the nearest one of that rank (Eckart & Young), of equal norm.

        Args:
            weight: The weight, of shape ``(out, in, ...)``.
            rank: The number of singular values that are kept.

        Returns:
            Weights of the shapes ``(rank, in, ...)`` and ``(out, rank, 1, ...)``.
        """
        basis = self.basis[:, :rank]
        # The sign of a singular vector is arbitrary: its largest entry is made positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        root = self.energies[:rank].pow(0.25).to(basis).clamp_min(TINY)
        if len(self.matrix) <= self.matrix.shape[1]:
            first, second = (basis.T @ self.matrix) / root[:, None], basis * root
        else:
            first, second = (basis * root).T, (self.matrix @ basis) / root
        second = second.reshape(len(weight), rank, *[1] * (weight.dim() - 2))
        return _as_weight(first.to(weight.dtype), weight), second.to(weight.dtype).contiguous()


def _inputs_last(weight: Tensor) -> bool:
    """Whether the inputs are contiguous in memory, as in channels_last."""
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def _as_matrix(weight: Tensor) -> Tensor:
    """The matrix (out, everything else), its columns in an order that needs no copy: the spectrum is the same."""
    return (weight.movedim(1, -1) if _inputs_last(weight) else weight).flatten(1)


def _as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    """Undoes `_as_matrix`, for a matrix with any number of rows."""
    if _inputs_last(like):
        return matrix.reshape(-1, *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return matrix.reshape(-1, *like.shape[1:]).contiguous()


def _multiplies_exactly(weight: Tensor) -> bool:
    """Whether float32 products are computed in float32, and not in TF32 as a GPU may be told to."""
    return not weight.is_cuda or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")


def _gram(matrix: Tensor) -> Tensor:
    """The Gram matrix of a matrix's rows."""
    if matrix.is_cuda:
        return matrix @ matrix.T
    rows = matrix.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the range
        return torch.from_numpy(rows @ rows.T)  # NumPy computes one half and mirrors it; PyTorch computes both
