"""The result of a trace: groups of channels that can be removed, and the reasons why others must stay."""

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
        classes: The class of each position, see `autocompress.schemes.coupling.Classes`, shape ``(size,)``.
        is_buffer: Whether the tensor is a buffer.
        is_output: Whether the positions are the outputs of a layer.
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
        """The name of the module whose weight the tensor is, or of the tensor itself."""
        return "the model itself" if self.tensor == "weight" else self.tensor.removesuffix(".weight")


@dataclass(frozen=True)
class Findings:
    """What can be removed from a model, and what cannot.

    Attributes:
        places: All dimensions, in the order in which the forward pass uses them.
        pinned: For each class that must stay, why.
        groups: Classes that occur in the same places, in the order of their roots.
        group_of: The number of each class's group, -1 for none, shape ``(classes,)``.
        unused: Layers that no forward pass reached.
    """

    places: list[Place]
    pinned: Mapping[int, str]
    groups: list[Group]
    group_of: NDArray[np.int64]
    unused: list[str]

    @classmethod
    def of(cls, trace: Trace, model: nn.Module) -> "Findings":
        """Solves the ties of a trace and groups the classes by the places where they occur."""
        classes = trace.couplings.classes()
        parameters = dict(model.named_parameters())
        places = _places(trace, classes, parameters)
        signatures = _signatures(places, classes)
        roots = [_root(signature, places) for signature, _ in signatures]
        n_classes = classes.of.max(initial=-1) + 1
        group_of, channel_of = np.full(n_classes, -1), np.zeros(n_classes, int)
        names = []
        for number, i in enumerate(sorted(range(len(roots)), key=roots.__getitem__)):
            _, members = signatures[i]
            root = places[roots[i]]
            group_of[members] = number
            positions = np.flatnonzero(group_of[root.classes] == number)
            _, first = np.unique(root.classes[positions], return_index=True)  # a class may occur several times
            channel_of[root.classes[positions[np.sort(first)]]] = np.arange(len(members))
            names.append(root.layer)
        groups = _groups(_distinct(names), places, group_of, channel_of)
        unused = [name for name, p in parameters.items() if name not in trace.positions and p.dim() > 1]
        return cls(places, classes.pinned, groups, group_of, [name.removesuffix(".weight") for name in unused])

    def left_whole(self, wrong: Collection[str]) -> dict[str, list[str]]:
        """Layers some of whose channels cannot be removed, by the reason; those of the network's output aside.

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
        """Why a class must stay; None if it can be removed."""
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
    """The first label of each vector of labels, by which its place is recognized."""
    return {int(labels[0]) for labels in vectors}


def _signatures(places: Sequence[Place], classes: Classes) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Groups the classes that are not pinned by the places where they occur.

    Returns:
        For each group of at least two classes the numbers of the places, and the classes.
    """
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
    """The number of the first place that holds outputs of a layer, or of the first place if none does."""
    return next((number for number in signature.tolist() if places[number].is_output), int(signature[0]))


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, with a number behind each repetition."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct


def _groups(
    names: Sequence[str], places: Sequence[Place], group_of: NDArray[np.int64], channel_of: NDArray[np.int64]
) -> list[Group]:
    """The groups.

    Args:
        names: The name of each group's root.
        places: All places.
        group_of: The number of each class's group, -1 for none.
        channel_of: The channel that each class is in its group.
    """
    slices: list[list[Slices]] = [[] for _ in names]
    buffers: list[list[Slices]] = [[] for _ in names]
    filters, widths = set(), [0] * len(names)
    for place in places:
        groups = group_of[place.classes]
        order = np.argsort(groups, kind="stable")
        found, starts = np.unique(groups[order], return_index=True)
        for number, positions in zip(found.tolist(), np.split(order, starts[1:]), strict=False):
            if number < 0:
                continue
            channels = channel_of[place.classes[positions]]
            widths[number] = int(channels.max()) + 1
            members = Slices(place.tensor, place.dim, torch.from_numpy(positions), torch.from_numpy(channels))
            (buffers if place.is_buffer else slices)[number].append(members)
            filters |= {number} if place.is_filter else set()
    return [
        Group(name, widths[i], tuple(slices[i]), i in filters, (torch.arange(widths[i]),), tuple(buffers[i]))
        for i, name in enumerate(names)
    ]
