"""The options of a task: model, data and metric, for the command line and for `make_task`. Imports no torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from autocompress.arguments import Kind, check_fields, flag, number, optional, several, text, whole

_KINDS: Mapping[Any, Kind] = {  # by the annotation of a field
    str: text,
    str | None: optional(text),
    tuple[str, ...]: several(text),
    int: whole,
    int | None: optional(whole),
    float: number,
    float | None: optional(number),
    bool: flag,
}
MOVABLE = ("data", "weights", "data_workers")  # may differ when a study is resumed: its task is compared by hash


@dataclass(frozen=True)
class TaskOptions:
    """The model, the data and the metric of a task; the fields are the options of the command line.

    Attributes:
        model: ``small_resnet``, a classifier of torchvision, ``timm/NAME``, ``file.py:factory`` or
            ``package.module:factory``.
        model_args: Arguments of the model's factory, each as ``key=value``.
        weights: A ``.pt`` or ``.safetensors`` file, ``none``, or ``auto`` for torchvision's weights if they are on
            this machine.
        data: ``digits``, a ``.npz`` file, a folder of images, a ``.csv`` table, ``name:folder`` of torchvision, or
            ``file.py:factory``.
        data_args: Arguments of the data's factory, each as ``key=value``.
        label: Columns of a table that hold labels.
        group: How to find groups of images, such as those of a patient, that must not be divided between train,
            val and test: a regular expression on paths, or a column of a table.
        split: Shares of train, val and test, if the data set is not divided already.
        image_size: ``64`` or ``64x48`` (height x width).
        channels: 1 or 3.
        normalize: ``imagenet``, ``data``, ``none``; ``auto`` for imagenet with torchvision's weights, else data.
        augment: Names of augmentations, or of sets of them.
        balance: ``none``, class ``weights`` in the loss, or a ``sampler`` that draws rare classes more often.
        batch_size: Samples in a batch.
        data_workers: Number of processes that read images which are not held in memory.
        strict: Whether an image that cannot be read is an error; otherwise it is left out.
        label_smoothing: Share of the target that is spread over all classes.
        train_epochs: Epochs of the dense model's training; 0 for none; None for 30 if its weights are not trained.
        train_optimizer: ``adamw`` or ``sgd``.
        train_lr: Peak learning rate of the dense model's training.
        patience: Epochs without a better score on val after which that training ends.
        freeze: A share of the layers, or names of layers, that are not trained.
        metric: The score whose drop is bounded.
        task_seed: Seeds the split, new weights and the training.
    """

    model: str | None = None
    model_args: tuple[str, ...] = ()
    weights: str = "auto"
    data: str | None = None
    data_args: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    group: str = ""
    split: str = "70/15/15"
    image_size: str | None = None  # or an int, which becomes one
    channels: int | None = None
    normalize: str = "auto"
    augment: tuple[str, ...] = ()
    balance: str = "none"
    batch_size: int | None = None
    data_workers: int = 2
    strict: bool = False
    label_smoothing: float = 0.0
    train_epochs: int | None = None
    train_optimizer: str = "adamw"
    train_lr: float | None = None
    patience: int = 8
    freeze: tuple[str, ...] = ()
    metric: str = "accuracy"
    task_seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", str(self.image_size))
        check_fields(self, **{field.name: _KINDS[field.type] for field in fields(self)})
        for name in ("model", "data", "weights", "metric"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name} is empty; give a value, or leave it out")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"--image-size {self.image_size}: it must be at least 1")
        if len(self.shares) != 3 or min(self.shares) <= 0:
            raise ValueError(f"--split {self.split}: three positive shares, such as 70/15/15")

    @property
    def is_default(self) -> bool:
        """Whether all options are at their defaults: the digits and their small network."""
        return self == TaskOptions()

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None for the data's own."""
        if self.image_size is None:
            return None
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", self.image_size)
        if not match:
            raise ValueError(f"--image-size {self.image_size!r} is no size; write 64, or 64x48 for height x width")
        return int(match[1]), int(match[2] or match[1])

    @property
    def shares(self) -> tuple[float, ...]:
        """The fractions of train, val and test, which sum to 1; empty if `split` cannot be read."""
        try:
            shares = [float(share) for share in self.split.split("/")]
        except ValueError:
            shares = []
        total = sum(shares) if shares and all(0 < share < 1e6 for share in shares) else 0
        return tuple(share / total for share in shares) if total else ()

    def to_json(self) -> dict[str, Any]:
        """The fields for ``study.json``, with absolute paths, so that a study can be resumed from any folder."""
        stored = asdict(self)
        for name in ("data", "weights", "model", "metric"):
            stored[name] = _absolute(stored[name])
        return {} if self.is_default else {k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}


def _absolute(spec: str | None) -> str | None:
    """A path, or ``file.py:name``, of an existing file with its absolute path; anything else as it is."""
    if not spec:
        return spec
    path, colon, name = spec.rpartition(":")
    for file, rest in ((spec, ""), (path, colon + name)):
        if file and Path(file).expanduser().exists() and ("/" in file or "." in file):
            return str(Path(file).expanduser().resolve()) + rest
    return spec


F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--model",
        metavar="MODEL",
        help="small_resnet, a torchvision name (resnet18), timm/NAME, file.py:factory or package.module:factory.",
    ),
    click.option(
        "--model-args", multiple=True, metavar="KEY=VALUE", help="Argument of the model's factory; repeatable."
    ),
    click.option(
        "--weights",
        default="auto",
        show_default=True,
        metavar="FILE",
        help="Trained weights: .pt or .safetensors file; none; auto: torchvision's, if they are on this machine.",
    ),
    click.option(
        "--data",
        metavar="DATA",
        help="digits, .npz file as MedMNIST's, a folder of images, labels.csv, cifar10:FOLDER, file.py:factory.",
    ),
    click.option(
        "--data-args", multiple=True, metavar="KEY=VALUE", help="Argument of the data's factory; repeatable."
    ),
    click.option(
        "--label", multiple=True, metavar="COLUMN", help="Column of labels in the .csv file; repeatable."
    ),
    click.option(
        "--group",
        default="",
        metavar="REGEX",
        help="Regular expression: images whose paths have the same match, as a patient's, stay in the same part.",
    ),
    click.option(
        "--split",
        default="70/15/15",
        show_default=True,
        help="Shares of train/val/test, if the data are not divided.",
    ),
    click.option("--image-size", metavar="N|HxW", help="Resize images to this size in pixels."),
    click.option(
        "--channels",
        type=click.Choice(["1", "3"]),
        callback=lambda ctx, param, value: None if value is None else int(value),
        help="Channels of the images: grey or RGB.  [default: as the data, or as the weights need]",
    ),
    click.option(
        "--normalize",
        type=click.Choice(["auto", "imagenet", "data", "none"]),
        default="auto",
        show_default=True,
        help="Mean and standard deviation; auto: imagenet with torchvision's weights, data otherwise.",
    ),
    click.option(
        "--augment",
        multiple=True,
        metavar="NAME",
        help="Augmentation: skin, xray, cells, natural, rotation, flip, vertical-flip, crop, jitter; repeatable.",
    ),
    click.option(
        "--balance",
        type=click.Choice(["none", "weights", "sampler"]),
        default="none",
        show_default=True,
        help="Make rare classes count as much as others, by weights in the loss or by drawing them more often.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), help="Samples in a batch.  [default: 64]"),
    click.option(
        "--data-workers",
        type=click.IntRange(min=0),
        default=2,
        show_default=True,
        help="Processes that read images from files if they do not fit in memory.",
    ),
    click.option(
        "--strict", is_flag=True, help="Fail on an image that cannot be read, instead of leaving it out."
    ),
    click.option(
        "--label-smoothing",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        show_default=True,
        help="Share of the target that is spread over all classes.",
    ),
    click.option(
        "--train-epochs",
        type=click.IntRange(min=0),
        help="Most epochs of the dense model's training; 0 leaves the model as it is.  [default: 30, or 0 with "
        "trained weights]",
    ),
    click.option(
        "--train-optimizer",
        type=click.Choice(["adamw", "sgd"]),
        default="adamw",
        show_default=True,
        help="Optimizer of the dense model's training.",
    ),
    click.option(
        "--train-lr",
        type=click.FloatRange(min=0, min_open=True),
        help="Peak learning rate of the dense model's training.  [default: 0.001 with adamw, 0.05 with sgd]",
    ),
    click.option(
        "--patience",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Epochs without a better score on val after which the dense model's training ends.",
    ),
    click.option(
        "--freeze",
        multiple=True,
        metavar="SHARE|NAME",
        help="Layers that the dense model's training does not change; repeatable.",
    ),
    click.option(
        "--metric",
        default="accuracy",
        show_default=True,
        help="Metric: accuracy, balanced_accuracy, auc, average_precision, sensitivity, specificity, "
        "precision, f1, kappa, log_loss, recall[CLASS], specificity@sensitivity=0.95, or file.py:name.",
    ),
    click.option(
        "--task-seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed of the split and of the dense model's training.",
    ),
)
CONSTRAINT = click.option(
    "--constraint",
    "constraints",
    multiple=True,
    metavar="NAME>=VALUE",
    help="Further requirement, on a metric or a cost: sensitivity>=0.95, latency<=5ms, size<=1MB; repeatable.",
)


def add_options(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """Adds options to a command, in their order."""
    for option in reversed(options):
        command = option(command)
    return command


def task_options(command: F) -> F:
    """Adds the options of `TaskOptions` to a command."""
    return add_options(command, _OPTIONS)


def take_options(options: dict[str, Any]) -> TaskOptions:
    """Removes the options of the task from a command's options and returns them.

    Raises:
        ValueError: If one is not usable.
    """
    return TaskOptions(**{field.name: options.pop(field.name) for field in fields(TaskOptions)})


def found_again(spec: str, files: Mapping[str, str]) -> str:
    """A spec of a study with the file's absolute path, so that it is found from this folder.

    Args:
        spec: A spec in ``study.json``, such as ``path/to/file.py:name``; others are returned as they are.
        files: The absolute paths of the study's files, by the paths that are written in its specs.
    """
    path = next((path for path in files if spec.startswith(f"{path}:")), "")
    return files.get(path, "") + spec.removeprefix(path)


def restore(options: dict[str, Any], given: Sequence[str], asked: Mapping[str, Any]) -> None:
    """Fills in the options of a study that is resumed, except those given again on the command line.

    Args:
        options: The command's options by name; changed in place.
        given: Names of the options that were given.
        asked: The settings in ``study.json``, with those of its ``files`` that still exist.

    Raises:
        ValueError: If an option was given that differs from the study's and is not one of `MOVABLE`.
    """
    stored = TaskOptions(**asked.get("task_options", {}))
    for name, value in vars(stored).items():
        if name not in given:
            options[name] = value
        elif name not in MOVABLE and _absolute_if_text(options[name]) != _absolute_if_text(value):
            raise ValueError(
                f"the study {options['resume']!r} was made with --{name.replace('_', '-')} {value!r}, not "
                f"{options[name]!r}; resume it as it was or begin a new one"
            )
    if "constraints" not in given:
        files = asked.get("files", {})
        options["constraints"] = tuple(found_again(spec, files) for spec in asked.get("constraints", ()))


def _absolute_if_text(value: Any) -> Any:
    return _absolute(value) if isinstance(value, str) else value
