"""Requirements on a model that is to be compressed: it is copied, changed and trained."""

import copy

import torch
from torch import nn


def check_model(model: nn.Module) -> None:
    """Checks that a model can be copied, changed and trained.

    Raises:
        ValueError: If it cannot; the message names the part of the model that prevents it, and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"the model is TorchScript (at {name or 'its root'!r}), whose layers cannot be changed; pass the "
                "module that it was scripted or traced from"
            )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"the model is wrapped in {type(model).__name__}; pass what is inside, model.module")
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model went through torch.compile; pass what it was made from, model._orig_mod")
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"the model's {name} has no shape yet; run a batch through the model first")
        if p.is_floating_point() and p.dtype != torch.float32:
            raise ValueError(
                f"the model's {name} is of type {p.dtype}; it is trained in float32: convert it with model.float()"
            )
    trained = [p.requires_grad for p in model.parameters()]
    if trained and not any(trained):
        raise ValueError(
            "no parameter of the model requires a gradient, and recovery could train nothing; call "
            "requires_grad_(True) on it, or on the layers that may change"
        )
    try:
        copy.deepcopy(model)
    except Exception as error:  # modules may hold objects that cannot be copied: weight_norm, an open file
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "the model cannot be copied, which every trial does (masks and norms of weights go with "
            f"torch.nn.utils.prune.remove and remove_weight_norm): {type(error).__name__}: {reason}"
        ) from error
