"""One trial in several processes, which torchrun starts: each trains on its share of every batch.

The first process, rank 0, does what it would do alone: it searches, compresses, judges and writes. The others help
in L steps only. Before each one rank 0 sends them where the training stands; in it all of them take the same
gradient steps, by the mean gradient of the whole batch and with BatchNorm's statistics of the whole batch. So a
trial takes the steps that it takes in one process, and all that is decided is decided once.
"""

import copy
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.processes.parcel import pack, unpack
from autocompress.splits import Batch, Split
from autocompress.task import Task, device_of

# The others wait while rank 0 does all else, for hours. That a process has died is told by its connections.
PATIENCE = timedelta(days=365)


class LostProcessError(RuntimeError):
    """A process of the team has ended, or no longer takes the steps that the others take."""


class Pupil(Protocol):
    """What learns in every process: see `autocompress.learning.learner.Learner`."""

    def follow(self, told: Any) -> None:
        """Takes an L step as rank 0 takes it."""


class Team:
    """The processes that train together; one that is alone is a team of one, and does nothing of this.

    Args:
        rank: The place of this process; 0 leads.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._held: list[Any] = [None]  # the training data, which is sent when it is another
        self._broken = ""

    @property
    def leads(self) -> bool:
        """Whether this is the process that sends, and there is one to send to."""
        return self.size > 1 and self.rank == 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever starts a study should know of the team."""
        if self.size == 1:
            return ()
        return (f"each trial trains in {self.size} processes, with a share of every batch in each",)

    # Between L steps: rank 0 sends, the others receive.

    def begin(self, recipe: Any, model: nn.Module, task: Task, seed: int) -> None:
        """Has the others make the learner that rank 0 makes.

        Raises:
            ValueError: If the team cannot share the task's batches, or the device.
            LostProcessError: If a process has ended.
        """
        if not self.leads:
            return
        device, smallest = device_of(model), min(task.train.batch_size, task.train.n_samples)
        if smallest < self.size:
            raise ValueError(f"batches of {smallest} samples cannot be shared by {self.size} processes")
        _check_gpus(device)
        if self._held[0] is not task.train:
            self._held = [None]
            self._send("data", pack(task.train))
            self._held = [task.train]
        on_cpu = task.on("cpu")
        on_cpu.val = on_cpu.test = on_cpu.train  # which nobody trains on
        asked = recipe, copy.deepcopy(model).cpu(), on_cpu, seed, device.type
        self._send("learner", pack(asked, self._held))

    def tell(self, told: Any, tensors: Sequence[Tensor]) -> None:
        """Has the others take an L step.

        Args:
            told: For `Pupil.follow`.
            tensors: Those in it that are large; they go from device to device.
        """
        if self.leads:
            self._send("step", pack(told, tensors), tensors)

    def _send(self, name: str, data: bytes, tensors: Sequence[Tensor] = ()) -> None:
        if self._broken:
            raise LostProcessError(f"the processes fell out of step when one said {self._broken}")
        self._broken = "that it was interrupted"
        metadata = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
        _collectively(dist.broadcast_object_list, [name, data, metadata], 0)
        for tensor in tensors:
            _collectively(dist.broadcast, tensor.detach().contiguous(), 0)
        self._broken = ""

    def serve(self, make: Callable[..., Pupil]) -> None:
        """What the others do: learners are made, and take their steps, as rank 0 says, until it ends."""
        pupil: Pupil | None = None
        while True:
            message: list[Any] = [None, b"", []]
            _collectively(dist.broadcast_object_list, message, 0)
            name, data, metadata = message
            tensors = [torch.empty(shape, dtype=dtype, device=kind) for shape, dtype, kind in metadata]
            for tensor in tensors:
                _collectively(dist.broadcast, tensor, 0)
            if name == "end":
                return
            if name == "data":
                self._held = [unpack(data)]
            elif name == "learner":
                recipe, model, task, seed, kind = unpack(data, self._held)
                pupil = make(recipe, model.to(kind), task.on(kind), seed)
            elif pupil is not None:
                try:
                    pupil.follow(unpack(data, tensors))
                except FloatingPointError:  # rank 0 has it as well, and gives the trial up
                    pupil = None

    def end(self) -> None:
        """Lets the others go."""
        if self.leads and not self._broken:
            self._send("end", b"")

    # In an L step: all do the same.

    @contextmanager
    def in_step(self, model: nn.Module) -> Iterator[None]:
        """An L step of ``model``: its BatchNorm sees the whole batch.

        What ends it in one process alone leaves the others where they are: nothing can be sent any more.
        """
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm)] if self.size > 1 else []
        for layer in layers:
            vars(layer)["forward"] = partial(_normalize, self, layer)
        try:
            yield
        except FloatingPointError:  # the gradient is that of all, and so is this
            raise
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise
        finally:
            for layer in layers:
                del vars(layer)["forward"]

    def share(self, split: Split) -> Split:
        """The split with this process's share of every batch; those that read samples read no others."""
        if self.size == 1:
            return split
        own: Callable[[int, int], Split] | None = getattr(split, "share", None)
        return own(self.rank, self.size) if own else Share(split, self.rank, self.size)

    def weigh(self, loss: Tensor, samples: int) -> Tensor:
        """The loss as a sum over this process's samples, which `average` makes a mean over all of them.

        The gradient must be one of that sum from the beginning: through BatchNorm each sample acts on all others.
        """
        return loss * samples if self.size > 1 else loss

    def average(self, tensors: Sequence[Tensor], samples: float) -> None:
        """Replaces sums over this process's samples with means over all samples; changes nothing in one alone."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([*(t.flatten() for t in tensors), tensors[0].new_tensor([samples])])
        _collectively(dist.all_reduce, flat)
        means = torch.split(flat[:-1] / flat[-1], [t.numel() for t in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


@dataclass(frozen=True)
class Share:
    """A split with every ``size``-th sample of each batch, from the one numbered ``rank`` on."""

    split: Split
    rank: int
    size: int

    @property
    def n_samples(self) -> int:
        """How many samples the split holds, for all processes."""
        return self.split.n_samples

    @property
    def batch_size(self) -> int:
        """Samples in a full batch, for all processes."""
        return self.split.batch_size

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, see `autocompress.splits.Split.batches`."""
        for x, y in self.split.batches(generator):
            yield x[self.rank :: self.size], y[self.rank :: self.size]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        _collectively(dist.all_reduce, total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        _collectively(dist.all_reduce, total)
        return total


def _normalize(team: Team, layer: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm by the mean and variance of the batch of all processes; in eval mode as ever.

    torch's SyncBatchNorm does this on GPUs only. The variance is put together from those of the shares and the
    distances of their means (Chan et al., "Updating Formulae", 1979), which loses no digits.
    """
    if not layer.training and layer.track_running_stats:
        unchanged: Tensor = type(layer).forward(layer, x)
        return unchanged
    others = [dim for dim in range(x.ndim) if dim != 1]
    variance, mean = torch.var_mean(x.float(), others, correction=0)
    count = torch.full_like(mean, x.numel() / x.shape[1])
    mine = torch.stack([count, mean, variance])
    place = torch.arange(team.size, device=x.device) == team.rank
    counts, means, variances = _Sum.apply(place.view(-1, 1, 1) * mine).unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    _remember(layer, mean.detach(), (variance * total / (total - 1)).detach())
    scale = torch.rsqrt(variance + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = [1, -1, *(1 for _ in others[1:])]
    normal: Tensor = x.float() * scale.view(shape) + shift.view(shape)
    return normal.to(x.dtype)


@torch.no_grad()
def _remember(layer: _BatchNorm, mean: Tensor, unbiased_variance: Tensor) -> None:
    """Updates the running statistics."""
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return
    layer.num_batches_tracked += 1
    share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_(unbiased_variance.to(layer.running_var.dtype), share)


def _collectively(operation: Callable[..., Any], *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostProcessError(
            f"a process of torchrun's has ended ({reason}); what was finished is saved: --resume goes on with it"
        ) from error


def _check_gpus(device: torch.device) -> None:
    """That each process has the GPU of its own number."""
    if device.type != "cuda":
        return
    here, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if processes > here:
        raise ValueError(
            f"torchrun has started {processes} processes on a machine of {here} GPUs; start one for each"
        )
    if device.index not in (None, torch.cuda.current_device()):
        raise ValueError(f"device={device}; under torchrun each process takes the GPU of its number: cuda")


# The team of this process

_team = Team()


def team() -> Team:
    """The team that this process is in."""
    return _team


@contextmanager
def joined() -> Iterator[Team]:
    """For a ``with`` block, this process is in a team with the others that torchrun started."""
    global _team
    on_gpus = torch.cuda.is_available()
    if on_gpus and (place := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    _team = Team(dist.get_rank(), dist.get_world_size())
    if not _team.leads:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; rank 0 decides
    try:
        yield _team
    finally:
        _team.end()
        _team = Team()
        dist.destroy_process_group()
