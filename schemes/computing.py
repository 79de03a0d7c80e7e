"""Rules for operations that compute: elements that they add, multiply or normalise together are tied."""

import re
from collections.abc import Iterator

from torch import Tensor

from .calls import FIXED, MIXED, Call, Labelled
from .coupling import Fields, along, varies


def elementwise(call: Call) -> list[Fields]:
    """A function of elements at the same place, after broadcasting."""
    ndim = max(len(out.shape) for out in call.outs)
    shape: tuple[int, ...] = (1,) * ndim
    fields: Fields = ()
    for tensor in call.tensors:
        part = call.trace.labelled(tensor)
        missing = (1,) * (ndim - len(part.shape))
        own = tuple(f.reshape(missing + tuple(f.shape)) for f in part.fields)
        fields = call.couplings.combine(fields, shape, own, missing + part.shape, FIXED)
        shape = tuple(map(max, shape, missing + part.shape))
    return call.everywhere(fields)


def reduce(call: Call) -> list[Fields]:
    """A reduction over some dimensions: mean, sum, maximum, variance."""
    ndim = len(call.x.shape)
    formal = {argument.name for argument in call.func._schema.arguments}
    dims = call.dims("dim", ndim) if "dim" in formal else list(range(ndim))
    fields = call.couplings.merge_all(call.x.fields, dims, MIXED.format(call.name))
    if call.outs[0].dim() == ndim:
        return call.everywhere(fields)
    return call.everywhere(tuple(f.squeeze(tuple(dims)) for f in fields))


def normalize_along(call: Call) -> list[Fields]:
    """Softmax and the like: the shape stays, the elements along a dimension depend on each other."""
    dims = call.dims("dim", len(call.x.shape))
    call.couplings.merge_all(call.x.fields, dims, MIXED.format("softmax or sum"))
    return call.everywhere(call.x.fields)


def spatial(call: Call) -> list[Fields]:
    """Pooling, interpolation and padding by reflection: they mix places along the last dimensions of a channel."""
    (n,) = re.findall(r"(\d)d", call.name)[:1] or ["2"]
    ndim = len(call.x.shape)
    last = range(ndim - int(n), ndim)
    return call.everywhere(call.couplings.merge_all(call.x.fields, last, MIXED.format(call.name)))


def shuffle_pixels(call: Call) -> list[Fields]:
    """`torch.pixel_shuffle` turns channels into pixels: the channels of one output channel are tied."""
    moved = tuple(call.moved(f) for f in call.x.fields)
    ndim = len(call.x.shape)
    return [call.couplings.merge_all(moved, [ndim - 2, ndim - 1], FIXED)]


def layer_norm(call: Call) -> list[Fields]:
    """Statistics over the last dimensions; over a single one, zero channels can be left out (`ThinLayerNorm`)."""
    why = MIXED.format("LayerNorm")
    x, last = call.x, len(call.argument("normalized_shape"))
    ndim = len(x.shape)
    labels = along(x.fields, ndim - 1)
    if last == 1 and labels is not None:
        for vector in _vectors(call, "weight", "bias"):
            call.couplings.tie_or_pin(vector, labels, FIXED)
        return [x.fields, *(() for _ in call.outs[1:])]
    for name in ("weight", "bias"):
        _pin_argument(call, name, why)
    call.couplings.merge_all(x.fields, range(ndim - last, ndim), why)
    return [x.fields, *(() for _ in call.outs[1:])]


def _pin_argument(call: Call, name: str, why: str) -> None:
    tensor = call.argument(name)
    for f in call.trace.labelled(tensor).fields if tensor is not None else ():
        call.couplings.pin(f, why)


def _vectors(call: Call, *names: str) -> Iterator[Tensor | None]:
    """The labels of arguments that are vectors, where they were given."""
    for name in names:
        tensor = call.argument(name)
        if tensor is not None:
            yield along(call.trace.labelled(tensor).fields, 0)


def group_norm(call: Call) -> list[Fields]:
    """Statistics over each group of channels: the channels of a group are tied."""
    groups, channels = call.argument("group"), call.argument("C")
    labels = _channels(call, call.x)
    if labels is not None:
        of_group = labels.view(groups, -1)
        call.couplings.tie(of_group, of_group[:, :1])
        if groups == 1:
            call.couplings.pin(labels, MIXED.format("GroupNorm"))
    for vector in _vectors(call, "weight", "bias"):
        call.couplings.tie_or_pin(vector, labels, FIXED)
    fields = _as_channels(labels if channels > 1 else None, len(call.x.shape))
    return [fields, *(() for _ in call.outs[1:])]


def batch_norm(call: Call) -> list[Fields]:
    """Statistics of each channel by itself: scale, shift and running statistics go with it."""
    labels = _channels(call, call.x)
    for vector in _vectors(call, "weight", "bias", "running_mean", "running_var"):
        call.couplings.tie_or_pin(vector, labels, FIXED)
    fields = _as_channels(labels, len(call.x.shape))
    return [fields, *(() for _ in call.outs[1:])]


def _channels(call: Call, x: Labelled) -> Tensor | None:
    """The labels along dimension 1 of a tensor; those along the other dimensions are merged."""
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    return along(call.couplings.merge_all(x.fields, others, FIXED), 1)


def _as_channels(labels: Tensor | None, ndim: int) -> Fields:
    return () if labels is None else (labels.view([-1 if dim == 1 else 1 for dim in range(ndim)]),)


def multiply(call: Call) -> list[Fields]:
    """Products of matrices: `mm`, `bmm`, and `addmm` and `baddbmm`, which add a tensor."""
    *added, a, b = (call.trace.labelled(t) for t in call.tensors)
    rows, columns = len(a.shape) - 2, len(a.shape) - 1
    # The elements a[.., m, k] b[.., k, n] over (.., m, k, n), then their sum over k.
    left, right = tuple(f.unsqueeze(columns + 1) for f in a.fields), tuple(f.unsqueeze(rows) for f in b.fields)
    products = call.couplings.combine(left, (*a.shape, 1), right, (*b.shape[:rows], 1, *b.shape[rows:]), FIXED)
    if a.is_weight or b.is_weight:  # where k is removed the weight is zero, so the sum does not change
        products = tuple(f for f in products if varies(f) != {columns})
        put_out = [
            along(a.fields, rows) if a.is_weight else None,
            along(b.fields, columns) if b.is_weight else None,
        ]
        call.trace.outputs += [labels for labels in put_out if labels is not None]
    why = MIXED.format("product of activations")
    fields = tuple(f.squeeze(columns) for f in call.couplings.merge_all(products, [columns], why))
    shape = tuple(call.outs[0].shape)
    for other in added:
        missing = (1,) * (len(shape) - len(other.shape))
        own = tuple(f.reshape(missing + tuple(f.shape)) for f in other.fields)
        fields = call.couplings.combine(fields, shape, own, missing + other.shape, FIXED)
    return [fields]


def takes_whole_groups(groups: int, inputs_per_group: int) -> bool:
    """Whether a grouped convolution loses whole groups; otherwise it loses the same channels of each group.

    Both are exact. The choice is the one with more pieces to choose from: a depthwise convolution loses groups.
    """
    return groups >= inputs_per_group


def convolve(call: Call) -> list[Fields]:
    """A convolution reads the channels of its input and puts out those of its weight."""
    weight = call.trace.labelled(call.argument("weight"))
    groups, transposed = call.argument("groups"), call.argument("transposed")
    read = _channels(call, call.x)
    first, second = along(weight.fields, 0), along(weight.fields, 1)
    for f in weight.fields:
        if varies(f) - {0, 1}:
            call.couplings.pin(f, "they are positions of a kernel")
    if groups > 1:
        put_out = _grouped(call, weight.shape, read, first, second)
    else:
        reads, put_out = (first, second) if transposed else (second, first)
        call.couplings.tie_or_pin(reads, read, FIXED)
        if not weight.is_weight and read is not None:
            call.couplings.pin(read, MIXED.format("computed weight"))
    if put_out is not None:
        call.trace.filters.append(put_out)
        call.trace.outputs.append(put_out)
    for bias in _vectors(call, "bias"):
        call.couplings.tie_or_pin(bias, put_out, FIXED)
    return [_as_channels(put_out, len(call.x.shape))]


def _grouped(
    call: Call, shape: tuple[int, ...], read: Tensor | None, first: Tensor | None, second: Tensor | None
) -> Tensor | None:
    """Ties the channels of a grouped convolution; returns the labels of its outputs.

    Its weight has shape (outputs, inputs of a group, ...), transposed (inputs, outputs of a group, ...). In both
    cases all groups share its second dimension. A weight that was expanded to the width of the input, such as a
    blur that is the same for every channel, has no labels along its first.
    """
    groups, couplings = call.argument("groups"), call.couplings
    ours, rows = (None if labels is None else labels.view(groups, -1) for labels in (first, read))
    if takes_whole_groups(groups, call.x.shape[1] // groups):
        if second is not None:
            couplings.pin(second, "they are inside the groups of a convolution")
        of_group = ours if ours is not None else rows
        if of_group is None:
            return None
        couplings.tie(of_group, of_group[:, :1])
        if ours is not None:
            couplings.tie_or_pin(ours[:, :1], rows, FIXED)
        return of_group[:, :1].expand(groups, call.outs[0].shape[1] // groups).reshape(-1)
    if ours is not None:
        couplings.tie(ours, ours[:1])
    shared = None if second is None else second.expand(groups, -1)
    inputs, outputs = (ours, shared) if call.argument("transposed") else (shared, ours)
    couplings.tie_or_pin(inputs, rows, FIXED)
    return None if outputs is None else outputs.reshape(-1)
