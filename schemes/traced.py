"""Tracing a network in eval mode: a graph of ATen operators without side effects."""

import copy
import warnings

import torch
from torch import Tensor, fx, nn

from autocompress.task import device_of

aten = torch.ops.aten

# Operators that overwrite their input, and their forms that return a new tensor.
FUNCTIONAL = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.clamp_.default: aten.clamp.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.silu_.default: aten.silu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.dropout_.default: aten.dropout.default,
}


def trace(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """What ``model`` computes in eval mode as a graph of ATen operators without side effects.

    Args:
        model: Any model that `torch.export` takes, for any batch size. It is not changed.
        example_input: A batch of at least one sample.

    Returns:
        A new module with copies of the parameters and buffers, under their names in ``model``.

    Raises:
        ValueError: If it cannot be traced.
    """
    # Traced on the CPU: on a GPU, torch.export bounds BatchNorm's batch size by 65,535 and refuses any larger one.
    device, model = device_of(model), copy.deepcopy(model).cpu().eval()
    # The exporter takes a batch of a single sample for a fixed size.
    x = torch.cat([example_input[:1].detach().cpu()] * 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between the exporter's own parts
            program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
            if any(_writes(node) and not _writes_alone(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # makes every operator functional, but is slow
            exported = program.module(check_guards=False)
    except Exception as error:  # an exporter may raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "specialized it to be a constant" in str(error):
            first = "its code makes a constant of the batch size, as len(x) does where x.shape[0] does not"
        raise ValueError(
            f"Quantize8 finds no int8 form of this model: torch.export cannot trace it for any batch size: {first}"
        ) from error
    graph = exported.graph
    for node in graph.nodes:
        if node.target in FUNCTIONAL:
            _without_side_effect(node)
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
        if node.target is aten.to.device:
            node.update_arg(1, device)
    graph.eliminate_dead_code()
    traced = fx.GraphModule(exported, graph).to(device)
    traced.eval()
    for parameter in traced.parameters():
        parameter.grad = None
    return traced


def _writes(node: fx.Node) -> bool:
    """Whether an operator overwrites one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _writes_alone(node: fx.Node) -> bool:
    """Whether an operator overwrites a tensor that shares no memory with others, and has a `FUNCTIONAL` form."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    return node.target in FUNCTIONAL and not any(_is_view(other) for other in (written, *written.users))


def _is_view(node: fx.Node) -> bool:
    """Whether an operator may return its input's memory."""
    if "dropout" in str(node.target):  # it does in eval mode, which its schema does not say
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else []
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _without_side_effect(node: fx.Node) -> None:
    """Replaces an operator that overwrites its input by its functional form, which later readers then read."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    written.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and node < user)
    assert isinstance(node.target, torch._ops.OpOverload)
    node.target = FUNCTIONAL[node.target]
