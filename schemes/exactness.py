"""A check of groups of channels by experiment: half of each is removed, and the model's outputs are compared."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .removal import remove_channels
from .slices import Group, zeroed

SMALL = (64, 128)  # pixels: sides of images that are tried before the input's own
TOLERANCE = 1e-4  # relative to the largest output; an error in the groups shows in the first digits


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
        """Prepares a model, in place: zeros and ones from its initialization would hide errors."""
        _stir(model)
        return cls(model, _smallest_input(model, x, training), training)

    def passed(self, groups: Sequence[Group]) -> bool:
        """Whether the model without half of the groups' channels computes what it computes with zeros there."""
        removed = {g.root: torch.cat([part[: len(part) // 2] for part in g.parts]).tolist() for g in groups}
        try:
            outputs = _outputs(remove_channels(self.model, groups, removed), self.x, self.training)
        except Exception:  # a forward pass that meets sizes it was not written for may raise anything
            return False
        with _masked(self.model, groups, removed):
            expected = _outputs(self.model, self.x, self.training)
        return len(outputs) == len(expected) and all(map(_agree, outputs, expected))


def exact(exam: Exam, groups: Sequence[Group]) -> list[Group]:
    """The groups that pass the exam together.

    It takes one exam where all groups pass. Otherwise bisection finds one that fails. It is set aside with the
    groups alike, those of the same layers in other blocks, as they tend to fail too; these are tried again last.
    """
    kept, set_aside = list(groups), []
    while kept and not exam.passed(kept):
        culprit = _culprit(exam, kept)
        alike = [group for group in kept if _kind(group) == _kind(culprit)]
        set_aside.append([group for group in alike if group is not culprit])
        kept = [group for group in kept if group not in alike]
    for others in set_aside:
        if others and exam.passed([*kept, *others]):
            kept += others
    roots = {group.root for group in kept}
    return [group for group in groups if group.root in roots]


def _culprit(exam: Exam, groups: Sequence[Group]) -> Group:
    """A group such that the groups before it pass, and fail together with it."""
    passes, fails = 0, len(groups)
    while fails - passes > 1:
        middle = (passes + fails) // 2
        passes, fails = (middle, fails) if exam.passed(groups[:middle]) else (passes, middle)
    return groups[passes]


def _kind(group: Group) -> frozenset[tuple[str, int]]:
    """The parameters and dimensions of a group, without the numbers of blocks: the same for groups alike."""
    return frozenset((re.sub(r"\d+", "*", s.parameter), s.dim) for s in group.slices)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())


@contextmanager
def _masked(model: nn.Module, groups: Sequence[Group], removed: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Sets the slices of some channels to zero, for a ``with`` block."""
    whole = {name: p.data for name, p in model.named_parameters()}
    try:
        for name, values in zeroed(groups, removed, whole).items():
            model.get_parameter(name).data = values
        yield
    finally:
        for name, values in whole.items():
            model.get_parameter(name).data = values


def _outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """All tensors that the model puts out in eval mode and, if ``training``, in train mode without noise."""
    with torch.no_grad():
        outputs = [model.eval()(x)]
        if training:
            outputs.append(_without_noise(model.train())(x))
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]


def _without_noise(model: nn.Module) -> nn.Module:
    """Puts the layers in eval mode; the modules that contain them still take their train-mode branches."""
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.eval()
    return model


def _stir(model: nn.Module) -> None:
    """Replaces constant parameters and running statistics, in place, by reproducible random ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            is_statistic = name.endswith(("running_mean", "running_var"))
            if not tensor.is_floating_point() or not (is_statistic or isinstance(tensor, nn.Parameter)):
                continue
            first = tensor.flatten()[:1]
            # For most tensors the first two entries alone show that they are not constant.
            if tensor.numel() > 1 and bool((tensor.flatten()[:2] == first).all() and (tensor == first).all()):
                low = -0.5 if first == 0 else 0.5
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)


def _smallest_input(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    """A corner of the image, if the model takes a smaller one; otherwise ``x``."""
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
