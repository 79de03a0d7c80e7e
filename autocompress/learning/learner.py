"""The L step: gradient steps on the task's loss, distillation from the dense model, and a penalty."""

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from autocompress.learning.ranks import team
from autocompress.learning.training import MAX_GRADIENT, Descent, Optimizer, TaughtStream, distillation_loss
from autocompress.scheme import Evidence, Weights, as_numbers
from autocompress.splits import Batch, Split, kept_on
from autocompress.task import Task, device_of

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVIDENCE_BATCHES = 8  # training batches that a scheme may look at before a C step
IN_CACHE = 2**18  # entries of a weight that successive operations on a CPU find in its cache


class Recipe(Protocol):
    """The hyperparameters of an L step, see `autocompress.lc.LearningCompression`."""

    def n_steps(self, train: Split) -> int: ...  # noqa: D102  # described there, as are the others
    @property
    def optimizer(self) -> Optimizer: ...  # noqa: D102
    @property
    def peak_lr(self) -> float: ...  # noqa: D102
    @property
    def momentum(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def max_gradient(self) -> float | None: ...  # noqa: D102
    @property
    def distill(self) -> float: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def precision(self) -> Precision: ...  # noqa: D102
    @property
    def compile(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Penalty:
    """The penalty of an L step, −λᵀ(w − θ) + μ/2 ‖w − θ‖², over the entries of w that are bound to θ.

    A weight with bound entries has a mask in `to_zero` if all of them are drawn to zero, and a `target` otherwise.
    A target encodes its own mask, which saves the memory of a second tensor: it is +0 (all bits 0) at a free entry
    and -0 at a bound entry that is drawn to zero.

    Attributes:
        mu: The penalty parameter μ; infinity means w = θ.
        target: Per weight, θ + λ/μ: the point that the bound entries are drawn to; +0 at the free ones.
        to_zero: Per weight, True where the entry is drawn to zero and False where it is free (bool).
    """

    mu: float
    target: Weights
    to_zero: Mapping[str, Tensor]

    @classmethod
    def none(cls) -> "Penalty":
        """A penalty that binds nothing: every entry is free."""
        return cls(math.inf, {}, {})

    @classmethod
    def towards(cls, theta: Weights, support: Mapping[str, Tensor], multipliers: Weights, mu: float) -> "Penalty":
        """The penalty that binds the entries outside of ``support`` to θ.

        Args:
            theta: The decompressed weights Δ(θ), by name.
            support: Per weight, True where the entry is free (bool). Weights without a mask are free.
            multipliers: The multipliers λ by name; 0 for weights without.
            mu: The penalty parameter μ.
        """
        target, to_zero = {}, {}
        for name, is_free in support.items():
            is_bound = ~is_free
            if name in multipliers:
                target[name] = _masked(torch.add(theta[name], multipliers[name], alpha=1 / mu), is_bound)
            elif (theta[name] * as_numbers(is_bound)).any():
                target[name] = _masked(theta[name].clone(), is_bound)
            else:
                to_zero[name] = is_bound
        return cls(mu, target, to_zero)

    @property
    def bound(self) -> dict[str, Tensor]:
        """Per weight, True where the entry is drawn to θ and False where it is free (bool)."""
        return {**self.to_zero, **{name: _is_bound(target) for name, target in self.target.items()}}

    def only(self, names: Collection[str]) -> "Penalty":
        """The penalty on the weights of these names."""
        target, to_zero = (
            {name: tensors[name] for name in tensors.keys() & names} for tensors in (self.target, self.to_zero)
        )
        return Penalty(self.mu, target, to_zero)

    def within(self, part_of: Callable[[str, Tensor], Tensor]) -> "Penalty":
        """The penalty on a part of each weight.

        Args:
            part_of: Maps a weight's name and a tensor of its shape to the part.

        Returns:
            The penalty, without the weights in whose part nothing is bound.
        """
        target, to_zero = (
            {name: part_of(name, whole) for name, whole in tensors.items()}
            for tensors in (self.target, self.to_zero)
        )
        return Penalty(
            self.mu,
            {name: part for name, part in target.items() if _is_bound(part).any()},
            {name: part for name, part in to_zero.items() if part.any()},
        )

    @torch.no_grad()
    def apply(self, weights: Weights, lr: float) -> None:
        """Takes one implicit gradient step: w ← w − ημ/(1 + ημ) (w − θ − λ/μ), at learning rate η, in place."""
        strength = 1.0 if math.isinf(self.mu) else lr * self.mu / (1 + lr * self.mu)
        # As w (1 - strength) + strength x target: w - target would need a temporary, and memory traffic dominates.
        if self.to_zero:
            drawn = [weights[name] for name in self.to_zero]
            torch._foreach_addcmul_(drawn, drawn, list(map(as_numbers, self.to_zero.values())), -strength)
        for name, target in self.target.items():
            for w, point in zip(_pieces(weights[name]), _pieces(target), strict=True):
                w.addcmul_(w, as_numbers(_is_bound(point)), value=-strength).add_(point, alpha=strength)

    @torch.no_grad()
    def multipliers(self, weights: Weights) -> Weights:
        """The updated multipliers λ ← λ − μ(w − θ) after an L step, by weight with bound entries; 0 at free ones.

        At the L step's minimum they are the gradient of the loss at the bound entries. There are none at μ = ∞,
        where w = θ.
        """
        if math.isinf(self.mu):
            return {}
        to_target = {name: self.target.get(name, 0) - weights[name] for name in (*self.to_zero, *self.target)}
        return {name: to_target[name].mul_(as_numbers(bound)).mul_(self.mu) for name, bound in self.bound.items()}


def _masked(target: Tensor, is_bound: Tensor) -> Tensor:
    """Encodes the mask in a target, in place: +0 where an entry is free, -0 where one is drawn to zero."""
    bits, bound = _bits(target), as_numbers(is_bound)
    bits.mul_(bound)
    bits.add_(bound ^ as_numbers(bits.bool()), alpha=torch.iinfo(bits.dtype).min)  # sets the sign bit
    return target


def _is_bound(target: Tensor) -> Tensor:
    return _bits(target).bool()


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])


def _pieces(w: Tensor) -> Sequence[Tensor]:
    """Views of a weight, split along its first dimension, that fit in a CPU's cache."""
    if w.device.type != "cpu" or w.numel() <= IN_CACHE:
        return [w]
    return w.chunk(math.ceil(w.numel() / IN_CACHE))


@dataclass(frozen=True)
class Snapshot:
    """The state of a `Learner`: all that its training continues from.

    Attributes:
        tensors: The model's (``model/…``), the optimizer's (``optimizer/…``), and the states of the random
            number generators (``rng/…``).
        numbers: Gradient steps taken, the factor on the learning rate, full passes over the training data, and
            batches of the current pass; in fp16 the state of the loss scaler (``scaler/…``).
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float]

    def under(self, kind: str) -> Weights:
        """The tensors of one kind (``"model"``, ``"optimizer"``, ``"rng"``), by name."""
        return {
            name.removeprefix(f"{kind}/"): t for name, t in self.tensors.items() if name.startswith(f"{kind}/")
        }


class Learner:
    """Trains a model in place: steps of SGD or AdamW on the task's loss, each followed by a step on a penalty.

    Args:
        recipe: The hyperparameters.
        model: Trained in place.
        task: The data, the loss, and the dense model as the teacher.
        seed: Seeds the order of the batches.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, task: Task, seed: int) -> None:
        self.recipe, self._task, self._seed = recipe, task, seed
        self._device = device_of(model)
        self._precision = _precision(recipe.precision, self._device)
        self._scaler = torch.amp.GradScaler(self._device.type) if self._precision == "fp16" else None
        self._set_model(model)
        self._train = kept_on(task.train, self._device)
        self._team = team()
        self._team.begin(recipe, model, task, seed)
        self._stream = self._serve(0, 0)

    def _set_model(self, model: nn.Module) -> None:
        recipe = self.recipe
        self.model = model.train()
        self.weights: Weights = dict(model.named_parameters())
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if recipe.compile else model
        self.descent = Descent(
            model,
            recipe.n_steps(self._task.train),
            recipe.peak_lr,
            optimizer=recipe.optimizer,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            scaler=self._scaler,
        )

    def of(self, model: nn.Module) -> "Learner":
        """A learner of another model that goes on with the same stream of batches; its optimizer is new."""
        other = copy.copy(self)
        other._set_model(model)
        return other

    def _serve(self, epoch: int, position: int) -> TaughtStream:
        teacher = self._task.model if self.recipe.distill else None
        return TaughtStream(self._train, teacher, self._seed, epoch, position, share=self._team.share)

    def l_step(self, steps: int, penalty: Penalty) -> float:
        """Takes gradient steps under ``penalty``; returns their mean loss (without the penalty).

        Gradients are clipped at the recipe's norm, but at `MAX_GRADIENT` in an L step of one gradient step with a
        finite μ: a weight that overshoots its target would not come back before the next C step.

        Raises:
            FloatingPointError: If the training diverged, see `Descent`.
        """
        is_hasty = steps == 1 and math.isfinite(penalty.mu)
        self.descent.max_gradient = MAX_GRADIENT if is_hasty else self.recipe.max_gradient or MAX_GRADIENT
        total, seen = torch.zeros((), device=self._device), 0
        with self._team.in_step(self.model):
            self._tell_others(steps, penalty)
            for x, y, taught in itertools.islice(self._stream, steps):
                loss = self._team.weigh(self._loss(x.to(self._device), y.to(self._device), taught), len(y))
                average = partial(self._team.average, samples=len(y))
                penalty.apply(self.weights, self.descent.step(loss, average))
                total += loss.detach()
                seen += len(y)
            self._team.average([total], samples=seen / max(1, steps))
        return float(total) / max(1, steps)

    def _tell_others(self, steps: int, penalty: Penalty) -> None:
        """Sends this L step, and the state that it starts from, to the other processes of the trial."""
        if not self._team.leads:
            return
        state = self.snapshot()
        tensors = {name: t for name, t in state.tensors.items() if not name.startswith("rng/")}
        large = [*tensors.values(), *penalty.target.values(), *penalty.to_zero.values()]
        self._team.tell((Snapshot(tensors, state.numbers), steps, penalty), large)

    def follow(self, l_step: tuple[Snapshot, int, Penalty]) -> None:
        """Takes an L step that rank 0 has sent: the state that it starts from, its gradient steps, its penalty."""
        snapshot, steps, penalty = l_step
        self.restore(snapshot)
        self.l_step(steps, penalty)

    def _loss(self, x: Tensor, y: Tensor, taught: Tensor | None) -> Tensor:
        lower = DTYPES.get(self._precision)
        with torch.autocast(self._device.type, lower) if lower else nullcontext():
            logits = self._forward(x)
        loss = self._task.loss(logits.float(), y)
        if taught is None:
            return loss
        distilled = distillation_loss(
            logits.float(), taught.to(self._device), self.recipe.temperature, several_labels=y.ndim == 2
        )
        return (1 - self.recipe.distill) * loss + self.recipe.distill * distilled

    def evidence(self, *, last: bool = False, provisional: bool = False) -> Evidence:
        """What a scheme may look at before a C step, see `autocompress.scheme.Evidence`."""
        moments = self.descent.gradient_moments
        return Evidence(self.model, self._some_batches, self._task.loss, moments, last, provisional)

    def _some_batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        for x, y in itertools.islice(self._task.train.batches(generator), EVIDENCE_BATCHES):
            yield x.to(self._device), y.to(self._device)

    def snapshot(self) -> Snapshot:
        """A copy of the state of the training, on the model's device."""
        rng = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self._device)
        kinds = {"model": self.model.state_dict(), "optimizer": self.descent.state_dict(), "rng": rng}
        tensors = {f"{kind}/{name}": t.detach().clone() for kind, ts in kinds.items() for name, t in ts.items()}
        batches = self._stream.batches
        numbers = {
            "taken": self.descent.taken,
            "slowed": self.descent.slowed,
            "epoch": batches.epoch,
            "position": batches.position,
        }
        if self._scaler is not None:
            numbers |= {f"scaler/{name}": value for name, value in self._scaler.state_dict().items()}
        return Snapshot(tensors, numbers)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Continues from a `snapshot`; None changes nothing.

        A snapshot without numbers (`autocompress.learning.state.State.warm`) restores the model's tensors alone.
        """
        if snapshot is None:
            return
        self.model.load_state_dict(snapshot.under("model"))
        if not snapshot.numbers:
            return
        numbers = snapshot.numbers
        self.descent.load_state_dict(snapshot.under("optimizer"), int(numbers["taken"]), numbers["slowed"])
        epoch, position = int(numbers["epoch"]), int(numbers["position"])
        if (epoch, position) != (self._stream.batches.epoch, self._stream.batches.position):
            self._stream = self._serve(epoch, position)
        if self._scaler is not None:
            default = self._scaler.state_dict()
            self._scaler.load_state_dict({name: numbers.get(f"scaler/{name}", default[name]) for name in default})
        rng = snapshot.under("rng")
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"].cpu())
        if self._device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self._device)


def _precision(asked: Precision, device: torch.device) -> Precision:
    """The precision asked for; for ``"auto"`` bf16 on a GPU that computes in it, fp32 elsewhere."""
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
