"""Data-parallel trials: several processes, which torchrun starts, each train on a share of every batch.

Rank 0 does everything that it would do alone: it searches, compresses, evaluates and writes. The other ranks help
in L steps only. Before each L step rank 0 sends them the state of the training; then all ranks take the same
gradient steps, with the mean gradient and the BatchNorm statistics of the whole batch. So a trial takes the same
steps as in one process, and every decision is made once.
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

# The other ranks wait for hours while rank 0 does everything else; a dead process shows as a closed connection.
PATIENCE = timedelta(days=365)


class LostProcessError(RuntimeError):
    """A process of the team has ended, or fell out of step with the others."""


class Pupil(Protocol):
    """Takes L steps on the ranks other than 0: an `autocompress.learning.learner.Learner`."""

    def follow(self, l_step: Any) -> None:
        """Takes an L step that rank 0 has sent."""


class Team:
    """The processes that train together. A process alone is a team of one, whose methods do nothing.

    Args:
        rank: The rank of this process; 0 leads.
        size: The number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._held: list[Any] = [None]  # the training data that all ranks have; sent again only when it changes
        self._broken = ""  # why nothing can be sent any more

    @property
    def leads(self) -> bool:
        """Whether this is rank 0 of several processes."""
        return self.size > 1 and self.rank == 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a study tells its user about the team, in sentences."""
        if self.size == 1:
            return ()
        return (f"each trial trains in {self.size} processes, with a share of every batch in each",)

    # Between L steps: rank 0 sends, the others receive.

    def begin(self, recipe: Any, model: nn.Module, task: Task, seed: int) -> None:
        """Makes the other ranks create the same learner; see `autocompress.learning.learner.Learner`.

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
        on_cpu.val = on_cpu.test = on_cpu.train  # the other ranks never read them
        asked = recipe, copy.deepcopy(model).cpu(), on_cpu, seed, device.type
        self._send("learner", pack(asked, self._held))

    def tell(self, l_step: Any, tensors: Sequence[Tensor]) -> None:
        """Makes the other ranks take an L step.

        Args:
            l_step: The argument of their `Pupil.follow`.
            tensors: The large tensors in it; they are broadcast from device to device.
        """
        if self.leads:
            self._send("step", pack(l_step, tensors), tensors)

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
        """The loop of the other ranks: creates learners and takes L steps as rank 0 says, until it ends.

        Args:
            make: Creates a learner from the arguments of `begin`.
        """
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
                except FloatingPointError:  # rank 0 raises the same error, and gives the trial up
                    pupil = None

    def end(self) -> None:
        """Ends `serve` on the other ranks."""
        if self.leads and not self._broken:
            self._send("end", b"")

    # In an L step: all ranks do the same.

    @contextmanager
    def in_step(self, model: nn.Module) -> Iterator[None]:
        """For the ``with`` block of an L step, BatchNorm layers normalize by the batch of all processes.

        An error in one process alone leaves the others waiting in the step: nothing can be sent to them any more.
        """
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm)] if self.size > 1 else []
        for layer in layers:
            vars(layer)["forward"] = partial(_normalize, self, layer)
        try:
            yield
        except FloatingPointError:  # all ranks have the same gradient, and raise it together
            raise
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise
        finally:
            for layer in layers:
                del vars(layer)["forward"]

    def share(self, split: Split) -> Split:
        """The split with this process's share of every batch; one that reads files reads no other samples."""
        if self.size == 1:
            return split
        own: Callable[[int, int], Split] | None = getattr(split, "share", None)
        return own(self.rank, self.size) if own else Share(split, self.rank, self.size)

    def weigh(self, loss: Tensor, samples: int) -> Tensor:
        """A mean loss as a sum over this process's samples; `average` later divides by the samples of all.

        Gradients have to be taken of the sum: through BatchNorm each sample acts on the loss of all processes.
        """
        return loss * samples if self.size > 1 else loss

    def average(self, tensors: Sequence[Tensor], samples: float) -> None:
        """Replaces sums over this process's samples, in place, by means over the samples of all processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([*(t.flatten() for t in tensors), tensors[0].new_tensor([samples])])
        _collectively(dist.all_reduce, flat)
        means = torch.split(flat[:-1] / flat[-1], [t.numel() for t in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


@dataclass(frozen=True)
class Share:
    """A split with every ``size``-th sample of each batch, starting with sample ``rank``."""

    split: Split
    rank: int
    size: int

    @property
    def n_samples(self) -> int:
        """Samples in the split, of all processes."""
        return self.split.n_samples

    @property
    def batch_size(self) -> int:
        """Samples in a full batch, of all processes."""
        return self.split.batch_size

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, see `autocompress.splits.Split.batches`."""
        for x, y in self.split.batches(generator):
            yield x[self.rank :: self.size], y[self.rank :: self.size]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed over them as well."""

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
    """BatchNorm by the mean and variance of the batch of all processes; in eval mode it is unchanged.

    `torch.nn.SyncBatchNorm` does this on GPUs only. The variance is combined from the variances and means of the
    shares, which is numerically stable (Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979).
    """
    if not layer.training and layer.track_running_stats:
        unchanged: Tensor = type(layer).forward(layer, x)
        return unchanged
    others = [dim for dim in range(x.ndim) if dim != 1]
    variance, mean = torch.var_mean(x.float(), others, correction=0)
    count = torch.full_like(mean, x.numel() / x.shape[1])
    own = torch.stack([count, mean, variance])
    is_own = torch.arange(team.size, device=x.device) == team.rank
    counts, means, variances = _Sum.apply(is_own.view(-1, 1, 1) * own).unbind(1)  # a sum that gathers
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
    """Updates the running statistics of a layer."""
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return
    layer.num_batches_tracked += 1
    share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_(unbiased_variance.to(layer.running_var.dtype), share)


def _collectively(operation: Callable[..., Any], *arguments: Any) -> None:
    """Runs a collective operation; raises `LostProcessError` if a process has ended."""
    try:
        operation(*arguments)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostProcessError(
            f"a process of torchrun's has ended ({reason}); what was finished is saved: --resume goes on with it"
        ) from error


def _check_gpus(device: torch.device) -> None:
    """Checks that each process has the GPU of its own number."""
    if device.type != "cuda":
        return
    here, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if processes > here:
        raise ValueError(
            f"torchrun has started {processes} processes on a machine of {here} GPUs; start one for each"
        )
    if device.index not in (None, torch.cuda.current_device()):
        raise ValueError(f"device={device}; under torchrun each process takes the GPU of its number: cuda")


_team = Team()  # of this process


def team() -> Team:
    """The team of this process."""
    return _team


@contextmanager
def joined() -> Iterator[Team]:
    """Joins the team of the processes that torchrun started, for a ``with`` block."""
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
