"""Coupled channels of a model: which can be removed, and which cannot and why."""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .attention import heads_of_rows, make_traceable
from .exactness import Exam, exact
from .findings import Findings
from .removal import remove_channels
from .slices import Group, Slices, first_channels, kept_entries, sizes_along, zeroed
from .trace import Trace

__all__ = [
    "Group",
    "Slices",
    "find_groups",
    "first_channels",
    "kept_entries",
    "remove_channels",
    "sizes_along",
    "warn_of_whole",
    "zeroed",
]


def warn_of_whole(why: str, layers: Iterable[str]) -> None:
    """Warns that layers keep all their channels."""
    warnings.warn(f"left at full width, as {why}: {', '.join(layers)}", stacklevel=3)


def find_groups(
    model: nn.Module, example_input: Tensor, tell: Callable[[str, list[str]], None] = warn_of_whole
) -> tuple[Group, ...]:
    """The channels of a model that can be removed, in groups that live in the same tensors.

    Whatever a removal would change beyond the channels themselves stays whole: what reaches the output (classes
    are not pruned), what LayerNorm or a softmax takes together, what the forward pass picks by its place or
    counts on. A last check takes half of the channels out and compares outputs.

    Args:
        model: Left as it is.
        example_input: A batch of one sample.
        tell: Is told of the layers that stay whole for each reason.
    """
    model = copy.deepcopy(model).cpu().eval()  # where float32 is not cut to fewer bits
    # In other layouts torch computes with views of memory, which say nothing of channels.
    model = model.to(memory_format=torch.contiguous_format)
    x = example_input.detach().cpu().contiguous()
    trace, training = _traced(model, x)
    found = Findings.of(trace, model)
    right = exact(Exam.of(model, x, training), found.groups)
    wrong = {group.root for group in found.groups} - {group.root for group in right}
    for why, layers in found.left_whole(wrong).items():
        tell(why, _abridged(layers))
    return tuple(right)


def _traced(model: nn.Module, x: Tensor) -> tuple[Trace, bool]:
    """The trace of a forward pass, and of one in train mode if that is needed to reach all parameters."""
    shared: dict[int, object] = {id(p): p for p in model.parameters()}  # passes change nothing but statistics
    trace = Trace(make_traceable(copy.deepcopy(model, shared)), heads_of_rows(model))
    trace.run(x)
    if all(name in trace.positions for name, _ in model.named_parameters()):
        return trace, False
    try:
        trace.model.train()
        trace.run(torch.cat([x, x]))  # BatchNorm wants more than one value
    except Exception as error:  # a model may be written for inference alone; whatever it raises
        warnings.warn(f"train mode was not looked at, the model fails in it: {error}", stacklevel=3)
        return trace, False
    return trace, True


def _abridged(layers: Iterable[str]) -> list[str]:
    """Layers that repeat under other numbers, named once: ``blocks.*.mlp (12 layers)``."""
    alike: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        name, *some = layer.split(" ", 1)  # "conv2 (16 of 32)"
        alike[" ".join([re.sub(r"\d+(?=\D)", "*", name), *some])].append(layer)  # a number at the end is kept
    return [
        text
        for pattern, names in alike.items()
        for text in ([f"{pattern} ({len(names)} layers)"] if len(names) > 3 else names)
    ]
