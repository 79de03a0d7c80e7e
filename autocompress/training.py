"""Supervised training: the steps that the L step, the polish after it and a dense model's training share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from autocompress.task import Batch, Loss, Split, TensorSplit, device_of, evaluating, predict

Taught: TypeAlias = tuple[Tensor, Tensor, Tensor]

MAX_GRADIENT = 1.0  # norm at which gradients are clipped: one bad batch shall not throw a trained network away
WORTH_SHARING = 200_000_000  # multiply-accumulates of a batch: some milliseconds of one core


@contextmanager
def threads_for(macs: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Runs a block on one CPU thread if a batch of ``macs`` multiply-accumulates is too small to share.

    Small operations gain little from a second thread, and wait for it long when something else runs.
    """
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu" and macs < WORTH_SHARING:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def n_steps(split: Split, epochs: float) -> int:
    """Gradient steps in ``epochs`` passes over ``split``; at least one."""
    per_epoch = max(1, split.n_samples // min(split.batch_size, split.n_samples))
    return max(1, round(epochs * per_epoch))


def one_cycle(step: int, steps: int, peak: float, warmup: float = 0.1) -> float:
    """Learning rate at ``step`` of ``steps``: a linear warm-up, then half a cosine down to zero.

    After Smith & Topin, "Super-Convergence" (2019), and Loshchilov & Hutter, "SGDR" (ICLR 2017).
    """
    rising = warmup * steps
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


class Descent:
    """SGD with Nesterov momentum along one cycle of the learning rate.

    Args:
        model: Its trainable parameters are updated in place.
        steps: Length of the cycle.
        lr: Peak learning rate.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty.
    """

    def __init__(
        self, model: nn.Module, steps: int, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4
    ) -> None:
        self.steps = self.steps_left = steps
        self._peak = lr
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(
            self._trainable, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
        )

    def step(self, loss: Tensor) -> float:
        """One step down the gradient of ``loss``; returns the learning rate it was taken with."""
        lr = one_cycle(self.steps - self.steps_left, self.steps, self._peak)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self._trainable, MAX_GRADIENT)
        self._optimizer.step()
        self.steps_left -= 1
        return lr


def fit(model: nn.Module, split: Split, loss: Loss, *, epochs: float, lr: float, seed: int) -> None:
    """Trains ``model`` in place with SGD for ``epochs`` passes over ``split``; leaves it in eval mode."""
    device = device_of(model)
    descent = Descent(model, n_steps(split, epochs), lr)
    model.train()
    for x, y in islice(endless(split, torch.Generator().manual_seed(seed)), descent.steps):
        descent.step(loss(model(x.to(device)), y.to(device)))
    model.eval()


def endless(split: Split, generator: torch.Generator) -> Iterator[Batch]:
    """Shuffled batches of ``split``, one pass after the other."""
    while True:
        served = False
        for batch in split.batches(generator):
            served = True
            yield batch
        if not served:
            raise ValueError(
                f"train= serves no full batch: {split.n_samples} samples, {split.batch_size} a batch; "
                "give it more samples or smaller batches"
            )


def endless_taught(split: Split, teacher: nn.Module, generator: torch.Generator) -> Iterator[Taught]:
    """Shuffled batches ``(x, y, teacher's logits)``, one pass after the other.

    Where the samples are held as tensors nothing augments them, so the teacher sees each just once.
    """
    if isinstance(split, TensorSplit):
        logits = torch.from_numpy(predict(teacher, split)[0])
        numbered = TensorSplit(split.x, torch.arange(split.n_samples), split.batch_size)
        for x, index in endless(numbered, generator):
            yield x, split.y[index], logits[index]
    device = device_of(teacher)
    for x, y in endless(split, generator):
        with evaluating(teacher), torch.no_grad():
            taught = teacher(x.to(device))
        yield x, y, taught


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, *, several_labels: bool = False
) -> Tensor:
    """Divergence from the teacher's softened classes (Hinton et al., 2015), scaled to the usual gradients.

    Args:
        logits: The student's, shape ``(n, classes)``.
        teacher_logits: The teacher's, shape ``(n, classes)``.
        temperature: Softens both; the loss is multiplied by its square.
        several_labels: Whether each logit is a label of its own: then the mean over labels of the cross-entropy
            to the teacher's sigmoid, whose gradient is that of the divergence.
    """
    if several_labels:
        softened = torch.sigmoid(teacher_logits / temperature)
        return F.binary_cross_entropy_with_logits(logits / temperature, softened) * temperature**2
    log_p = F.log_softmax(logits / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def recalibrate_batchnorm(model: nn.Module, split: Split) -> None:
    """Computes BatchNorm's running statistics anew from one pass over ``split``: pruning has moved them."""
    device = device_of(model)
    update_bn((x.to(device) for x, _ in split.batches()), model)
