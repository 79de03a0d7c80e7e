"""L steps on the smaller network, where whole channels have been removed for good.

A masked channel costs as much arithmetic as any other. The realized network, which lacks these channels, computes
the same as the masked one; so gradient steps on it are the same, up to rounding, and cheaper.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.learning.learner import Learner, Penalty
from autocompress.learning.ranks import team
from autocompress.scheme import Facts, Scheme, Theta, Weights, is_hard, parts_of, realize_by_part
from autocompress.task import channels_last

EXACT = 2**24  # float32 represents all whole numbers up to it


@dataclass(frozen=True)
class Slices:
    """Which slices of a network's tensors the tensors of a smaller network are.

    Attributes:
        kept: By name, the indices along each dimension of the larger tensor. A tensor that is not named is the
            same in both networks: a count of batches, for instance.
    """

    kept: Mapping[str, tuple[Tensor, ...]]

    def of(self, name: str, whole: Tensor) -> Tensor:
        """A copy of the smaller network's slice of the tensor ``whole``."""
        whole = part = whole.detach()
        for dim, indices in enumerate(self.kept.get(name, ()) if whole.dim() else ()):
            part = part.index_select(dim, indices) if len(indices) < whole.shape[dim] else part
        return whole.clone() if part is whole else part

    @torch.no_grad()
    def put(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Writes the slice ``part`` back into the tensor ``whole``, in place."""
        if name in self.kept and whole.dim():
            whole[torch.meshgrid(*self.kept[name], indexing="ij")] = part
        else:
            whole.copy_(part)


class Shrunk:
    """Takes the L steps of a learner; those at μ = ∞ on the realized, smaller network where that is possible.

    It is possible where the scheme is hard, see `autocompress.scheme.Hard`, and the realized network's tensors are
    slices of the learner's. Of a composition only the first part is realized. A network that is compiled, or
    trained by several processes, is trained whole: each new shape would have to be compiled, or sent.

    Args:
        scheme: Realizes the smaller network.
        learner: Takes the steps. After each L step its model and optimizer are as if it had trained the whole
            network.
    """

    def __init__(self, scheme: Scheme, learner: Learner) -> None:
        self._learner, self._scheme = learner, scheme
        first = parts_of(scheme)[0]
        may_shrink = is_hard(first) and first.takes_density
        self._is_possible = may_shrink and not learner.recipe.compile and team().size == 1

    def l_step(self, steps: int, penalty: Penalty, plan: Mapping[str, Any], facts: Facts) -> float:
        """Takes gradient steps under ``penalty`` and returns their mean loss, see `Learner.l_step`.

        Args:
            steps: How many gradient steps.
            penalty: At μ = ∞ it binds everything that the plan removes.
            plan: What the scheme removes, see `autocompress.scheme.Theta`.
            facts: What the scheme found out about the network.
        """
        learner = self._learner
        if not math.isinf(penalty.mu):
            return learner.l_step(steps, penalty)
        penalty.apply(learner.weights, lr=1.0)
        realized = self._realized(plan, facts)
        if realized is None:
            return learner.l_step(steps, penalty)
        model, slices = realized
        large, small = _tensors(learner.model), _tensors(model)
        for name, tensor in small.items():
            tensor.data = slices.of(name, large[name])
        smaller = learner.of(channels_last(model))
        smaller.descent.take_over(learner.descent, slices.of)
        loss = smaller.l_step(steps, penalty.within(slices.of))
        for name, tensor in small.items():
            slices.put(name, tensor, large[name])

        def padded(name: str, part: Tensor) -> Tensor:
            whole = torch.zeros_like(large[name], dtype=part.dtype) if part.dim() else part.clone()
            slices.put(name, part, whole)
            return whole

        learner.descent.take_over(smaller.descent, padded)
        return loss

    def _realized(self, plan: Mapping[str, Any], facts: Facts) -> tuple[nn.Module, Slices] | None:
        """The smaller network, with any weights, and its slices; None if it is not smaller or has no slices.

        The slices are found by realizing a copy of the network in which each number is its own position.
        """
        if not self._is_possible:
            return None
        numbered, theta = _numbered(self._learner.model), Theta({}, {}, 0, plan)
        _, model = next(realize_by_part(self._scheme, numbered, theta, facts))
        whole, left = _tensors(self._learner.model), _tensors(model)
        if left.keys() != whole.keys():
            return None
        kept, is_smaller = {}, False
        for name, numbers in left.items():
            if numbers.dim() != whole[name].dim():
                return None
            if whole[name].is_floating_point():
                if (indices := _slice(numbers.detach(), whole[name].shape)) is None:
                    return None
                kept[name] = indices
            elif not torch.equal(numbers, whole[name]):  # an index table of other channels, for instance
                return None
            is_smaller |= numbers.shape != whole[name].shape
        return (model, Slices(kept)) if is_smaller else None


def _numbered(model: nn.Module) -> nn.Module:
    """A copy of a model in which each floating-point number is its position in its tensor."""
    numbered = copy.deepcopy(model)
    for t in _tensors(numbered).values():
        if t.is_floating_point():
            dtype = torch.float32 if t.numel() <= EXACT else torch.float64
            t.data = torch.arange(t.numel(), dtype=dtype, device=t.device).view(t.shape)
    return numbered


def _slice(numbers: Tensor, shape: torch.Size) -> tuple[Tensor, ...] | None:
    """The indices along each dimension of the slice that holds these positions of a tensor; None if none does.

    Args:
        numbers: Positions in the flattened tensor, in the slice's shape.
        shape: The tensor's shape.
    """
    positions, kept, expected = numbers.long(), [], torch.zeros((), dtype=torch.long, device=numbers.device)
    for dim, size in enumerate(shape):
        stride = math.prod(shape[dim + 1 :])
        indices = positions.movedim(dim, 0).reshape(positions.shape[dim], -1)[:, 0] // stride % size
        if (indices.diff() <= 0).any():
            return None
        kept.append(indices)
        expected = expected.unsqueeze(-1) + indices * stride
    return tuple(kept) if torch.equal(expected.to(numbers.dtype), numbers) else None


def _tensors(model: nn.Module) -> Weights:
    """The parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
