"""LayerNorm behind channels that are gone: what it computes of the others is what it computed beside zeros."""

import torch
from torch import Tensor, nn


class ThinLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels that are left of a wider stream, the others being zero.

    Mean and variance are those of the wide stream: the channels that are gone lie
    as far from it as the mean from zero.

    Attributes:
        dense_width: How many channels there were.
        dim: The dimension of the channels.
    """

    dense_width: int
    dim: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes ``input`` along the channels."""
        x = input.movedim(self.dim, -1)
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        mean = x.sum(-1, keepdim=True) / self.dense_width
        apart = x - mean
        gone = self.dense_width - x.shape[-1]
        variance = (apart.square().sum(-1, keepdim=True) + gone * mean.square()) / self.dense_width
        out = apart * (variance + self.eps).rsqrt()
        out = out if self.weight is None else out * self.weight
        out = out if self.bias is None else out + self.bias
        return out.to(input.dtype).movedim(-1, self.dim)


def make_thin_norm(norm: nn.LayerNorm, width: int) -> None:
    """Turns a LayerNorm whose parameters have lost channels into its thin form, in place.

    Args:
        norm: Over one dimension: the last, or the one after the batch in a class whose name ends in "2d".
        width: How many channels are left.
    """
    (dense_width,) = norm.normalized_shape
    if not isinstance(norm, ThinLayerNorm):
        dim = 1 if type(norm).__name__.lower().endswith("2d") else -1
        norm.__class__ = ThinLayerNorm  # it keeps its parameters, settings, mode and hooks
        assert isinstance(norm, ThinLayerNorm)
        norm.dense_width, norm.dim = dense_width, dim
    norm.normalized_shape = (width,)
