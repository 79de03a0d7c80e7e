"""Quantization to 8 bits: a quarter of the bytes, and the integer arithmetic of runtimes that have it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from autocompress.scheme import Evidence, Scheme, Theta, Weights, describe, register_scheme
from autocompress.task import device_of

from .grid import dequantize_weight, quantize_weight
from .integer_graph import LEVELS, Ranges, find_layers, find_points, operators, with_integers
from .lowrank import LowRank
from .quantize import Quantize16
from .traced import trace

# With fewer bits weights are drawn to their grid while they are trained; with as many, what that costs them in
# freedom is more than rounding takes at the end (on digits, pruned to 5% at 4 bits: 96.5% against 97.7%).
COARSE = 4


@dataclass(frozen=True)
class Integers:
    """The facts of a model for integers.

    Attributes:
        axes: For each weight that becomes integers the dimension of its output channels.
        traced: The model's graph.
        points: The places of its operators whose outputs become integers.
        steps: Scale and zero point of each of them; empty as long as no data was seen.
        example_input: A batch of one sample.
    """

    axes: Mapping[str, int]
    traced: fx.GraphModule
    points: tuple[int, ...]
    example_input: Tensor
    steps: tuple[tuple[float, int], ...] = ()


@register_scheme
@dataclass(frozen=True)
class Quantize8:
    """Computes in 8-bit integers: linear and convolutional layers and what passes between them.

    Weights lie on a symmetric grid for each output channel, the one with the least squared error; activations
    on one affine grid a tensor, between the least and the largest value seen on training data (Jacob et al.,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
    The realized module computes in float32 what integers compute; the ONNX file computes in integers.

    Args:
        bits: Bits of a weight, 2 to 8. They are stored in 8; fewer lose more, and 7 cannot saturate the 16-bit
            sums of x86 processors without VNNI.
    """

    bits: int = 8
    takes_density: ClassVar[bool] = False
    # Activations in 255 steps a tensor are off by up to a step in every layer; an error in the graph moves the
    # outputs by as much as they are large.
    tolerance: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits!r}; a weight has 2 to 8 bits")

    @property
    def hard(self) -> bool:
        """Whether weights are rounded at the end alone; those of few bits have to be drawn to their grid."""
        return self.bits >= COARSE

    def check_parts(self, parts: tuple[Scheme, ...]) -> None:
        """Integers come last, in a network that still has the dense model's operators: there they were found."""
        if parts[-1] is not self:
            raise ValueError(
                f"Quantize8 must come last, not before {describe(parts[-1])}: nothing works on integers"
            )
        for part in parts[:-1]:
            if isinstance(part, LowRank | Quantize16):
                raise ValueError(
                    f"Quantize8 cannot come behind {describe(part)}, which puts other operators in a network; "
                    "compose it with schemes that prune"
                )

    def analyze(self, model: nn.Module, example_input: Tensor) -> Integers:
        """Traces the model and finds where integers can flow."""
        traced = trace(model, example_input)
        layers, left = find_layers(traced)
        names = {id(p): name for name, p in model.named_parameters()}
        canonical = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        axes = {canonical[layer.weight]: layer.axis for layer in layers}
        if not axes:
            raise ValueError("Quantize8 finds no linear or convolutional weights in this model")
        if left:
            why = "something else reads them too, their bias is computed, or they are transposed in groups"
            warnings.warn(f"left in float32 ({why}): {', '.join(left)}", stacklevel=2)
        places = {node: i for i, node in enumerate(operators(traced))}
        points = tuple(places[node] for node in find_points(traced, layers))
        return Integers(axes, traced, points, example_input[:1].detach().clone())

    def observe(self, evidence: Evidence, facts: Integers) -> Integers:
        """Notes between which values the activations of the training batches lie, at the end of training."""
        if not evidence.last:
            return facts
        device = device_of(evidence.model)
        ranges = Ranges(facts.traced, facts.points, evidence.model.state_dict())
        with torch.no_grad():
            for x, _ in evidence.batches():
                ranges.run(x.to(device))
        return replace(facts, steps=tuple(map(steps_between, ranges.lowest, ranges.highest)))

    def lowest_density(self, facts: Integers) -> float:
        """Every parameter is kept."""
        return 1.0

    def pi(self, weights: Weights, density: float, facts: Integers) -> Theta:
        """Moves each weight to the nearest point of its channel's grid."""
        values = {
            name: self._on_grid(w, facts.axes[name]) if name in facts.axes else w.clone()
            for name, w in weights.items()
        }
        kept = sum(w.numel() for w in weights.values())
        plan = {"bits": self.bits, "steps": [list(step) for step in facts.steps]}
        return Theta(values, {}, kept, plan, frozenset(facts.axes if self.bits < COARSE else ()))

    def _on_grid(self, weight: Tensor, axis: int) -> Tensor:
        return dequantize_weight(*quantize_weight(weight, axis, self.bits), axis).to(weight.dtype)

    def delta(self, theta: Theta) -> Weights:
        """The weights, on their grids."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Integers) -> fx.GraphModule:
        """The model's graph with integer weights, BatchNorm folded, and activations rounded to their steps.

        Raises:
            ValueError: If the activations were never observed.
        """
        steps: Any = [tuple(step) for step in theta.plan["steps"]]
        if not steps and facts.points:
            raise ValueError("Quantize8 must see training data before it realizes a model; call observe first")
        realized = with_integers(trace(model, facts.example_input), steps, theta.plan["bits"])
        realized.train(model.training)
        return realized


def steps_between(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of 255 steps over [low, high], zero among them."""
    scale = float(np.float32((high - low) / LEVELS)) or 1.0
    return scale, round(-low / scale)
