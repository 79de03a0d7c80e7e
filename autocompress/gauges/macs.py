"""Counts that need no timing: a model's parameters, and the multiply-accumulates of its forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.task import device_of, evaluating


def count_params(model: nn.Module) -> int:
    """The number of a model's parameters, zeros included; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulate operations of one sample's forward pass in eval mode.

    It counts convolutions, matrix products, attention and recurrent layers, as modules or functions, and not
    operations without multiply-accumulates: normalization, pooling, activations.

    Args:
        model: Any model; it is not changed.
        example_input: A batch of shape ``(n, ...)``; its first sample is used.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), _op_by_op(), counter:
        model(example_input[:1].to(device_of(model)))
    return counter.get_total_flops() // 2


@contextmanager
def _op_by_op() -> Iterator[None]:
    """Disables fused kernels for a ``with`` block: in attention and LSTMs they hide products from the counter."""
    mha = torch.backends.mha
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    fast_attention, enabled = mha.get_fastpath_enabled(), [library.enabled for library in libraries]
    mha.set_fastpath_enabled(False)
    for library in libraries:  # their flags() would set precisions too, with a warning
        library.enabled = False
    try:
        yield
    finally:
        mha.set_fastpath_enabled(fast_attention)
        for library, was in zip(libraries, enabled, strict=True):
            library.enabled = was
