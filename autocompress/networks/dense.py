"""Training the dense model where none is given trained: the loss, early stopping, and the cache of weights."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.gauges.macs import count_macs
from autocompress.learning.training import Descent, Stream, n_steps, threads_for
from autocompress.models import cached
from autocompress.progress import heard_by
from autocompress.splits import Batch, as_bytes, fingerprint, kept_on
from autocompress.task import Task, device_of

OPTIMIZERS = ("adamw", "sgd")
DEFAULT_LR = {"adamw": 1e-3, "sgd": 0.05}
DEFAULT_WEIGHT_DECAY = {"adamw": 0.01, "sgd": 5e-4}


@dataclass(frozen=True)
class ClassLoss:
    """Cross-entropy of class numbers, binary cross-entropy of labels, with weights and smoothing.

    Attributes:
        weights: Of each class in the mean; of each label's positive samples, where a sample may have several
            labels. Empty for 1 each.
        smoothing: Share of the target that is spread over all classes; the share by which labels move to 1/2.
    """

    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"label smoothing {self.smoothing}; it must be at least 0 and below 1")

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits ``(n, classes)`` at targets ``(n,)`` or ``(n, classes)``."""
        weights = torch.tensor(self.weights, device=logits.device) if self.weights else None
        if targets.ndim == 1:
            return F.cross_entropy(logits, targets, weights, label_smoothing=self.smoothing)
        smoothed = targets * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weights)


def balancing_weights(y: Tensor, classes: int) -> tuple[float, ...]:
    """Weights with which rare classes count as much as frequent ones: the mean count over the class's own count.

    For labels of shape ``(n, labels)`` they are the number of samples without a label over the number with it.
    """
    if y.ndim == 2:
        positive = y.sum(dim=0).clamp_min(1)
        return tuple(((len(y) - positive) / positive).tolist())
    counts = torch.bincount(y, minlength=classes).clamp_min(1)
    return tuple((len(y) / classes / counts.double()).tolist())


@dataclass(frozen=True)
class DenseTraining:
    """How the dense model is trained.

    Attributes:
        epochs: Passes over the training data, at most.
        optimizer: ``adamw`` (Loshchilov & Hutter, ICLR 2019) or ``sgd`` with Nesterov momentum.
        lr: Peak learning rate; None for 0.001 with AdamW and 0.05 with SGD. It follows one cycle.
        patience: Epochs without a better score on val after which the training ends.
        freeze: What is not trained: a share of the layers, counted from the input, or names of modules.
        seed: Seeds the order of the batches.
    """

    epochs: int = 30
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None
    patience: int = 8
    freeze: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}; it must be adamw or sgd")
        if self.epochs < 1 or self.patience < 1:
            raise ValueError(f"epochs={self.epochs}, patience={self.patience}; both must be at least 1")

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr


def train_dense(
    task: Task, training: DenseTraining, device: str, cache: Path | None, progress: Callable[[str], None]
) -> None:
    """Trains ``task.model`` in place, or takes its weights from the cache.

    The cache's key is a hash of everything that goes into the training: the weights it starts from, the data, how
    they are sampled and augmented, the loss, the metric and the recipe.

    Raises:
        ValueError: If a module to freeze is not in the model, or nothing is left to train.
        FloatingPointError: If the training diverged.
    """
    frozen = frozen_modules(task.model, training.freeze)
    file = cache / f"{_plain(task.name)}-{_digest(task, training, device)}.safetensors" if cache else None

    def train() -> None:
        macs = count_macs(task.model, task.example_input) * task.train.batch_size
        with threads_for(macs, device):
            _train(task, training, frozen, device, progress)

    progress("training the dense model, or taking it from the cache")
    cached(task.model, train, file)


def _train(
    task: Task, training: DenseTraining, frozen: Sequence[nn.Module], device: str, progress: Callable[[str], None]
) -> None:
    model = task.model.to(device)
    for module in frozen:
        module.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("everything is frozen, so nothing is left to train; freeze less")
    per_epoch = n_steps(task.train, 1)
    descent = Descent(
        model,
        training.epochs * per_epoch,
        training.peak,
        optimizer=training.optimizer,
        weight_decay=DEFAULT_WEIGHT_DECAY[training.optimizer],
    )
    batches = Stream(kept_on(task.train, device_of(model)), training.seed)
    best, best_score, since = copy.deepcopy(model.state_dict()), -math.inf, 0
    torch.manual_seed(training.seed)  # for dropout
    for epoch in range(training.epochs):
        loss = _one_epoch(task, model, frozen, descent, islice(batches, per_epoch))
        with heard_by(None):  # progress is counted in gradient steps alone
            score = task.evaluate(model, task.val).score
        better = score if task.metric.higher_is_better else -score
        since = 0 if better > best_score else since + 1
        if since == 0:
            best, best_score = copy.deepcopy(model.state_dict()), better
        progress(
            f"training the dense model: epoch {epoch + 1} of at most {training.epochs}, loss {loss:.4f}, "
            f"{task.metric.name} on val {score:.4f}{' (best so far)' if since == 0 else ''}"
        )
        if since >= training.patience:
            progress(f"training the dense model: no better for {since} epochs, so it ends")
            break
    model.load_state_dict(best)
    model.requires_grad_(True).cpu()


def _one_epoch(
    task: Task, model: nn.Module, frozen: Sequence[nn.Module], descent: Descent, batches: Iterable[Batch]
) -> float:
    """Trains on the batches; returns their mean loss."""
    device = device_of(model)
    model.train()
    for module in frozen:  # their running statistics must not change either
        for part in module.modules():
            part.training = part.training and not isinstance(part, _BatchNorm)
    losses = []
    for x, y in batches:
        loss = task.loss(model(x.to(device)), y.to(device))
        descent.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def frozen_modules(model: nn.Module, freeze: Sequence[str]) -> list[nn.Module]:
    """The modules that are not trained.

    Args:
        model: The model.
        freeze: A share between 0 and 1 of the layers with parameters, from the input on, or names of modules.

    Raises:
        ValueError: If the model has no module of a name; the message lists its own.
    """
    modules = dict(model.named_modules())
    frozen: list[nn.Module] = []
    for what in freeze:
        if re.fullmatch(r"\d*\.?\d+", what):
            share = float(what)
            if not 0 <= share < 1:
                raise ValueError(f"freeze={what}; a share of the layers is at least 0 and below 1")
            layers = [m for m in modules.values() if any(True for _ in m.parameters(recurse=False))]
            frozen += layers[: round(share * len(layers))]
        elif what in modules and what:
            frozen.append(modules[what])
        else:
            own = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"freeze={what!r}: the model has no such module; at the top it has {own}")
    return frozen


def _plain(name: str) -> str:
    """A name that can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"


def _digest(task: Task, training: DenseTraining, device: str) -> str:
    """A hash of everything that the trained weights depend on."""
    sampling = getattr(task.train, "sampling", None)
    recipe = {
        **asdict(training),
        "loss": repr(task.loss) if isinstance(task.loss, ClassLoss) else getattr(task.loss, "__qualname__", ""),
        "metric": task.metric.whole or task.metric.name,
        "batch_size": task.train.batch_size,
        "augmentations": getattr(sampling, "augmentations", ()),
        "model": str(task.model),
        "device": torch.device(device).type,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    weights = getattr(sampling, "weights", None)
    digest.update(b"" if weights is None else as_bytes(weights))
    for split in (task.train, task.val):
        digest.update(fingerprint(split))
    for name, tensor in task.model.state_dict().items():
        digest.update(name.encode() + as_bytes(tensor))
    return digest.hexdigest()[:16]
