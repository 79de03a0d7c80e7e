"""An operation in a trace: its arguments, and the labels that they carry."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from .coupling import Couplings, Field, Fields, reduced

# Why channels stay, in words for users.
FIXED = "they meet a tensor whose size is fixed"
MIXED = "a {} takes all of them together"
BY_PLACE = "a {} picks them by their place"


@dataclass(frozen=True)
class Labelled:
    """The labels of a tensor.

    Attributes:
        shape: The tensor's shape.
        fields: The labels of its elements.
        is_weight: Whether it is a parameter, possibly rearranged: where a label is removed, the masked model has
            zeros.
    """

    shape: tuple[int, ...]
    fields: Fields
    is_weight: bool = False


class Tracing(Protocol):
    """The part of a trace that rules use."""

    couplings: Couplings
    outputs: list[Tensor]
    filters: list[Tensor]

    def labelled(self, tensor: Tensor) -> Labelled:
        """The labels of a tensor."""


@dataclass
class Call:
    """An operation with its arguments, and the tensors that it puts out."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: Tracing
    outs: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The operation's name without namespace, overload and the underscore of the in-place form."""
        return name_of(self.func)

    @property
    def couplings(self) -> Couplings:
        """The ties and pins of the trace."""
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
        """The first tensor among the arguments."""
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
        """Applies the operation to the labels of the first tensor, as if they were its values."""
        out: Tensor = self.func(field.expand(self.x.shape), *self.args[1:], **self.kwargs)
        return reduced(out)

    def everywhere(self, fields: Fields) -> list[Fields]:
        """The same fields for each output."""
        return [fields for _ in self.outs]


Rule: TypeAlias = Callable[[Call], list[Fields]]


def name_of(func: Any) -> str:
    """An operation's name without namespace, overload and the underscore of the in-place form."""
    name: str = func._schema.name.split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
