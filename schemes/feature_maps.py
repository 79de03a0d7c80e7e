"""Feature maps on training data, for the importance criteria that are based on them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autocompress.scheme import Evidence
from autocompress.task import evaluating

from .criteria import Observed, looking_at
from .groups import Group, Slices
from .roles import Roles, cover, module_of

MAP_CRITERIA = ("activation", "hrank", "beta_rank")
SAMPLES = 64  # that are looked at: a C step should cost little compared with the training before it
RANKED_SAMPLES = 16  # of a batch: Lin et al. find that ranks hardly depend on the choice of samples


def watched(criterion: str, group: Group, roles: Roles) -> list[Slices]:
    """The slices at whose layers a group's channels can be observed; none if not all of the channels can be.

    They are the layers that read the channels, behind BatchNorm and activation, or else those that put them out.
    """
    places = [roles.filters(group)] if criterion == "beta_rank" else [roles.readers(group), roles.filters(group)]
    places = [[s for s in slices if s.parameter not in roles.silent] for slices in places]
    if criterion == "hrank":  # a neuron has no map
        places = [[s for s in slices if s.parameter in roles.planar] for slices in places]
    return next((slices for slices in places if cover(slices, group)), [])


def observe_maps(criterion: str, evidence: Evidence, groups: Sequence[Group], roles: Roles) -> Observed:
    """The mean of a criterion's statistic over batches, and over the layers where a channel can be observed.

    Args:
        criterion: One of `MAP_CRITERIA`.
        evidence: The model and the data.
        groups: The groups.
        roles: The roles of the model's parameters.

    Returns:
        ``activation``: mean magnitude of each channel, by the name of the group's root, shape ``(width,)``; 0 if
        no pass in eval mode has used it, as in an auxiliary head: the deployed model does not need it.
        ``hrank``: likewise the mean rank of its maps. ``beta_rank``: by the filters' weight, the ratio of the
        standard deviations of each filter's output and input, shape ``(filters,)``.
    """
    totals: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], int] = defaultdict(int)

    def note(key: tuple[str, int], s: Slices, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        value = _look(criterion, s, roles, module, inputs[0], output)
        totals[key] = totals[key] + value if key in totals else value
        counts[key] += 1

    hooks = []
    places = {(group.root, i): s for group in groups for i, s in enumerate(watched(criterion, group, roles))}
    try:
        for key, s in places.items():
            module = evidence.model.get_submodule(module_of(s))
            hooks.append(module.register_forward_hook(partial(note, key, s)))
        with looking_at(evidence) as batches, torch.no_grad():
            left = SAMPLES
            for x, _ in batches:
                evidence.model(x[:left])
                left -= len(x)
                if left <= 0:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if not totals:
        raise ValueError("there are no batches to look at; the training data must serve at least one")
    means = {key: total / counts[key] for key, total in totals.items()}
    if criterion == "beta_rank":
        return {places[key].parameter: mean for key, mean in means.items()}
    return {group.root: _per_channel(group, places, means) for group in groups}


def _look(criterion: str, s: Slices, roles: Roles, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The criterion's statistic in one forward pass, for each position along the dimension of the slices.

    Args:
        criterion: One of `MAP_CRITERIA`.
        s: The slices whose layer is observed.
        roles: The roles of the model's parameters.
        module: The layer.
        x: Its input.
        y: Its output.

    Returns:
        A tensor of shape ``(n,)``.
    """
    maps = (y if roles.outputs[s.parameter] == s.dim else x).movedim(-1 if isinstance(module, nn.Linear) else 1, 0)
    if criterion == "activation":
        magnitude: Tensor = maps.abs().flatten(1).mean(1)
        return magnitude
    if criterion == "hrank":
        rank: Tensor = torch.linalg.matrix_rank(maps[:, :RANKED_SAMPLES].float()).float().mean(1)
        return rank
    of_inputs = x.std(0, correction=0).mean()  # over the batch, at each position
    of_outputs = maps.std(1, correction=0).reshape(len(maps), -1).mean(1)
    ratio: Tensor = of_outputs / of_inputs.clamp_min(torch.finfo(x.dtype).tiny)
    return ratio


def _per_channel(
    group: Group, places: dict[tuple[str, int], Slices], means: dict[tuple[str, int], Tensor]
) -> Tensor:
    """The mean of each channel over the layers where it was observed, shape ``(width,)``."""
    device = next(iter(means.values())).device
    total, count = torch.zeros(2, group.width, device=device)
    for key, mean in means.items():
        if key[0] == group.root:
            channels, positions = places[key].channels.to(device), places[key].positions.to(device)
            total.index_add_(0, channels, mean[positions])
            count.index_add_(0, channels, torch.ones_like(mean[positions]))
    mean_of_channel: Tensor = total / count.clamp_min(1)
    return mean_of_channel


def in_eval_mode(roles: Roles, model: nn.Module, x: Tensor) -> Roles:
    """The roles with what a forward pass in eval mode shows: layers that it does not call, parameters not used."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(f"{name}.weight".lstrip(".")))
        for name, module in model.named_modules()
    ]
    try:
        with evaluating(model), torch.no_grad(), _Used() as used:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    named = model.named_parameters(remove_duplicate=False)
    unused = frozenset(name for name, parameter in named if id(parameter) not in used.parameters)
    return replace(roles, silent=roles.silent | (roles.outputs.keys() - called), training=unused)


class _Used(TorchFunctionMode):
    """Collects the ids of the parameters that torch's functions get, whichever module calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        self.parameters.update(id(value) for value in given if isinstance(value, nn.Parameter))
        return func(*args, **(kwargs or {}))
