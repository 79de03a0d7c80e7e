"""The objectives that ship with autocompress, one a file. Importing this registers them."""

from .density import density
from .energy import energy
from .latency import latency
from .macs import macs
from .memory import memory
from .params import params
from .product import product
from .size import size
from .throughput import throughput
from .weighted_sum import weighted_sum

__all__ = [
    "density",
    "energy",
    "latency",
    "macs",
    "memory",
    "params",
    "product",
    "size",
    "throughput",
    "weighted_sum",
]
