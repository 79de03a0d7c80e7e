"""The roles of parameters: filters that put channels out, weights that read them, scales of BatchNorm."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .attention import known_attention
from .groups import Group, Slices


@dataclass(frozen=True)
class Roles:
    """The roles of a model's parameters.

    Attributes:
        outputs: For each weight of a linear or convolutional layer, by name, the dimension of its outputs.
        planar: Of these weights, those of layers that put out two-dimensional maps.
        grouped: Of these weights, those of grouped convolutions.
        silent: Of these weights, those of layers that are never called, so that hooks cannot observe them.
        scales: The scales of BatchNorm layers.
        training: Parameters that the model uses in train mode alone, as those of auxiliary heads; empty unless
            that was looked for.
    """

    outputs: Mapping[str, int]
    planar: frozenset[str]
    grouped: frozenset[str]
    silent: frozenset[str]
    scales: frozenset[str]
    training: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> "Roles":
        """Reads the roles off the types of the modules."""
        outputs, planar, grouped, silent, scales = {}, set(), set(), set(), set()
        for layer, module in model.named_modules():  # the model itself is named ""
            name = f"{layer}.weight".lstrip(".")
            if isinstance(module, nn.Linear | _ConvNd):
                outputs[name] = int(getattr(module, "transposed", False))
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    planar.add(name)
                if getattr(module, "groups", 1) > 1:
                    grouped.add(name)
            elif isinstance(module, _BatchNorm) and module.affine:
                scales.add(name)
            elif (known := known_attention(module)) is not None:
                silent |= {f"{layer}.{inner}.weight".lstrip(".") for inner in known.uncalled}
                bare = [f"{layer}.{name}".lstrip(".") for name in known.projections if "." not in name]
                outputs |= dict.fromkeys(bare, 0)
                silent.update(bare)
        return cls(outputs, *map(frozenset, (planar, grouped, silent, scales)))

    def filters(self, group: Group) -> list[Slices]:
        """The slices of a group that put its channels out: filters, neurons."""
        return [s for s in group.slices if self.outputs.get(s.parameter) == s.dim]

    def readers(self, group: Group) -> list[Slices]:
        """The slices of a group that read its channels, those of grouped convolutions aside."""
        return [s for s in group.slices if self._reads(s) and s.parameter not in self.grouped]

    def owners(self, group: Group) -> set[str]:
        """Names of the modules that put a group's channels out, scale or shift them."""
        return {module_of(s) for s in group.slices if not self._reads(s)}

    def only_train(self, group: Group) -> bool:
        """Whether a group's channels are there in train mode alone."""
        filters = self.filters(group)
        return bool(filters) and all(s.parameter in self.training for s in filters)

    def _reads(self, s: Slices) -> bool:
        return s.parameter in self.outputs and self.outputs[s.parameter] != s.dim


def module_of(s: Slices) -> str:
    """The name of the module that the slices' parameter belongs to."""
    return s.parameter.rpartition(".")[0]


def cover(slices: Iterable[Slices], group: Group) -> bool:
    """Whether each channel of the group is in one of the slices."""
    reached = torch.zeros(group.width, dtype=torch.bool)
    for s in slices:
        reached[s.channels] = True
    return bool(reached.all())
