"""The spread of a density over the layers of a network.

Every spread is an order in which entries (or channels) are removed. ``global`` and ``lamp`` go by a threshold on
their scores. The others go by a level t that falls until the density is met: a layer of relative density a keeps
the share min(1, a·t) of its entries, the best of them, and the others are removed.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .criteria import lamp
from .patterns import PerModule

SpreadName: TypeAlias = Literal["global", "uniform", "erk", "lamp"]
Spread: TypeAlias = SpreadName | Mapping[str, float]


def checked_spread(spread: Spread) -> SpreadName | PerModule[float]:
    """The spread, checked; a mapping is returned as a hashable one.

    Raises:
        ValueError: If it is not a spread.
    """
    if isinstance(spread, Mapping):
        named = all(isinstance(pattern, str) for pattern in spread)
        if spread and named and all(isinstance(a, int | float) and 0 < a < math.inf for a in spread.values()):
            return PerModule(spread)
    elif spread in get_args(SpreadName):
        return spread
    raise ValueError(
        f"spread={spread!r}; it must be {', '.join(get_args(SpreadName))}, or a mapping from patterns to positive "
        "relative densities such as {'layer1.*': 1.0, 'layer4.*': 0.3}"
    )


def as_lamp(criterion: str, spread: Spread) -> tuple[str, Spread]:
    """Replaces the criterion ``lamp`` by ``l2``, which ranks alike within a layer, and a ``lamp`` spread."""
    if criterion != "lamp":
        return criterion, spread
    return "l2", "lamp" if spread == "global" else spread


def relative_density(
    spread: Spread, shapes: Iterable[torch.Size], named: Mapping[str, float], modules: Iterable[str]
) -> float:
    """The relative density a of a layer.

    Args:
        spread: The spread.
        shapes: The shapes of the layer's weights.
        named: The relative densities that the spread gives by module.
        modules: The names of the modules that the weights belong to.
    """
    if spread == "erk":
        return erdos_renyi_kernel(shapes)
    return max((named[module] for module in modules if module in named), default=1.0)


def erdos_renyi_kernel(shapes: Iterable[torch.Size]) -> float:
    """The relative density of a layer with weights of these shapes: the sum of their sizes over their entries.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners" (ICML 2020), section 3: the smaller a layer,
    the denser it stays.
    """
    shapes = list(shapes)
    return sum(map(sum, shapes)) / sum(shape.numel() for shape in shapes)


def allocate(total: int, sizes: Sequence[int], relative: Sequence[float], floors: Sequence[int]) -> list[int]:
    """The number of entries that each layer keeps, ``total`` in all.

    Args:
        total: From the sum of the floors to the sum of the sizes.
        sizes: Entries of each layer.
        relative: Their relative densities a: a layer keeps the share min(1, a·t) of its entries.
        floors: The number of entries that each layer keeps at least.
    """

    def kept_at(t: float) -> list[int]:
        shares = zip(sizes, relative, floors, strict=True)
        return [max(floor, min(size, int(size * a * t))) for size, a, floor in shares]

    low, high = 0.0, 1 / min(relative)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(kept_at(middle)) > total else (middle, high)
    kept = kept_at(low)
    # The entries lost to rounding down go to the layers that reach their next entry at the lowest level t.
    reached = [((kept[i] + 1) / sizes[i] / relative[i], i) for i in range(len(sizes)) if kept[i] < sizes[i]]
    heapq.heapify(reached)
    for _ in range(total - sum(kept)):
        _, i = heapq.heappop(reached)
        kept[i] += 1
        if kept[i] < sizes[i]:
            heapq.heappush(reached, ((kept[i] + 1) / sizes[i] / relative[i], i))
    return kept


@dataclass(frozen=True)
class Layer:
    """The channels of a layer, which are removed in the order of their scores, the lowest first.

    Attributes:
        channels: Their numbers among all the channels of the network, shape ``(n,)``.
        floor: The number of channels that stay at least, below n.
        step: The number of channels that are removed at a time, so that a multiple of it stays.
        relative: The layer's relative density, for the spreads that use it.
        fine: The width at and below which channels are removed one by one.
    """

    channels: Tensor
    floor: int
    step: int
    relative: float
    fine: int = 0


@dataclass(frozen=True)
class Order:
    """The order in which channels are removed.

    Attributes:
        channels: Their numbers, shape ``(m,)``.
        ends: The number of channels that are removed after 0, 1, 2, … steps, shape ``(steps + 1,)``.
        n_dead: The number of steps, the first ones, that remove nothing but dead channels.
    """

    channels: Tensor
    ends: Tensor
    n_dead: int


def removal_order(scores: Tensor, dead: Tensor, layers: Sequence[Layer], spread: Spread) -> Order:
    """The order in which channels are removed, dead ones first, so that pruning again changes nothing.

    Channels of a layer that are removed in one step are compared with others by the mean of their keys.

    Args:
        scores: The importance of every channel, not negative, shape ``(channels,)``.
        dead: True where a channel is zero already, shape ``(channels,)``.
        layers: The layers; a channel is in one of them at most.
        spread: How channels of different layers compare.
    """
    removable, sizes, keys, is_dead = [], [], [], []
    for layer in layers:
        n_removable = len(layer.channels) - layer.floor
        ranked = scores[layer.channels].masked_fill(dead[layer.channels], -1).sort(stable=True)
        removable.append(layer.channels[ranked.indices[:n_removable]])
        widths = torch.arange(len(layer.channels) - 1, layer.floor - 1, -1)
        ends = len(layer.channels) - widths[(widths % layer.step == 0) | (widths <= layer.fine)]
        key = _keys(ranked.values.clamp_min(0).double(), spread, layer.relative)[:n_removable]
        step_sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long))
        step_of_key = torch.arange(len(ends)).repeat_interleave(step_sizes)
        means = torch.zeros(len(ends), dtype=key.dtype).index_add_(0, step_of_key, key) / step_sizes
        sizes.append(step_sizes)
        keys.append(means.cummax(0).values)  # rising, although means of equal keys may differ in the last bit
        is_dead.append(ranked.values[ends - 1] < 0)
    dead_steps = torch.cat(is_dead)
    steps = torch.cat(keys).masked_fill(dead_steps, -torch.inf).argsort(stable=True)
    size = torch.cat(sizes)
    step_of_channel = torch.arange(len(size)).repeat_interleave(size)
    place = torch.empty_like(steps).scatter_(0, steps, torch.arange(len(steps)))  # of each step in the order
    order = torch.cat(removable)[place[step_of_channel].argsort(stable=True)]
    ends = torch.cat([torch.zeros(1, dtype=torch.long), size[steps].cumsum(0)])
    return Order(order, ends, int(dead_steps.sum()))


def _keys(ranked: Tensor, spread: Spread, relative: float) -> Tensor:
    """The keys by which channels of different layers compare, rising; the smallest is removed first.

    Args:
        ranked: The scores of a layer's channels in rising order, shape ``(n,)``.
        spread: The spread.
        relative: The layer's relative density.
    """
    if spread == "global":
        return ranked
    if spread == "lamp":
        return lamp(ranked)
    n = len(ranked)
    return -(n - torch.arange(n, dtype=torch.double)) / n / relative
