"""Removing channels: a copy of a model with smaller parameters, and layers whose attributes state their sizes."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .attention import known_attention, make_thin
from .computing import takes_whole_groups
from .layernorm import make_thin_norm
from .slices import Group, positions_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
VISION_TRANSFORMER = "torchvision.models.vision_transformer"
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def remove_channels(model: nn.Module, groups: Sequence[Group], removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of ``model`` without some channels.

    Args:
        model: A model of the architecture that ``groups`` were found in; not changed.
        groups: The groups.
        removed: The channels to remove, by the root of their group. Groups that are not named stay whole.

    Raises:
        ValueError: If ``removed`` names a group that is not in ``groups``.
    """
    unknown = removed.keys() - {group.root for group in groups}
    if unknown:
        raise ValueError(f"the model has no channels to remove in {', '.join(sorted(unknown))}")
    gone = _gone(groups, removed)
    smaller: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kept = tensor.detach()
        for dim in range(tensor.dim()):
            if (name, dim) in gone:
                stays = torch.ones(kept.shape[dim], dtype=torch.bool)
                stays[gone[name, dim]] = False
                kept = kept.index_select(dim, stays.nonzero()[:, 0].to(kept.device))
        kept = kept.clone() if kept.data_ptr() == tensor.data_ptr() else kept
        smaller[id(tensor)] = (
            nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
        )
    thinner = copy.deepcopy(model, smaller)  # takes the tensors from the memo: shared ones stay shared
    for before, after in zip(model.modules(), thinner.modules(), strict=True):
        _restate_sizes(before, after)
        if known_attention(before) is not None and _shapes(after) != _shapes(before):
            make_thin(after, before)
    for name, module in thinner.named_modules():
        place = (f"{name}.num_features".lstrip("."), 0)
        if place in gone and isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features -= len(gone[place])
        elif place in gone and isinstance(module, nn.LayerNorm):
            make_thin_norm(module, module.normalized_shape[0] - len(gone[place]))
    return thinner


def _gone(groups: Sequence[Group], removed: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Tensor]:
    """The positions to remove, by tensor and dimension."""
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for s, positions in positions_of(groups, removed):
        gone[s.parameter, s.dim].append(positions)
    return {place: torch.cat(positions) for place, positions in gone.items()}


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [p.shape for p in module.parameters()]


def _restate_sizes(before: nn.Module, after: nn.Module) -> None:
    """Sets the attributes in which PyTorch's layers repeat the sizes of their parameters."""
    weight = after._parameters.get("weight")
    if isinstance(before, CONVOLUTIONS) and isinstance(after, CONVOLUTIONS) and weight is not None:
        groups, (first, second) = before.groups, weight.shape[:2]
        if groups > 1 and takes_whole_groups(groups, before.in_channels // groups):
            groups = first * groups // before.weight.shape[0]
        transposed = isinstance(before, TRANSPOSED)
        after.groups = groups
        after.in_channels, after.out_channels = (
            (first, second * groups) if transposed else (second * groups, first)
        )
    elif isinstance(after, nn.Linear):
        after.out_features, after.in_features = after.weight.shape
    elif isinstance(after, nn.modules.batchnorm._NormBase):
        vectors = [t for t in (weight, after.running_mean) if t is not None]
        after.num_features = len(vectors[0]) if vectors else after.num_features
    elif isinstance(before, nn.GroupNorm) and isinstance(after, nn.GroupNorm) and weight is not None:
        after.num_groups, after.num_channels = before.num_groups * len(weight) // before.num_channels, len(weight)
    elif isinstance(after, nn.LayerNorm) and weight is not None and weight.shape != after.normalized_shape:
        make_thin_norm(after, len(weight))
    elif isinstance(after, nn.Embedding):
        after.num_embeddings, after.embedding_dim = after.weight.shape
    elif isinstance(after, nn.PReLU):
        after.num_parameters = after.weight.numel()
    elif type(after).__module__ == VISION_TRANSFORMER and "class_token" in after._parameters:
        setattr(after, "hidden_dim", after.get_parameter("class_token").shape[-1])  # noqa: B010  # not nn.Module's
