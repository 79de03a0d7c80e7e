"""Supervised training: the steps that the L step, the polish after it and a dense model's training share."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from autocompress import progress
from autocompress.splits import Batch, Split, TensorSplit
from autocompress.task import Loss, device_of, evaluating, predict

Taught: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
Optimizer: TypeAlias = Literal["sgd", "adamw"]

MAX_GRADIENT = 1.0  # norm at which gradients are clipped: one bad batch shall not throw a trained network away
SLOWER = 0.1  # factor on the learning rate after a step that could not be taken
MOMENT_DECAY = 0.98  # of the running means of gradients: they look back some fifty steps
SCALED_BACK = 256  # steps after which running means are brought back to scale
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
    """SGD with Nesterov momentum, or AdamW, along one cycle of the learning rate.

    A gradient that is not finite is not followed: the step is left out and the learning rate falls to a tenth
    for good. At the second such gradient the training has diverged.

    Args:
        model: Its trainable parameters are updated in place.
        steps: Length of the cycle.
        lr: Peak learning rate.
        optimizer: ``"sgd"`` or ``"adamw"``.
        momentum: Nesterov momentum of SGD; the first moment's decay of AdamW.
        weight_decay: L2 penalty of SGD; decoupled decay of AdamW.
        scaler: Scales the loss where gradients are computed in fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        lr: float,
        *,
        optimizer: Optimizer = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.steps = steps
        self.taken = 0
        self.slowed = 1.0
        self.max_gradient = MAX_GRADIENT
        self._peak = lr
        self._scaler = scaler or torch.amp.GradScaler(enabled=False)
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trainable = list(self._named.values())
        self._optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self._optimizer = torch.optim.SGD(
                self._trainable, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
            )
        else:
            self._optimizer = torch.optim.AdamW(
                self._trainable, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            )
        self.remembers = True  # whether running means of gradients are kept for those who ask
        self._moments: dict[int, dict[str, Tensor]] = {}  # those that somebody has asked for, by power

    @property
    def steps_left(self) -> int:
        """Steps to the end of the cycle."""
        return self.steps - self.taken

    def gradient_moments(self, power: int) -> dict[str, Tensor]:
        """The running mean of the gradients to a power of 1 or 2, by name and up to a factor that all share.

        It is kept from the first call on.
        """
        return self._moments.setdefault(power, {})

    def step(self, loss: Tensor, average: Callable[[Sequence[Tensor]], None] | None = None) -> float:
        """One step down the gradient of ``loss``; returns the learning rate it was taken with.

        Args:
            loss: A scalar.
            average: Replaces the gradients by those of all processes, where several compute one step.

        Raises:
            FloatingPointError: If a gradient is not finite for the second time.
        """
        lr = one_cycle(self.taken, self.steps, self._peak) * self.slowed
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.taken += 1
        progress.report(self.taken / self.steps)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if average is not None:
            average([p.grad for p in self._trainable if p.grad is not None])
        self._scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._trainable, self.max_gradient))
        is_finite = math.isfinite(norm)
        if is_finite and self.remembers:
            self._remember_gradients(max(1.0, norm / self.max_gradient))
        if is_finite or self._scaler.is_enabled():
            self._scaler.step(self._optimizer)  # which leaves out, by itself, what overflowed in fp16
            self._scaler.update()
        elif self.slowed == 1.0:
            self.slowed = SLOWER
        else:
            raise FloatingPointError(
                f"the training diverged (loss {float(loss.detach())}); try a smaller learning rate"
            )
        return lr

    @torch.no_grad()
    def _remember_gradients(self, clipped: float) -> None:
        """Enters gradients that were divided by ``clipped`` into the running means.

        What is new weighs more and more, in the place of all that is old shrinking: half as much to write.
        """
        age = self.taken % SCALED_BACK
        for power, moments in self._moments.items():
            gradients = {name: p.grad for name, p in self._named.items() if p.grad is not None}
            moments |= {name: torch.zeros_like(g) for name, g in gradients.items() if name not in moments}
            means, values = [moments[name] for name in gradients], list(gradients.values())
            if age == 0:
                torch._foreach_mul_(means, MOMENT_DECAY**SCALED_BACK)
            weight = clipped**power / MOMENT_DECAY**age
            if power == 1:
                torch._foreach_add_(means, values, alpha=weight)
            else:
                torch._foreach_addcmul_(means, values, values, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """What the optimizer remembers, as tensors by name."""
        state = {}
        for name, p in self._named.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        for power, moments in self._moments.items():
            state |= {f"moment{power}/{name}": value for name, value in moments.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor], taken: int, slowed: float) -> None:
        """Goes on where another optimizer was when it gave its `state_dict`; means of gradients stay asked for."""
        self.taken, self.slowed = taken, slowed
        self._moments = {power: {} for power in self._moments}
        for entry, value in state.items():
            key, name = entry.split("/", 1)
            p = self._named[name]
            if key in ("moment1", "moment2"):
                self.gradient_moments(int(key[-1]))[name] = value.to(p.device).clone()
            else:
                self._optimizer.state[p][key] = value.clone() if value.dim() == 0 else value.to(p.device).clone()

    def take_over(self, other: "Descent", fitted: Callable[[str, Tensor], Tensor]) -> None:
        """Goes on where another optimizer is, with the means of gradients that were asked of it.

        Args:
            other: The other one.
            fitted: Makes what it keeps of a parameter, by the parameter's name, fit the one here.
        """
        for power in other._moments:
            self.gradient_moments(power)
        state = {entry: fitted(entry.partition("/")[2], t) for entry, t in other.state_dict().items()}
        self.load_state_dict(state, other.taken, other.slowed)
        self.remembers = other.remembers


def fit(model: nn.Module, split: Split, loss: Loss, *, epochs: float, lr: float, seed: int) -> None:
    """Trains ``model`` in place with SGD for ``epochs`` passes over ``split``; leaves it in eval mode."""
    device = device_of(model)
    descent = Descent(model, n_steps(split, epochs), lr)
    model.train()
    for x, y in islice(Stream(split, seed), descent.steps):
        descent.step(loss(model(x.to(device)), y.to(device)))
    model.eval()


class Stream(Iterator[Batch]):
    """Shuffled batches without end, one pass after the other, that can be taken up anywhere.

    Args:
        split: The data.
        seed: Seeds the order; each pass has its own.
        epoch: Passes that were served before.
        position: Batches of the pass after them that were served before.

    Raises:
        ValueError: If a pass serves no full batch.
    """

    def __init__(self, split: Split, seed: int, epoch: int = 0, position: int = 0) -> None:
        self._split, self._seed = split, seed
        self.epoch, self.position = epoch, position
        self._pass = islice(self._shuffled(), position, None)

    def _shuffled(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self.epoch)
        return self._split.batches(generator)

    def __next__(self) -> Batch:
        for batch in self._pass:
            self.position += 1
            return batch
        if self.position == 0:
            raise ValueError(
                f"train= serves no full batch: {self._split.n_samples} samples, {self._split.batch_size} a batch; "
                "give it more samples or smaller batches"
            )
        self.epoch, self.position = self.epoch + 1, 0
        self._pass = islice(self._shuffled(), 0, None)
        return next(self)


class TaughtStream(Iterator[Taught]):
    """Shuffled batches ``(x, y, teacher's logits)`` without end; None for the logits without a teacher.

    Where the samples are held as tensors nothing augments them, so the teacher sees each just once.

    Args:
        split: The data.
        teacher: The model to learn from.
        seed: Seeds the order.
        epoch: See `Stream`.
        position: See `Stream`.
        share: What of the split is served, where several processes divide its batches.
    """

    def __init__(
        self,
        split: Split,
        teacher: nn.Module | None,
        seed: int,
        epoch: int = 0,
        position: int = 0,
        share: Callable[[Split], Split] = lambda split: split,
    ) -> None:
        self._teacher = teacher
        self._held: tuple[Tensor, Tensor] | None = None
        if teacher is not None and isinstance(split, TensorSplit):
            with progress.heard_by(None):
                self._held = split.y, torch.from_numpy(predict(teacher, split)[0])
            split = TensorSplit(split.x, torch.arange(split.n_samples), split.batch_size)
        self.batches = Stream(share(split), seed, epoch, position)

    def __next__(self) -> Taught:
        x, y = next(self.batches)
        if self._held is not None:  # y numbers the samples
            targets, logits = self._held
            return x, targets[y], logits[y]
        if self._teacher is None:
            return x, y, None
        with evaluating(self._teacher), torch.no_grad():
            return x, y, self._teacher(x.to(device_of(self._teacher)))


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
    # A single sample at the end has no variance where a layer gives it one value a channel.
    update_bn((x.to(device) for x, _ in split.batches() if len(x) > 1 or split.n_samples == 1), model)
