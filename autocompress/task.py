"""Task: what is compressed and how it is judged."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from autocompress import progress
from autocompress.arguments import function, instance, listing, takes, text
from autocompress.metrics import MetricLike, Outputs, Targets, accuracy, as_metric
from autocompress.networks.model_check import check_model
from autocompress.plugins import name_of
from autocompress.splits import (
    Batch,
    Data,
    HalfBatches,
    LoaderSplit,
    Split,
    TensorSplit,
    as_bytes,
    as_split,
    fingerprint,
    held_labels,
    kept_on,
    labels_of,
)

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

MANY_CLASSES = 5  # that a note names


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
    """A trained model, its data, and how it is judged.

    Train must have samples of every class that val and test have. A class that val or test lack is noted: nothing
    is known of what is lost there. Neither is looked for in a DataLoader, which would have to be read.

    Args:
        model: The trained dense model: logits of shape ``(n, classes)`` from a batch.
        train: What recovery trains on. A DataLoader or a pair of tensors ``(x, y)``.
        val: What the search sees.
        test: What only the verdict sees, once.
        loss: Maps logits and targets to a scalar; `classification_loss` by default.
        metric: The score that the bound on the drop is about: its name, see `autocompress.metrics.METRICS`, a
            `Metric`, or a function of targets and outputs of which more is better.
        name: Names the task in the study, the tables and MLflow.
        architecture: How `autocompress.load` can make the dense architecture again without being handed it, see
            `autocompress.models.build`; only tasks that autocompress itself makes have one.
        classes: The names of the classes, or of the labels, in order.
        preprocessing: What was done to a sample before the model sees it, in words.
        input: The same for programs, such as the mean and standard deviation: JSON types only.
        options: How the task was made, for resuming a study of it: JSON types only.
        notes: What whoever starts a study should know of the model and the data.

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
        self.notes = (*listing(notes), *self._absences())

    def check(self) -> None:
        """Looks at one batch of each split and at what the model makes of it.

        Raises:
            ValueError: If something does not fit, before hours are spent on it: in one line, with the remedy.
        """
        check_model(self.model)
        first = {"val": _first_batch("val", self.val)}  # each is read once: for that a loader starts its workers
        expected = tuple(first["val"][0].shape[1:])
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            first[name] = x, y = first.get(name) or _first_batch(name, split)
            if x.dtype != torch.float32:
                raise ValueError(f"{name}= serves inputs of type {x.dtype}; convert them to float32 (x.float())")
            if tuple(x.shape[1:]) != expected:
                raise ValueError(f"{name}= serves inputs of shape {tuple(x.shape[1:])}, val= of shape {expected}")
            _check_values(name, split, x, y)
            if name != "train" and isinstance(split, LoaderSplit):
                _check_order(name, split, (x, y))
        x, _ = first["val"]
        with evaluating(self.model), torch.inference_mode():
            try:
                outputs = self.model(x[:2].to(device_of(self.model)))
            except Exception as error:  # whatever a model may raise that is not made for this input
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"the model does not take the data: on inputs of shape {expected} it raised "
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
        self._check_labels(outputs.shape[1])
        self._check_loss(*first["train"])

    def _check_loss(self, x: Tensor, y: Tensor) -> None:
        """That the loss takes logits and targets of a batch, and what it gives can be trained on."""
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
            found = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            cut_off = isinstance(value, Tensor) and value.numel() == 1
            what = "a number without a gradient" if cut_off else found
            raise ValueError(f"{called}, and returned {what}; it must return a scalar tensor, such as their mean")

    def loss_on(self, device: str | torch.device) -> Loss:
        """The loss on a device: where it is a module, a copy with its weights of classes there."""
        if isinstance(self.loss, nn.Module) and list(chain(self.loss.parameters(), self.loss.buffers())):
            return copy.deepcopy(self.loss).to(device)
        return self.loss

    def _check_labels(self, n_logits: int) -> None:
        """That the model has a logit for every class."""
        kinds = set()
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            y = labels_of(split)
            kinds.add(y.ndim)
            if y.ndim == 2 and y.shape[1] != n_logits:
                raise ValueError(f"{name}= has {y.shape[1]} labels a sample and the model gives {n_logits} logits")
            if y.ndim == 1 and not 0 <= int(y.min()) <= int(y.max()) < n_logits:
                wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
                raise ValueError(
                    f"{name}= has a sample of class {wrong}, and the model gives {n_logits} logits: classes 0 to "
                    f"{n_logits - 1}"
                )
        if len(kinds) > 1:
            raise ValueError("train=, val= and test= must all have class numbers (n,), or all labels (n, labels)")
        if self.classes and len(self.classes) != n_logits:
            raise ValueError(
                f"there are {len(self.classes)} names of classes and the model gives {n_logits} logits"
            )
        self._check_presence()

    def _check_presence(self) -> None:
        """That train has every class that is judged, and no part just one."""
        present = self._classes_held()
        unseen = set().union(*present.values()) - present["train"] if "train" in present else set()
        if unseen:
            raise ValueError(
                f"train= has no sample of class {self._called(min(unseen))}, which is judged: the network would "
                "forget it; add samples, or leave the class out"
            )
        for name, classes in present.items():
            if labels_of(getattr(self, name)).ndim == 1 and len(classes) < 2:
                raise ValueError(
                    f"{name}= has samples of class {min(classes)} alone; there must be two to tell apart"
                )

    def _absences(self) -> Iterator[str]:
        """In words, which classes cannot be judged."""
        present = self._classes_held()
        everywhere = set().union(*present.values())
        for name, what in (("val", "the search sees nothing"), ("test", "the verdict says nothing")):
            if absent := everywhere - present.get(name, everywhere):
                first = ", ".join(self._called(k) for k in sorted(absent)[:MANY_CLASSES])
                more = f" and {len(absent) - MANY_CLASSES} more" if len(absent) > MANY_CLASSES else ""
                yield f"{name} has no sample of class {first}{more}: {what} of what is lost there"

    def _classes_held(self) -> dict[str, set[int]]:
        """The classes of each part; of a DataLoader they are not known without reading all of it."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        held = {name: y for name, split in splits.items() if (y := held_labels(split)) is not None}
        return {
            name: set((y.sum(dim=0) > 0).nonzero().flatten().tolist() if y.ndim == 2 else torch.unique(y).tolist())
            for name, y in held.items()
        }

    def _called(self, k: int) -> str:
        """A class by its number and, if it has one, its name."""
        return f"{k} ({self.classes[k]})" if 0 <= k < len(self.classes) and self.classes[k] != str(k) else str(k)

    @property
    def specs(self) -> tuple[str, ...]:
        """What its model and its metric were given as, which may name files."""
        return self.options.get("model") or "", name_of(self.metric)  # a model's file is a whole path already

    def fingerprint(self) -> str:
        """A hash of the model's weights and of the data: what makes it the same task.

        Of a DataLoader it is the number of samples and, but for training, the first batch: it would take long to
        read all of them.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
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
        return x[:1].clone()  # a view would keep the whole batch, and take it along to other processes

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Runs ``model`` in eval mode over ``split``, on the model's device, and scores it."""
        outputs, targets = predict(model, split)
        # Decisions can be made with any logits; scores that rank or weigh them need numbers.
        if self.metric.correct is None and not np.isfinite(outputs).all():
            raise FloatingPointError("the model's outputs are not all finite numbers")
        return Evaluation(self.metric.score(targets, outputs), outputs, targets)


def as_task(given: Task | Callable[[], Task]) -> Task:
    """A task, or what a function makes.

    Raises:
        ValueError: If it is neither.
    """
    made = given() if callable(given) and not isinstance(given, nn.Module | type) else given
    if not isinstance(made, Task):
        raise ValueError(
            f"task= is {' '.join(repr(made).split()):.100}; it must be a Task, or a function that makes one"
        )
    return made


def _first_batch(name: str, split: Split) -> Batch:
    """The first batch of a part, if it is one."""
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
    """That a loader whose first batch was ``first`` serves the same samples at every pass, and all of them."""
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
    """That inputs are finite, and targets class numbers or zeros and ones."""
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


def predict(model: nn.Module, split: Split) -> tuple[Outputs, Targets]:
    """Logits ``(n, classes)`` and targets as the split has them; the model's mode is left as it was."""
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
    """The same model, its 2-D convolutions laid out in the order in which CPUs and GPUs run them fastest."""
    if any(parameter.dim() == 5 for parameter in model.parameters()):
        return model  # 3-D convolutions have another order, and torch refuses to mix the two
    return model.to(memory_format=torch.channels_last)


class evaluating:
    """Puts a model in eval mode for a ``with`` block and gives every module its own mode back."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training
