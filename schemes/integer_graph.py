"""Quantizing a traced graph: the layers that compute with integers, and the activations between them.

A point is an activation that int8 kernels pass on as integers: the input of a quantized layer, its output after
the BatchNorm that is folded into it and the ReLU that clips it, and the sum of two points.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .grid import SMALLEST, along, quantize_weight

aten = torch.ops.aten

# The operators of layers that runtimes compute in integers, and the output channels' dimension of their weights.
INTEGER = {
    aten.linear.default: 0,
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.padding: 0,
}
# No runtime computes these in int8: their weights are stored as integers, and they compute with floats.
STORED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
}
GROUPS_OF_TRANSPOSED = 6  # position of the argument `groups` of a transposed convolution
BATCHNORM = aten.batch_norm.default
ADD = aten.add.Tensor
CLIPPING = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
# Operators that do not change values: their outputs are on the grid of their input.
PASSING = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
)
LEVELS = 255  # steps between the lowest and the highest value of an activation
BIAS_LEVELS = 2**30  # largest bias: an integer of 32 bits, on the grid of its layer's products


@dataclass(frozen=True)
class Layer:
    """A layer whose weight becomes integers.

    Attributes:
        node: The operator.
        weight: The weight's name.
        axis: The dimension of the weight that holds the output channels.
        batchnorm: The BatchNorm that can be folded into the layer, if there is one.
    """

    node: fx.Node
    weight: str
    axis: int
    batchnorm: fx.Node | None

    @property
    def in_integers(self) -> bool:
        """Whether runtimes compute it in integers."""
        return self.node.target in INTEGER

    @property
    def result(self) -> fx.Node:
        """The node of the layer's output, after BatchNorm."""
        return self.batchnorm or self.node


def find_layers(traced: fx.GraphModule) -> tuple[list[Layer], list[str]]:
    """The layers whose weights can become integers, and the names of the weights of the others.

    The others are transposed convolutions in groups (their output channels lie in two dimensions), layers whose
    weight an operator of another kind reads as well, and layers whose bias is computed.
    """
    axes: dict[Any, int] = INTEGER | STORED
    uses = _uses(traced)
    layers, left = [], []
    for node in traced.graph.nodes:
        if node.target not in axes or not _is_parameter(traced, arguments(node)[1]):
            continue
        axis, weight = axes[node.target], arguments(node)[1]
        users = uses[id(_attribute(traced, weight))]
        in_groups = node.target in STORED and arguments(node)[GROUPS_OF_TRANSPOSED:][:1] not in ((), (1,))
        alike = all(axes.get(user.target) == axis and _are_stored(arguments(user)[1:3]) for user in users)
        if in_groups or not alike:
            left.append(weight.target)
            continue
        batchnorm = _batchnorm_behind(node) if len(users) == 1 else None
        layers.append(Layer(node, weight.target, axis, batchnorm))
    return layers, left


def _uses(traced: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """The nodes that read each parameter and buffer, by its id: one that is tied has several names."""
    uses: dict[int, list[fx.Node]] = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        uses.setdefault(id(_attribute(traced, node)), []).extend(node.users)
    return uses


def _attribute(traced: fx.GraphModule, node: fx.Node) -> Tensor:
    tensor: Tensor = operator.attrgetter(str(node.target))(traced)
    return tensor


def _is_parameter(traced: fx.GraphModule, node: Any) -> bool:
    return (
        isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(_attribute(traced, node), nn.Parameter)
    )


def _are_stored(given: Sequence[fx.Node | None]) -> bool:
    """Whether optional arguments are parameters or buffers themselves, not computed from them."""
    return all(node is None or node.op == "get_attr" for node in given)


def _batchnorm_behind(node: fx.Node) -> fx.Node | None:
    """The BatchNorm with fixed statistics that is the only reader of ``node``, channel by channel; or None."""
    user = next(iter(node.users))
    if len(node.users) > 1 or user.target != BATCHNORM or arguments(user)[0] is not node:
        return None
    *_, mean, var, training = arguments(user)[:6]
    if training or mean is None or var is None or not _are_stored(arguments(user)[1:5]):
        return None
    by_channel = node.target != aten.linear.default or node.meta["val"].dim() == 2
    return user if by_channel else None


def find_points(traced: fx.GraphModule, layers: Sequence[Layer]) -> list[fx.Node]:
    """The nodes of the points, in the order of the graph.

    The network's outputs are not among them: rounded logits would tie.
    """
    points: set[fx.Node] = set()
    for layer in layers:
        if layer.in_integers:
            points |= {origin(arguments(layer.node)[0]), _clipped(layer.result)}
    for node in traced.graph.find_nodes(op="call_function", target=ADD):
        terms = arguments(node)[:2]
        if all(isinstance(term, fx.Node) and origin(term) in points for term in terms) and not node.kwargs:
            points.add(_clipped(node))
    return [node for node in traced.graph.nodes if node in points and not _is_output(node)]


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, typed so that mypy accepts any use of them."""
    return node.args


def origin(node: Any) -> fx.Node:
    """The node whose values ``node`` passes on unchanged, through operators that move them at most."""
    while node.target in PASSING:
        node = arguments(node)[0]
    assert isinstance(node, fx.Node)
    return node


def _clipped(node: fx.Node) -> fx.Node:
    """The only reader of ``node`` if it clips, such as a ReLU; otherwise ``node`` itself."""
    user = next(iter(node.users), node)
    return user if len(node.users) == 1 and user.target in CLIPPING else node


def _is_output(node: fx.Node) -> bool:
    """Whether the values of ``node`` are an output of the network."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in PASSING:
        node = user
    return any(user.op == "output" for user in node.users)


class Ranges(fx.Interpreter):
    """Runs a traced network and records the lowest and highest value of each point, zero included.

    Args:
        traced: The network.
        points: The points, as indices into `operators`.
        state: The parameters and buffers to run it with, by name, in place of its own.

    Attributes:
        lowest: The lowest value of each point so far.
        highest: The highest value of each point so far.
    """

    def __init__(self, traced: fx.GraphModule, points: Sequence[int], state: Mapping[str, Tensor]) -> None:
        super().__init__(traced)
        self._state = state
        nodes = operators(traced)
        self._points = {nodes[place]: i for i, place in enumerate(points)}
        self.lowest = [0.0] * len(points)
        self.highest = [0.0] * len(points)

    def fetch_attr(self, target: str) -> Any:
        """Returns a parameter or buffer, from ``state`` if it is there."""
        return self._state[target] if target in self._state else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """Runs an operator, and widens the range of its output if that is a point."""
        value = super().run_node(n)
        if (i := self._points.get(n)) is not None:
            low, high = value.aminmax()
            self.lowest[i] = min(self.lowest[i], float(low))
            self.highest[i] = max(self.highest[i], float(high))
        return value


def operators(traced: fx.GraphModule) -> list[fx.Node]:
    """The inputs and operators of a network in order: node names do not survive pickling, their order does."""
    return [node for node in traced.graph.nodes if node.op in ("placeholder", "call_function")]


def with_integers(traced: fx.GraphModule, steps: Sequence[tuple[float, int]], bits: int) -> fx.GraphModule:
    """The quantized network: weights as integers of ``bits`` bits, BatchNorm folded, points on their grids.

    Args:
        traced: The result of `autocompress.schemes.traced.trace`; it is changed.
        steps: For each point the scale and the zero point of its integers.
        bits: Bits of a weight.

    Raises:
        ValueError: If the network does not have as many points as ``steps``.
    """
    layers, _ = find_layers(traced)
    points = find_points(traced, layers)
    if len(points) != len(steps):
        raise ValueError(
            f"the network has {len(points)} tensors to quantize, and {len(steps)} were observed; compose "
            "Quantize8 only with schemes that leave the network's operators as they are"
        )
    step_of = dict(zip(points, steps, strict=True))
    inputs = {layer.node: step_of.get(origin(arguments(layer.node)[0])) for layer in layers if layer.in_integers}
    for point in points:
        _round(point, step_of[point], list(point.users))
    for node, step in inputs.items():
        if step is not None and arguments(node)[0].target in PASSING:
            _round(arguments(node)[0], step, [node])
    weights = [_attribute(traced, arguments(layer.node)[1]) for layer in layers]  # all before any is replaced
    stored: dict[int, tuple[nn.Parameter, Tensor]] = {}  # by the weight's id: layers may share it
    for layer, weight in zip(layers, weights, strict=True):
        step, bias = inputs.get(layer.node), _value(traced, arguments(layer.node)[2:3])
        q, scale = quantize_weight(weight, layer.axis, bits)
        if layer.batchnorm is not None:
            factor, bias = _fold(traced, layer.batchnorm, bias)
            q, scale = q * along(factor.sign(), layer.axis, q.dim()), scale * factor.abs()
        if bias is not None and step is not None:
            q, scale = _room_for(bias, q, scale, step[0], layer.axis)
        integers = nn.Parameter(q.to(torch.int8).contiguous(), requires_grad=False)
        scales = along(scale.float().clamp_min(SMALLEST), layer.axis, q.dim())
        integers, scales = stored.setdefault(id(weight), (integers, scales))
        if bias is not None and step is not None:
            unit = scales.flatten().double() * step[0]
            bias = (bias.double() / unit).round() * unit
        _replace(traced, layer, integers, scales, bias)
    _drop_unused(traced)
    traced.graph.lint()
    traced.recompile()
    return traced


def _round(value: fx.Node, step: tuple[float, int], readers: Sequence[fx.Node]) -> None:
    """Lets ``readers`` read ``value`` rounded to 8 bits: scale * clamp(round(value / scale), -zero, 255 - zero).

    As single operators, which compute the same as ONNX's QuantizeLinear and DequantizeLinear to the last bit: the
    fused fake-quantize operator multiplies by the scale's reciprocal, and has no dynamic shapes.
    """
    graph, (scale, zero) = value.graph, step
    with graph.inserting_after(value):
        steps = graph.call_function(aten.div.Scalar, (value, scale))
    with graph.inserting_after(steps):
        rounded = graph.call_function(aten.round.default, (steps,))
    with graph.inserting_after(rounded):
        clamped = graph.call_function(aten.clamp.default, (rounded, -zero, LEVELS - zero))
    with graph.inserting_after(clamped):
        result = graph.call_function(aten.mul.Scalar, (clamped, scale))
    for reader in readers:
        reader.replace_input_with(value, result)


def _replace(
    traced: fx.GraphModule, layer: Layer, integers: nn.Parameter, scales: Tensor, bias: Tensor | None
) -> None:
    """Lets a layer read these integers, scales and bias, and removes the BatchNorm that was folded into them."""
    graph, node = traced.graph, layer.node
    shifts = [*arguments(node)[2:3], *(arguments(layer.batchnorm)[2:3] if layer.batchnorm else ())]
    trainable = any(_attribute(traced, shift).requires_grad for shift in shifts if shift is not None)
    home, _, leaf = layer.weight.rpartition(".")
    module = traced.get_submodule(home)
    setattr(module, leaf, integers)
    module.register_buffer(f"{leaf}_scale", scales)
    with graph.inserting_before(node):
        whole = graph.call_function(aten.to.dtype, (graph.get_attr(layer.weight), torch.float32))
        scaled = graph.call_function(aten.mul.Tensor, (whole, graph.get_attr(f"{layer.weight}_scale")))
        node.update_arg(1, scaled)
        if bias is not None:
            name = _bias_name(traced, layer)
            home, _, leaf = name.rpartition(".")
            setattr(traced.get_submodule(home), leaf, nn.Parameter(bias.float(), requires_grad=trainable))
            node.args = (*arguments(node)[:2], graph.get_attr(name), *arguments(node)[3:])
    if layer.batchnorm is not None:
        layer.batchnorm.replace_all_uses_with(node)
        graph.erase_node(layer.batchnorm)


def _fold(traced: fx.GraphModule, batchnorm: fx.Node, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of each channel that folds a BatchNorm into the layer before it, and that layer's new bias."""
    gamma, beta, mean, var = (_value(traced, (arg,)) for arg in arguments(batchnorm)[1:5])
    assert mean is not None and var is not None
    factor = (var.double() + arguments(batchnorm)[7]).rsqrt()
    factor = factor if gamma is None else factor * gamma
    shift = -mean * factor if bias is None else (bias - mean) * factor
    return factor, shift if beta is None else shift + beta


def _room_for(bias: Tensor, q: Tensor, scale: Tensor, step: float, axis: int) -> tuple[Tensor, Tensor]:
    """Integers on a coarser grid in channels whose bias would not fit 32 bits on the grid of products.

    The weights of such a channel are tiny beside its bias.
    """
    coarse = torch.maximum(scale, bias.abs() / (BIAS_LEVELS * step))
    return (q * along(scale / coarse.clamp_min(SMALLEST), axis, q.dim())).round(), coarse


def _value(traced: fx.GraphModule, argument: Sequence[Any]) -> Tensor | None:
    """The parameter or buffer of an optional argument (a slice of at most one), detached; None without one."""
    (node,) = argument or (None,)
    return None if node is None else _attribute(traced, node).detach()


def _bias_name(traced: fx.GraphModule, layer: Layer) -> str:
    """The name for a layer's bias: its own one's unless others read that too; else a new one beside its weight."""
    own = arguments(layer.node)[2:3]
    if own and own[0] is not None and len(own[0].users) == 1:
        return str(own[0].target)
    home, _, leaf = layer.weight.rpartition(".")
    prefix = f"{home}." if home else ""
    taken = hasattr(traced.get_submodule(home), "bias")
    return f"{prefix}{leaf}_bias" if taken else f"{prefix}bias"


def _drop_unused(traced: fx.GraphModule) -> None:
    """Removes operators that the output does not depend on, then parameters and buffers that none reads."""
    traced.graph.eliminate_dead_code()
    read = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
    for home, module in traced.named_modules():
        prefix = f"{home}." if home else ""
        for leaf in [*module._parameters, *module._buffers]:
            if prefix + leaf not in read:
                delattr(module, leaf)
    traced.delete_all_unused_submodules()
