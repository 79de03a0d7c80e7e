"""Training what is left: where whole channels are gone for good, on the network without them.

A channel that is masked costs as much as any other. The network that a scheme realizes computes what the masked
one does: gradient steps on it are the same but for rounding, and cost what is left of the arithmetic.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.learning.learner import Learner, Penalty
from autocompress.learning.ranks import team
from autocompress.learning.training import Descent
from autocompress.scheme import Compose, Facts, Scheme, Theta, Weights, is_hard, parts_of
from autocompress.task import channels_last


@dataclass(frozen=True)
class Slices:
    """Where the tensors of a smaller network are in those of a larger one.

    Attributes:
        positions: By name, of each entry in the flat tensor of the larger network. What is not named is no slice
            and is the same in both: a count of batches, for instance.
    """

    positions: Mapping[str, Tensor]

    def of(self, name: str, whole: Tensor) -> Tensor:
        """A copy of the slice of a tensor."""
        if name not in self.positions or not whole.dim():
            return whole.detach().clone()
        return whole.detach().flatten()[self.positions[name]]

    @torch.no_grad()
    def put(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Writes a slice back into its tensor."""
        if name not in self.positions or not whole.dim():
            whole.copy_(part)
            return
        flat = whole.flatten()  # a view, or a copy where the memory is in another order
        flat[self.positions[name].flatten()] = part.flatten()
        if flat.data_ptr() != whole.data_ptr():
            whole.copy_(flat.view(whole.shape))


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
        self._learner, self._part, self._is_composed = learner, parts_of(scheme)[0], isinstance(scheme, Compose)
        is_possible = is_hard(self._part) and not learner.recipe.compile and team().size == 1
        self._numbered = _numbered(learner.model) if is_possible else None

    def l_step(self, steps: int, penalty: Penalty, plan: Mapping[str, Any], facts: Facts) -> float:
        """Takes gradient steps under ``penalty``, see `Learner.l_step`.

        Args:
            steps: How many.
            penalty: At μ = ∞ it binds all that the plan leaves out.
            plan: What the scheme takes out, see `autocompress.scheme.Theta`.
            facts: What the scheme found out about the network.
        """
        learner = self._learner
        left = self._left(plan, facts) if math.isinf(penalty.mu) else None
        if left is None:
            return learner.l_step(steps, penalty)
        model, slices = left
        penalty.apply(learner.weights, lr=1.0)
        before, after = _tensors(learner.model), _tensors(model)
        for name, tensor in after.items():
            tensor.data = slices.of(name, before[name])
        smaller = learner.of(channels_last(model))
        _hand_over(learner.descent, smaller.descent, slices.of)
        loss = smaller.l_step(steps, penalty.within(slices.positions))
        for name, tensor in after.items():
            slices.put(name, tensor, before[name])

        def whole(name: str, part: Tensor) -> Tensor:
            found = torch.zeros_like(before[name], dtype=part.dtype) if part.dim() else part.clone()
            slices.put(name, part, found)
            return found

        _hand_over(smaller.descent, learner.descent, whole)
        return loss

    def _left(self, plan: Mapping[str, Any], facts: Facts) -> tuple[nn.Module, Slices] | None:
        """The network without what is gone; None where it is no smaller, or does not consist of slices."""
        if self._numbered is None:
            return None
        if self._is_composed:
            plan, facts = plan["parts"][0], facts[0]
        model = self._part.realize(self._numbered, Theta({}, {}, 0, plan), facts)
        whole, found = _tensors(self._learner.model), _tensors(model)
        if not found.keys() <= whole.keys():
            return None
        is_number = {name: t.is_floating_point() for name, t in whole.items()}
        positions = {name: t.detach().long() for name, t in found.items() if is_number[name]}
        are_slices = all(
            _is_slice(positions[name], t, whole[name]) if is_number[name] else t.shape == whole[name].shape
            for name, t in found.items()
        )
        is_smaller = any(at.numel() < whole[name].numel() for name, at in positions.items())
        return (model, Slices(positions)) if are_slices and is_smaller else None


def _numbered(model: nn.Module) -> nn.Module:
    """A copy in which each number is its position in its tensor."""
    numbered = copy.deepcopy(model)
    for t in _tensors(numbered).values():
        if t.is_floating_point():
            t.data = torch.arange(t.numel(), dtype=torch.float64, device=t.device).view(t.shape)
    return numbered


def _is_slice(positions: Tensor, numbers: Tensor, whole: Tensor) -> bool:
    """Whether numbers are positions in the whole, in their order."""
    is_rising = bool((positions.flatten().diff() > 0).all())
    return is_rising and torch.equal(positions.double(), numbers) and bool((positions < whole.numel()).all())


def _tensors(model: nn.Module) -> Weights:
    """The parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _hand_over(one: Descent, other: Descent, fitted: Callable[[str, Tensor], Tensor]) -> None:
    """Has another optimizer go on where one is, with what it keeps of each parameter, by name, made to fit."""
    state = {entry: fitted(entry.partition("/")[2], t) for entry, t in one.state_dict().items()}
    other.load_state_dict(state, one.taken, one.slowed)
    other.remembers = one.remembers
