"""Labels for channels and the ties between them: the constraints that a trace collects, solved all at once.

Every position along every dimension of every parameter has a label. Where the network forces two positions to
come and go together (the outputs of two layers that are added), their labels are tied; where a position must
stay (a class of the output), its label is pinned. The connected components are what can be removed.

A `Field` says which label each element of a tensor carries: it has the tensor's number of dimensions, and size 1
along those that it does not vary over. An element is gone when the label of any of its tensor's fields is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Field: TypeAlias = Tensor
Fields: TypeAlias = tuple[Field, ...]


@dataclass(frozen=True)
class Classes:
    """The classes of labels that come and go together: the connected components of the ties.

    Attributes:
        of: The class of each label, shape ``(labels,)``.
        pinned: For each class that must stay, why.
    """

    of: NDArray[np.int64]
    pinned: dict[int, str]


class Couplings:
    """Collects labels, ties and pins."""

    def __init__(self) -> None:
        self._n = 0
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._pins: list[tuple[Tensor, str]] = []

    def fresh(self, n: int) -> Tensor:
        """Labels that nothing is tied to yet, shape ``(n,)``."""
        self._n += n
        return torch.arange(self._n - n, self._n)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Ties labels at the same place, after broadcasting: they come and go together."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._ties.append((a.reshape(-1), b.reshape(-1)))

    def pin(self, labels: Tensor, why: str) -> None:
        """Pins labels: they stay, for the reason ``why``."""
        self._pins.append((labels.reshape(-1), why))

    def tie_or_pin(self, a: Tensor | None, b: Tensor | None, why: str) -> None:
        """Ties two lists of labels; where one is None, its size is fixed, and the other list is pinned."""
        if a is not None and b is not None:
            self.tie(a, b)
        elif a is not None or b is not None:
            self.pin(a if a is not None else b, why)  # type: ignore[arg-type]  # one of them is there

    def merge(self, field: Field, dims: Iterable[int]) -> Field:
        """Ties all labels along ``dims``, which makes the field constant there: its elements go together."""
        for dim in dims:
            if field.size(dim) > 1:
                first = field.narrow(dim, 0, 1)
                self.tie(field, first)
                field = first
        return field

    def merge_all(self, fields: Fields, dims: Iterable[int], why: str) -> Fields:
        """Merges each field along ``dims``; pins and drops those that vary no more, as they are one piece."""
        dims = list(dims)
        merged = [(field, self.merge(field, dims)) for field in fields]
        for before, after in merged:
            if not varies(after):
                self.pin(before, why)
        return tuple(after for _, after in merged if varies(after))

    def combine(
        self, a: Fields, a_shape: tuple[int, ...], b: Fields, b_shape: tuple[int, ...], why: str
    ) -> Fields:
        """The fields of an elementwise function of two tensors that have as many dimensions.

        Fields that vary over the same dimension are tied. One that meets a fixed size there is merged along
        it; one that is broadcast against size 1 goes on as it is.
        """
        combined: list[Field] = []
        for field in a:
            partners = [other for other in b if varies(other) & varies(field)]
            for other in partners:
                self.tie(field, other)
                combined.append(_narrowed(field, set(range(field.dim())) - varies(other)))
            if not partners:
                combined += self.merge_all((field,), _full(b_shape, field), why)
        for other in b:
            if not any(varies(other) & varies(field) for field in a):
                combined += self.merge_all((other,), _full(a_shape, other), why)
        return self._distinct(combined)

    def _distinct(self, fields: Iterable[Field]) -> Fields:
        """The fields, those that vary over the same dimensions tied and merged into one."""
        kept: dict[frozenset[int], Field] = {}
        for field in fields:
            first = kept.setdefault(frozenset(varies(field)), field)
            if first is not field:
                self.tie(first, field)
        return tuple(kept.values())

    def classes(self) -> Classes:
        """Solves the ties: their connected components, and which of these must stay."""
        ends = [np.concatenate([t[i].numpy() for t in self._ties] or [np.zeros(0, np.int64)]) for i in (0, 1)]
        graph = coo_array((np.ones(len(ends[0]), dtype=bool), (ends[0], ends[1])), shape=(self._n, self._n))
        _, of = connected_components(graph, directed=False)
        pinned: dict[int, str] = {}
        for labels, why in self._pins:
            for c in np.unique(of[labels.numpy()]).tolist():
                pinned.setdefault(c, why)
        return Classes(of.astype(np.int64), pinned)


def varies(field: Field) -> set[int]:
    """The dimensions that a field varies over."""
    return {dim for dim, size in enumerate(field.shape) if size > 1}


def reduced(field: Field) -> Field:
    """The same field with size 1 along the dimensions over which it is constant."""
    for dim in range(field.dim()):
        if field.stride(dim) == 0 and field.size(dim) > 1:
            field = field.narrow(dim, 0, 1)
    for dim in varies(field):
        if bool((field == field.narrow(dim, 0, 1)).all()):
            field = field.narrow(dim, 0, 1)
    return field


def along(fields: Fields, dim: int) -> Tensor | None:
    """The labels of the field that varies over ``dim`` alone, as a vector; None if there is no such field."""
    return next((field.reshape(-1) for field in fields if varies(field) == {dim}), None)


def _narrowed(field: Field, dims: Iterable[int]) -> Field:
    for dim in dims:
        field = field.narrow(dim, 0, 1)
    return field


def _full(shape: tuple[int, ...], field: Field) -> list[int]:
    """The dimensions over which ``field`` varies and along which ``shape`` is not broadcast."""
    return [dim for dim in varies(field) if shape[dim] > 1]
