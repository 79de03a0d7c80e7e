"""Supervised training: the steps, batches and losses that L steps, the polish and dense training share."""

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

MAX_GRADIENT = 1.0  # norm at which gradients are clipped: one bad batch must not ruin a trained network
SLOWER = 0.1  # factor on the learning rate after a gradient that was not finite
MOMENT_DECAY = 0.98  # of the running means of gradients, per step: they average over some fifty steps
SCALED_BACK = 256  # steps between rescalings of the running means, see `Descent._remember_gradients`
WORTH_SHARING = 200_000_000  # multiply-accumulates of a batch: some milliseconds of one core


@contextmanager
def threads_for(macs: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Limits a ``with`` block to one CPU thread if a batch takes less than `WORTH_SHARING` multiply-accumulates.

    Small operations gain little from a second thread, and lose much waiting for it on a busy machine.

    Args:
        macs: Multiply-accumulates of a batch.
        device: The device that computes; on others than a CPU nothing changes.
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

    A step whose gradient is not finite is skipped, and the learning rate stays at a tenth from then on. A second
    such gradient counts as divergence. In fp16 the gradients of a finite loss may overflow: the scaler skips that
    step alone.

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
        self.remembers = True  # whether steps update the gradient moments
        self._moments: dict[int, dict[str, Tensor]] = {}  # by power, for the powers asked for so far

    @property
    def steps_left(self) -> int:
        """Steps to the end of the cycle."""
        return self.steps - self.taken

    def gradient_moments(self, power: int) -> dict[str, Tensor]:
        """The running mean of the gradients to the power of 1 or 2, by parameter, up to a common factor.

        It is kept from the first call on, and empty until the next step.
        """
        return self._moments.setdefault(power, {})

    def step(self, loss: Tensor, average: Callable[[Sequence[Tensor]], None] | None = None) -> float:
        """Takes a gradient step on ``loss`` and returns the learning rate of the step.

        Args:
            loss: A scalar.
            average: Replaces gradients in place by their mean over all processes, where several share a batch.

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
            self._scaler.step(self._optimizer)  # skips the step by itself if the gradient is not finite
            self._scaler.update()
        if not is_finite:
            self._slow_down(_mean(loss, average))
        return lr

    def _slow_down(self, loss: float) -> None:
        """Answers a gradient that is not finite: a lower learning rate, or an error the second time."""
        if self._scaler.is_enabled() and math.isfinite(loss):
            return  # it overflowed in fp16, and the scaler scales less from now on
        if self.slowed < 1:
            raise FloatingPointError(f"the training diverged (loss {loss}); try a smaller learning rate")
        self.slowed = SLOWER

    @torch.no_grad()
    def _remember_gradients(self, clipped: float) -> None:
        """Adds the gradients, which clipping has divided by ``clipped``, to the running means.

        Instead of shrinking the means at every step, each new gradient gets a larger weight than the one before,
        and the means are rescaled every `SCALED_BACK` steps: that halves the memory traffic.
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
        """The state of the optimizer and the gradient moments: tensors by ``kind/parameter``."""
        state = {}
        for name, p in self._named.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        for power, moments in self._moments.items():
            state |= {f"moment{power}/{name}": value for name, value in moments.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor], taken: int, slowed: float) -> None:
        """Continues from a `state_dict`, at its step and slow-down; keeps the gradient moments asked for here."""
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
        """Continues from where another optimizer is, keeping the same gradient moments.

        Args:
            other: The other optimizer, of parameters with the same names.
            fitted: Maps a parameter's name and a tensor of the other's state to the shape that it has here.
        """
        for power in other._moments:
            self.gradient_moments(power)
        state = {entry: fitted(entry.partition("/")[2], t) for entry, t in other.state_dict().items()}
        self.load_state_dict(state, other.taken, other.slowed)
        self.remembers = other.remembers


def _mean(loss: Tensor, average: Callable[[Sequence[Tensor]], None] | None) -> float:
    """The loss, averaged over the processes that share the batch: they must all decide alike."""
    loss = loss.detach().clone()
    if average is not None:
        average([loss])
    return float(loss)


def fit(model: nn.Module, split: Split, loss: Loss, *, epochs: float, lr: float, seed: int) -> None:
    """Trains ``model`` in place with SGD for ``epochs`` passes over ``split``; leaves it in eval mode."""
    device = device_of(model)
    descent = Descent(model, n_steps(split, epochs), lr)
    model.train()
    for x, y in islice(Stream(split, seed), descent.steps):
        descent.step(loss(model(x.to(device)), y.to(device)))
    model.eval()


class Stream(Iterator[Batch]):
    """Endless shuffled batches, pass after pass, which can be resumed at any batch.

    Args:
        split: The data.
        seed: Seeds the order; each pass has its own.
        epoch: Full passes that were served already.
        position: Batches of the current pass that were served already.

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
    """Endless shuffled batches ``(x, y, teacher's logits)``; the logits are None without a teacher.

    Samples held as tensors are never augmented, so their teacher's logits are computed once, in advance.

    Args:
        split: The data.
        teacher: The model to learn from.
        seed: Seeds the order.
        epoch: See `Stream`.
        position: See `Stream`.
        share: Returns the part of a split that this process trains on, where several divide the batches.
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
        if self._held is not None:  # then y holds the samples' indices
            targets, logits = self._held
            return x, targets[y], logits[y]
        if self._teacher is None:
            return x, y, None
        with evaluating(self._teacher), torch.no_grad():
            return x, y, self._teacher(x.to(device_of(self._teacher)))


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, *, several_labels: bool = False
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened class probabilities, times the squared temperature.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2; the factor keeps the size of
    the gradients at any temperature.

    Args:
        logits: The student's, shape ``(n, classes)``.
        teacher_logits: The teacher's, shape ``(n, classes)``.
        temperature: Divides both logits.
        several_labels: Whether each logit is a label of its own. Then it is the mean cross-entropy over labels
            to the teacher's softened sigmoid, which has the same gradient as the divergence.

    Returns:
        The mean over the batch, a scalar.
    """
    if several_labels:
        softened = torch.sigmoid(teacher_logits / temperature)
        return F.binary_cross_entropy_with_logits(logits / temperature, softened) * temperature**2
    log_p = F.log_softmax(logits / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def recalibrate_batchnorm(model: nn.Module, split: Split) -> None:
    """Recomputes BatchNorm's running statistics in one pass over ``split``: pruning has shifted them."""
    device = device_of(model)
    # A last batch of a single sample has no variance in a layer with one value per channel.
    update_bn((x.to(device) for x, _ in split.batches() if len(x) > 1 or split.n_samples == 1), model)
