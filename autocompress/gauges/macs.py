"""Counts of a model that need no clock: its parameters, and the multiply-accumulates of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.task import device_of, evaluating


def count_params(model: nn.Module) -> int:
    """Parameters of a model, zeros included; one that is used twice counts once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulate operations of one sample's forward pass in eval mode.

    Counted are convolutions, matrix products, attention and recurrent layers, as modules or functions. Not
    counted is what does not multiply and add in pairs: normalization, pooling, activations.

    Args:
        model: Any model; its mode is left as it was.
        example_input: A batch of shape ``(n, ...)``; its first sample is used.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), _op_by_op(), counter:
        model(example_input[:1].to(device_of(model)))
    return counter.get_total_flops() // 2


@contextmanager
def _op_by_op() -> Iterator[None]:
    """Turns fused kernels off: those of attention and LSTMs hide their matrix products from the counter."""
    mha = torch.backends.mha
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    fast_attention, enabled = mha.get_fastpath_enabled(), [library.enabled for library in libraries]
    mha.set_fastpath_enabled(False)
    for library in libraries:  # not their flags(), which set precisions as well and warn about it
        library.enabled = False
    try:
        yield
    finally:
        mha.set_fastpath_enabled(fast_attention)
        for library, was in zip(libraries, enabled, strict=True):
            library.enabled = was
