"""Compositions that have a name of their own."""

from autocompress.scheme import Compose, automatic, register_scheme

from .prune import Prune
from .quantize import Quantize16
from .quantize8 import Quantize8
from .struct import FilterPrune, StructPrune


@register_scheme
def PruneQuantize16() -> Compose:
    """Prune, then Quantize16."""
    return Compose(Prune(), Quantize16())


@automatic
@register_scheme
def StructPruneQuantize16() -> Compose:
    """StructPrune, then Quantize16."""
    return Compose(StructPrune(), Quantize16())


@register_scheme
def FilterPruneQuantize16() -> Compose:
    """FilterPrune, then Quantize16."""
    return Compose(FilterPrune(), Quantize16())


@automatic
@register_scheme
def PruneQuantize8() -> Compose:
    """Prune, then Quantize8."""
    return Compose(Prune(), Quantize8())


@automatic
@register_scheme
def StructPruneQuantize8() -> Compose:
    """StructPrune, then Quantize8."""
    return Compose(StructPrune(), Quantize8())
