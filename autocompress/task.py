"""Task: a trained model, its data, its loss and its metric."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from autocompress import progress
from autocompress.arguments import function, instance, listing, takes, text
from autocompress.metrics import MetricLike, accuracy, as_metric
from autocompress.networks.model_check import check_model
from autocompress.plugins import name_of
from autocompress.reading.split_check import absences, check_batches, check_labels
from autocompress.splits import (
    Data,
    HalfBatches,
    LoaderSplit,
    Split,
    as_bytes,
    as_split,
    fingerprint,
    kept_on,
    overlaps,
)
from autocompress.verdict.scores import Outputs, Targets

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """A model's outputs on a split, and the metric's score of them.

    Attributes:
        score: The metric, e.g. 0.971.
        outputs: Logits of shape ``(n, classes)``.
        targets: Classes of shape ``(n,)``, or zeros and ones of shape ``(n, labels)``.
    """

    score: float
    outputs: Outputs
    targets: Targets


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of class numbers ``(n,)``; binary cross-entropy of each label of ``(n, labels)``."""
    if targets.ndim == 2:
        return nn.functional.binary_cross_entropy_with_logits(logits, targets)
    return nn.functional.cross_entropy(logits, targets)


class Task:
    """A trained model, its data, its loss and its metric.

    Train must have samples of every class that val and test have. A class without samples in val or test is
    reported in `notes`: a loss of accuracy on it goes unseen. So are samples that two of the three have in common.
    DataLoaders are exempt from all this, as they would have to be read as a whole.

    Args:
        model: The trained dense model; it maps a batch to logits of shape ``(n, classes)``.
        train: The data that recovery trains on: a DataLoader or a pair of tensors ``(x, y)``.
        val: The data on which the search scores trials.
        test: The data for the verdict, evaluated once at the end of a study.
        loss: Maps logits and targets to a scalar; `classification_loss` by default.
        metric: The score whose drop is bounded: a name of `autocompress.metrics.METRICS`, a `Metric`, or a
            function of targets and outputs whose result is better the larger it is.
        name: Names the task in the study, the tables and MLflow.
        architecture: The dense architecture, as `autocompress.models.build` takes it, so that `autocompress.load`
            needs no model; None unless autocompress itself made the task.
        classes: The names of the classes, or of the labels, in order.
        preprocessing: How samples are preprocessed before the model sees them, in words.
        input: The same for programs, such as the mean and standard deviation: JSON types only.
        options: The options that the task was made from, for resuming a study of it: JSON types only.
        notes: Remarks on the model and the data that are shown when a study is started.

    Raises:
        ValueError: If a split is empty or of a form that is not understood.
    """

    @takes(model=instance("a torch.nn.Module", nn.Module), loss=function, name=text, preprocessing=text)
    def __init__(
        self,
        model: nn.Module,
        train: Data,
        val: Data,
        test: Data,
        *,
        loss: Loss = classification_loss,
        metric: MetricLike = accuracy,
        name: str = "task",
        architecture: str | Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        preprocessing: str = "",
        input: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.train = as_split(train, "train")
        self.val = as_split(val, "val")
        self.test = as_split(test, "test")
        self.loss = loss
        self.classes = tuple(map(str, listing(classes)))
        self.metric = as_metric(metric, self.classes)
        self.name = name
        self.architecture = architecture
        self.preprocessing = preprocessing
        self.input = dict(input or {})
        self.options = dict(options or {})
        self.notes = (*listing(notes), *absences(self._splits, self.classes), *overlaps(**self._splits))

    def check(self) -> None:
        """Checks one batch of each split, and the model and the loss on it, before hours are spent on them.

        Raises:
            ValueError: If something does not fit; one line, with the remedy.
        """
        check_model(self.model)
        first = check_batches(self._splits)
        x, _ = first["val"]
        with evaluating(self.model), torch.inference_mode():
            try:
                outputs = self.model(x[:2].to(device_of(self.model)))
            except Exception as error:  # whatever a model may raise that is not made for this input
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"the model does not take the data: on inputs of shape {tuple(x.shape[1:])} it raised "
                    f"{type(error).__name__}: {reason}"
                ) from error
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"the model returns {found}; it must return a tensor of logits of shape (n, classes): wrap it in "
                "a module whose forward picks them"
            )
        if not outputs.isfinite().all():
            raise ValueError(
                "the model's outputs on the first val samples are not all finite numbers; look for what diverged "
                "or divides by zero"
            )
        check_labels(self._splits, self.classes, outputs.shape[1])
        self._check_loss(*first["train"])
        if len(first["train"][0]) == 1:
            self._check_batch_of_one(first["train"][0])

    def _check_batch_of_one(self, x: Tensor) -> None:
        """Checks that a batch of one sample can be trained on: BatchNorm may have one value per channel in it."""
        in_training = copy.deepcopy(self.model).train()
        try:
            with torch.no_grad():
                in_training(x.to(device_of(self.model)))
        except ValueError as error:
            raise ValueError(
                f"train= serves batches of one sample, on which the model cannot be trained: {error}; make its "
                "DataLoader with a larger batch_size"
            ) from error

    def _check_loss(self, x: Tensor, y: Tensor) -> None:
        """Checks that the loss maps a batch's logits and targets to a scalar with a gradient."""
        device = device_of(self.model)
        with evaluating(self.model), torch.no_grad():
            logits = self.model(x[:2].to(device)).requires_grad_()
        targets = y[:2].to(device)
        called = f"loss= gets logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}"
        try:
            value: object = self.loss_on(device)(logits, targets)
        except Exception as error:  # whatever a loss may raise that is not made for these
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{called}, and raised {type(error).__name__}: {reason}") from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            if not isinstance(value, Tensor):
                returned = type(value).__name__
            elif value.numel() != 1:
                returned = f"a tensor of shape {tuple(value.shape)}"
            else:
                returned = "a number without a gradient"
            raise ValueError(
                f"{called}, and returned {returned}; it must return a scalar tensor, such as their mean"
            )

    def loss_on(self, device: str | torch.device) -> Loss:
        """The loss on a device: a copy there if it is a module with tensors such as class weights."""
        if isinstance(self.loss, nn.Module) and list(chain(self.loss.parameters(), self.loss.buffers())):
            return copy.deepcopy(self.loss).to(device)
        return self.loss

    @property
    def _splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def specs(self) -> tuple[str, ...]:
        """The specs of the model and the metric, which may name files, see `autocompress.plugins`."""
        return self.options.get("model") or "", name_of(self.metric)  # a model's file is a whole path already

    def fingerprint(self) -> str:
        """A hash of the model's weights and the data, by which a study that is resumed recognizes its task.

        Of a DataLoader, which would take long to read, only the number of samples is hashed and, for val and test,
        the first batch.
        """
        digest = hashlib.sha256()
        for split in self._splits.values():
            digest.update(fingerprint(split))
            if isinstance(split, LoaderSplit) and split is not self.train:
                for tensor in next(split.batches()):
                    digest.update(as_bytes(tensor))
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(as_bytes(tensor))
        return digest.hexdigest()[:16]

    def on(self, device: str | torch.device) -> "Task":
        """The same task with a copy of the model on ``device``, in eval mode and `channels_last`."""
        moved = copy.copy(self)
        moved.model = channels_last(copy.deepcopy(self.model).to(device).eval())
        moved.loss = self.loss_on(device)
        return moved

    def in_half_batches(self) -> "Task":
        """The same task, served in batches of half the size."""
        halved = copy.copy(self)
        halved.train, halved.val, halved.test = map(HalfBatches, (self.train, self.val, self.test))
        return halved

    @property
    def example_input(self) -> Tensor:
        """One validation sample as a batch of shape ``(1, ...)``."""
        x, _ = next(self.val.batches())
        return x[:1].clone()  # a view would keep the whole batch in memory, and in pickles for other processes

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Runs ``model`` in eval mode over ``split``, on the model's device, and scores it.

        Raises:
            FloatingPointError: If outputs are not finite and the metric needs their values, as AUC does.
        """
        outputs, targets = predict(model, split)
        # An argmax exists for any logits; scores that rank or weigh them need finite numbers.
        if self.metric.correct is None and not np.isfinite(outputs).all():
            raise FloatingPointError("the model's outputs are not all finite numbers")
        return Evaluation(self.metric.score(targets, outputs), outputs, targets)


def as_task(given: Task | Callable[[], Task]) -> Task:
    """The given task, or the one that a given function returns.

    Raises:
        ValueError: If ``given`` is neither.
    """
    task = given() if callable(given) and not isinstance(given, nn.Module | type) else given
    if not isinstance(task, Task):
        raise ValueError(
            f"task= is {' '.join(repr(task).split()):.100}; it must be a Task, or a function that makes one"
        )
    return task


def predict(model: nn.Module, split: Split) -> tuple[Outputs, Targets]:
    """Runs ``model`` in eval mode over ``split``; reports progress.

    Returns:
        Logits of shape ``(n, classes)``, and targets of shape ``(n,)`` or ``(n, labels)``.
    """
    device = device_of(model)
    outputs, targets, seen = [], [], 0
    with evaluating(model), torch.inference_mode():
        for x, y in kept_on(split, device).batches():
            outputs.append(model(x.to(device)).float().cpu())
            targets.append(y.cpu())
            seen += len(y)
            progress.report(seen / split.n_samples)
    return torch.cat(outputs).numpy().astype(np.float32), torch.cat(targets).numpy().astype(np.int64)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU when it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def channels_last(model: nn.Module) -> nn.Module:
    """Converts a model in place to the memory format in which CPUs and GPUs run 2-D convolutions fastest."""
    if any(parameter.dim() == 5 for parameter in model.parameters()):
        return model  # `channels_last` is for 4-D tensors; torch raises on the weights of 3-D convolutions
    return model.to(memory_format=torch.channels_last)


class evaluating:
    """Puts a model in eval mode for a ``with`` block, then restores the mode of every module."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training
