"""Are groups of channels what they seem? Half of each is taken out, and the outputs are compared."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .removal import remove_channels
from .slices import Group, kept_entries

SMALL = (64, 128)  # sides of an image that are tried before its own
TOLERANCE = 1e-4  # of the largest output; an error in the groups shows in the first digits


@dataclass(frozen=True)
class Exam:
    """A model and the input to compare outputs on.

    Attributes:
        model: A copy of the model without constant parameters.
        x: The input, a small image where the model takes one.
        training: Whether the outputs that a model has only in train mode are compared as well.
    """

    model: nn.Module
    x: Tensor
    training: bool

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, training: bool) -> "Exam":
        """Prepares a model, which is changed: zeros and ones that it starts with would hide errors."""
        _stir(model)
        return cls(model, _smallest_input(model, x, training), training)

    def passed(self, groups: Sequence[Group]) -> bool:
        """Whether the model without half of the groups' channels computes what it computes with zeros there."""
        removed = {g.root: torch.cat([part[: len(part) // 2] for part in g.parts]).tolist() for g in groups}
        masked = copy.deepcopy(self.model)
        weights = dict(masked.named_parameters())
        with torch.no_grad():
            for name, kept in kept_entries(groups, removed, weights).items():
                weights[name].mul_(kept)
        try:
            outputs = _outputs(remove_channels(masked, groups, removed), self.x, self.training)
        except Exception:  # a forward pass that meets sizes it was not written for may raise anything
            return False
        expected = _outputs(masked, self.x, self.training)
        return len(outputs) == len(expected) and all(map(_agree, outputs, expected))


def exact(exam: Exam, groups: Sequence[Group]) -> list[Group]:
    """The groups that pass, found by bisection: one exam where all do, a logarithm of them for one that fails."""
    groups = list(groups)
    if not groups or exam.passed(groups):
        return groups
    if len(groups) == 1:
        return []
    middle = len(groups) // 2
    first, second = exact(exam, groups[:middle]), exact(exam, groups[middle:])
    if not first or not second or exam.passed(first + second):
        return first + second
    for group in second:  # each half is right by itself: take what goes together with the first
        first = [*first, group] if exam.passed([*first, group]) else first
    return first


def _agree(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """All tensors that the model puts out, in eval mode and, if asked for, with all but noise in train mode."""
    outputs = [model.eval()(x)]
    if training:
        outputs.append(_without_noise(model.train())(x))
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]


def _without_noise(model: nn.Module) -> nn.Module:
    """Puts the layers in eval mode: what is left of train mode is the way through the network."""
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.eval()
    return model


def _stir(model: nn.Module) -> None:
    """Replaces parameters and statistics that are constant by random ones, the same each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            is_statistic = name.endswith(("running_mean", "running_var"))
            if not tensor.is_floating_point() or not (is_statistic or isinstance(tensor, nn.Parameter)):
                continue
            first = tensor.flatten()[:1]
            if tensor.numel() > 1 and bool((tensor == first).all()):
                low = -0.5 if first == 0 else 0.5
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)


def _smallest_input(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    """A corner of the image that the model takes as well; ``x`` where it is no image or must have its size."""
    if x.dim() != 4 or not x.is_floating_point():
        return x
    for side in SMALL:
        corner = x[:, :, :side, :side]
        if corner.shape == x.shape:
            break
        try:
            _outputs(model, corner, training)
        except Exception:  # the model takes no image of this size; whatever it raises
            continue
        return corner
    return x
