"""The form in which a model is deployed: BatchNorm folded into the layers before it, channels last."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autocompress.task import channels_last, device_of, evaluating

TOLERANCE, TOLERANCE_16_BITS = 1e-4, 5e-2  # of the largest output, by which the folded model may differ
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Functions that read the shape or type of a tensor, but none of its values.
LOOKS = ("size", "dim", "stride", "numel", "ndimension", "is_contiguous", "is_floating_point", "__get__")


def deployed(model: nn.Module, example_input: Tensor) -> nn.Module:
    """The model as it is deployed: it computes the same, without the BatchNorm layers that can be folded.

    A BatchNorm is folded where it is the only reader of the output of one convolutional or linear layer. That is
    observed in a run of the model, so its code may be anything. If the outputs of the folded model differ, the
    model is returned unfolded. Folding turns the parameters of a BatchNorm into a bias, so parameters and density
    have to be counted before.

    Args:
        model: Any model in any mode; it is not changed.
        example_input: A batch of shape ``(n, ...)``; its first sample is run.

    Returns:
        A model in eval mode on the same device, `channels_last`; ``model`` itself where there is nothing to do.
    """
    if any(p.dtype == torch.int8 for p in model.parameters()):  # a quantized graph is folded already
        return model
    x = example_input[:1].to(device_of(model))
    folded = model
    with evaluating(model), torch.no_grad():
        pairs, expected = _foldable(model, x)
        if pairs:
            folded = _fold(copy.deepcopy(model), pairs)
            if not _agree(folded, x, expected):
                folded = model
    if folded is model and not is_channels_last(model):
        folded = copy.deepcopy(model)
    return folded if folded is model else channels_last(folded).eval()


def is_channels_last(model: nn.Module) -> bool:
    """Whether the weights of a model's convolutions have the memory layout of `channels_last`."""
    convolves = [p for p in model.parameters() if p.dim() == 4]
    three_d = any(p.dim() == 5 for p in model.parameters())
    return three_d or all(p.is_contiguous(memory_format=torch.channels_last) for p in convolves)


def _foldable(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, str]], Any]:
    """The pairs of layers and BatchNorms to fold into them, by name, and the model's outputs."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers, batchnorms = {}, {}
    for name, module in model.named_modules():
        if names[id(module)] > 1 or module._forward_hooks or module._forward_pre_hooks:
            continue
        if type(module) in LAYERS and owners[id(module.weight)] == 1:
            if type(module) not in TRANSPOSED or module.groups == 1:
                layers[id(module.weight)] = name
        elif type(module) in BATCHNORMS and module.running_mean is not None:
            batchnorms[id(module.running_mean)] = name
    if not layers or not batchnorms:
        return [], None
    reads = _Reads(set(layers), set(batchnorms))
    with reads:
        outputs = model(x)
    reads.end(outputs)
    return [(layers[weight], batchnorms[mean]) for weight, mean in reads.pairs()], outputs


class _Reads(TorchFunctionMode):
    """Records which tensors the functions of a forward pass read: weights, running means, the outputs of layers.

    Args:
        weights: The ids of the weights of layers.
        means: The ids of the running means of BatchNorms.
    """

    def __init__(self, weights: set[int], means: set[int]) -> None:
        super().__init__()
        self._weights, self._means = weights, means
        self._held: list[Any] = []  # keeps tensors alive, so that no id is used again
        self._weight_of: dict[int, int] = {}  # the weight of the layer, by the id of its output
        self._reads: Counter[int] = Counter()
        self._pairs: list[tuple[int, int, int]] = []  # weight, running mean, and the tensor between them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in LOOKS and not isinstance(result, Tensor):
            return result
        read = [id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._reads.update(read)
        self._held.append((args, kwargs, result))
        weight = next((i for i in read if i in self._weights), None)
        mean = next((i for i in read if i in self._means), None)
        by_channel = isinstance(result, Tensor) and (func is not nn.functional.linear or result.dim() == 2)
        if weight is not None and by_channel:
            self._weight_of[id(result)] = weight
        if mean is not None and read[0] in self._weight_of:
            self._pairs.append((self._weight_of[read[0]], mean, read[0]))
        return result

    def end(self, outputs: Any) -> None:
        """Counts the model's outputs as read once more, by its caller."""
        self._reads.update(id(leaf) for leaf in tree_leaves(outputs))

    def pairs(self) -> list[tuple[int, int]]:
        """The weights and running means to fold: those that, like the tensor between them, were read just once."""
        return [
            (weight, mean)
            for weight, mean, between in self._pairs
            if self._reads[weight] == self._reads[mean] == self._reads[between] == 1
        ]


def _fold(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """Folds each BatchNorm into the layer before it, in place."""
    model.eval()
    for layer_name, batchnorm_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        batchnorm: Any = model.get_submodule(batchnorm_name)
        dtype = layer.weight.dtype
        layer, batchnorm = layer.float(), batchnorm.float()  # 16 bits would round the intermediate results
        if isinstance(layer, nn.Linear):
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                if getattr(batchnorm, name) is None:  # this function, unlike that for convolutions, needs both
                    setattr(batchnorm, name, nn.Parameter(torch.full_like(batchnorm.running_mean, value)))
            fused: nn.Module = fuse_linear_bn_eval(layer, batchnorm)
        else:
            fused = fuse_conv_bn_eval(layer, batchnorm, transpose=isinstance(layer, TRANSPOSED))
        _replace(model, layer_name, fused.to(dtype))
        _replace(model, batchnorm_name, nn.Identity().eval())
    return model


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    home, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(home), leaf, by)


def _agree(folded: nn.Module, x: Tensor, expected: Any) -> bool:
    """Whether the folded model's outputs are the expected ones, up to rounding."""
    try:
        outputs = folded(x)
    except Exception:  # the model's code may use a BatchNorm that is gone
        return False
    sixteen_bits = any(p.dtype in (torch.bfloat16, torch.float16) for p in folded.parameters())
    tolerance = TOLERANCE_16_BITS if sixteen_bits else TOLERANCE
    pairs = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    return all(float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp_min(1e-12)) for a, b in pairs)
