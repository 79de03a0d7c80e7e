"""Rules for operations that move, repeat or drop elements: labels move as the values do."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .calls import BY_PLACE, FIXED, Call, Labelled
from .coupling import Field, Fields, along, reduced, varies


def unchanged(call: Call) -> list[Fields]:
    """The output has the first tensor's shape, and its labels."""
    return call.everywhere(call.x.fields)


def unlabelled(call: Call) -> list[Fields]:
    """A new tensor, whose size does not depend on that of others."""
    return call.everywhere(())


def rearrange(call: Call) -> list[Fields]:
    """The labels move as the values do."""
    return [tuple(call.moved(f) for f in call.x.fields)]


def reshape(call: Call) -> list[Fields]:
    """Dimensions are merged and split.

    Where a dimension is split into several, as into groups and the channels of a group, only one of them can
    shrink, as the code states the sizes of the others. The largest is taken: groups are few, channels many.
    """
    shape = tuple(call.outs[0].shape)
    fields = []
    for f in call.x.fields:
        moved = reduced(f.expand(call.x.shape).reshape(shape))
        for dims in _blocks(call.x.shape, shape):
            split = [dim for dim in dims if moved.size(dim) > 1]
            free = max(split, key=lambda dim: (moved.size(dim), dim), default=None)
            moved = call.couplings.merge(moved, [dim for dim in split if dim != free])
        fields.append(moved)
    return [call.couplings.merge_all(tuple(fields), (), "a reshape leaves none to choose")]


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[list[int]]:
    """The dimensions of ``after`` in runs, each of which holds the elements of a run of ``before``."""
    i = j = 0
    while i < len(before) and j < len(after):
        block, left, right = [j], before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                block.append(j)
                right, j = right * after[j], j + 1
        yield block


def restride(call: Call) -> list[Fields]:
    """Another layout in memory; pooling uses it on dimensions of size 1, where it moves no element."""
    out = call.outs[0]
    strides = [stride for stride, size in zip(out.stride(), out.shape, strict=True) if size > 1]
    if tuple(out.shape) != call.x.shape or strides != sorted(strides, reverse=True):
        return unknown(call)
    return [call.x.fields]


def unknown(call: Call) -> list[Fields]:
    """An operation without a rule: all labels of its arguments are pinned."""
    for tensor in map(call.trace.labelled, call.tensors):
        if tensor.is_weight and (put_out := along(tensor.fields, 0)) is not None:
            call.trace.outputs.append(put_out)  # of a layer, as far as can be known
        for f in tensor.fields:
            call.couplings.pin(f, f"nothing is known of the operation {call.name}")
    return call.everywhere(())


def select(call: Call) -> list[Fields]:
    """One place along a dimension: `select`, `unbind`."""
    (dim,) = call.dims("dim", len(call.x.shape))
    kept = call.couplings.merge_all(call.x.fields, [dim], BY_PLACE.format(call.name))
    kept = tuple(f.squeeze(dim) for f in kept)
    return call.everywhere(kept)


def slice_(call: Call) -> list[Fields]:
    """A range of places along a dimension; many networks take all of them."""
    x, (dim,) = call.x, call.dims("dim", len(call.x.shape))
    if call.outs[0].shape[dim] == x.shape[dim]:
        return [x.fields]
    return [call.couplings.merge_all(x.fields, [dim], BY_PLACE.format("slice"))]


def split(call: Call) -> list[Fields]:
    """Parts of equal size stay of equal size: places are tied across them."""
    x, (dim,) = call.x, call.dims("dim", len(call.x.shape))
    sizes = [out.shape[dim] for out in call.outs]
    if len(set(sizes)) > 1:
        return call.everywhere(call.couplings.merge_all(x.fields, [dim], BY_PLACE.format("split")))
    fields = []
    for f in x.fields:
        if f.size(dim) > 1:
            first, *others = f.split(sizes[0], dim)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            for other in others:
                call.couplings.tie(first, other)
            f = first
        fields.append(f)
    return call.everywhere(call.couplings.merge_all(tuple(fields), (), BY_PLACE.format("split")))


def halve(call: Call) -> list[Fields]:
    """A gated linear unit: the first half of a dimension times a function of the second."""
    (dim,) = call.dims("dim", len(call.x.shape))
    fields = []
    for f in call.x.fields:
        if f.size(dim) > 1:
            first, second = f.chunk(2, dim)
            call.couplings.tie(first, second)
            f = first
        fields.append(f)
    return [call.couplings.merge_all(tuple(fields), (), FIXED)]


def index(call: Call) -> list[Fields]:
    """Places by number, which a tensor holds: `index`, `index_select`, `embedding`."""
    x = call.x
    if call.name == "embedding":
        given: list[Any] = [call.argument("indices"), None]
    elif call.name == "index_select":
        (chosen,) = call.dims("dim", len(x.shape))
        given = [call.argument("index") if dim == chosen else None for dim in range(len(x.shape))]
    else:
        given = call.argument("indices") + [None] * (len(x.shape) - len(call.argument("indices")))
    indexed = [dim for dim, tensor in enumerate(given) if tensor is not None]
    for tensor in (t for t in given if t is not None):
        for f in call.trace.labelled(tensor).fields:
            call.couplings.pin(f, "they are places in a table")
    if call.name == "embedding" and x.is_weight and (vectors := along(x.fields, 1)) is not None:
        call.trace.outputs.append(vectors)
    kept = call.couplings.merge_all(x.fields, indexed, BY_PLACE.format("table look-up"))
    every = tuple(slice(None) if tensor is None else tensor for tensor in given)
    return [tuple(reduced(_expanded(f, x.shape, indexed)[every]) for f in kept)]


def _expanded(f: Field, shape: Sequence[int], dims: Sequence[int]) -> Field:
    """The field, expanded to ``shape`` along ``dims``."""
    return f.expand([shape[dim] if dim in dims else f.size(dim) for dim in range(f.dim())])


def roll(call: Call) -> list[Fields]:
    """A circular shift by a number of places."""
    dims = call.dims("dims", len(call.x.shape))
    return [call.couplings.merge_all(call.x.fields, dims, BY_PLACE.format("roll"))]


def pad(call: Call) -> list[Fields]:
    """Padding by a constant: added elements get labels that are pinned, the others keep theirs."""
    x, widths = call.x, call.argument("pad")
    ends = {len(x.shape) - 1 - i // 2: (widths[i], widths[i + 1]) for i in range(0, len(widths), 2)}
    ends = {dim: added for dim, added in ends.items() if any(added)}
    cut = [dim for dim, added in ends.items() if min(added) < 0]
    fields = []
    for f in call.couplings.merge_all(x.fields, cut, BY_PLACE.format("slice")):
        for dim in varies(f) & ends.keys():
            shape = [[n if d == dim else size for d, size in enumerate(f.shape)] for n in ends[dim]]
            added = [call.couplings.fresh(math.prod(s)).view(s) for s in shape]
            for labels in added:
                call.couplings.pin(labels, "they are added to padding, whose width is fixed")
            f = torch.cat([added[0], f, added[1]], dim)
        fields.append(f)
    return [tuple(fields)]


def concatenate(call: Call) -> list[Fields]:
    """Along the dimension, the labels of one tensor after those of the other; along others they are tied."""
    parts = [call.trace.labelled(t) for t in call.tensors if t.numel()]
    ndim = len(parts[0].shape)
    (dim,) = call.dims("dim", ndim)
    across: Fields = tuple(f for f in parts[0].fields if f.size(dim) == 1)
    for i, part in enumerate(parts[1:]):
        shapes = [tuple(1 if d == dim else n for d, n in enumerate(p.shape)) for p in (parts[i], part)]
        own = tuple(f for f in part.fields if f.size(dim) == 1)
        across = call.couplings.combine(across, shapes[0], own, shapes[1], FIXED)
    if not any(f.size(dim) > 1 for part in parts for f in part.fields):
        return [across]
    columns = [_column(call, part, dim) for part in parts]
    widest = [max(c.size(d) for c in columns) for d in range(ndim)]
    shapes = [tuple(c.size(d) if d == dim else widest[d] for d in range(ndim)) for c in columns]
    return [(*across, torch.cat([c.expand(shape) for c, shape in zip(columns, shapes, strict=True)], dim))]


def _column(call: Call, part: Labelled, dim: int) -> Field:
    """The field of a concatenated tensor that varies along ``dim``; a new one of pinned labels if none does."""
    own = [f for f in part.fields if f.size(dim) > 1]
    if own:
        for other in own[1:]:
            call.couplings.tie(own[0], other)
        return own[0]
    labels = call.couplings.fresh(part.shape[dim])
    call.couplings.pin(labels, FIXED)
    return labels.view([-1 if d == dim else 1 for d in range(len(part.shape))])


def stack(call: Call) -> list[Fields]:
    """Tensors of one shape along a new dimension: their labels are tied."""
    parts = [call.trace.labelled(t) for t in call.tensors]
    fields = parts[0].fields
    for part in parts[1:]:
        fields = call.couplings.combine(fields, part.shape, part.fields, part.shape, FIXED)
    (dim,) = call.dims("dim", len(parts[0].shape) + 1)
    return [tuple(f.unsqueeze(dim) for f in fields)]
