"""Importance of channels: how much is lost when one of them is removed with everything coupled to it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from autocompress.scheme import Evidence, Weights

from .criteria import Observed, draw, entry_scores, observe_entries, required
from .feature_maps import MAP_CRITERIA, observe_maps, watched
from .groups import Group, Slices, first_channels
from .roles import Roles, cover

ChannelCriterion: TypeAlias = Literal[
    "l1", "l2", "lamp", "taylor", "obd", "bn_scale", "fpgm", "activation", "hrank", "beta_rank", "random"
]
CHANNEL_CRITERIA: tuple[str, ...] = get_args(ChannelCriterion)
Normalization: TypeAlias = Literal["sqrt", "mean", "parameters", "none"]
BLOCK = 64  # filters whose distances from others are computed at a time
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def channel_scores(
    criterion: str, groups: Sequence[Group], weights: Weights, roles: Roles, observed: Observed | None
) -> Tensor:
    """The importance of every channel of the groups.

    Args:
        criterion: What makes a channel important:

            - ``l1``, ``l2``, ``taylor``, ``obd``: the sum of the scores of all entries that go with it, see
              `autocompress.schemes.criteria.entry_scores`; ``l2`` is group magnitude (Fang et al., "DepGraph:
              Towards Any Structural Pruning", CVPR 2023).
            - ``bn_scale``: the magnitude of BatchNorm's scales (Liu et al., "Learning Efficient Convolutional
              Networks through Network Slimming", ICCV 2017).
            - ``fpgm``: the distance of its filters from all others of the layer, summed: the filter at the
              geometric median can be replaced by them (He et al., "Filter Pruning via Geometric Median",
              CVPR 2019).
            - ``activation``: the mean magnitude of its activations, where the next layer reads them (Polyak &
              Wolf, "Channel-Level Acceleration of Deep Face Representations", IEEE Access 2015).
            - ``hrank``: the mean rank of its feature maps (Lin et al., "HRank: Filter Pruning using High-Rank
              Feature Map", CVPR 2020).
            - ``beta_rank``: the l1 norm of its filters, each times the ratio of the standard deviations over a
              batch of its output and its input, averaged over positions (Homayounfar et al., "Beta-Rank: A Robust
              Convolutional Filter Pruning Method for Imbalanced Medical Image Analysis", 2023).
            - ``random``: a fixed draw.
        groups: The groups.
        weights: All the model's parameters.
        roles: The roles of the parameters.
        observed: What `observe_channels` returned.

    Returns:
        Scores that are not negative, one group after the other, shape ``(channels,)``, on the CPU.

    Raises:
        ValueError: If the criterion looks at data and nothing was observed.
    """
    if criterion == "random":
        return torch.cat([draw(group.root, group.width) for group in groups])
    if criterion in ("activation", "hrank"):
        seen = required(observed, criterion)
        return torch.cat([seen[group.root] for group in groups]).cpu()
    if criterion == "bn_scale":
        scales = [[s for s in group.slices if s.parameter in roles.scales] for group in groups]
        total = _summed(groups, scales, lambda s: weights[s.parameter].abs())
        return total / _summed(groups, scales, lambda s: torch.ones(len(weights[s.parameter])))
    filters = [roles.filters(group) for group in groups]
    if criterion == "fpgm":
        return _summed(groups, filters, lambda s: _distances(weights[s.parameter], s))
    if criterion == "beta_rank":
        seen = required(observed, criterion)
        rated = [[s for s in of_group if s.parameter in seen] for of_group in filters]
        return _summed(groups, rated, lambda s: _along(weights[s.parameter].abs(), s) * seen[s.parameter])
    scores = entry_scores(criterion, weights, {s.parameter for g in groups for s in g.slices}, observed)
    return _summed(groups, [g.slices for g in groups], lambda s: _along(scores[s.parameter], s))


def observe_channels(criterion: str, evidence: Evidence, groups: Sequence[Group], roles: Roles) -> Observed | None:
    """What `channel_scores` needs to know of the data; None for a criterion that looks at weights alone.

    The model is not changed.
    """
    if criterion in MAP_CRITERIA:
        return observe_maps(criterion, evidence, groups, roles)
    return observe_entries(criterion, evidence, sorted({s.parameter for g in groups for s in g.slices}))


def can_rate(criterion: str, group: Group, roles: Roles) -> bool:
    """Whether each channel of a group has what the criterion looks at: a scale, a filter or a feature map."""
    if criterion in MAP_CRITERIA:
        return bool(watched(criterion, group, roles)) or roles.only_train(group)
    if criterion == "bn_scale":
        return cover((s for s in group.slices if s.parameter in roles.scales), group)
    return criterion != "fpgm" or cover(roles.filters(group), group)


def normalized(
    by: Normalization, scores: Tensor, groups: Sequence[Group], shapes: Mapping[str, torch.Size]
) -> Tensor:
    """Scores that one threshold can compare across layers, shape ``(channels,)``.

    Args:
        by: ``mean`` divides by the mean of the group, ``sqrt`` by the square root of that mean.
            ``parameters`` divides by the number of parameters that are removed with a channel: of two channels
            that matter as much to the loss, the one that saves more is less important. ``none`` changes nothing.
        scores: One group after the other, shape ``(channels,)``.
        groups: The groups.
        shapes: Shape of every parameter of the model.
    """
    if by == "parameters":
        return scores / _parameters(groups, shapes)
    if by == "none":
        return scores
    parts = torch.split(scores, [group.width for group in groups])
    means = [part.mean().clamp_min(torch.finfo(part.dtype).tiny) for part in parts]
    return torch.cat([part / (m.sqrt() if by == "sqrt" else m) for part, m in zip(parts, means, strict=True)])


def _parameters(groups: Sequence[Group], shapes: Mapping[str, torch.Size]) -> Tensor:
    """The parameters that are removed with each channel, shape ``(channels,)``; shared ones count for each."""

    def size(s: Slices) -> Tensor:
        shape = shapes[s.parameter]
        return torch.full((shape[s.dim],), float(shape.numel() // shape[s.dim]))

    return _summed(groups, [group.slices for group in groups], size)


def _summed(
    groups: Sequence[Group], slices: Sequence[Sequence[Slices]], score: Callable[[Slices], Tensor]
) -> Tensor:
    """For every channel, the sum of the scores of its slices; on the CPU, shape ``(channels,)``.

    Args:
        groups: The groups.
        slices: The slices of each group to sum over.
        score: The scores of all positions along the dimension of a slice, shape ``(n,)``.
    """
    starts = [(start, s) for start, own in zip(first_channels(groups), slices, strict=False) for s in own]
    scores = [score(s).float() for _, s in starts]
    on_cpu = torch.split(torch.cat(scores).cpu(), [len(s) for s in scores])  # in one transfer
    total = torch.zeros(sum(group.width for group in groups))
    for (start, s), values in zip(starts, on_cpu, strict=True):
        total.index_add_(0, s.channels + start, values[s.positions])
    return total


def _along(entries: Tensor, s: Slices) -> Tensor:
    """The sum over all dimensions but that of the slices."""
    if entries.dim() == 1:
        return entries
    if s.dim > 0 and entries.is_contiguous():  # leading dimensions first: that takes a fifth of the time
        entries = entries.sum(list(range(s.dim)))
        return entries.sum(list(range(1, entries.dim()))) if entries.dim() > 1 else entries
    return entries.sum([d for d in range(entries.dim()) if d != s.dim])


def _distances(weight: Tensor, s: Slices) -> Tensor:
    """For each filter, the sum of its Euclidean distances from all others; shape ``(filters,)``."""
    filters = weight.movedim(s.dim, 0).flatten(1)
    squares, total = filters.square().sum(1), torch.zeros_like(filters[:, 0])
    for start in range(0, len(filters), BLOCK):  # each pair once
        rows, others = slice(start, start + BLOCK), slice(start, None)
        apart = squares[rows, None] + squares[others] - 2 * filters[rows] @ filters[others].T
        apart = apart.fill_diagonal_(0).clamp_min_(0).sqrt_()
        total[rows] += apart.sum(1)
        total[start + BLOCK :] += apart[:, BLOCK:].sum(0)
    return total
