"""Writing an ExecuTorch file, for phones and the like, with XNNPACK's kernels; needs the extra ``executorch``."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

MAX_BATCH = 8  # the program plans its memory for as many samples


def check_executorch() -> None:
    """Checks that ExecuTorch is installed, without importing it.

    Raises:
        ValueError: If it is not; the message says how to install it.
    """
    if find_spec("executorch") is None:
        raise ValueError("executorch is not installed here; pip install 'autocompress[executorch]'")


def write_pte(model: nn.Module, batch: Tensor, path: Path) -> None:
    """Writes a model as an ExecuTorch program, delegated to XNNPACK, for batches of up to `MAX_BATCH`.

    Args:
        model: The model in eval mode on the CPU; it is not changed.
        batch: An input of at least two samples.
        path: The file to write.

    Raises:
        Exception: Any error of the exporter, for a model that it cannot convert.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    dynamic = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    program = torch.export.export(model, (batch,), dynamic_shapes=dynamic)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
