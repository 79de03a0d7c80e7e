"""The peak memory of a forward pass."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.profiler import profile


def peak_bytes(run: Callable[[Tensor], object], x: Tensor) -> int:
    """The most bytes that a forward pass allocates at once, beyond its input and what was allocated before.

    Args:
        run: The model.
        x: A batch, on the model's device.
    """
    return _peak_bytes_cpu(run, x) if x.device.type == "cpu" else _peak_bytes_cuda(run, x)


def _peak_bytes_cuda(run: Callable[[Tensor], object], x: Tensor) -> int:
    """`peak_bytes` on a GPU: the peak that torch's allocator records."""
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    run(x)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


def _peak_bytes_cpu(run: Callable[[Tensor], object], x: Tensor) -> int:
    """`peak_bytes` on the CPU: the peak of the running sum of the allocator's events."""
    with _quiet_kineto(), profile(profile_memory=True) as record:
        run(x)
    assert record.kineto_results is not None, "the profiler has ended"
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events), default=0)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keeps Kineto, the profiler's library, from logging to stderr; it reads its log level at first use."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "6"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
