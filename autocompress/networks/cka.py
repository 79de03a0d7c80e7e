"""The similarity of two networks' representations, layer by layer: linear centered kernel alignment (CKA)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autocompress.task import device_of, evaluating

if TYPE_CHECKING:
    import pandas as pd

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations of the same samples.

    It is 1 if they are equal up to rotation and scale, and 0 if no features of one are correlated with those of
    the other. Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), equation 3.

    Args:
        x: A representation, shape ``(n, ...)``.
        y: A representation, shape ``(n, ...)``, of as many samples; the other dimensions may differ.
    """
    return _alignment(_gram(x), _gram(y))


def layer_similarity(a: nn.Module, b: nn.Module, x: Tensor) -> "pd.DataFrame":
    """Linear CKA between the outputs of the convolutional and linear layers of two models.

    Args:
        a: A model; its layers are the rows, in the order in which they run.
        b: A model, or the same; its layers are the columns.
        x: A batch of shape ``(n, ...)``. With fewer than some hundred samples all layers look alike.

    Returns:
        A table of numbers from 0 to 1.
    """
    import pandas as pd

    rows, columns = _grams(a, x), _grams(b, x)
    similarity = [[_alignment(k, m) for m in columns.values()] for k in rows.values()]
    return pd.DataFrame(similarity, index=list(rows), columns=list(columns))


def _grams(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The centered Gram matrix of each layer's outputs, by the layer's name."""
    grams: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: grams.update({name: _gram(y)}))
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(x.to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def _gram(x: Tensor) -> Tensor:
    """The centered Gram matrix of the samples, shape ``(n, n)``."""
    features = x.detach().flatten(1).double().cpu()
    features = features - features.mean(0)
    return features @ features.T


def _alignment(k: Tensor, m: Tensor) -> float:
    """The inner product of two Gram matrices over their norms; 0 where a representation is constant."""
    norms = k.norm() * m.norm()
    return float((k * m).sum() / norms) if norms > 0 else 0.0
