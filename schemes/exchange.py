"""Replacing a layer by two thinner ones: which layers allow it, and the two layers."""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autocompress.task import device_of, evaluating

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
ALIKE = 1e-3  # relative to the largest output: above rounding, below what a hook changes
FACTORIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def exchangeable_layers(model: nn.Module, example_input: Tensor) -> dict[str, Layer]:
    """The layers that can be replaced, by name: the model calls them, and uses them in no other way.

    A warning names layers that the model calls and that cannot be replaced: their weight is read elsewhere, as in
    PyTorch's encoder layers, or a hook changes what they put out.
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
    """Whether the model's outputs stay the same with each layer replaced by two, one of which is the identity."""
    changed = copy.deepcopy(model).eval()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        m, n, ones = len(weight), weight[0].numel(), [1] * (weight.dim() - 2)
        same = torch.eye(min(m, n), dtype=weight.dtype, device=weight.device)
        factors = (
            (weight, same.view(m, m, *ones))
            if m <= n
            else (same.view(n, *weight.shape[1:]), weight.reshape(m, n, *ones))
        )
        two = two_layers(copy.deepcopy(layer).eval(), *factors)
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


def two_layers(whole: Layer, first: Tensor, second: Tensor) -> nn.Sequential:
    """Two layers in a row that compute what ``whole`` would compute with the product of their weights.

    Args:
        whole: The layer to replace; the second layer takes over its bias.
        first: The weight of the first layer, shape ``(rank, in, ...)``.
        second: The weight of the second layer, shape ``(out, rank, 1, ...)``.
    """
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
