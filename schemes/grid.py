"""The integer grid of a weight: per output channel the symmetric one with the least squared error.

A channel's weights become s·q with one scale s and integers |q| ≤ qmax = 2^(bits−1) − 1. Such a grid survives
the folding of BatchNorm exactly: to multiply a channel is to multiply its scale.
"""

import torch
from torch import Tensor

CLIPS = 16  # clipping points that are tried below the largest weight; the fewer the bits, the deeper they reach
CLIPS_OF_MANY = 4  # with 8 bits clipping gains little: 16 points take 0.6% off the squared error of a ResNet-18
MANY = 100  # largest integer from which on there are CLIPS_OF_MANY points
REFINEMENTS = 3
AT_A_TIME = 2**18  # weights that are quantized at a time: they fit in the processor's cache
SMALLEST = 1e-30  # a channel whose largest weight is smaller is zero
MANTISSA_BITS = 16  # of a scale: its product with an integer of 8 bits is exact in float32


def quantize_weight(weight: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
    """The integers and scales of a weight that are nearest to it, as far as the search below goes.

    The scale that minimizes ‖w − s·q(w/s)‖² is searched over clipping points, starting at the largest weight, and
    refined by s ← ⟨w, q⟩ / ⟨q, q⟩, the least-squares scale for given integers (Lloyd's iteration). A scale never
    exceeds the largest weight over qmax: so each channel uses the largest integer, and the projection is
    idempotent, bit for bit.

    Args:
        weight: Any shape, with the output channels along ``axis``.
        axis: The dimension of the output channels.
        bits: Bits of the integers, sign included: 2 to 8.

    Returns:
        The integers (int8, the weight's shape) and the scales, shape ``(channels,)``, positive.
    """
    channels = weight.detach().float().movedim(axis, 0)
    rows = channels.flatten(1)
    chunks = torch.split(rows, max(1, AT_A_TIME // rows.shape[1]))
    quantized = [_quantize_rows(chunk, 2 ** (bits - 1) - 1) for chunk in chunks]
    q, scale = (torch.cat(tensors) for tensors in zip(*quantized, strict=True))
    return q.view_as(channels).movedim(0, axis), scale


def _quantize_rows(w: Tensor, q_max: int) -> tuple[Tensor, Tensor]:
    """The integers (int8, the shape of ``w``) and scales, shape ``(channels,)``, of rows of channels."""
    largest = w.abs().amax(1)
    unclipped = _short(largest.clamp_min(SMALLEST) / q_max)
    scale, error = unclipped, _error(w, unclipped, q_max)
    deepest, clips = min(0.8, 5.6 / q_max), CLIPS if q_max < MANY else CLIPS_OF_MANY
    for k in range(clips):
        clip = 1 - deepest * (k + 1) / clips
        scale, error = _better(w, _short(clip * unclipped), scale, error, q_max)
    for _ in range(REFINEMENTS):
        q = _integers(w, scale, q_max)
        fitted = (w * q).sum(1) / q.square_().sum(1).clamp_min(1)
        fitted = torch.minimum(_short(fitted), unclipped).clamp_min(SMALLEST)
        scale, error = _better(w, fitted, scale, error, q_max)
    q = _integers(w, scale, q_max) * (largest >= SMALLEST)[:, None]
    return q.to(torch.int8), scale


def dequantize_weight(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """The weight s·q, in float32."""
    return q.float() * along(scale, axis, q.dim())


def along(vector: Tensor, axis: int, dims: int) -> Tensor:
    """``vector`` in a shape that broadcasts along ``axis`` of a tensor of ``dims`` dimensions."""
    return vector.reshape([-1 if d == axis else 1 for d in range(dims)])


def _integers(w: Tensor, scale: Tensor, q_max: int) -> Tensor:
    return (w / scale[:, None]).round_().clamp_(-q_max, q_max)


def _error(w: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """Squared error of each channel, shape ``(channels,)``."""
    return _integers(w, scale, q_max).mul_(scale[:, None]).sub_(w).square_().sum(1)


def _better(w: Tensor, other: Tensor, scale: Tensor, error: Tensor, q_max: int) -> tuple[Tensor, Tensor]:
    """Per channel the scale of the smaller error, and that error; ``scale`` where both are as good."""
    other_error = _error(w, other, q_max)
    improved = other_error < error
    return torch.where(improved, other, scale), torch.where(improved, other_error, error)


def _short(scale: Tensor) -> Tensor:
    """Rounded down to a mantissa of 16 bits."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**MANTISSA_BITS).floor(), exponent - MANTISSA_BITS)
