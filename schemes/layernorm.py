"""LayerNorm over a stream that has lost channels: the others are normalized as if those were there, and zero."""

import torch
from torch import Tensor, nn


class ThinLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels that are left of a wider stream, whose other channels were zero.

    Mean and variance are those of the wide stream: each removed channel counts as a zero.

    Attributes:
        dense_width: The number of channels of the wide stream.
        dim: The dimension of the channels.
    """

    dense_width: int
    dim: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes ``input`` along the channels."""
        x = input.movedim(self.dim, -1)
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        mean = x.sum(-1, keepdim=True) / self.dense_width
        centred = x - mean
        n_removed = self.dense_width - x.shape[-1]
        variance = (centred.square().sum(-1, keepdim=True) + n_removed * mean.square()) / self.dense_width
        out = centred * (variance + self.eps).rsqrt()
        out = out if self.weight is None else out * self.weight
        out = out if self.bias is None else out + self.bias
        return out.to(input.dtype).movedim(-1, self.dim)


def make_thin_norm(norm: nn.LayerNorm, width: int) -> None:
    """Turns a LayerNorm whose parameters have lost channels into its thin form, in place.

    Args:
        norm: It normalizes one dimension: the last, or dimension 1 in a class whose name ends in "2d".
        width: The number of channels that are left.
    """
    (dense_width,) = norm.normalized_shape
    if not isinstance(norm, ThinLayerNorm):
        dim = 1 if type(norm).__name__.lower().endswith("2d") else -1
        norm.__class__ = ThinLayerNorm  # it keeps its parameters, settings, mode and hooks
        assert isinstance(norm, ThinLayerNorm)
        norm.dense_width, norm.dim = dense_width, dim
    norm.normalized_shape = (width,)
