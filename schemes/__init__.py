"""The schemes that ship with autocompress, one family a file. Importing this registers them."""

from .block import BlockPrune
from .compositions import (
    FilterPruneQuantize16,
    PruneQuantize8,
    PruneQuantize16,
    StructPruneQuantize8,
    StructPruneQuantize16,
)
from .lowrank import LowRank
from .nm import NMPrune
from .prune import Prune
from .quantize import Quantize16
from .quantize8 import Quantize8
from .struct import FilterPrune, NeuronPrune, StructPrune

__all__ = [
    "BlockPrune",
    "FilterPrune",
    "FilterPruneQuantize16",
    "LowRank",
    "NMPrune",
    "NeuronPrune",
    "Prune",
    "PruneQuantize8",
    "PruneQuantize16",
    "Quantize8",
    "Quantize16",
    "StructPrune",
    "StructPruneQuantize8",
    "StructPruneQuantize16",
]
