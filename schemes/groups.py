"""The coupled channels of a model: which can be removed, and which cannot, and why."""

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

    Channels stay whole where their removal would change more than themselves: where they reach the output (classes
    are not pruned), where a softmax takes all of them together, where the forward pass picks them by position or
    counts on their number. A final check removes half of the channels of each group and compares outputs.

    Args:
        model: The model; not changed.
        example_input: A batch of one sample.
        tell: Is called with each reason why layers stay whole, and the names of these layers.
    """
    model = copy.deepcopy(model).cpu().eval()  # a GPU may compute float32 with fewer bits
    # In other layouts torch uses strided views of memory, through which channels cannot be followed.
    model = model.to(memory_format=torch.contiguous_format)
    x = example_input.detach().cpu().contiguous()
    trace, training = _traced(model, x)
    findings = Findings.of(trace, model)
    passed = exact(Exam.of(model, x, training), findings.groups)
    wrong = {group.root for group in findings.groups} - {group.root for group in passed}
    for why, layers in findings.left_whole(wrong).items():
        tell(why, _abridged(layers))
    return tuple(passed)


def _traced(model: nn.Module, x: Tensor) -> tuple[Trace, bool]:
    """The trace of a forward pass in eval mode, and of one in train mode if parameters were not reached.

    Returns:
        The trace, and whether train mode was traced too.
    """
    shared: dict[int, object] = {id(p): p for p in model.parameters()}  # forward passes do not change parameters
    trace = Trace(make_traceable(copy.deepcopy(model, shared)), heads_of_rows(model))
    trace.run(x)
    if all(name in trace.positions for name, _ in model.named_parameters()):
        return trace, False
    try:
        trace.model.train()
        trace.run(torch.cat([x, x]))  # BatchNorm needs more than one value per channel
    except Exception as error:  # a model may be written for inference alone; whatever it raises
        warnings.warn(f"train mode was not looked at, the model fails in it: {error}", stacklevel=3)
        return trace, False
    return trace, True


def _abridged(layers: Iterable[str]) -> list[str]:
    """The layers' names; those that differ in numbers alone become one: ``blocks.*.mlp (12 layers)``."""
    alike: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        name, *some = layer.split(" ", 1)  # "conv2 (16 of 32)"
        alike[" ".join([re.sub(r"\d+(?=\D)", "*", name), *some])].append(layer)  # a number at the end is kept
    return [
        text
        for pattern, names in alike.items()
        for text in ([f"{pattern} ({len(names)} layers)"] if len(names) > 3 else names)
    ]
