"""Fingerprints: everything about a model, or the result of a C step, that must not change."""

import hashlib
import json

import torch
from torch import Tensor, nn

from autocompress.scheme import Theta


def fingerprint(model: nn.Module) -> list[object]:
    """Everything about a model that must not change, in a form that compares with ``==``.

    That is the bits and memory addresses of weights, buffers and gradients, what is trainable, and each module's
    mode, settings (such as the widths of a layer) and hooks.
    """
    state = [(name, *_place(t), bytes(t.numpy())) for name, t in model.state_dict().items()]
    parameters = [
        (name, p.requires_grad, None if p.grad is None else (*_place(p.grad), bytes(p.grad.numpy())))
        for name, p in model.named_parameters()
    ]
    modules = [(name, _settings(module), _hooks(module)) for name, module in model.named_modules()]
    return [state, parameters, modules]


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    plain = (bool, int, float, str, tuple)
    return [(name, value) for name, value in vars(module).items() if isinstance(value, plain)]


def _hooks(module: nn.Module) -> list[tuple[str, list[int]]]:
    tables = ((name, value) for name, value in vars(module).items() if name.endswith("_hooks"))
    return [(name, [id(hook) for hook in value.values()]) for name, value in tables if isinstance(value, dict)]


def theta_digest(theta: Theta) -> dict[str, str]:
    """A digest of the result of a C step, which compares with ``==`` between processes."""
    parts = {"plan": json.dumps(dict(theta.plan), sort_keys=True, default=str), "kept": str(theta.kept)}
    for kind, tensors in (("support", theta.support), ("values", theta.values)):
        for name, tensor in tensors.items():
            stored = tensor.detach().contiguous().flatten().view(torch.uint8)
            parts[f"{kind} {name}"] = hashlib.sha256(bytes(stored.numpy())).hexdigest()
    return parts
