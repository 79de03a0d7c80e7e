"""Block pruning: rectangles of weights become zero together, which kernels for sparse matrices can skip."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.scheme import Evidence, Theta, Weights, as_numbers, density_error, register_scheme

from .criteria import check_criterion, entry_scores, observe_entries
from .patterns import checked_skip
from .prune import PatternCriterion, Patterned, prunable_weights
from .ranking import rising_order


@register_scheme
@dataclass(frozen=True)
class BlockPrune:
    """Sets blocks of weights to zero, those that matter least in the whole network.

    A block spans outputs x inputs of a linear layer (Narang et al., "Block-Sparse Recurrent Neural Networks",
    2017; Gray et al., "GPU Kernels for Block-Sparse Weights", 2017). In a convolution it lies within one
    position of the kernel, so that the matrix of the implicit matrix product, channels innermost, has the same
    blocks. Blocks at the far edges are smaller where the shape is no multiple of the block. Biases and
    normalisation are kept and count as parameters; the classifier is pruned like any other layer.

    Args:
        block: Outputs and inputs that a block spans.
        criterion: The importance of a weight, see `autocompress.schemes.criteria.entry_scores`; a block's is
            the mean. With ``l2`` and blocks of one size the C step is the Euclidean projection.
        min_keep: Blocks that every layer keeps at least.
        skip: Layers that are left whole: names of modules, globs or types, as ``["conv1", "Linear"]``.
    """

    block: tuple[int, int] = (4, 4)
    criterion: PatternCriterion = "l2"
    min_keep: int = 1
    skip: Sequence[str] = ()
    takes_density: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        sizes = self.block if isinstance(self.block, tuple) else ()
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"block={self.block!r}; it must be two positive numbers, as in (4, 4)")
        check_criterion(self, self.criterion, get_args(PatternCriterion))
        object.__setattr__(self, "skip", checked_skip(self.skip))
        if self.min_keep < 1:
            raise ValueError(f"min_keep={self.min_keep}; every layer must keep at least 1 block")

    def analyze(self, model: nn.Module, example_input: Tensor) -> Patterned:
        """Finds the weights of linear and convolutional layers that have more than ``min_keep`` blocks."""
        shapes = {name: w.shape for name, w in prunable_weights(model, self.skip).items()}
        shapes = {name: shape for name, shape in shapes.items() if len(self._sizes(shape)) > self.min_keep}
        if not shapes:
            raise ValueError("BlockPrune finds no weights in this model that are larger than a block")
        return Patterned(shapes, sum(p.numel() for p in model.parameters()))

    def observe(self, evidence: Evidence, facts: Patterned) -> Patterned:
        """Looks at gradients, if the criterion needs them."""
        return replace(facts, observed=observe_entries(self.criterion, evidence, facts.shapes))

    def lowest_density(self, facts: Patterned) -> float:
        """The density at which every layer has ``min_keep`` of its largest blocks left."""
        removable = (self._sizes(shape).sort().values[: -self.min_keep] for shape in facts.shapes.values())
        return (facts.n_params - sum(int(sizes.sum()) for sizes in removable)) / facts.n_params

    def pi(self, weights: Weights, density: float, facts: Patterned) -> Theta:
        """Removes the blocks of the lowest mean score until what is left fits ``density``."""
        entries = entry_scores(self.criterion, weights, facts.shapes, facts.observed)
        scores, sizes = [], []
        for name, shape in facts.shapes.items():
            size = self._sizes(shape)
            score = self._sums(entries[name]).flatten().cpu() / size
            score[self._always_kept(score, size)] = torch.inf
            scores.append(score)
            sizes.append(size)
        ranked = torch.cat(scores)
        order = rising_order(ranked)[: int(ranked.isfinite().sum())]
        left = facts.n_params - torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(sizes)[order].cumsum(0)])
        fits = left.double() / facts.n_params <= density
        if not fits.any():
            raise density_error(density, self.lowest_density(facts))
        # Blocks that are zero already are always removed: it costs nothing, and makes pi idempotent.
        n_removed = max(int(fits.int().argmax()), int((ranked == 0).sum()))
        stays = torch.ones(len(ranked), dtype=torch.bool)
        stays[order[:n_removed]] = False
        parts = torch.split(stays, [len(size) for size in sizes])
        kept = {
            name: self._per_weight(part, shape).to(weights[name].device)
            for (name, shape), part in zip(facts.shapes.items(), parts, strict=True)
        }
        values = {name: w * as_numbers(kept[name]) if name in kept else w.clone() for name, w in weights.items()}
        return Theta(values, kept, int(left[n_removed]))

    def delta(self, theta: Theta) -> Weights:
        """The weights, zero where blocks were removed."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Patterned) -> nn.Module:
        """A copy: the zeros are in the weights, and the saved file does not store them."""
        return copy.deepcopy(model)

    def _sums(self, weight: Tensor) -> Tensor:
        """Sums over the blocks of a weight (out, in, ...): shape (blocks out, blocks in, kernel positions)."""
        height, width = self.block
        entries = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        m, n, positions = entries.shape
        if m % height or n % width:
            entries = functional.pad(entries, (0, 0, 0, -n % width, 0, -m % height))
        rows = entries.reshape(-(-m // height), height, -1).sum(1)
        return rows.view(len(rows), -(-n // width), width, positions).sum(2)

    def _sizes(self, shape: torch.Size) -> Tensor:
        """The number of entries in each block of a weight, shape (blocks,)."""
        tall, wide = (
            torch.arange(0, n, size).neg().add(n).clamp_max(size)
            for n, size in zip(shape[:2], self.block, strict=True)
        )
        return (tall[:, None, None] * wide[:, None]).expand(-1, -1, shape[2:].numel()).flatten()

    def _always_kept(self, score: Tensor, size: Tensor) -> Tensor:
        """The ``min_keep`` blocks of a layer that are never removed, as indices.

        They are the best among the largest, so that the lowest density does not depend on the scores.
        """
        least = size.topk(self.min_keep).values[-1]
        larger, as_large = (size > least).nonzero()[:, 0], (size == least).nonzero()[:, 0]
        best = score[as_large].topk(self.min_keep - len(larger)).indices
        return torch.cat([larger, as_large[best]])

    def _per_weight(self, per_block: Tensor, shape: torch.Size) -> Tensor:
        """A vector of one value per block as a tensor of one value per entry, of the weight's shape."""
        height, width = self.block
        m, n = shape[:2]
        blocks = per_block.view(-(-m // height), -(-n // width), -1)
        return blocks.repeat_interleave(height, 0)[:m].repeat_interleave(width, 1)[:, :n].reshape(shape)
