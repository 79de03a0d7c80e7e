"""N:M sparsity: of M consecutive inputs each output reads N, the pattern that sparse tensor cores compute with."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Scheme, Theta, Weights, as_numbers, describe, register_scheme

from .criteria import check_criterion, entry_scores, observe_entries
from .patterns import checked_skip
from .prune import PatternCriterion, Patterned, prunable_weights


@register_scheme
@dataclass(frozen=True)
class NMPrune:
    """Keeps the N most important of every M consecutive weights along the inputs (2:4 by default).

    Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021). In a convolution the M weights belong to
    consecutive input channels at one position of the kernel. Inputs beyond the last multiple of M are kept,
    and so are layers with fewer than M inputs (the first one, of an image's three colours). The pattern sets
    the density; there is none to search for. The zeros make the file smaller; the arithmetic is that of dense
    layers unless a runtime has sparse kernels. In a composition no scheme that removes weights can come before it.

    Args:
        n: Weights that are kept of every ``m``.
        m: Consecutive inputs that form a group.
        criterion: The importance of a weight, see `autocompress.schemes.criteria.entry_scores`.
        skip: Layers that are left whole: names of modules, globs or types, as ``["conv1", "Linear"]``.
    """

    n: int = 2
    m: int = 4
    criterion: PatternCriterion = "l1"
    skip: Sequence[str] = ()
    takes_density: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n < self.m):
            raise ValueError(
                f"n={self.n}, m={self.m}; n must be at least 1 and below m, whole numbers as in 2 of 4"
            )
        check_criterion(self, self.criterion, get_args(PatternCriterion))
        object.__setattr__(self, "skip", checked_skip(self.skip))

    def check_parts(self, parts: tuple[Scheme, ...]) -> None:
        """Checks that no scheme before it removes weights: they might be the same ones.

        Raises:
            ValueError: If one does.
        """
        before = parts[: next(i for i, part in enumerate(parts) if part is self)]
        for part in before:
            if part.takes_density or isinstance(part, NMPrune):
                raise ValueError(
                    f"NMPrune cannot come behind {describe(part)}, which removes weights itself; compose it with "
                    "schemes that quantize"
                )

    def analyze(self, model: nn.Module, example_input: Tensor) -> Patterned:
        """Finds the weights of linear and convolutional layers with at least ``m`` inputs."""
        shapes = {name: w.shape for name, w in prunable_weights(model, self.skip).items() if w.shape[1] >= self.m}
        if not shapes:
            raise ValueError(f"NMPrune finds no weights in this model with at least m={self.m} inputs")
        return Patterned(shapes, sum(p.numel() for p in model.parameters()))

    def observe(self, evidence: Evidence, facts: Patterned) -> Patterned:
        """Looks at gradients, if the criterion needs them."""
        return replace(facts, observed=observe_entries(self.criterion, evidence, facts.shapes))

    def lowest_density(self, facts: Patterned) -> float:
        """The density that the pattern sets."""
        return self._kept(facts) / facts.n_params

    def pi(self, weights: Weights, density: float, facts: Patterned) -> Theta:
        """Keeps the ``n`` most important of every ``m`` weights: by magnitude the nearest point in the pattern."""
        scores = entry_scores(self.criterion, weights, facts.shapes, facts.observed)
        support = {name: self._pattern(score) for name, score in scores.items()}
        values = {n: w * as_numbers(support[n]) if n in support else w.clone() for n, w in weights.items()}
        return Theta(values, support, self._kept(facts))

    def delta(self, theta: Theta) -> Weights:
        """The weights, zero where the pattern leaves them out."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Patterned) -> nn.Module:
        """A copy: the zeros are in the weights, and the saved file does not store them."""
        return copy.deepcopy(model)

    def _pattern(self, scores: Tensor) -> Tensor:
        """True at the ``n`` highest of every ``m`` scores along dimension 1, and beyond the last multiple of m.

        It compares each pair of the m, where the first of equal ones is higher; that is much faster than
        `torch.topk`.
        """
        whole = scores.shape[1] // self.m * self.m
        places = [scores[:, i : whole : self.m] for i in range(self.m)]
        higher = [torch.zeros_like(place, dtype=torch.int16) for place in places]
        for i, j in combinations(range(self.m), 2):
            is_first = places[i] >= places[j]
            higher[j] += is_first
            higher[i] += ~is_first
        kept = torch.ones_like(scores, dtype=torch.bool)
        for i, count in enumerate(higher):
            kept[:, i : whole : self.m] = count < self.n
        return kept

    def _kept(self, facts: Patterned) -> int:
        """Parameters that are left."""
        removed = 0
        for shape in facts.shapes.values():
            removed += shape.numel() // shape[1] * (shape[1] // self.m) * (self.m - self.n)
        return facts.n_params - removed
