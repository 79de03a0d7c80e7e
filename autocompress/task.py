"""Task: what is compressed and how it is judged."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from autocompress import progress
from autocompress.metrics import Metric, Outputs, Targets, accuracy, as_metric
from autocompress.model_check import check_model

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Batch: TypeAlias = tuple[Tensor, Tensor]


class Split(Protocol):
    """One part of the data, served in batches of ``(x, y)``: x of shape ``(n, ...)``, y of shape ``(n,)``.

    Where a sample may have several labels, y is of shape ``(n, labels)``, floating, of zeros and ones.
    """

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass. With a generator: shuffled by it, the last incomplete batch left out (for training)."""


@dataclass(frozen=True)
class TensorSplit:
    """Data held as two tensors: ``x`` of shape ``(n, ...)``, ``y`` of shape ``(n,)`` or ``(n, labels)``."""

    x: Tensor
    y: Tensor
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.y.ndim == 2 and self.y.shape[1] == 1 and not self.y.is_floating_point():  # as MedMNIST has them
            object.__setattr__(self, "y", self.y.squeeze(1))
        if len(self.x) != len(self.y):
            raise ValueError(f"x holds {len(self.x)} samples and y {len(self.y)}; they must be as many")
        if len(self.x) == 0:
            raise ValueError("a split holds no samples; each of train, val and test needs some")

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""
        return len(self.x)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, see `Split.batches`."""
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
    """The split with its samples on the device, if it holds them as tensors that take a quarter of the room there.

    A split may say itself what it keeps there, as images do; a loader is served as it is.
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

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""
        return len(self.loader.dataset)  # type: ignore[arg-type]  # map-style data sets have a length

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return self.loader.batch_size or 1

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, see `Split.batches`. The generator, when given, seeds the loader's own sampler."""
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        smallest = min(self.batch_size, self.n_samples) if generator is not None else 1
        yield from (batch for batch in cast(Iterable[Batch], self.loader) if len(batch[0]) >= smallest)


@dataclass(frozen=True)
class HalfBatches:
    """A split with each of its batches cut in two, for a device that has no room for a whole one."""

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
        """One pass, see `Split.batches`."""
        for x, y in self.split.batches(generator):
            yield from zip(*(torch.split(one, self.batch_size) for one in (x, y)), strict=True)


Data: TypeAlias = Split | DataLoader[Batch] | tuple[Tensor, Tensor]


def as_split(data: Data, name: str) -> Split:
    """Any accepted form of data as a `Split`.

    Raises:
        ValueError: If ``data`` is of another form or empty; ``name`` says which part it was.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor | np.ndarray) for t in data):
        return TensorSplit(torch.as_tensor(data[0]), torch.as_tensor(data[1]))
    if isinstance(data, DataLoader):
        return LoaderSplit(data)
    if hasattr(data, "batches") and hasattr(data, "n_samples"):
        return cast(Split, data)
    raise ValueError(
        f"{name}= must be a DataLoader, or a pair (x, y) of tensors or numpy arrays, not a {type(data).__name__}"
    )


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

    Args:
        model: The trained dense model: logits of shape ``(n, classes)`` from a batch.
        train: What recovery trains on. A DataLoader or a pair of tensors ``(x, y)``.
        val: What the search sees.
        test: What only the verdict sees, once.
        loss: Maps logits and targets to a scalar; `classification_loss` by default.
        metric: The score that the bound on the drop is about, or its name, see `autocompress.metrics.METRICS`.
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

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        val: Data,
        test: Data,
        *,
        loss: Loss = classification_loss,
        metric: Metric | str = accuracy,
        name: str = "task",
        architecture: str | Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        preprocessing: str = "",
        input: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model= must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self.train = as_split(train, "train")
        self.val = as_split(val, "val")
        self.test = as_split(test, "test")
        self.loss = loss
        self.metric = as_metric(metric, classes)
        self.name = name
        self.architecture = architecture
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.input = dict(input or {})
        self.options = dict(options or {})
        self.notes = tuple(notes)

    def check(self) -> None:
        """Looks at one batch of each split and at what the model makes of it.

        Raises:
            ValueError: If something does not fit, before hours are spent on it: in one line, with the remedy.
        """
        check_model(self.model)
        expected = tuple(next(self.val.batches())[0].shape[1:])
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            x, y = next(split.batches())
            if not x.is_floating_point():
                raise ValueError(f"{name}= serves inputs of type {x.dtype}; convert them to float32 (x.float())")
            if tuple(x.shape[1:]) != expected:
                raise ValueError(f"{name}= serves inputs of shape {tuple(x.shape[1:])}, val= of shape {expected}")
            _check_values(name, split, x, y)
            shuffled = isinstance(split, LoaderSplit) and isinstance(split.loader.sampler, RandomSampler)
            if shuffled and name != "train":
                raise ValueError(f"{name}= is shuffled; make its DataLoader with shuffle=False")
        x, _ = next(self.val.batches())
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
            raise ValueError(f"the model returns {found}; it must return a tensor of logits of shape (n, classes)")
        self._check_labels(outputs.shape[1])

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

    def fingerprint(self) -> str:
        """A hash of the model's weights and of the data: what makes it the same task.

        Of a DataLoader only the number of samples is known without reading all of them.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            digest.update(fingerprint(split))
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(as_bytes(tensor))
        return digest.hexdigest()[:16]

    def on(self, device: str | torch.device) -> "Task":
        """The same task with a copy of the model on ``device``, in eval mode and `channels_last`."""
        moved = copy.copy(self)
        moved.model = channels_last(copy.deepcopy(self.model).to(device).eval())
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
        return x[:1]

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Runs ``model`` in eval mode over ``split``, on the model's device, and scores it."""
        outputs, targets = predict(model, split)
        # Decisions can be made with any logits; scores that rank or weigh them need numbers.
        if self.metric.correct is None and not np.isfinite(outputs).all():
            raise FloatingPointError("the model's outputs are not all finite numbers")
        return Evaluation(self.metric.score(targets, outputs), outputs, targets)


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
    if not labels and (y.ndim != 1 or y.is_floating_point()):
        raise ValueError(
            f"{name}= serves targets of shape {tuple(y.shape)} and type {y.dtype}; they must be class numbers, of "
            "shape (n,) and type torch.long, or zeros and ones for several labels, of shape (n, labels) and type "
            "torch.float32"
        )
    if labels and not ((y == 0) | (y == 1)).all():
        raise ValueError(f"{name}= serves labels other than 0 and 1; a sample has a label or has it not")


def labels_of(split: Split) -> Tensor:
    """All targets of a split that holds them; of others those of the first batch."""
    y = getattr(split, "y", None)
    return y if isinstance(y, Tensor) else next(split.batches())[1]


def fingerprint(split: Split) -> bytes:
    """A hash of a split's samples; of a DataLoader, which would have to read them all, of how many there are."""
    if isinstance(split, TensorSplit):
        return hashlib.sha256(as_bytes(split.x) + as_bytes(split.y)).digest()
    own = getattr(split, "fingerprint", None)
    return own() if callable(own) else hashlib.sha256(str(split.n_samples).encode()).digest()


def as_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
