"""Quantization to 16 bits: half the bytes, and faster arithmetic on hardware that supports it."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autocompress.scheme import Theta, Weights, register_scheme
from autocompress.task import device_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class SixteenBit(nn.Module):
    """Runs a model in 16 bits behind a float32 interface: float32 in, float32 out.

    Args:
        inner: The model, its parameters and buffers in a 16-bit type.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """Float32 logits of a float32 batch, and any other outputs of the model, tensors in float32."""
        dtype = next(p.dtype for p in self.inner.parameters() if p.is_floating_point())
        return tree_map(_in_32_bits, self.inner(x.to(dtype) if x.is_floating_point() else x))


def _in_32_bits(output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) else output


@register_scheme
@dataclass(frozen=True)
class Quantize16:
    """Stores and computes everything in 16 bits: fp16 on a GPU, bf16 on a CPU, where it is the fast one.

    Args:
        dtype: ``"auto"``, ``"fp16"`` or ``"bf16"``.
    """

    dtype: Literal["auto", "fp16", "bf16"] = "auto"
    takes_density: ClassVar[bool] = False
    hard: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.05

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}; it must be auto, fp16 or bf16")

    def analyze(self, model: nn.Module, example_input: Tensor) -> str:
        """The 16-bit type, ``"fp16"`` or ``"bf16"``: the one asked for, or the one that suits the model's device.

        Raises:
            ValueError: If the model cannot compute in it.
        """
        on_cpu = device_of(model).type == "cpu"
        dtype = self.dtype if self.dtype != "auto" else "bf16" if on_cpu else "fp16"
        trial = SixteenBit(copy.deepcopy(model).to(DTYPES[dtype])).eval()
        try:
            with torch.inference_mode():
                trial(example_input.to(device_of(model)))
        except Exception as error:  # an operation without a kernel, or code that counts on float32
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"Quantize16 cannot run this model in {dtype}: {first}") from error
        return dtype

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
        """The model cast to 16 bits, behind a float32 interface."""
        wrapped = SixteenBit(copy.deepcopy(model).to(DTYPES[theta.plan["dtype"]]))
        wrapped.training = model.training  # the modules inside keep their modes
        return wrapped
