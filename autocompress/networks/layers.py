"""The layers of a dense model, and the size of each after compression."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Layer:
    """A layer with a weight matrix, before and after compression.

    Attributes:
        name: Its name in the dense model.
        kind: Its type, such as ``"Conv2d"``.
        dense_width: Output channels or neurons of the dense layer.
        width: Those of the compressed layer; None where the compressed model has no such layer.
        dense_params: Parameters of the dense layer that are not zero.
        params: Parameters of the compressed layer that are not zero.
    """

    name: str
    kind: str
    dense_width: int
    width: int | None
    dense_params: int
    params: int


def compare_layers(dense: nn.Module, compressed: nn.Module) -> tuple[Layer, ...]:
    """The layers of ``dense`` with a weight of two or more dimensions, each compared with its compressed form.

    Layers are matched by name: a sequence of smaller layers that replaces one counts as a whole.
    """
    modules = dict(compressed.named_modules())
    layers = []
    for name, layer in dense.named_modules():
        weight = _weight(layer)
        if weight is None or any(layer.children()):
            continue
        left = modules.get(name)
        layers.append(
            Layer(
                name=name or "(model)",
                kind=type(layer).__name__,
                dense_width=len(weight),
                width=_width(left) if left is not None else None,
                dense_params=_nonzero(layer),
                params=_nonzero(left) if left is not None else 0,
            )
        )
    return tuple(layers)


def _weight(layer: nn.Module) -> torch.Tensor | None:
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() > 1 else None


def _width(layer: nn.Module) -> int | None:
    """Outputs of a layer, or of the last layer of a sequence."""
    weights = [weight for module in layer.modules() if (weight := _weight(module)) is not None]
    return len(weights[-1]) if weights else None


def _nonzero(layer: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p.detach())) for p in layer.parameters())
