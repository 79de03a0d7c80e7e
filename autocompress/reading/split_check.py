"""Requirements on train, val and test: batches that models can be trained on and compared by, labels that fit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from autocompress.splits import Batch, LoaderSplit, Split, TensorSplit, held_labels, labels_of

MAX_CLASSES_NAMED = 5  # in a note on classes without samples


def check_batches(splits: Mapping[str, Split]) -> dict[str, Batch]:
    """Checks the first batch of each split, and that val and test serve the same samples at every pass.

    Args:
        splits: Train, val and test by these names.

    Returns:
        The first batches, by the same names.

    Raises:
        ValueError: If something does not fit; the message names the split and says what to do.
    """
    first = {"val": _first_batch("val", splits["val"])}  # read once: a loader starts its workers for each pass
    expected = tuple(first["val"][0].shape[1:])
    for name, split in splits.items():
        first[name] = x, y = first.get(name) or _first_batch(name, split)
        if x.dtype != torch.float32:
            tokens = "" if x.is_floating_point() else "; of tokens, the model's forward makes x.long() again"
            raise ValueError(
                f"{name}= serves inputs of type {x.dtype}; convert them to float32 (x.float()){tokens}"
            )
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"{name}= serves inputs of shape {tuple(x.shape[1:])}, val= of shape {expected}")
        _check_values(name, split, x, y)
        if name != "train" and isinstance(split, LoaderSplit):
            _check_order(name, split, (x, y))
    return first


def _first_batch(name: str, split: Split) -> Batch:
    """The first batch of the split ``name``; ValueError if there is none or it is not a pair of tensors."""
    batch: Any = next(iter(split.loader if isinstance(split, LoaderSplit) else split.batches()), None)
    if batch is None:
        raise ValueError(
            f"{name}= serves no batch; it needs samples, and with drop_last=True a whole batch of them"
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        found = f"{len(batch)} values" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        raise ValueError(
            f"{name}= serves {found} a batch; it must be a pair of tensors (x, y): a collate_fn can "
            "make one, and weights of samples go into a WeightedRandomSampler of train="
        )
    return batch[0], batch[1]


def _check_order(name: str, split: LoaderSplit, first: Batch) -> None:
    """Checks that a loader, whose first batch was ``first``, serves all samples in the same order again."""
    if isinstance(split.loader.sampler, RandomSampler):
        raise ValueError(f"{name}= is shuffled; make its DataLoader with shuffle=False")
    if split.loader.drop_last:
        raise ValueError(f"{name}= leaves out its last samples; make its DataLoader with drop_last=False")
    if not _is_same(first, _first_batch(name, split)):
        raise ValueError(
            f"{name}= serves other samples at every pass, and models could not be compared; make its "
            "DataLoader with shuffle=False and no random sampler, and augment train= alone"
        )


def _is_same(first: Batch, second: Batch) -> bool:
    return all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )


def _check_values(name: str, split: Split, x: Tensor, y: Tensor) -> None:
    """Checks that inputs are finite, and that targets are class numbers or zeros and ones."""
    inputs = split.x if isinstance(split, TensorSplit) else x
    if not inputs.isfinite().all():
        where = (~inputs.isfinite()).flatten(1).any(1).nonzero()
        raise ValueError(
            f"{name}= has inputs that are NaN or infinite, in {len(where)} samples of {len(inputs)}, the first is "
            f"number {int(where[0])}; repair them or leave them out"
        )
    labels = y.ndim == 2 and y.is_floating_point()
    if not labels and (y.ndim != 1 or y.dtype not in (torch.long, torch.uint8)):
        raise ValueError(
            f"{name}= serves targets of shape {tuple(y.shape)} and type {y.dtype}; they must be class numbers, of "
            "shape (n,) and type torch.long, or zeros and ones for several labels, of shape (n, labels) and type "
            "torch.float32"
        )
    if labels and not ((y == 0) | (y == 1)).all():
        raise ValueError(f"{name}= serves labels other than 0 and 1; a sample has a label or has it not")


def check_labels(splits: Mapping[str, Split], classes: Sequence[str], n_logits: int) -> None:
    """Checks that the model has a logit for every class, and that train has every class that val or test have.

    Args:
        splits: Train, val and test by these names.
        classes: The names of the classes or labels; none if they have no names.
        n_logits: How many logits the model gives for a sample.

    Raises:
        ValueError: If not, or if a split has samples of a single class alone.
    """
    target_dims = set()
    for name, split in splits.items():
        y = labels_of(split)
        target_dims.add(y.ndim)
        if y.ndim == 2 and y.shape[1] != n_logits:
            raise ValueError(f"{name}= has {y.shape[1]} labels a sample and the model gives {n_logits} logits")
        if y.ndim == 1 and not 0 <= int(y.min()) <= int(y.max()) < n_logits:
            wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
            raise ValueError(
                f"{name}= has a sample of class {wrong}, and the model gives {n_logits} logits: classes 0 to "
                f"{n_logits - 1}"
            )
    if len(target_dims) > 1:
        raise ValueError("train=, val= and test= must all have class numbers (n,), or all labels (n, labels)")
    if classes and len(classes) != n_logits:
        raise ValueError(f"there are {len(classes)} names of classes and the model gives {n_logits} logits")
    _check_presence(splits, classes)


def _check_presence(splits: Mapping[str, Split], classes: Sequence[str]) -> None:
    """Checks that train has every class that val or test have, and that no split has a single class."""
    present = _classes_present(splits)
    unseen = set().union(*present.values()) - present["train"] if "train" in present else set()
    if unseen:
        raise ValueError(
            f"train= has no sample of class {_class_label(min(unseen), classes)}, which is judged: the network "
            "would forget it; add samples, or leave the class out"
        )
    for name, found in present.items():
        if labels_of(splits[name]).ndim == 1 and len(found) < 2:
            raise ValueError(f"{name}= has samples of class {min(found)} alone; there must be two to tell apart")


def absences(splits: Mapping[str, Split], classes: Sequence[str]) -> Iterator[str]:
    """Notes on classes that have no samples in val or in test; see `check_labels`."""
    present = _classes_present(splits)
    everywhere = set().union(*present.values())
    for name, effect in (("val", "the search sees nothing"), ("test", "the verdict says nothing")):
        if absent := everywhere - present.get(name, everywhere):
            first = ", ".join(_class_label(k, classes) for k in sorted(absent)[:MAX_CLASSES_NAMED])
            more = f" and {len(absent) - MAX_CLASSES_NAMED} more" if len(absent) > MAX_CLASSES_NAMED else ""
            yield f"{name} has no sample of class {first}{more}: {effect} of what is lost there"


def _classes_present(splits: Mapping[str, Split]) -> dict[str, set[int]]:
    """The classes that have samples, by the name of the split; splits that hold no labels are left out."""
    held = {name: y for name, split in splits.items() if (y := held_labels(split)) is not None}
    return {
        name: set((y.sum(dim=0) > 0).nonzero().flatten().tolist() if y.ndim == 2 else torch.unique(y).tolist())
        for name, y in held.items()
    }


def _class_label(k: int, classes: Sequence[str]) -> str:
    """The number of class ``k``, with its name if it has one."""
    return f"{k} ({classes[k]})" if 0 <= k < len(classes) and classes[k] != str(k) else str(k)
