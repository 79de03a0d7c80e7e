"""Quantization to 8 bits: a quarter of the bytes, and integer arithmetic in runtimes that support it."""

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

# With fewer bits weights are drawn to their grid while they are trained. With as many or more they are rounded at
# the end, which costs less accuracy than binding them in training (digits at 5% and 4 bits: 97.7% against 96.5%).
COARSE = 4


@dataclass(frozen=True)
class Integers:
    """The facts of a model for quantization to integers.

    Attributes:
        axes: For each weight that becomes integers the dimension of its output channels.
        traced: The model's graph.
        points: The operators whose outputs become integers, as indices into
            `autocompress.schemes.integer_graph.operators`.
        example_input: A batch of one sample.
        steps: Scale and zero point of each of these outputs; empty until data was observed.
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

    Weights lie on a symmetric grid per output channel, the one with the least squared error; activations lie on an
    affine grid per tensor, between the least and the largest value seen on training data (Jacob et al.,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
    The realized module computes in float32 what integers compute; the ONNX file computes in integers.

    Args:
        bits: Bits of a weight, 2 to 8. They are stored in 8; fewer lose more, and 7 cannot saturate the 16-bit
            sums of x86 processors without VNNI.
    """

    bits: int = 8
    takes_density: ClassVar[bool] = False
    # Rounding activations to 255 steps adds errors of up to a step in every layer; an error in the graph changes
    # outputs by as much as their own size.
    tolerance: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits!r}; a weight has 2 to 8 bits")

    @property
    def hard(self) -> bool:
        """Whether weights are rounded at the end alone; with fewer than 4 bits they are drawn to their grid."""
        return self.bits >= COARSE

    def check_parts(self, parts: tuple[Scheme, ...]) -> None:
        """Checks that it comes last, behind schemes that leave the network's operators as `analyze` found them.

        Raises:
            ValueError: If it does not.
        """
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
        """Traces the model, and finds the weights and activations that can become integers.

        Raises:
            ValueError: If the model cannot be traced, or no weight can.
        """
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
        """Records the ranges of the activations on the training batches, at the end of training alone."""
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
    """Scale and zero point of the grid of 255 steps from ``low`` ≤ 0 to ``high`` ≥ 0, which has a point at 0."""
    scale = float(np.float32((high - low) / LEVELS)) or 1.0
    return scale, round(-low / scale)
