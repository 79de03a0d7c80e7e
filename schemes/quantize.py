"""Quantization to 16 bits: half the bytes, and the faster arithmetic of the hardware that has it."""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from autocompress.scheme import Theta, Weights, register_scheme
from autocompress.task import device_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class SixteenBit(nn.Module):
    """Runs a model in 16 bits behind an interface of 32: float32 in, float32 out.

    Args:
        inner: The model, its parameters and buffers in a 16-bit type.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Float32 logits of a float32 batch."""
        dtype = next(p.dtype for p in self.inner.parameters() if p.is_floating_point())
        logits: Tensor = self.inner(x.to(dtype))
        return logits.float()


@register_scheme
@dataclass(frozen=True)
class Quantize16:
    """Stores and computes everything in 16 bits: fp16 on a GPU, bf16 on a CPU, where it is the fast one.

    Args:
        dtype: ``"auto"``, ``"fp16"`` or ``"bf16"``.
    """

    dtype: Literal["auto", "fp16", "bf16"] = "auto"
    takes_density: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.05

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}; it must be auto, fp16 or bf16")

    def analyze(self, model: nn.Module, example_input: Tensor) -> str:
        """The type that suits the model's device."""
        if self.dtype != "auto":
            return self.dtype
        return "bf16" if device_of(model).type == "cpu" else "fp16"

    def lowest_density(self, facts: str) -> float:
        """Every parameter is kept."""
        return 1.0

    def pi(self, weights: Weights, density: float, facts: str) -> Theta:
        """Rounds every weight to the nearest 16-bit number."""
        values = {name: w.to(DTYPES[facts]) if w.is_floating_point() else w for name, w in weights.items()}
        return Theta(values, {}, sum(w.numel() for w in weights.values()), {"dtype": facts})

    def delta(self, theta: Theta) -> Weights:
        """The rounded weights in 32 bits."""
        return {name: w.float() if w.is_floating_point() else w for name, w in theta.values.items()}

    def realize(self, model: nn.Module, theta: Theta, facts: str) -> nn.Module:
        """The model cast to 16 bits, behind an interface of 32."""
        wrapped = SixteenBit(copy.deepcopy(model).to(DTYPES[theta.plan["dtype"]]))
        wrapped.training = model.training  # what is inside keeps its modes
        return wrapped
