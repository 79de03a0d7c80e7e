"""The schemes that ship with autocompress, one family a file. Importing this registers them."""

from .compositions import FilterPruneQuantize16, PruneQuantize16, StructPruneQuantize16
from .prune import Prune
from .quantize import Quantize16
from .struct import FilterPrune, NeuronPrune, StructPrune

__all__ = [
    "FilterPrune",
    "FilterPruneQuantize16",
    "NeuronPrune",
    "Prune",
    "PruneQuantize16",
    "Quantize16",
    "StructPrune",
    "StructPruneQuantize16",
]
