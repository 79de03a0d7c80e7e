"""A trace of a forward pass, operation by operation: which channels the network ties together.

Below autograd a PyTorch network is a sequence of basic (ATen) operations, some hundred different ones, whatever
Python code it was written in. The trace intercepts them, carries labels from their inputs to their outputs, and
collects ties and pins. The rules of the operations are in `autocompress.schemes.rules`; an operation without a
rule pins all labels of its arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .calls import Call, Labelled
from .coupling import Couplings, along
from .rules import MOVES, rule_for

OUTPUT = "the network's output"


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Labels the parameters and buffers of a model, and collects the ties and pins of its forward passes.

    Args:
        model: The model; passes in train mode change its running statistics.
        heads: For parameters whose rows belong to attention heads: the head of each row, shape ``(rows,)``.

    Attributes:
        model: The model.
        couplings: The ties and pins.
        positions: The labels of the parameters and buffers met so far, in the order in which they were used:
            by name, for each dimension a vector, or None where the dimension has size 1. A normalisation layer
            without tensors is there as its ``num_features``.
        outputs: Labels of the outputs of layers, one vector for each.
        filters: Those of them that belong to convolutions.
    """

    def __init__(self, model: nn.Module, heads: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.couplings = Couplings()
        self.positions: dict[str, tuple[Tensor | None, ...]] = {}
        self.outputs: list[Tensor] = []
        self.filters: list[Tensor] = []
        self.model = model
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._buffers = {id(b): name for name, b in model.named_buffers()}
        self._heads = heads or {}
        self._labelled: Any = WeakTensorKeyDictionary()

    def run(self, x: Tensor) -> None:
        """Traces one forward pass of the model, in the mode (train or eval) that it is in."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # attention as single products, not a fused kernel
            fastpath = torch.backends.mha.get_fastpath_enabled()
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            torch.backends.mha.set_fastpath_enabled(False)
            for name, module in self.model.named_modules():
                if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm) and not module.state_dict():
                    stack.enter_context(module.register_forward_pre_hook(self._without_tensors(name)))
            with self:
                outputs = self.model(x)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                for field in self.labelled(output).fields:
                    self.couplings.pin(field, OUTPUT)

    def _without_tensors(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook that labels ``num_features`` of a normalisation without tensors, which states its channels."""

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = self.labelled(inputs[0])
            labels = along(x.fields, len(x.shape) - 1 if isinstance(module, nn.LayerNorm) else 1)
            if labels is not None:
                self.positions[f"{name}.num_features".lstrip(".")] = (labels,)

        return note

    def labelled(self, tensor: Tensor) -> Labelled:
        """The labels of a tensor; a parameter or buffer that is used for the first time gets fresh ones."""
        known: Labelled | None = self._labelled.get(tensor)
        if known is None:
            name = self._parameters.get(id(tensor), self._buffers.get(id(tensor)))
            known = Labelled(tuple(tensor.shape), ()) if name is None else self._introduce(name, tensor)
            self._labelled[tensor] = known
        return known

    def _introduce(self, name: str, tensor: Tensor) -> Labelled:
        """Fresh labels for a parameter or buffer: one for each position along each dimension, or for each head."""
        shape = tuple(tensor.shape)
        positions = tuple(self.couplings.fresh(size) if size > 1 else None for size in shape)
        if (heads := self._heads.get(name)) is not None:
            positions = (self.couplings.fresh(int(heads.max()) + 1)[heads], *positions[1:])
        self.positions[name] = positions
        fields = tuple(
            labels.view([-1 if d == dim else 1 for d in range(len(shape))])
            for dim, labels in enumerate(positions)
            if labels is not None
        )
        return Labelled(shape, fields, id(tensor) in self._parameters)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and applies its rule."""
        call = Call(func, tuple(args), dict(kwargs or {}), self)
        result = func(*args, **call.kwargs)
        call.outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not any(self.labelled(t).fields for t in call.tensors):
            return result  # constants and inputs have no labels
        fields = rule_for(func)(call)
        is_weight = call.name in MOVES and all(self.labelled(t).is_weight for t in call.tensors)
        for out, out_fields in zip(call.outs, fields, strict=True):
            self._labelled[out] = Labelled(tuple(out.shape), out_fields, is_weight)
        return result
