"""Writing an ONNX file: weights in as many bits as the model stores, arithmetic in float32 or 8-bit integers."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

HALVES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The type of fewer than 32 bits in which a model stores parameters; float32 if there is none."""
    return next((p.dtype for p in model.parameters() if p.dtype in (*HALVES, torch.int8)), torch.float32)


def capture(model: nn.Module, batch: Tensor) -> ExportedProgram:
    """A model's graph of operators, for batches of any size.

    Args:
        model: The model in eval mode.
        batch: An input of at least two samples, so that the batch size is not taken for a constant.

    Raises:
        Exception: Any error of `torch.export`, for a model that it does not support.
    """
    return torch.export.export(model, (batch,), dynamic_shapes=_any_batch())


def _any_batch() -> tuple[dict[int, Any], ...]:
    return ({0: torch.export.Dim("batch", min=1)},)


def write_onnx(model: nn.Module, batch: Tensor, path: Path, program: ExportedProgram | None = None) -> None:
    """Writes a model as ONNX: input ``input``, output ``logits``, any batch size.

    ONNX Runtime's CPU provider has no 16-bit convolution. So a 16-bit model is written as its float32 copy, and
    each weight that a 16-bit number represents exactly is stored as one, followed by a Cast to float32. The file
    is half as large, and ONNX Runtime does the casts once, when it loads the file.

    A model that simulates 8-bit integers is written with integers, see `autocompress.formats.onnx_integers`.

    Args:
        model: The model in eval mode on the CPU; it is not changed. Its float32 copy must compute in float32.
        batch: An input of at least two samples, so that the batch size is not taken for a constant.
        path: The file to write.
        program: The result of `capture` for the model, if it is there already: that saves a fifth of the time.

    Raises:
        Exception: Any error of the exporter, for a model that it cannot convert.
    """
    import onnx
    import onnxscript.optimizer

    from autocompress.formats.onnx_integers import dequantize_weights, quantize_activations

    dtype = weight_dtype(model)
    converted = torch.onnx.export(
        copy.deepcopy(model).float() if dtype in HALVES else program or model,
        (batch,),
        dynamo=True,
        verbose=False,
        optimize=False,
        dynamic_shapes=_any_batch(),
        input_names=["input"],
        output_names=["logits"],
    )
    assert converted is not None
    if dtype == torch.int8:
        proto = converted.model_proto
        dequantize_weights(proto.graph)  # before constant folding, which would turn the weights into floats
        proto = onnxscript.optimizer.optimize(proto)
    elif dtype == torch.float32:
        converted.optimize()
        proto = converted.model_proto
    else:
        # Simplified without fusing BatchNorm into the convolutions, whose weights would no longer be 16-bit
        # numbers. ONNX Runtime fuses them when it loads the file.
        onnxscript.optimizer.fold_constants(converted.model)
        onnxscript.optimizer.remove_unused_nodes(converted.model)
        proto = converted.model_proto
    _strip(proto)
    if dtype == torch.int8:
        quantize_activations(proto.graph)
    elif dtype in HALVES:
        _store_in_16_bits(proto.graph, dtype)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, path)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences exporters for a ``with`` block; errors are still raised.

    They print graphs, log hints, and warn of deprecations in their own code, which no user can act on.
    """
    logged = logging.root.manager.disable
    dropped = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(dropped), contextlib.redirect_stderr(dropped):
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logged)


def _strip(proto: Any) -> None:
    """Removes intermediate shapes, and metadata that quotes the user's source: runtimes need neither."""
    graph = proto.graph
    del graph.value_info[:]
    for item in (proto, graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        del item.metadata_props[:]
        item.doc_string = ""


def _store_in_16_bits(graph: Any, dtype: torch.dtype) -> None:
    """Stores each float32 initializer that ``dtype`` represents exactly in ``dtype``, followed by a Cast."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for i, stored in enumerate(graph.initializer):
        if stored.data_type != TensorProto.FLOAT or not stored.dims:
            continue
        values: Tensor = torch.from_numpy(numpy_helper.to_array(stored).copy())
        half = values.to(dtype)
        if not torch.equal(half.float(), values):
            continue
        name, bits = stored.name, half.view(torch.int16).numpy().tobytes()
        kind = getattr(TensorProto, HALVES[dtype])
        casts.append(helper.make_node("Cast", [f"{name}.16bit"], [name], to=TensorProto.FLOAT))
        graph.initializer[i].CopyFrom(helper.make_tensor(f"{name}.16bit", kind, stored.dims, bits, raw=True))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
