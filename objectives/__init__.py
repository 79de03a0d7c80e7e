"""The objectives that ship with autocompress, one a file. Importing this registers them."""

from .density import density
from .latency import latency
from .macs import macs
from .size import size

__all__ = ["density", "latency", "macs", "size"]
