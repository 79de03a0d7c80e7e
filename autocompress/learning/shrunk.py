"""Training what is left: where whole channels are gone for good, on the network without them.

A channel that is masked costs as much as any other. The network that a scheme realizes computes what the masked
one does: gradient steps on it are the same but for rounding, and cost what is left of the arithmetic.
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

EXACT = 2**24  # whole numbers up to which float32 has them all


@dataclass(frozen=True)
class Slices:
    """Where the tensors of a smaller network are in those of a larger one.

    Attributes:
        kept: By name, the indices along each dimension of the larger tensor. What is not named is no slice and is
            the same in both: a count of batches, for instance.
    """

    kept: Mapping[str, tuple[Tensor, ...]]

    def of(self, name: str, whole: Tensor) -> Tensor:
        """A copy of the slice of a tensor."""
        whole = part = whole.detach()
        for dim, indices in enumerate(self.kept.get(name, ()) if whole.dim() else ()):
            part = part.index_select(dim, indices) if len(indices) < whole.shape[dim] else part
        return whole.clone() if part is whole else part

    @torch.no_grad()
    def put(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Writes a slice back into its tensor."""
        if name in self.kept and whole.dim():
            whole[torch.meshgrid(*self.kept[name], indexing="ij")] = part
        else:
            whole.copy_(part)


class Shrunk:
    """Takes the L steps of a learner, those at μ = ∞ on as much of its network as is left.

    That is so where the scheme is hard, see `autocompress.scheme.Hard`, and what it realizes consists of slices of
    the learner's tensors. Of a composition the first part is realized. A network that is compiled, or trained by
    several processes, is trained whole: each new shape would have to be compiled, or sent.

    Args:
        scheme: Says what is left.
        learner: Whose steps they are. After each L step its model and its optimizer stand where they would.
    """

    def __init__(self, scheme: Scheme, learner: Learner) -> None:
        self._learner, self._scheme = learner, scheme
        first = parts_of(scheme)[0]
        may_shrink = is_hard(first) and first.takes_density
        self._is_possible = may_shrink and not learner.recipe.compile and team().size == 1

    def l_step(self, steps: int, penalty: Penalty, plan: Mapping[str, Any], facts: Facts) -> float:
        """Takes gradient steps under ``penalty``, see `Learner.l_step`.

        Args:
            steps: How many.
            penalty: At μ = ∞ it binds all that the plan leaves out.
            plan: What the scheme takes out, see `autocompress.scheme.Theta`.
            facts: What the scheme found out about the network.
        """
        learner = self._learner
        if not math.isinf(penalty.mu):
            return learner.l_step(steps, penalty)
        penalty.apply(learner.weights, lr=1.0)
        left = self._left(plan, facts)
        if left is None:
            return learner.l_step(steps, penalty)
        model, slices = left
        before, after = _tensors(learner.model), _tensors(model)
        for name, tensor in after.items():
            tensor.data = slices.of(name, before[name])
        smaller = learner.of(channels_last(model))
        smaller.descent.take_over(learner.descent, slices.of)
        loss = smaller.l_step(steps, penalty.within(slices.of))
        for name, tensor in after.items():
            slices.put(name, tensor, before[name])

        def whole(name: str, part: Tensor) -> Tensor:
            found = torch.zeros_like(before[name], dtype=part.dtype) if part.dim() else part.clone()
            slices.put(name, part, found)
            return found

        learner.descent.take_over(smaller.descent, whole)
        return loss

    def _left(self, plan: Mapping[str, Any], facts: Facts) -> tuple[nn.Module, Slices] | None:
        """The network without what is gone; None where it is no smaller, or does not consist of slices."""
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
                if (found := _slice(numbers.detach(), whole[name].shape)) is None:
                    return None
                kept[name] = found
            elif not torch.equal(numbers, whole[name]):  # of other channels, for instance
                return None
            is_smaller |= numbers.shape != whole[name].shape
        return (model, Slices(kept)) if is_smaller else None


def _numbered(model: nn.Module) -> nn.Module:
    """A copy in which each number is its position in its tensor."""
    numbered = copy.deepcopy(model)
    for t in _tensors(numbered).values():
        if t.is_floating_point():
            dtype = torch.float32 if t.numel() <= EXACT else torch.float64
            t.data = torch.arange(t.numel(), dtype=dtype, device=t.device).view(t.shape)
    return numbered


def _slice(numbers: Tensor, shape: torch.Size) -> tuple[Tensor, ...] | None:
    """The indices along each dimension, of positions in a tensor of this shape; None where they are no slice."""
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
