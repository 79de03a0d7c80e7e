"""Makes a task from options: reads the data, builds a model that fits it and trains it if it has no weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autocompress.arguments import function, path, several, takes
from autocompress.data import digits
from autocompress.metrics import as_metric, try_metric
from autocompress.networks.dense import ClassLoss, DenseTraining, balancing_weights, train_dense
from autocompress.networks.own_model import (
    Made,
    call_factory,
    find_model,
    load_factory,
    make_model,
    parse_arguments,
)
from autocompress.reading.images import FileImages, HeldImages, Sampling
from autocompress.reading.readers import read
from autocompress.reading.samples import PARTS, Found, Reading, Samples
from autocompress.reading.transforms import IMAGENET, Preprocessing, parse_augmentations
from autocompress.splits import Data, Split, TensorSplit, as_split, held_labels, row_hashes
from autocompress.task import Task, classification_loss, predict
from autocompress.task_options import TaskOptions
from autocompress.verdict.constraint import Constraint
from autocompress.verdict.limit import REQUIREMENT, parse_constraints

DEFAULT_MODEL = "small_resnet"
TRAIN_EPOCHS = 30
BATCH_SIZE = 64
FLOATS_BYTES = 1_000_000_000  # up to this size, inputs without augmentation are held preprocessed, in float32

Progress = Callable[[str], None]


@takes(out=path, constraints=several(REQUIREMENT), progress=function)
def make_task(
    options: TaskOptions | None = None,
    *,
    out: str | Path | None = None,
    device: str = "cpu",
    constraints: str | Sequence[str] = (),
    progress: Progress = lambda what: None,
    **fields: Any,
) -> Task:
    """Makes the task that options describe; its dense model is trained, or loaded from the cache.

    Example:
        ``ac.make_task(data="pneumoniamnist.npz", model="resnet18", metric="auc", out="autocompress-runs")``

    Args:
        options: The model, the data and the metric; or give the fields of `TaskOptions` by name.
        out: The folder of all studies, which has the cache of dense models; None to train at every call.
        device: The device on which the dense model is trained.
        constraints: Constraints of the study, which are tried on the data before anything is trained.
        progress: Called with a line of text before each step that takes time.
        **fields: Fields of `TaskOptions`, which replace those of ``options``.

    Raises:
        ValueError: If the model or the data cannot be used; the message says why, in one line.
    """
    options = replace(options or TaskOptions(), **fields)
    cache = Path(out) / "cache" if out is not None else None
    if options.data in (None, "digits") and replace(options, data=None, metric="accuracy").is_default:
        task = digits(cache=cache)
        task.classes = tuple(str(k) for k in range(10))
        return _with_options(task, options, constraints)
    found = find_model(
        options.model or DEFAULT_MODEL,
        arguments=parse_arguments(options.model_args),
        weights=options.weights,
        seed=options.task_seed,
    )
    parts = _from_factory(options, found) if _is_factory(options.data) else _from_images(options, found, progress)
    if isinstance(parts, Task):
        return _with_options(parts, options, constraints)
    task = _assemble(parts, options, constraints)
    epochs = options.train_epochs
    if epochs is None:
        epochs = 0 if parts.model.is_trained else TRAIN_EPOCHS
    if epochs:
        training = DenseTraining(
            epochs=epochs,
            optimizer=cast(Any, options.train_optimizer),
            lr=options.train_lr,
            patience=options.patience,
            freeze=options.freeze,
            seed=options.task_seed,
        )
        train_dense(task, training, device, cache, progress)
    else:
        _refuse_others(
            options,
            [name for name in vars(options) if name not in _OF_TRAINING],
            "the model is taken as it is; --train-epochs trains it",
        )
    task.model.eval()
    return task


def _assemble(parts: "_Parts", options: TaskOptions, constraints: Sequence[str]) -> Task:
    """The checked task of a model, not trained yet, and its data."""
    y, preprocessing = _all_labels(parts.splits["train"]), parts.preprocessing
    note = _positive_class_note(options.metric, constraints, parts.classes, y)
    task = Task(
        parts.model.model,
        *(parts.splits[part] for part in PARTS),
        loss=_loss(options, y, len(parts.classes)),
        metric=as_metric(options.metric, parts.classes),
        name=parts.name,
        architecture=parts.model.architecture,
        classes=parts.classes,
        preprocessing=preprocessing.words if preprocessing else "",
        input=preprocessing.to_json() if preprocessing else {},
        options=options.to_json(),
        notes=(*parts.notes, *parts.model.notes, *note),
    )
    task.check()
    _check_metrics(task, constraints)
    return task


def _all_labels(split: Split) -> Tensor:
    """The targets of all samples; reads all of them if the split does not hold its labels in memory."""
    y = held_labels(split)
    return y if y is not None else torch.cat([batch for _, batch in split.batches()])


@dataclass(frozen=True)
class _Parts:
    """The model and the data of a task; ``splits`` are named as in `PARTS`."""

    name: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    model: Made
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]


def _is_factory(data: str | None) -> bool:
    return bool(data and (data.endswith(".py") or data.rpartition(":")[0].endswith(".py")))


def _from_images(options: TaskOptions, factory: Any, progress: Progress) -> _Parts:
    """Reads images and builds a model that fits them, by a factory if that is not None."""
    if options.data_args:
        raise ValueError(f"--data-args go to a factory, and {options.data or 'digits'!r} is none; leave them out")
    augmentations = parse_augmentations(options.augment)
    reading = Reading(
        size=options.size,
        shares=cast(tuple[float, float, float], options.shares),
        group=options.group,
        strict=options.strict,
        labels=options.label,
        seed=options.task_seed,
        progress=progress,
    )
    found = read(options.data or "digits", reading)
    model = _model(options, factory, len(found.classes), found.channels)
    train = found.parts["train"]
    preprocessing = Preprocessing(found.size, model.channels, found.scale, *_normalization(options, found, model))
    floats = train.pixels if train.pixels is not None and train.pixels.is_floating_point() else torch.zeros(1)
    if "jitter" in augmentations and not 0 <= float(floats.min()) <= float(floats.max()) <= 1:
        raise ValueError("jitter needs bytes or values from 0 to 1; the data has others: leave it out")
    batch = options.batch_size or BATCH_SIZE
    plain = Sampling(batch, workers=options.data_workers)
    training = replace(plain, augmentations=augmentations, weights=_sample_weights(options, train.y))
    splits = {
        part: _split(samples, preprocessing, training if part == "train" else plain)
        for part, samples in found.parts.items()
    }
    notes = found.notes
    if model.is_trained and options.normalize == "auto":
        notes += (
            "images are normalised by the data's own mean: if the weights learned otherwise, give --normalize",
        )
    return _Parts(found.name, splits, found.classes, model, preprocessing, notes)


def _split(samples: Samples, preprocessing: Preprocessing, sampling: Sampling) -> Split:
    """Samples as a split: preprocessed in memory if they fit and are not augmented; else as pixels or files."""
    if samples.pixels is None:
        return FileImages(samples.files, samples.y, preprocessing, sampling, hashes=samples.hashes)
    height, width = preprocessing.size
    floats_bytes = 4 * len(samples) * preprocessing.channels * height * width
    if sampling.augmentations or sampling.weights is not None or floats_bytes > FLOATS_BYTES:
        return HeldImages(samples.pixels, samples.y, preprocessing, sampling)
    hashes = row_hashes(samples.pixels)  # as `HeldImages` has them: parts may be held in different forms
    return TensorSplit(preprocessing(samples.pixels), samples.y, sampling.batch_size, hashes)


def _model(options: TaskOptions, factory: Any, classes: int, channels: int) -> Made:
    return make_model(
        options.model or DEFAULT_MODEL,
        arguments=parse_arguments(options.model_args),
        weights=options.weights,
        classes=classes,
        data_channels=channels,
        channels=options.channels,
        seed=options.task_seed,
        factory=factory,
    )


def _normalization(options: TaskOptions, found: Found, model: Made) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which inputs are normalized, per channel; empty without normalization."""
    kind = options.normalize
    if kind == "auto":
        kind = "imagenet" if any("torchvision's weights" in note for note in model.notes) else "data"
    if kind == "none":
        return (), ()
    if kind == "imagenet":
        if model.channels != 3:
            raise ValueError("--normalize imagenet is for 3 channels; give --channels 3, or --normalize data")
        low, high = _ends(found)
        if low < 0 or high > 1 + 1e-6:  # 65535 / 65535 is rounded
            raise ValueError(
                f"--normalize imagenet is for images of 0 to 1, and these go from {low:g} to {high:g}; save them "
                "as uint8, as uint16 or as floats of 0 to 1, or give --normalize data"
            )
        return IMAGENET
    split = _split(found.parts["train"], Preprocessing(found.size, model.channels, found.scale), Sampling(256))
    count, total, squares = 0, torch.zeros(model.channels).double(), torch.zeros(model.channels).double()
    for x, _ in split.batches():
        values = x.double()
        count += values.numel() // model.channels
        total += values.sum(dim=(0, 2, 3))
        squares += (values**2).sum(dim=(0, 2, 3))
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())


def _ends(found: Found) -> tuple[float, float]:
    """The least and the largest pixel of all images, as they are scaled; of files 0 and 1."""
    held = [samples.pixels for samples in found.parts.values() if samples.pixels is not None]
    ends = [float(end) * found.scale for pixels in held for end in pixels.aminmax()]
    return min(ends, default=0.0), max(ends, default=1.0)


def _sample_weights(options: TaskOptions, y: Tensor) -> Tensor | None:
    """With ``--balance sampler``, weights of shape ``(n,)`` by which training samples are drawn; else None."""
    if options.balance != "sampler":
        return None
    if y.ndim == 2:
        raise ValueError("--balance sampler is for one class a sample; with several labels use --balance weights")
    return (1 / torch.bincount(y).clamp_min(1).double())[y]


def _loss(options: TaskOptions, y: Tensor, classes: int) -> Any:
    weights = balancing_weights(y, classes) if options.balance == "weights" else ()
    if not weights and not options.label_smoothing:
        return classification_loss
    return ClassLoss(weights, options.label_smoothing)


def _positive_class_note(
    metric: str, constraints: Sequence[str], classes: Sequence[str], y: Tensor
) -> tuple[str, ...]:
    """A note on which of two classes is the positive one, if the metric or a constraint depends on it."""
    scores = " ".join((metric, *constraints))
    is_named = "[" in scores  # as in recall[CLASS]
    if y.ndim == 2 or len(classes) != 2 or is_named or not re.search("sensitivity|specificity", scores):
        return ()
    return (f"sensitivity is the share found of class {classes[1]!r}, specificity that of {classes[0]!r}",)


def _check_metrics(task: Task, constraints: Sequence[str]) -> None:
    """Scores random outputs with the metric and those of the constraints, to fail before hours are spent."""
    example = TensorSplit(task.example_input, torch.zeros(1, dtype=torch.long))
    required = parse_constraints(constraints, task.classes)
    n_logits = predict(task.model, example)[0].shape[1]
    for metric in (task.metric, *(limit.metric for limit in required if isinstance(limit, Constraint))):
        for name, split in (("val", task.val), ("test", task.test)):
            if (y := held_labels(split)) is not None:
                try_metric(metric, name, y.numpy().astype(np.int64), n_logits)


def _from_factory(options: TaskOptions, factory: Any) -> _Parts | Task:
    """Calls ``file.py:factory``, which returns a task, or train, val and test; ``factory`` makes the model."""
    spec = options.data
    assert spec is not None
    result = call_factory(spec, load_factory(spec), parse_arguments(options.data_args))
    if isinstance(result, Task):
        _refuse_others(options, ("data", "data_args", "metric"), f"{spec!r} gives a task, which has its own")
        return result
    used = tuple(name for name in vars(options) if name not in _FOR_IMAGES)
    _refuse_others(options, used, f"{spec!r} prepares its own data")
    if options.balance == "sampler":
        raise ValueError(f"--balance sampler: {spec!r} makes its own batches; use --balance weights")
    if isinstance(result, Mapping) and set(PARTS) <= set(result):
        result = [result[part] for part in PARTS]
    if not isinstance(result, list | tuple) or len(result) != 3:
        raise ValueError(f"{spec!r} gives a {type(result).__name__}; it must give a Task, or (train, val, test)")
    batch = options.batch_size or BATCH_SIZE
    splits = {
        part: as_split(_loader(data, part, batch, options.data_workers), part)
        for part, data in zip(PARTS, result, strict=True)
    }
    x, _ = next(splits["train"].batches())
    classes = _classes(result[0], splits["train"])
    channels = x.shape[1] if x.ndim == 4 else 3
    model = _model(replace(options, channels=channels), factory, len(classes), channels)
    return _Parts(Path(spec.rpartition(":")[0]).stem, splits, classes, model, None, ())


def _refuse_others(options: TaskOptions, used: Sequence[str], because: str) -> None:
    """Raises ValueError, with the reason ``because``, if options other than ``used`` are not at their defaults."""
    unused = [
        name for name, value in vars(TaskOptions()).items() if name not in used and getattr(options, name) != value
    ]
    if unused:
        raise ValueError(f"--{', --'.join(unused).replace('_', '-')} cannot be used, for {because}")


_OF_TRAINING = ("train_optimizer", "train_lr", "patience", "freeze")
_FOR_IMAGES = ("label", "group", "split", "image_size", "channels", "normalize", "augment", "strict")


def _loader(data: Any, part: str, batch_size: int, workers: int) -> Data:
    """A DataLoader of a data set; other forms of data, such as loaders and pairs of tensors, as they are."""
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) != 2):
        dataset = cast(Dataset[Any], data)
        return DataLoader(dataset, batch_size, shuffle=part == "train", num_workers=workers)
    return cast(Data, data)


def _classes(data: Any, split: Split) -> tuple[str, ...]:
    """The names of the classes as the data set has them, or else their numbers."""
    if names := getattr(getattr(data, "dataset", data), "classes", None):
        return tuple(map(str, names))
    y = _all_labels(split)
    return tuple(str(k) for k in range(y.shape[1] if y.ndim == 2 else int(y.max()) + 1))


def _with_options(task: Task, options: TaskOptions, constraints: Sequence[str]) -> Task:
    """A ready-made task with the metric of the options, checked."""
    if options.metric != "accuracy":
        task.metric = as_metric(options.metric, task.classes)
    task.options = options.to_json()
    task.check()
    _check_metrics(task, constraints)
    return task
