import copy
import warnings
from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.measurement import count_params
from autocompress.models import SmallResNet
from autocompress.scheme import Compose, Scheme, Theta
from autocompress.schemes import (
    FilterPrune,
    FilterPruneQuantize16,
    Prune,
    PruneQuantize16,
    Quantize16,
    StructPrune,
    StructPruneQuantize16,
)
from autocompress.schemes.groups import first_channels, find_groups, remove_channels, sizes_along
from autocompress.schemes.struct import Structure
from autocompress.testing import Case, SchemeConformance, lived_in, masked_model, run


class Structured(SchemeConformance):
    __test__ = False

    def unit_size(self, case: Case) -> int:
        """A channel with all that is coupled to it, in the dense model."""
        structure = case.facts[0] if isinstance(self.make_scheme(), Compose) else case.facts
        return max(largest_channel(structure, i) for i in range(len(structure.groups)))


def largest_channel(structure: Structure, i: int) -> int:
    group = structure.groups[i]
    sizes = torch.zeros(group.width, dtype=torch.long)
    for s in group.slices:
        shape = structure.shapes[s.parameter]
        sizes += torch.bincount(s.channels, minlength=group.width) * (shape.numel() // shape[s.dim])
    return int(sizes.max())


class TestPrune(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return Prune()


class TestStructPrune(Structured):
    def make_scheme(self) -> Scheme:
        return StructPrune()


class TestFilterPrune(Structured):
    def make_scheme(self) -> Scheme:
        return FilterPrune()


class TestBFloat16(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return Quantize16(dtype="bf16")


class TestFloat16(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return Quantize16(dtype="fp16")


class TestPruneQuantize16(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return PruneQuantize16()


class TestStructPruneQuantize16(Structured):
    def make_scheme(self) -> Scheme:
        return StructPruneQuantize16()


class TestFilterPruneQuantize16(Structured):
    def make_scheme(self) -> Scheme:
        return FilterPruneQuantize16()
