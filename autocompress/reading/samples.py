"""Labelled images as readers return them, and their division into train, val and test."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from torch import Tensor

from autocompress.reading.transforms import Size
from autocompress.splits import Hashes

PARTS = ("train", "val", "test")
HELD_BYTES = 2_000_000_000  # decoded images are held in memory up to this size
FOLDS = 20  # folds into which groups are dealt; parts are made of whole folds


@dataclass(frozen=True)
class Samples:
    """Labelled images of one part, or of all parts.

    Attributes:
        y: Class numbers ``(n,)``, or zeros and ones ``(n, labels)``, floating.
        pixels: The images as stored, ``(n, channels, height, width)``; None where they stay in files.
        files: One file per sample; empty where they are not from files.
        groups: The group of each sample, such as its patient, which must not be in two parts; empty for none.
        hashes: Of decoded images that are not held, see `autocompress.splits.row_hashes`; else None.
    """

    y: Tensor
    pixels: Tensor | None = None
    files: tuple[Path, ...] = ()
    groups: tuple[str, ...] = ()
    hashes: Hashes | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, chosen: Sequence[int]) -> "Samples":
        """The samples of these indices."""
        index = torch.as_tensor(list(chosen), dtype=torch.long)
        pixels = None if self.pixels is None else self.pixels[index]
        files = tuple(self.files[i] for i in chosen) if self.files else ()
        groups = tuple(self.groups[i] for i in chosen) if self.groups else ()
        hashes = None if self.hashes is None else self.hashes[index.numpy()]
        return Samples(self.y[index], pixels, files, groups, hashes)


@dataclass(frozen=True)
class Found:
    """The data that a reader found.

    Attributes:
        name: The name of the data, for the task.
        parts: The samples of ``train``, and of ``val`` and ``test`` where they are given.
        classes: The names of the classes, in order.
        channels: Channels of the images.
        size: Height and width of the images.
        scale: The factor that brings pixels to 0…1.
        notes: What was left out or divided, in sentences.
    """

    name: str
    parts: Mapping[str, Samples]
    classes: tuple[str, ...]
    channels: int
    size: Size
    scale: float = 1 / 255
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How data is read.

    Attributes:
        size: Height and width to bring images to; None for their own.
        shares: The shares of train, val and test, where the data is not divided already.
        group: A regular expression whose match in a file's path (its first group, if it has one) names the
            sample's group, which must not be in two parts; or the column of a table that does.
        strict: Whether an image that cannot be read is an error.
        labels: The columns of a table that hold labels; empty for all columns without another meaning.
        seed: Seeds the division.
        held_bytes: Decoded images are held in memory up to this size.
        progress: Is called with a description of each step that takes time.
    """

    size: Size | None = None
    shares: tuple[float, float, float] = (0.7, 0.15, 0.15)
    group: str = ""
    strict: bool = False
    labels: tuple[str, ...] = ()
    seed: int = 0
    held_bytes: int = HELD_BYTES
    progress: Callable[[str], None] = field(default=lambda what: None, compare=False)

    def __post_init__(self) -> None:
        if not all(share > 0 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"the shares {self.shares} of train, val and test must be positive and sum to 1")
        try:
            re.compile(self.group)
        except re.error as error:
            raise ValueError(f"the group {self.group!r} is not a regular expression: {error}") from None


def divide(found: Found, reading: Reading) -> Found:
    """The data with train, val and test: missing parts are taken from train, stratified by class.

    Raises:
        ValueError: If there are too few samples, or too few groups, to divide, or a group is in two parts.
    """
    parts = dict(found.parts)
    missing = [part for part in ("val", "test") if part not in parts]
    if not missing:
        if reading.shares != Reading.shares:
            raise ValueError("--split is of no use here: the data says itself what is train, val and test")
        _refuse_shared_groups(parts)
        return found
    share = dict(zip(PARTS, reading.shares, strict=True))
    whole, needed = parts["train"], 1 + len(missing)
    for k, n in enumerate(torch.bincount(whole.y).tolist() if whole.y.ndim == 1 else []):
        if 0 < n < needed:
            many = f"the class {found.classes[k]!r} has {n} samples; at least {needed}"
            raise ValueError(f"{many} are needed to divide them into {', '.join(('train', *missing))}")
    total = share["train"] + sum(share[part] for part in missing)
    for part in missing:
        fraction = share[part] / total
        rest, taken = _split_off(parts["train"], fraction, reading)
        parts["train"], parts[part] = parts["train"].take(rest), parts["train"].take(taken)
        total -= share[part]
    sizes = ", ".join(f"{part} {len(parts[part]):,}" for part in PARTS)
    by = " by group" if whole.groups else ""
    note = f"the data does not say what is {' and '.join(missing)}: divided{by} with seed {reading.seed}: {sizes}"
    _refuse_shared_groups(parts)  # a part that was given may share groups with the new ones
    return replace(found, parts={part: parts[part] for part in PARTS}, notes=(*found.notes, note))


def _refuse_shared_groups(parts: Mapping[str, Samples]) -> None:
    groups = {part: set(parts[part].groups) for part in PARTS}
    for one, other in combinations(PARTS, 2):
        if shared := groups[one] & groups[other]:
            raise ValueError(
                f"{len(shared)} of the {len(groups[one])} groups in {one} are in {other} as well, such as "
                f"{min(shared)!r}; divide the data anew so that none is, or leave --group out"
            )


def _split_off(samples: Samples, fraction: float, reading: Reading) -> tuple[list[int], list[int]]:
    """The indices of the samples that stay, and of those that are split off, about ``fraction`` of them."""
    y = samples.y.numpy()
    strata = y if y.ndim == 1 else np.zeros(len(y), dtype=int)
    counts = np.bincount(strata)
    n_groups = len(set(samples.groups))
    if samples.groups:
        if n_groups < 3:
            raise ValueError(f"there are {n_groups} groups; at least 3 are needed to divide them")
        n_folds = max(2, min(FOLDS, n_groups, int(counts.max())))
        folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=reading.seed)
        taken: list[int] = []
        with warnings.catch_warnings():
            # It warns of classes with fewer samples than folds; parts that lack a class are noted later.
            warnings.simplefilter("ignore")
            for _, fold in folds.split(y, strata, samples.groups):
                if not taken or len(taken) + len(fold) / 2 <= fraction * len(y):
                    taken += fold.tolist()
        stay = sorted(set(range(len(y))) - set(taken))
        return stay, sorted(taken)
    try:
        stay, chosen = train_test_split(
            range(len(y)), test_size=fraction, stratify=strata if y.ndim == 1 else None, random_state=reading.seed
        )
    except ValueError:
        classes = f" of {len(np.unique(y))} classes" if y.ndim == 1 else ""
        raise ValueError(
            f"{len(y)} samples{classes} are too few to take {fraction:.0%} away with some of each; add samples, "
            "or take larger shares with --split"
        ) from None
    return sorted(stay), sorted(chosen)


def with_classes_checked(found: Found) -> Found:
    """Returns the data if it has at least two classes, and samples of each in train.

    A class that val or test lack is no error; `autocompress.task.Task` notes it.

    Raises:
        ValueError: If there is one class, a part is empty, or train lacks a class.
    """
    if len(found.classes) < 2 and found.parts["train"].y.ndim == 1:
        raise ValueError(f"{found.name} holds one class; there must be two to tell apart, numbered from 0")
    for part, samples in found.parts.items():
        if len(samples) == 0:
            raise ValueError(f"{part} has no samples")
    y, n = found.parts["train"].y, len(found.classes)
    present = y.sum(dim=0) > 0 if y.ndim == 2 else torch.bincount(y, minlength=n) > 0
    for k in (~present).nonzero().flatten().tolist():
        called = "" if found.classes[k] == str(k) else f" ({found.classes[k]})"
        raise ValueError(
            f"train has no sample of class {k}{called}: the network could not learn it; add samples, leave the "
            "class out, or divide otherwise"
        )
    return found
