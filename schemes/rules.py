"""The rule of each basic operation of PyTorch: how it carries channels from inputs to outputs.

A rule takes a call and returns the fields of each of its outputs. It ties the labels that the operation forces to
come and go together, and pins those that it forces to stay. Rules are sound for any removal that the ties allow,
but they do not see numbers that Python code computes from shapes; so the groups are checked afterwards, by
`autocompress.schemes.exactness`.
"""

import re
from typing import Any

import torch

from . import computing, moving
from .calls import Rule, name_of

# Operations whose result is a weight if their arguments are weights.
MOVES = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "clone", "detach"),
    *("alias", "split", "split_with_sizes", "select", "slice", "unbind", "flip", "_to_copy"),
}

_RULES: dict[Rule, str] = {
    moving.restride: "as_strided",
    moving.unchanged: "detach alias clone _to_copy lift_fresh zero fill uniform normal bernoulli random "
    "zeros_like ones_like empty_like full_like rand_like randn_like native_dropout hardswish",
    moving.rearrange: "t transpose permute unsqueeze squeeze expand flip repeat",
    moving.reshape: "view _unsafe_view _reshape_alias",
    moving.select: "select unbind",
    moving.slice_: "slice",
    moving.split: "split split_with_sizes",
    moving.halve: "glu",
    moving.index: "index index_select embedding",
    moving.roll: "roll",
    moving.pad: "constant_pad_nd",
    moving.concatenate: "cat",
    moving.stack: "stack",
    computing.reduce: "mean sum amax amin max min var std var_mean std_mean prod logsumexp norm argmax argmin any "
    "all linalg_vector_norm",
    computing.normalize_along: "_softmax _log_softmax _safe_softmax cumsum sort",
    computing.shuffle_pixels: "pixel_shuffle",
    computing.layer_norm: "native_layer_norm",
    computing.group_norm: "native_group_norm",
    computing.batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update",
    computing.multiply: "mm bmm addmm baddbmm",
    computing.convolve: "convolution",
    computing.elementwise: "copy leaky_relu hardtanh softplus elu prelu _prelu_kernel",
}
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names.split()}
_SPATIAL = re.compile(r"_?(adaptive_)?(max|avg)_pool\d|upsample_|reflection_pad\d|replication_pad\d")


def rule_for(func: Any) -> Rule:
    """The rule of an operation."""
    name = name_of(func)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.startswith("new_"):
        return moving.unlabelled
    if _SPATIAL.match(name):
        return computing.spatial
    return computing.elementwise if torch.Tag.pointwise in func.tags else moving.unknown
