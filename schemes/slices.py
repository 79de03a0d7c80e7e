"""Coupled channels as index tensors: which slices of which parameters go together.

A channel of a convolution lives in several tensors: a filter and a bias here, a scale and a shift in the
BatchNorm behind it, a slice of every layer that reads it, and, through a residual connection, a filter of
every other layer that is added to it (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """Where the channels of a group live in one dimension of one parameter or buffer.

    Attributes:
        parameter: The parameter's name in the model.
        dim: The dimension that shrinks.
        positions: Indices along that dimension, shape ``(k,)``.
        channels: The channel of the group that each position belongs to, shape ``(k,)``.
    """

    parameter: str
    dim: int
    positions: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that live in the same tensors: removing one removes its slice everywhere.

    One channel is the smallest unit that can be removed: a channel of a residual stream with all layers that write
    it, a whole group of a grouped convolution, an attention head.

    Attributes:
        root: Name of the module whose output channels number the group's.
        width: The number of channels.
        slices: The slices of parameters that are removed with the channels.
        is_filter: Whether the channels are filters of a convolution (and not neurons of a linear layer).
        parts: The channels by the layers that they live in. No layer is emptied as long as each part keeps some.
        buffers: The slices of buffers that are removed with the channels: running statistics.
    """

    root: str
    width: int
    slices: tuple[Slices, ...]
    is_filter: bool
    parts: tuple[Tensor, ...]
    buffers: tuple[Slices, ...] = ()


def sizes_along(groups: Sequence[Group], shapes: Mapping[str, torch.Size], order: Tensor) -> Tensor:
    """Parameters left after each removal of a sequence.

    Args:
        groups: The groups, whose channels are numbered one group after the other.
        shapes: Shape of every parameter of the model.
        order: Channel numbers in order of removal, shape ``(m,)``.

    Returns:
        Parameters in the whole model after 0, 1, …, m removals, shape ``(m + 1,)``. Exact: a weight that two
        groups touch (a filter of one, an input of the other) is counted once.
    """
    starts = first_channels(groups)
    entries: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(starts[-1], dtype=torch.long))
    for group, start in zip(groups, starts, strict=False):
        for s in group.slices:
            entries[s.parameter, s.dim] += torch.bincount(s.channels + start, minlength=starts[-1])
    total = torch.zeros(len(order) + 1, dtype=torch.long)
    for parameter, shape in shapes.items():
        left = torch.ones(1, dtype=torch.long)
        for dim, size in enumerate(shape):
            if (parameter, dim) in entries:
                gone = entries[parameter, dim][order].cumsum(0)
                left = left * torch.cat([torch.tensor([size]), size - gone])
            else:
                left = left * size
        total += left
    return total


def kept_entries(
    groups: Sequence[Group], removed: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """For each parameter that a group reaches: True where the entry stays (the parameter's shape)."""
    names = {s.parameter for group in groups for s in group.slices}
    kept = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in sorted(names)}
    for s, gone in positions_of(groups, removed):
        if s.parameter in kept:
            kept[s.parameter].index_fill_(s.dim, gone.to(kept[s.parameter].device), False)
    return kept


def zeroed(
    groups: Sequence[Group], removed: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of weights with zeros in the slices of the channels ``removed``, by the root of their group."""
    values = {name: w.clone() for name, w in weights.items()}
    for s, gone in positions_of(groups, removed):
        if s.parameter in values:
            values[s.parameter].index_fill_(s.dim, gone.to(values[s.parameter].device), 0)
    return values


def positions_of(
    groups: Sequence[Group], channels: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Slices, Tensor]]:
    """The slices of parameters and buffers that some channels live in, each with the positions of these channels.

    Args:
        groups: The groups.
        channels: The channels, by the root of their group.
    """
    for group in groups:
        is_chosen = torch.zeros(group.width, dtype=torch.bool)
        is_chosen[list(channels.get(group.root, ()))] = True
        if is_chosen.any():
            yield from ((s, s.positions[is_chosen[s.channels]]) for s in (*group.slices, *group.buffers))


def first_channels(groups: Sequence[Group]) -> list[int]:
    """The index of each group's first channel among the channels of all groups; at the end their number."""
    return list(accumulate((group.width for group in groups), initial=0))
