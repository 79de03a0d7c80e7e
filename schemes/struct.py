"""Structured pruning: whole channels and neurons are removed, so the model is smaller and faster as it is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autocompress.scheme import Theta, Weights, density_error, register_scheme

from .groups import Group, find_groups, first_channels, kept_entries, remove_channels, saliency, sizes_along


@dataclass(frozen=True)
class Structure:
    """The facts of a model for structured pruning.

    Attributes:
        groups: The groups of coupled channels that may shrink.
        shapes: The shape of every parameter of the model.
        example_input: A batch of one sample to trace the model with.
    """

    groups: tuple[Group, ...]
    shapes: dict[str, torch.Size]
    example_input: Tensor


@register_scheme
@dataclass(frozen=True)
class StructPrune:
    """Removes channels and neurons with all that is coupled to them (group magnitude, one global threshold).

    A channel's saliency is the squared norm of its coupled slices over the mean of its group (Fang et al.,
    "DepGraph: Towards Any Structural Pruning", CVPR 2023). The channels of lowest saliency in the whole
    network go, until what is left fits the density. The classes at the output are never pruned.

    Args:
        min_keep: Channels that every layer keeps at least.
    """

    min_keep: int = 2
    takes_density: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        if self.min_keep < 1:
            raise ValueError(f"min_keep={self.min_keep}; every layer must keep at least 1 channel")

    def prunes(self, group: Group) -> bool:
        """Whether the scheme removes channels of this kind."""
        return True

    def analyze(self, model: nn.Module, example_input: Tensor) -> Structure:
        """Finds the coupled groups by following a forward pass; warnings name what is left whole."""
        found = find_groups(model, example_input)
        groups = tuple(g for g in found if self.prunes(g) and any(len(part) > self.min_keep for part in g.parts))
        if not groups:
            raise ValueError(f"{type(self).__name__} finds no channels in this model that it can remove")
        shapes = {name: p.shape for name, p in model.named_parameters()}
        return Structure(groups, shapes, example_input.detach().clone())

    def lowest_density(self, facts: Structure) -> float:
        """The density at which every layer has ``min_keep`` channels left."""
        starts = first_channels(facts.groups)
        parts = [part + start for group, start in zip(facts.groups, starts, strict=False) for part in group.parts]
        removable = [part[self.min_keep :] for part in parts]
        sizes = sizes_along(facts.groups, facts.shapes, torch.cat(removable))
        return int(sizes[-1]) / int(sizes[0])

    def pi(self, weights: Weights, density: float, facts: Structure) -> Theta:
        """Removes the channels of lowest saliency until what is left fits ``density``."""
        saliencies = [saliency(group, weights).cpu() for group in facts.groups]
        floored = []
        for group, s in zip(facts.groups, saliencies, strict=True):
            s = s.clone()
            for part in group.parts:  # the most salient channels of each layer are out of reach
                s[part[s[part].topk(min(self.min_keep, len(part))).indices]] = torch.inf
            floored.append(s)
        ranked = torch.cat(floored).sort(stable=True)
        order = ranked.indices[ranked.values.isfinite()]
        sizes = sizes_along(facts.groups, facts.shapes, order)
        fits = sizes.double() / int(sizes[0]) <= density  # float32 cannot tell millions of parameters apart
        if not fits.any():
            raise density_error(density, self.lowest_density(facts))
        # Channels that are zero already go whatever the target: it is free, and it makes pi idempotent.
        n_removed = max(int(fits.int().argmax()), int((ranked.values == 0).sum()))
        removed = _by_group(facts.groups, order[:n_removed])
        kept = kept_entries(facts.groups, removed, weights)
        values = {name: w * kept[name] if name in kept else w.clone() for name, w in weights.items()}
        return Theta(values, kept, int(sizes[n_removed]), {"removed": removed})

    def delta(self, theta: Theta) -> Weights:
        """The weights, with zeros in place of the removed channels."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Structure) -> nn.Module:
        """Takes the channels out."""
        return remove_channels(model, facts.groups, theta.plan["removed"])


@register_scheme
@dataclass(frozen=True)
class FilterPrune(StructPrune):
    """Removes filters of convolutions with all that is coupled to them; linear layers keep their neurons.

    Args:
        min_keep: Filters that every layer keeps at least.
    """

    def prunes(self, group: Group) -> bool:
        """Only groups whose channels are filters."""
        return group.is_filter


def _by_group(groups: tuple[Group, ...], channels: Tensor) -> dict[str, list[int]]:
    """Channels numbered through all groups, as sorted lists by the name of their group's root."""
    starts = first_channels(groups)
    return {
        group.root: sorted((channels[(channels >= start) & (channels < end)] - start).tolist())
        for group, start, end in zip(groups, starts, starts[1:], strict=False)
    }
