"""From the ties that a trace collected to groups of channels, and to what must stay and why."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
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
        return "the model itself" if self.tensor == "weight" else self.tensor.removesuffix(".weight")


@dataclass(frozen=True)
class Findings:
    """What can be removed from a model, and what cannot.

    Attributes:
        places: All dimensions, in the order in which the forward pass uses them.
        pinned: Why a class must stay, for each class that must.
        groups: Classes that live in the same places, in the order of their roots.
        group_of: The number of the group that a class belongs to, -1 for none, shape ``(classes,)``.
        unused: Layers that no forward pass reached.
    """

    places: list[Place]
    pinned: Mapping[int, str]
    groups: list[Group]
    group_of: NDArray[np.int64]
    unused: list[str]

    @classmethod
    def of(cls, trace: Trace, model: nn.Module) -> "Findings":
        """Solves the ties of a trace and sorts the classes by where they live."""
        classes = trace.couplings.classes()
        parameters = dict(model.named_parameters())
        places = _places(trace, classes, parameters)
        signatures = _signatures(places, classes)
        roots = [_root(signature, places) for signature, _ in signatures]
        group_of, channel_of = (
            np.full(classes.of.max(initial=-1) + 1, -1),
            np.zeros(classes.of.max(initial=-1) + 1, int),
        )
        names = []
        for number, i in enumerate(sorted(range(len(roots)), key=roots.__getitem__)):
            _, members = signatures[i]
            root = places[roots[i]]
            group_of[members] = number
            at = np.flatnonzero(group_of[root.classes] == number)
            _, first = np.unique(root.classes[at], return_index=True)  # a class may be met several times
            channel_of[root.classes[at[np.sort(first)]]] = np.arange(len(members))
            names.append(root.layer)
        groups = _groups(_distinct(names), places, group_of, channel_of)
        unused = [name for name, p in parameters.items() if name not in trace.positions and p.dim() > 1]
        return cls(places, classes.pinned, groups, group_of, [name.removesuffix(".weight") for name in unused])

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
        if self.group_of[c] < 0:
            return INDIVISIBLE
        return INEXACT if wrong and self.groups[self.group_of[c]].root in wrong else None


def _places(trace: Trace, classes: Classes, parameters: Collection[str]) -> list[Place]:
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


def _signatures(places: Sequence[Place], classes: Classes) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Classes that may go and live in the same places: the places' numbers, and the classes, two at least."""
    met = [np.unique(place.classes) for place in places]
    member = np.concatenate([*met, np.zeros(0, np.int64)])
    number = np.repeat(np.arange(len(places)), [len(m) for m in met])
    order = np.argsort(member, kind="stable")
    found, starts = np.unique(member[order], return_index=True)
    alike: dict[bytes, list[int]] = defaultdict(list)
    for c, numbers in zip(found.tolist(), np.split(number[order], starts[1:]), strict=False):
        if c not in classes.pinned:
            alike[numbers.tobytes()].append(c)
    return [
        (np.frombuffer(numbers, dtype=number.dtype), np.array(members))
        for numbers, members in alike.items()
        if len(members) > 1
    ]


def _root(signature: NDArray[np.int64], places: Sequence[Place]) -> int:
    """The first place where a layer puts the channels out; the first of all where none does."""
    return next((number for number in signature.tolist() if places[number].is_output), int(signature[0]))


def _distinct(names: Iterable[str]) -> list[str]:
    """The names; where one comes again it gets a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct


def _groups(
    names: Sequence[str], places: Sequence[Place], group_of: NDArray[np.int64], channel_of: NDArray[np.int64]
) -> list[Group]:
    """The groups, by the group and the channel in it of each class."""
    slices: list[list[Slices]] = [[] for _ in names]
    buffers: list[list[Slices]] = [[] for _ in names]
    filters, widths = set(), [0] * len(names)
    for place in places:
        groups = group_of[place.classes]
        order = np.argsort(groups, kind="stable")
        found, starts = np.unique(groups[order], return_index=True)
        for number, at in zip(found.tolist(), np.split(order, starts[1:]), strict=False):
            if number < 0:
                continue
            channels = channel_of[place.classes[at]]
            widths[number] = int(channels.max()) + 1
            members = Slices(place.tensor, place.dim, torch.from_numpy(at), torch.from_numpy(channels))
            (buffers if place.is_buffer else slices)[number].append(members)
            filters |= {number} if place.is_filter else set()
    return [
        Group(name, widths[i], tuple(slices[i]), i in filters, (torch.arange(widths[i]),), tuple(buffers[i]))
        for i, name in enumerate(names)
    ]
