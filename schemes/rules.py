"""How the basic operations of PyTorch carry channels from inputs to outputs.

A rule takes a call and returns the fields of each of its outputs; on the way it ties what the operation forces
to come and go together, and pins what it forces to stay. Rules are sound for any removal that the ties allow;
numbers that Python code works out from shapes are beyond them, which is why what they find is checked afterwards.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .coupling import Couplings, Field, Fields, along, reduced, varies

FIXED = "they meet a tensor whose size is fixed"
MIXED = "a {} takes all of them together"
BY_PLACE = "a {} picks them by their place"


@dataclass(frozen=True)
class Labelled:
    """What the trace knows of a tensor.

    Attributes:
        shape: Its shape.
        fields: The labels of its elements.
        is_weight: Whether it holds parameters, rearranged at most: where a label goes, it is zero in the mask.
    """

    shape: tuple[int, ...]
    fields: Fields
    is_weight: bool = False


class Tracing(Protocol):
    """What a rule needs of the trace."""

    couplings: Couplings
    outputs: list[Tensor]
    filters: list[Tensor]

    def labelled(self, tensor: Tensor) -> Labelled:
        """What is known of a tensor."""


@dataclass
class Call:
    """An operation with its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: Tracing
    outs: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The operation's name without namespace, overload and the underscore of the in-place form."""
        return _name(self.func)

    @property
    def couplings(self) -> Couplings:
        """The ties and pins."""
        return self.trace.couplings

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, lists of tensors included."""
        found: list[Tensor] = []
        for argument in (*self.args, *self.kwargs.values()):
            members = argument if isinstance(argument, (list, tuple)) else (argument,)
            found += [member for member in members if isinstance(member, Tensor)]
        return found

    @property
    def x(self) -> Labelled:
        """The first tensor."""
        return self.trace.labelled(self.tensors[0])

    def argument(self, name: str) -> Any:
        """An argument by its name in the operation's schema; its default if it was not given."""
        for i, formal in enumerate(self.func._schema.arguments):
            if formal.name == name:
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, formal.default_value)
        raise AssertionError(f"{self.func} has no argument {name}")

    def dims(self, name: str, ndim: int) -> list[int]:
        """A dimension, or several, as non-negative numbers; all of them where none is given."""
        given = self.argument(name)
        if given is None or given == []:
            return list(range(ndim))
        return [dim % ndim for dim in (given if isinstance(given, (list, tuple)) else [given])]

    def moved(self, field: Field) -> Field:
        """What the operation makes of the labels of its first tensor, of its full shape."""
        out: Tensor = self.func(field.expand(self.x.shape), *self.args[1:], **self.kwargs)
        return reduced(out)

    def everywhere(self, fields: Fields) -> list[Fields]:
        """The same fields for each output."""
        return [fields for _ in self.outs]


Rule: TypeAlias = Callable[[Call], list[Fields]]


def _name(func: Any) -> str:
    name: str = func._schema.name.split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


# Operations that keep every element or leave it out


def unchanged(call: Call) -> list[Fields]:
    """The output has the first tensor's shape, and its labels."""
    return call.everywhere(call.x.fields)


def unlabelled(call: Call) -> list[Fields]:
    """A new tensor of a size of its own."""
    return call.everywhere(())


def rearrange(call: Call) -> list[Fields]:
    """The labels move as the values do."""
    return [tuple(call.moved(f) for f in call.x.fields)]


def reshape(call: Call) -> list[Fields]:
    """Dimensions are merged and split.

    Of a dimension that is split into several (into groups and channels within one) only one can shrink, and
    the others are numbers in the code. It is the largest: groups are few, channels many.
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
    """The dimensions of ``after`` in runs that hold the same elements as a run of ``before``."""
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


def select(call: Call) -> list[Fields]:
    """One place along a dimension: `select`, `unbind`."""
    (dim,) = call.dims("dim", len(call.x.shape))
    kept = call.couplings.merge_all(call.x.fields, [dim], BY_PLACE.format(call.name))
    kept = tuple(f.squeeze(dim) for f in kept)
    return call.everywhere(kept)


def slice_(call: Call) -> list[Fields]:
    """Some places along a dimension; all of them in many networks."""
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
    """Places by number, in a tensor of them."""
    x = call.x
    if call.name == "embedding":
        given: list[Any] = [call.argument("indices"), None]
    elif call.name == "index_select":
        (at,) = call.dims("dim", len(x.shape))
        given = [call.argument("index") if dim == at else None for dim in range(len(x.shape))]
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
    return f.expand([shape[dim] if dim in dims else f.size(dim) for dim in range(f.dim())])


def roll(call: Call) -> list[Fields]:
    """A shift in a circle, by a number of places."""
    dims = call.dims("dims", len(call.x.shape))
    return [call.couplings.merge_all(call.x.fields, dims, BY_PLACE.format("roll"))]


def pad(call: Call) -> list[Fields]:
    """What is added at either end stays; what was there keeps its labels."""
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
    """Labels one after the other along the dimension, tied across it."""
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
    """The field of a part of a concatenation that varies along it; where it has none, its places stay."""
    own = [f for f in part.fields if f.size(dim) > 1]
    if own:
        for other in own[1:]:
            call.couplings.tie(own[0], other)
        return own[0]
    labels = call.couplings.fresh(part.shape[dim])
    call.couplings.pin(labels, FIXED)
    return labels.view([-1 if d == dim else 1 for d in range(len(part.shape))])


def stack(call: Call) -> list[Fields]:
    """Tensors of one shape behind each other along a new dimension."""
    parts = [call.trace.labelled(t) for t in call.tensors]
    fields = parts[0].fields
    for part in parts[1:]:
        fields = call.couplings.combine(fields, part.shape, part.fields, part.shape, FIXED)
    (dim,) = call.dims("dim", len(parts[0].shape) + 1)
    return [tuple(f.unsqueeze(dim) for f in fields)]


# Operations that compute


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
    """A number for all the elements along some dimensions: mean, sum, maximum, variance."""
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
    """Pooling, interpolation and padding by reflection: they mix the last dimensions, one by one channel."""
    (n,) = re.findall(r"(\d)d", call.name)[:1] or ["2"]
    ndim = len(call.x.shape)
    last = range(ndim - int(n), ndim)
    return call.everywhere(call.couplings.merge_all(call.x.fields, last, MIXED.format(call.name)))


def shuffle_pixels(call: Call) -> list[Fields]:
    """Channels to positions: those of one output channel go together."""
    moved = tuple(call.moved(f) for f in call.x.fields)
    ndim = len(call.x.shape)
    return [call.couplings.merge_all(moved, [ndim - 2, ndim - 1], FIXED)]


def layer_norm(call: Call) -> list[Fields]:
    """Statistics over the last dimensions: without one of the elements they are others."""
    why = MIXED.format("LayerNorm")
    last = len(call.argument("normalized_shape"))
    for name in ("weight", "bias"):
        _pin_argument(call, name, why)
    ndim = len(call.x.shape)
    call.couplings.merge_all(call.x.fields, range(ndim - last, ndim), why)
    return [call.x.fields, *(() for _ in call.outs[1:])]


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
    """Statistics over each group of channels: whole groups come and go."""
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
    """The labels along dimension 1 of a tensor; what varies otherwise is merged into them."""
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
    if a.is_weight or b.is_weight:  # where a label goes, the weight is zero, and so is the product
        products = tuple(f for f in products if varies(f) != {columns})
        left_over = [
            along(a.fields, rows) if a.is_weight else None,
            along(b.fields, columns) if b.is_weight else None,
        ]
        call.trace.outputs += [labels for labels in left_over if labels is not None]
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

    Either is exact. The one with more pieces to choose from is taken; a depthwise convolution is the extreme.
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
    cases its second dimension is seen by all groups alike.
    """
    groups, couplings = call.argument("groups"), call.couplings
    assert first is not None  # it is at least as long as there are groups
    ours = first.view(groups, -1)
    rows = None if read is None else read.view(groups, -1)
    if takes_whole_groups(groups, call.x.shape[1] // groups):
        couplings.tie(ours, ours[:, :1])
        couplings.tie_or_pin(ours[:, :1], rows, FIXED)
        if second is not None:
            couplings.pin(second, "they are inside the groups of a convolution")
        return ours[:, :1].expand(groups, call.outs[0].shape[1] // groups).reshape(-1)
    couplings.tie(ours, ours[:1])
    shared = None if second is None else second.expand(groups, -1)
    inputs, outputs = (ours, shared) if call.argument("transposed") else (shared, ours)
    couplings.tie_or_pin(inputs, rows, FIXED)
    return None if outputs is None else outputs.reshape(-1)


def unknown(call: Call) -> list[Fields]:
    """An operation without a rule: all that it touches stays."""
    for tensor in call.tensors:
        for f in call.trace.labelled(tensor).fields:
            call.couplings.pin(f, f"nothing is known of the operation {call.name}")
    return call.everywhere(())


# The table

# Operations after which a weight is still a weight.
MOVES = {
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "clone"),
    *(
        "detach",
        "alias",
        "contiguous",
        "split",
        "split_with_sizes",
        "select",
        "slice",
        "unbind",
        "flip",
        "_to_copy",
    ),
}

_RULES: dict[Rule, str] = {
    unchanged: "detach alias clone contiguous _to_copy lift_fresh zero fill uniform normal bernoulli random "
    "zeros_like ones_like empty_like full_like rand_like randn_like native_dropout hardswish dropout",
    rearrange: "t transpose permute unsqueeze squeeze expand flip repeat numpy_T",
    reshape: "view _unsafe_view _reshape_alias reshape",
    select: "select unbind",
    slice_: "slice",
    split: "split split_with_sizes",
    halve: "glu",
    index: "index index_select embedding",
    roll: "roll",
    pad: "constant_pad_nd",
    concatenate: "cat",
    stack: "stack",
    reduce: "mean sum amax amin max min var std var_mean std_mean prod logsumexp norm linalg_vector_norm argmax "
    "argmin any all",
    normalize_along: "_softmax _log_softmax _safe_softmax cumsum sort",
    shuffle_pixels: "pixel_shuffle",
    layer_norm: "native_layer_norm",
    group_norm: "native_group_norm",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update",
    multiply: "mm bmm addmm baddbmm",
    convolve: "convolution",
    elementwise: "copy leaky_relu hardtanh softplus elu prelu _prelu_kernel",
}
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names.split()}
_SPATIAL = re.compile(r"_?(adaptive_)?(max|avg)_pool\d|upsample_|reflection_pad\d|replication_pad\d")


def rule_for(func: Any) -> Rule:
    """The rule of an operation."""
    name = _name(func)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.startswith("new_"):
        return unlabelled
    if _SPATIAL.match(name):
        return spatial
    return elementwise if torch.Tag.pointwise in func.tags else unknown
