"""Replacing simulated integers in an ONNX graph by QuantizeLinear and DequantizeLinear.

A traced network simulates integers in float arithmetic: a weight is an int8 tensor that is cast and multiplied by
its scales, a quantized activation is scale * clamp(round(x / scale), low, high). ONNX has operators for both, and
between these operators ONNX Runtime uses its integer kernels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
LAYERS = ("Conv", "Gemm")  # they take a bias as their third input


def dequantize_weights(graph: GraphProto) -> None:
    """Computes weights from integers and scales by DequantizeLinear; transposed ones are stored transposed."""
    editor = Editor(graph)
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        cast, scale = editor.maker(node.input[0]), editor.constant(node.input[1])
        integers = editor.constant(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
        if cast is None or integers is None or scale is None or integers.dtype != np.int8:
            continue
        for reader in editor.readers(node.output[0]):
            if reader.op_type == "Transpose":
                order = helper.get_node_attr_value(reader, "perm")
                _dequantize(editor, cast.input[0], integers.transpose(order), scale.transpose(order), reader)
        _dequantize(editor, cast.input[0], integers, scale, node)
    editor.finish()


def _dequantize(editor: "Editor", name: str, integers: Array, scale: Array, replaced: NodeProto) -> None:
    """Replaces a node by one that dequantizes ``integers``, with scales along one dimension."""
    axis = max(range(scale.ndim), key=lambda d: (scale.shape[d], integers.shape[d] == scale.shape[d]))
    inputs = _store(editor, f"{name}.int8", np.ascontiguousarray(integers), scale.ravel())
    editor.replace(replaced, helper.make_node("DequantizeLinear", inputs, list(replaced.output), axis=axis))


def quantize_activations(graph: GraphProto) -> None:
    """Rounds activations by QuantizeLinear and DequantizeLinear, and stores biases as integers.

    The graph's constants must have been folded before.
    """
    editor = Editor(graph)
    for node in graph.node:
        if node.op_type == "Mul" and (rounding := _rounding(editor, node)) is not None:
            value, scale, zero = rounding
            inputs = [
                editor.store(f"{value}.step", np.array(scale, np.float32)),
                editor.store(f"{value}.zero", np.array(zero, np.uint8)),
            ]
            integers = f"{node.output[0]}.uint8"
            quantize = helper.make_node("QuantizeLinear", [value, *inputs], [integers])
            dequantize = helper.make_node("DequantizeLinear", [integers, *inputs], list(node.output))
            editor.replace(node, quantize, dequantize)
    for node in graph.node:
        if node.op_type in LAYERS and len(node.input) == 3:
            _quantize_bias(editor, node)
    editor.finish()


def _rounding(editor: "Editor", multiply: NodeProto) -> tuple[str, float, int] | None:
    """The parameters of a simulated rounding that ends in ``multiply``, or None if it is none.

    Returns:
        The name of the value that is rounded, the scale, and the zero point.
    """
    clamps = {"Clip", "Max", "Min"}
    scale, node = editor.constant(multiply.input[1]), editor.maker(multiply.input[0])
    bounds: list[float] = []
    while node is not None and node.op_type in clamps:
        constants = [editor.constant(name) for name in node.input[1:]]
        bounds += [float(constant) for constant in constants if constant is not None and constant.size == 1]
        node = editor.maker(node.input[0])
    divide = editor.maker(node.input[0]) if node is not None and node.op_type == "Round" else None
    if divide is None or divide.op_type != "Div" or scale is None or len(bounds) != 2:
        return None
    if max(bounds) - min(bounds) != np.iinfo(np.uint8).max or editor.constant(divide.input[1]) != scale:
        return None
    return divide.input[0], float(scale), -int(min(bounds))


def _quantize_bias(editor: "Editor", layer: NodeProto) -> None:
    """Stores a layer's bias as int32 on the grid of the layer's products, to which integer kernels add it."""
    x, weight = (editor.maker(name) for name in layer.input[:2])
    bias = editor.constant(layer.input[2])
    if any(made is None or made.op_type != "DequantizeLinear" for made in (x, weight)) or bias is None:
        return
    assert x is not None and weight is not None
    step, scale = editor.constant(x.input[1]), editor.constant(weight.input[1])
    if step is None or scale is None or bias.shape != scale.shape:
        return
    unit = (step * scale).astype(np.float32)
    integers = np.rint(bias / unit.astype(np.float64))
    if np.abs(integers).max() > np.iinfo(np.int32).max:
        return
    name = layer.input[2]
    inputs = _store(editor, f"{name}.int32", integers.astype(np.int32), unit)
    dequantize = helper.make_node("DequantizeLinear", inputs, [f"{name}.whole.{layer.output[0]}"], axis=0)
    layer.input[2] = dequantize.output[0]
    editor.replace(layer, dequantize, layer)


def _store(editor: "Editor", name: str, integers: Array, scale: Array) -> list[str]:
    """Stores the inputs of DequantizeLinear; returns their names.

    The zero points are optional in the standard, but ONNX Runtime looks for them.
    """
    zeros = np.zeros(scale.shape, integers.dtype)
    return [
        editor.store(name, integers),
        editor.store(f"{name}.scale", scale),
        editor.store(f"{name}.zero", zeros),
    ]


class Editor:
    """Finds and replaces nodes of a graph.

    Args:
        graph: The graph; only `finish` changes it.
    """

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._in_place_of = {node.output[0]: [node] for node in graph.node}
        self._maker = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def maker(self, name: str) -> NodeProto | None:
        """The node that puts out a value."""
        return self._maker.get(name)

    def readers(self, name: str) -> Sequence[NodeProto]:
        """The nodes that read a value."""
        return self._readers.get(name, ())

    def constant(self, name: str) -> Array | None:
        """The value of an initializer or a Constant node; None for any other value."""
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name])
        node = self.maker(name)
        if node is None or node.op_type != "Constant":
            return None
        value = helper.get_attribute_value(node.attribute[0])
        return numpy_helper.to_array(value) if isinstance(value, TensorProto) else None

    def store(self, name: str, value: Array) -> str:
        """Stores a constant; returns its name, with a suffix if another value has that name."""
        while (stored := self._stored.get(name)) is not None:
            if np.array_equal(numpy_helper.to_array(stored), value):
                return name
            name += "'"
        self._stored[name] = numpy_helper.from_array(value, name)
        return name

    def replace(self, node: NodeProto, *by: NodeProto) -> None:
        """Replaces a node of the original graph by other nodes."""
        self._in_place_of[node.output[0]] = list(by)
        self._maker |= {name: new for new in by for name in new.output}

    def finish(self) -> None:
        """Writes the graph, without nodes and constants that nothing reads."""
        nodes = [new for news in self._in_place_of.values() for new in news]
        kept: list[NodeProto] = []
        read = {output.name for output in self._graph.output}
        for node in reversed(nodes):
            if read.intersection(node.output):
                kept.append(node)
                read.update(_inputs(node))
        # Copies, as clearing a container invalidates its members.
        copies = [_copy(node) for node in reversed(kept)]
        stored = [_copy(tensor) for name, tensor in self._stored.items() if name in read]
        del self._graph.node[:]
        del self._graph.initializer[:]
        self._graph.node.extend(copies)
        self._graph.initializer.extend(stored)


def _copy(proto: Any) -> Any:
    copied = type(proto)()
    copied.CopyFrom(proto)
    return copied


def _inputs(node: NodeProto) -> Iterable[str]:
    """The names of the values that a node reads, those read in its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            for inside in inner.node:
                yield from _inputs(inside)
