import copy

import torch
from torch import nn

from autocompress.networks.layers import Layer, compare_layers


def network():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


def test_widths_and_parameters_before_and_after():
    dense, small = network(), network()
    small[0], small[3] = nn.Conv2d(1, 2, 3), nn.Linear(2, 4)
    assert compare_layers(dense, small) == (
        Layer("0", "Conv2d", 8, 2, 80, 20),
        Layer("3", "Linear", 4, 4, 36, 12),
    )


def test_zeros_are_not_parameters_that_are_left():
    dense = network()
    for p in dense.parameters():
        nn.init.ones_(p)
    sparse = copy.deepcopy(dense)
    with torch.no_grad():
        sparse[3].weight[:, :6] = 0
    assert compare_layers(dense, sparse)[1] == Layer("3", "Linear", 4, 4, 36, 12)


def test_what_replaces_a_layer_counts_as_a_whole_and_what_is_gone_is_gone():
    dense, other = network(), network()
    other[3] = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(1, 4))
    other[0] = nn.Identity()
    first, last = compare_layers(dense, other)
    assert (first.width, first.params) == (None, 0)
    assert (last.width, last.params) == (4, 16)
    assert compare_layers(dense, nn.Sequential())[0].width is None
