"""The layers of a dense model and what compression left of each."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layer:
    """One layer that has a weight matrix, before and after.

    Attributes:
        name: Its name in the dense model.
        kind: Its type, such as ``"Conv2d"``.
        dense_width: Output channels or neurons of the dense layer.
        width: Those that are left; None where the compressed model has no such layer.
        dense_params: Parameters of the dense layer.
        params: Those that are left and not zero.
    """

    name: str
    kind: str
    dense_width: int
    width: int | None
    dense_params: int
    params: int


def compare_layers(dense: nn.Module, compressed: nn.Module) -> tuple[Layer, ...]:
    """The layers of ``dense`` that have a weight of two or more dimensions, each beside what became of it.

    Layers are found by name: what replaces one, a sequence of smaller ones for instance, counts as a whole.
    """
    there = dict(compressed.named_modules())
    found = []
    for name, layer in dense.named_modules():
        weight = _weight(layer)
        if weight is None or any(layer.children()):
            continue
        left = there.get(name)
        found.append(
            Layer(
                name=name or "(model)",
                kind=type(layer).__name__,
                dense_width=len(weight),
                width=_width(left) if left is not None else None,
                dense_params=_nonzero(layer),
                params=_nonzero(left) if left is not None else 0,
            )
        )
    return tuple(found)


def _weight(layer: nn.Module) -> torch.Tensor | None:
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() > 1 else None


def _width(layer: nn.Module) -> int | None:
    """Outputs of a layer, or of the last one of what replaces it."""
    weights = [weight for module in layer.modules() if (weight := _weight(module)) is not None]
    return len(weights[-1]) if weights else None


def _nonzero(layer: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p.detach())) for p in layer.parameters())
