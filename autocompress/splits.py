"""Splits: the parts of the data, served in batches, from tensors or from a loader."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

Hashes: TypeAlias = NDArray[np.uint64]  # of samples, shape ``(n,)``
Batch: TypeAlias = tuple[Tensor, Tensor]


class Split(Protocol):
    """One part of the data, served in batches of ``(x, y)``: x of shape ``(n, ...)``, y of shape ``(n,)``.

    In multi-label tasks y has shape ``(n, labels)`` and holds zeros and ones as floating-point numbers.
    """

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Serves one pass; with a generator in an order drawn from it, without the incomplete last batch."""


@dataclass(frozen=True)
class TensorSplit:
    """Data held as two tensors: ``x`` of shape ``(n, ...)``, ``y`` of shape ``(n,)`` or ``(n, labels)``.

    ``hashes`` are those of the samples before they were preprocessed, see `row_hashes`, if they were.
    """

    x: Tensor
    y: Tensor
    batch_size: int = 64
    hashes: Hashes | None = None

    def __post_init__(self) -> None:
        if self.y.ndim == 2 and self.y.shape[1] == 1 and not self.y.is_floating_point():  # as MedMNIST has them
            object.__setattr__(self, "y", self.y.squeeze(1))
        if not self.y.is_floating_point():  # cross-entropy takes class numbers of no other type
            object.__setattr__(self, "y", self.y.long())
        if len(self.x) != len(self.y):
            raise ValueError(f"x holds {len(self.x)} samples and y {len(self.y)}; they must be as many")
        if len(self.x) == 0:
            raise ValueError("there are no samples; train, val and test need some each")

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""
        return len(self.x)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Serves one pass, see `Split.batches`."""
        n, size = self.n_samples, min(self.batch_size, self.n_samples)
        if generator is None:
            for start in range(0, n, size):
                yield self.x[start : start + size], self.y[start : start + size]
            return
        order = torch.randperm(n, generator=generator)
        for start in range(0, n - size + 1, size):
            chosen = order[start : start + size]
            yield self.x[chosen], self.y[chosen]


def kept_on(split: Split, device: torch.device) -> Split:
    """The split with its samples on a CUDA device, if it holds tensors and they fit a quarter of the free memory.

    A split may have a method ``kept_on(device, limit_bytes)`` of its own, as images do. All other splits, such as
    DataLoaders, are returned unchanged.
    """
    if device.type != "cuda":
        return split
    free_bytes, _ = torch.cuda.mem_get_info(device)
    own: Callable[[torch.device, int], Split] | None = getattr(split, "kept_on", None)
    if own is not None:
        return own(device, free_bytes // 4)
    if not isinstance(split, TensorSplit) or split.x.nbytes > free_bytes // 4:
        return split
    return TensorSplit(split.x.to(device), split.y.to(device), split.batch_size)


@dataclass(frozen=True)
class LoaderSplit:
    """Data served by a DataLoader of ``(x, y)`` batches, shuffled or not as the loader was made."""

    loader: DataLoader[Batch]

    @cached_property
    def n_samples(self) -> int:
        """How many samples a pass serves; the sampler may draw fewer or more than the data set holds."""
        is_batched = self.loader.batch_sampler is None  # each item of the data set is a batch already
        try:
            n_drawn = len(self.loader.sampler)  # type: ignore[arg-type]  # not all have a length
        except TypeError:
            n_drawn = len(self.loader.dataset)  # type: ignore[arg-type]  # map-style data sets have a length
        return n_drawn * self.batch_size if is_batched else n_drawn

    @cached_property
    def batch_size(self) -> int:
        """Samples in a full batch; in the first one if neither the loader nor its sampler states a size."""
        sampler = self.loader.batch_sampler
        stated = self.loader.batch_size or getattr(sampler, "batch_size", None)
        if stated is None and sampler is not None:
            stated = len(next(iter(sampler)))
        return stated or len(next(iter(self.loader))[0])

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Serves one pass, see `Split.batches`. A generator seeds torch's global one and those of the loader."""
        if generator is not None:
            seed = int(torch.randint(2**31, (1,), generator=generator))
            torch.manual_seed(seed)
            for owner in (self.loader, self.loader.sampler):  # a user's generator has a state from earlier trials
                if isinstance(own := getattr(owner, "generator", None), torch.Generator):
                    own.manual_seed(seed)
        smallest = min(self.batch_size, self.n_samples) if generator is not None else 1
        yield from (batch for batch in cast(Iterable[Batch], self.loader) if len(batch[0]) >= smallest)


@dataclass(frozen=True)
class HalfBatches:
    """A split with each of its batches cut in two, for a device without the memory for a whole one."""

    split: Split

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""
        return self.split.n_samples

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return (min(self.split.batch_size, self.n_samples) + 1) // 2

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Serves one pass, see `Split.batches`."""
        for x, y in self.split.batches(generator):
            yield from zip(*(torch.split(tensor, self.batch_size) for tensor in (x, y)), strict=True)


Data: TypeAlias = Split | DataLoader[Batch] | tuple[Tensor, Tensor]


def as_split(data: Data, name: str) -> Split:
    """Any accepted form of data as a `Split`.

    Raises:
        ValueError: If ``data`` is of another form or empty; the message names the part by ``name``.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor | np.ndarray) for t in data):
        for array in data:
            if isinstance(array, np.ndarray) and array.dtype.kind not in "biuf":
                raise ValueError(
                    f"{name}= has an array of type {array.dtype}; inputs and targets are numbers, classes from 0"
                )
        try:
            return TensorSplit(torch.as_tensor(data[0]), torch.as_tensor(data[1]))
        except ValueError as error:
            raise ValueError(f"{name}=: {error}") from None
    if isinstance(data, DataLoader):
        if not hasattr(data.dataset, "__len__"):
            raise ValueError(
                f"{name}= is a DataLoader of a data set without a length; give it one, or a map-style one"
            )
        return LoaderSplit(data)
    if hasattr(data, "batches") and hasattr(data, "n_samples"):
        return cast(Split, data)
    found = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else type(data).__name__
    raise ValueError(
        f"{name}= must be a DataLoader, or a pair (x, y) of tensors or numpy arrays, not a {found}; "
        "a data set goes into a DataLoader"
    )


def held_labels(split: Split) -> Tensor | None:
    """All targets of a split that holds them in memory; None for others, which would have to read all samples."""
    y = getattr(split, "y", None)
    return y if isinstance(y, Tensor) else None


def labels_of(split: Split) -> Tensor:
    """All targets of a split that holds them in memory; for others those of the first batch."""
    y = held_labels(split)
    return y if y is not None else next(split.batches())[1]


def fingerprint(split: Split) -> bytes:
    """A hash of a split's samples; for a DataLoader, which would have to read them all, of their number."""
    if isinstance(split, TensorSplit):
        return hashlib.sha256(as_bytes(split.x) + as_bytes(split.y)).digest()
    own = getattr(split, "fingerprint", None)
    return own() if callable(own) else hashlib.sha256(str(split.n_samples).encode()).digest()


def row_hashes(x: Tensor) -> Hashes:
    """A hash of 64 bits of each sample ``x[i]``; equal samples of one type and shape have the same."""
    rows = x.detach().cpu().contiguous()[:, None].flatten(1).view(torch.uint8).numpy()
    hashes = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(hashes, dtype=np.uint64)


def _hashes_of(split: Split) -> Hashes:
    """The hashes of the distinct samples of a split; none of one that would have to read its samples."""
    own: Hashes | None = getattr(split, "hashes", None)
    if own is None and isinstance(split, TensorSplit):
        own = row_hashes(split.x)
    return np.unique(own) if own is not None else np.empty(0, dtype=np.uint64)


def overlaps(train: Split, val: Split, test: Split) -> Iterator[str]:
    """A sentence each if val samples are in train as well, and if test samples are in train or val.

    Splits without hashes, such as DataLoaders, are left out.
    """
    hashes = {"train": _hashes_of(train), "val": _hashes_of(val), "test": _hashes_of(test)}
    for name, others, effect in (
        ("val", ("train",), "the search is not on data held out from training"),
        ("test", ("train", "val"), "the verdict is not on data held out"),
    ):
        common = {other: len(np.intersect1d(hashes[name], hashes[other], assume_unique=True)) for other in others}
        if found := [f"{n:,} {'is' if n == 1 else 'are'} in {other}" for other, n in common.items() if n]:
            yield f"of {len(hashes[name]):,} different {name} samples {' and '.join(found)} as well: {effect}"


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
