"""A task from options: the data is read, the model made to fit it and, where no weights are given, trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from autocompress.arguments import function, path, several, takes
from autocompress.data import digits
from autocompress.metrics import Metric, as_metric
from autocompress.networks.dense import ClassLoss, DenseTraining, balancing_weights, train_dense
from autocompress.networks.own_model import Made, call_factory, load_factory, make_model, parse_arguments
from autocompress.reading.images import FileImages, HeldImages, Sampling
from autocompress.reading.readers import read
from autocompress.reading.samples import PARTS, Found, Reading, Samples
from autocompress.reading.transforms import IMAGENET, Preprocessing, parse_augmentations
from autocompress.splits import Data, Split, TensorSplit, as_split, held_labels, labels_of
from autocompress.task import Task, classification_loss, predict
from autocompress.task_options import TaskOptions
from autocompress.verdict.constraint import Constraint
from autocompress.verdict.limit import REQUIREMENT, parse_constraints

TRAIN_EPOCHS = 30
BATCH_SIZE = 64
FLOATS_BYTES = 1_000_000_000  # inputs that nothing augments are held ready for the model up to this

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
    """The task that options describe, its dense model trained or taken from the cache.

    Example:
        ``ac.make_task(data="pneumoniamnist.npz", model="resnet18", metric="auc", out="autocompress-runs")``

    Args:
        options: What is compressed and how it is judged; or give its fields by name.
        out: The folder for all studies, in which dense models are cached; None to train at every call.
        device: Where the dense model is trained.
        constraints: To be checked before anything is trained.
        progress: Is told what takes time.
        **fields: Of `TaskOptions`.

    Raises:
        ValueError: If the model or the data cannot be used; the message says why, in one line.
    """
    options = replace(options or TaskOptions(), **fields)
    cache = Path(out) / "cache" if out is not None else None
    if options.data in (None, "digits") and replace(options, data=None, metric="accuracy").is_default:
        task = digits(cache=cache)
        task.classes = tuple(str(k) for k in range(10))
        return _as_asked(task, options, constraints)
    made = _of_factory(options) if _is_factory(options.data) else _of_images(options, progress)
    if isinstance(made, Task):
        return _as_asked(made, options, constraints)
    task = _assembled(made, options, constraints)
    epochs = options.train_epochs
    if epochs is None:
        epochs = 0 if made.model.is_trained else TRAIN_EPOCHS
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


def _assembled(made: "_Parts", options: TaskOptions, constraints: Sequence[str]) -> Task:
    """The task with the model as it was made, checked."""
    y, preprocessing = _all_labels(made.parts["train"]), made.preprocessing
    task = Task(
        made.model.model,
        *(made.parts[part] for part in PARTS),
        loss=_loss(options, y, len(made.classes)),
        metric=as_metric(options.metric, made.classes),
        name=made.name,
        architecture=made.model.architecture,
        classes=made.classes,
        preprocessing=preprocessing.words if preprocessing else "",
        input=preprocessing.to_json() if preprocessing else {},
        options=options.to_json(),
        notes=(*made.notes, *made.model.notes, *_meaning(options.metric, constraints, made.classes, y)),
    )
    task.check()
    _check_metrics(task, constraints)
    return task


def _all_labels(split: Split) -> Tensor:
    """The targets of all samples, read once where the split does not hold them."""
    y = held_labels(split)
    return y if y is not None else torch.cat([batch for _, batch in split.batches()])


@dataclass(frozen=True)
class _Parts:
    """The data and the model, before they are put together."""

    name: str
    parts: Mapping[str, Split]
    classes: tuple[str, ...]
    model: Made
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]


def _is_factory(data: str | None) -> bool:
    return bool(data and (data.endswith(".py") or data.rpartition(":")[0].endswith(".py")))


def _of_images(options: TaskOptions, progress: Progress) -> _Parts:
    """Images that a reader finds."""
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
    model = _model(options, len(found.classes), found.channels)
    train = found.parts["train"]
    preprocessing = Preprocessing(found.size, model.channels, found.scale, *_normalization(options, found, model))
    floats = train.pixels if train.pixels is not None and train.pixels.is_floating_point() else torch.zeros(1)
    if "jitter" in augmentations and not 0 <= float(floats.min()) <= float(floats.max()) <= 1:
        raise ValueError("jitter needs bytes or values from 0 to 1; the data has others: leave it out")
    batch = options.batch_size or BATCH_SIZE
    plain = Sampling(batch, workers=options.data_workers)
    training = replace(plain, augmentations=augmentations, weights=_sample_weights(options, train.y))
    parts = {
        part: _split(samples, preprocessing, training if part == "train" else plain)
        for part, samples in found.parts.items()
    }
    notes = found.notes
    if model.is_trained and options.normalize == "auto":
        notes += (
            "images are normalised by the data's own mean: if the weights learned otherwise, give --normalize",
        )
    return _Parts(found.name, parts, found.classes, model, preprocessing, notes)


def _split(samples: Samples, preprocessing: Preprocessing, sampling: Sampling) -> Split:
    """Ready for the model where there is room and nothing changes them; else as pixels, or as files."""
    if samples.pixels is None:
        return FileImages(samples.files, samples.y, preprocessing, sampling)
    height, width = preprocessing.size
    as_floats = 4 * len(samples) * preprocessing.channels * height * width
    if sampling.augmentations or sampling.weights is not None or as_floats > FLOATS_BYTES:
        return HeldImages(samples.pixels, samples.y, preprocessing, sampling)
    return TensorSplit(preprocessing(samples.pixels), samples.y, sampling.batch_size)


def _model(options: TaskOptions, classes: int, channels: int) -> Made:
    return make_model(
        options.model or "small_resnet",
        arguments=parse_arguments(options.model_args),
        weights=options.weights,
        classes=classes,
        data_channels=channels,
        channels=options.channels,
        seed=options.task_seed,
    )


def _normalization(options: TaskOptions, found: Found, model: Made) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, per channel."""
    kind = options.normalize
    if kind == "auto":
        kind = "imagenet" if any("torchvision's weights" in note for note in model.notes) else "data"
    if kind == "none":
        return (), ()
    if kind == "imagenet":
        if model.channels != 3:
            raise ValueError("--normalize imagenet is for 3 channels; give --channels 3, or --normalize data")
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


def _sample_weights(options: TaskOptions, y: Tensor) -> Tensor | None:
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


def _meaning(metric: str, constraints: Sequence[str], classes: Sequence[str], y: Tensor) -> tuple[str, ...]:
    """Which class counts as the positive one, where that matters."""
    asked = " ".join((metric, *constraints))
    if y.ndim == 2 or len(classes) != 2 or not any(word in asked for word in ("sensitivity", "specificity")):
        return ()
    if "[" in asked:
        return ()
    return (f"sensitivity is the share found of class {classes[1]!r}, specificity that of {classes[0]!r}",)


def _check_metrics(task: Task, constraints: Sequence[str]) -> None:
    """Tries the metric and the constraints, on random outputs, before hours are spent."""
    example = TensorSplit(task.example_input, torch.zeros(1, dtype=torch.long))
    required = parse_constraints(constraints, task.classes)
    for metric in (task.metric, *(one.metric for one in required if isinstance(one, Constraint))):
        _try_metric(metric, labels_of(task.val), predict(task.model, example)[0].shape[1])


def _try_metric(metric: Metric, y: Tensor, classes: int) -> None:
    outputs = np.random.default_rng(0).normal(size=(len(y), classes)).astype(np.float32)
    try:
        metric.score(y.numpy().astype(np.int64), outputs)
    except ValueError as error:
        raise ValueError(f"the metric {metric.name} cannot be scored on val: {error}") from error


# A factory's data


def _of_factory(options: TaskOptions) -> _Parts | Task:
    """What ``file.py:factory`` gives: a task, or train, val and test."""
    spec = options.data
    assert spec is not None
    given = call_factory(spec, load_factory(spec), parse_arguments(options.data_args))
    if isinstance(given, Task):
        _refuse_others(options, ("data", "data_args", "metric"), f"{spec!r} gives a task, which has its own")
        return given
    used = tuple(name for name in vars(options) if name not in _FOR_IMAGES)
    _refuse_others(options, used, f"{spec!r} prepares its own data")
    if options.balance == "sampler":
        raise ValueError(f"--balance sampler: {spec!r} makes its own batches; use --balance weights")
    if isinstance(given, Mapping) and set(PARTS) <= set(given):
        given = [given[part] for part in PARTS]
    if not isinstance(given, list | tuple) or len(given) != 3:
        raise ValueError(f"{spec!r} gives a {type(given).__name__}; it must give a Task, or (train, val, test)")
    batch = options.batch_size or BATCH_SIZE
    loaders = [_loader(data, part, batch, options.data_workers) for part, data in zip(PARTS, given, strict=True)]
    parts = {part: as_split(data, part) for part, data in zip(PARTS, loaders, strict=True)}
    x, _ = next(parts["train"].batches())
    classes = _classes(given[0], parts["train"])
    channels = x.shape[1] if x.ndim == 4 else 3
    name = Path(spec.rpartition(":")[0]).stem
    return _Parts(
        name, parts, classes, _model(replace(options, channels=channels), len(classes), channels), None, ()
    )


def _refuse_others(options: TaskOptions, used: Sequence[str], because: str) -> None:
    unused = [
        name for name, value in vars(TaskOptions()).items() if name not in used and getattr(options, name) != value
    ]
    if unused:
        raise ValueError(f"--{', --'.join(unused).replace('_', '-')} cannot be used, for {because}")


_OF_TRAINING = ("train_optimizer", "train_lr", "patience", "freeze")
_FOR_IMAGES = ("label", "group", "split", "image_size", "channels", "normalize", "augment", "strict")


def _loader(data: Any, part: str, batch_size: int, workers: int) -> Data:
    """Loaders, pairs and splits as they are; a data set in a DataLoader."""
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) != 2):
        dataset = cast(Dataset[Any], data)
        return DataLoader(dataset, batch_size, shuffle=part == "train", num_workers=workers, collate_fn=_collate)
    return cast(Data, data)


def _collate(samples: list[Any]) -> Any:
    return list(default_collate(samples))


def _classes(data: Any, split: Split) -> tuple[str, ...]:
    """The names of the classes, or their numbers."""
    if names := getattr(getattr(data, "dataset", data), "classes", None):
        return tuple(map(str, names))
    y = _all_labels(split)
    return tuple(str(k) for k in range(y.shape[1] if y.ndim == 2 else int(y.max()) + 1))


def _as_asked(task: Task, options: TaskOptions, constraints: Sequence[str]) -> Task:
    """A task that came whole, with the metric that was asked for."""
    if options.metric != "accuracy":
        task.metric = as_metric(options.metric, task.classes)
    task.options = options.to_json()
    task.check()
    _check_metrics(task, constraints)
    return task
