"""From the ties that a trace collected to groups of channels, and to what must stay and why."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .coupling import Classes
from .slices import Group, Slices
from .trace import OUTPUT, Trace

INEXACT = "the forward pass counts on their number"
UNUSED = "the forward pass does not use them"
INDIVISIBLE = "they go together or not at all"


@dataclass(frozen=True)
class Place:
    """One dimension of a parameter or buffer.

    Attributes:
        tensor: The tensor's name in the model.
        dim: The dimension.
        classes: What each position is tied to, as a number, shape ``(size,)``.
        is_buffer: Whether the tensor is a buffer.
        is_output: Whether the positions are what a layer puts out.
        is_filter: Whether that layer is a convolution.
    """

    tensor: str
    dim: int
    classes: NDArray[np.int64]
    is_buffer: bool
    is_output: bool
    is_filter: bool

    @property
    def layer(self) -> str:
        """The module that the tensor is the weight of, or the tensor itself."""
        return self.tensor.removesuffix("weight").rstrip(".") or "the model itself"


@dataclass(frozen=True)
class Findings:
    """What can be removed from a model, and what cannot.

    Attributes:
        places: All dimensions, in the order in which the forward pass uses them.
        pinned: Why a class must stay, for each class that must.
        groups: Classes that live in the same places, in the order of their roots.
        root_of: The group that a class belongs to, by its root.
        unused: Layers that no forward pass reached.
    """

    places: list[Place]
    pinned: Mapping[int, str]
    groups: list[Group]
    root_of: Mapping[int, str]
    unused: list[str]

    @classmethod
    def of(cls, trace: Trace, model: nn.Module) -> "Findings":
        """Solves the ties of a trace and sorts the classes by where they live."""
        classes = trace.couplings.classes()
        parameters = dict(model.named_parameters())
        places = _places(trace, classes, parameters)
        signatures = {s: members for s, members in _signatures(places, classes.pinned).items() if len(members) > 1}
        roots = {signature: _root(signature, places) for signature in signatures}
        ordered = sorted(signatures, key=lambda signature: (roots[signature], signature))
        names = _distinct(places[roots[signature]].layer for signature in ordered)
        root_of, channel_of = {}, {}
        for name, signature in zip(names, ordered, strict=True):
            first = {int(c): i for i, c in reversed(list(enumerate(places[roots[signature]].classes)))}
            for channel, c in enumerate(sorted(signatures[signature], key=first.__getitem__)):
                root_of[c], channel_of[c] = name, channel
        groups = _groups(names, places, root_of, channel_of)
        unused = [name for name, p in parameters.items() if name not in trace.positions and p.dim() > 1]
        return cls(places, classes.pinned, groups, root_of, [name.removesuffix(".weight") for name in unused])

    def left_whole(self, wrong: Collection[str]) -> dict[str, list[str]]:
        """Layers that keep some channels whatever is asked, by the reason; those of the output go without saying.

        Args:
            wrong: Roots of groups that turned out not to be exact.
        """
        layers: dict[str, list[str]] = defaultdict(list)
        for place in self.places:
            if not place.is_output:
                continue
            reasons = Counter(filter(None, (self._reason(c, wrong) for c in place.classes.tolist())))
            n_whole = sum(reasons.values())
            if n_whole and (why := reasons.most_common(1)[0][0]) != OUTPUT:
                some = f" ({n_whole} of {len(place.classes)})" if n_whole < len(place.classes) else ""
                layers[why].append(place.layer + some)
        return {**layers, **({UNUSED: self.unused} if self.unused else {})}

    def _reason(self, c: int, wrong: Collection[str]) -> str | None:
        """Why a class stays; None if it can go."""
        if c in self.pinned:
            return self.pinned[c]
        if c not in self.root_of:
            return INDIVISIBLE
        return INEXACT if self.root_of[c] in wrong else None


def _places(trace: Trace, classes: Classes, parameters: Mapping[str, Tensor]) -> list[Place]:
    outputs, filters = _marked(trace.outputs), _marked(trace.filters)
    return [
        Place(
            name,
            dim,
            classes.of[labels.numpy()],
            name not in parameters,
            int(labels[0]) in outputs,
            int(labels[0]) in filters,
        )
        for name, dims in trace.positions.items()
        for dim, labels in enumerate(dims)
        if labels is not None
    ]


def _marked(vectors: Iterable[Tensor]) -> set[int]:
    return {int(labels[0]) for labels in vectors}


def _signatures(places: list[Place], pinned: Mapping[int, str]) -> dict[tuple[int, ...], list[int]]:
    """The classes that may go, by the numbers of the places that they live in."""
    places_of: dict[int, list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        for c in np.unique(place.classes).tolist():
            places_of[c].append(number)
    signatures: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for c, numbers in places_of.items():
        if c not in pinned:
            signatures[tuple(numbers)].append(c)
    return signatures


def _root(signature: tuple[int, ...], places: list[Place]) -> int:
    """The first place where a layer puts the channels out; the first of all where none does."""
    return next((number for number in signature if places[number].is_output), signature[0])


def _distinct(names: Iterable[str]) -> list[str]:
    """The names; where one comes again it gets a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct


def _groups(
    names: list[str], places: list[Place], root_of: Mapping[int, str], channel_of: Mapping[int, int]
) -> list[Group]:
    slices: dict[str, list[Slices]] = defaultdict(list)
    buffers: dict[str, list[Slices]] = defaultdict(list)
    widths = Counter(root_of.values())
    filters = set()
    for place in places:
        members: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for position, c in enumerate(place.classes.tolist()):
            if c in root_of:
                members[root_of[c]].append((position, channel_of[c]))
        for name, pairs in members.items():
            positions, channels = torch.tensor(pairs).T.contiguous()
            (buffers if place.is_buffer else slices)[name].append(
                Slices(place.tensor, place.dim, positions, channels)
            )
            filters |= {name} if place.is_filter else set()
    return [
        Group(
            name, widths[name], tuple(slices[name]), name in filters, (torch.arange(widths[name]),), tuple(buffers[name])
        )
        for name in names
    ]
