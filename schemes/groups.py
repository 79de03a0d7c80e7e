"""Coupled channels: which slices of which parameters must be removed together.

A channel of a convolution lives in several tensors: a filter and a bias here, a scale and a shift in the
BatchNorm behind it, a slice of every layer that reads it, and, through a residual connection, a filter of
every other layer that is added to it. The dependency graph (Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023) of torch-pruning finds these sets; here they become index tensors that a C step can use.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from autocompress.task import device_of, evaluating

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Slices:
    """Where the channels of a group live in one dimension of one parameter.

    Attributes:
        parameter: The parameter's name in the model.
        dim: The dimension that shrinks.
        positions: Indices along that dimension, shape ``(k,)``.
        channels: The channel of the group that each position belongs to, shape ``(k,)``.
    """

    parameter: str
    dim: int
    positions: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that are coupled: removing one removes its slice everywhere.

    Attributes:
        root: Name of the module whose output channels number the group's.
        width: How many channels there are.
        slices: Everything that goes with a channel.
        is_filter: Whether the channels are filters of a convolution (and not neurons of a linear layer).
        parts: The channels by the layers that they live in. There is more than one part where concatenated
            channels meet others one to one: no layer is emptied as long as each part keeps some.
    """

    root: str
    width: int
    slices: tuple[Slices, ...]
    is_filter: bool
    parts: tuple[Tensor, ...]


def find_groups(model: nn.Module, example_input: Tensor) -> tuple[Group, ...]:
    """The coupled groups of a model, without those that reach its output: classes are not pruned.

    A layer whose channels cannot be removed one by one (a grouped convolution), that mixes them (GroupNorm,
    LayerNorm) or that shares its weights with another layer keeps its group whole; a warning names it. So
    does a group that the graph gets wrong (it loses its way in a concatenation that is flattened).
    """
    dense, model = model, copy.deepcopy(model)
    graph = _dependency_graph(model, example_input)
    names = {module: name for name, module in model.named_modules()}
    bound = _bound_modules(model)
    groups, whole = [], []
    for found in graph.get_all_groups(ignored_layers=_output_layers(graph)):
        root = found[0].dep.target.module
        slices = _slices_of(found, graph, names, bound)
        if slices is None:
            whole.append(names[root])
            continue
        is_filter = any(
            isinstance(item.dep.target.module, CONVOLUTIONS) and graph.is_out_channel_pruning_fn(item.dep.handler)
            for item in found
        )
        width = len(found[0].idxs)
        groups.append(Group(names[root], width, slices, is_filter, _parts_of(slices, width)))
    if not _is_exact(dense, example_input, groups):
        wrong = [group.root for group in groups if not _is_exact(dense, example_input, [group])]
        groups = [group for group in groups if group.root not in wrong]
        whole += wrong
    if whole:
        warnings.warn(
            f"left at full width (their channels do not go one by one): {', '.join(whole)}", stacklevel=2
        )
    return tuple(groups)


def _is_exact(model: nn.Module, example_input: Tensor, groups: Sequence[Group]) -> bool:
    """Whether the model without half of the groups' channels computes what it computes with zeros there."""
    removed = {g.root: torch.cat([part[: len(part) // 2] for part in g.parts]).tolist() for g in groups}
    masked = copy.deepcopy(model).cpu().eval()  # where float32 is not cut to fewer bits
    weights = dict(masked.named_parameters())
    with torch.no_grad():
        for name, kept in kept_entries(groups, removed, weights).items():
            weights[name].mul_(kept)
        x = example_input.cpu()
        try:
            outputs = remove_channels(masked, x, removed)(x)
        except (RuntimeError, ValueError, IndexError):  # what layers of shapes that do not fit raise
            return False
        expected = masked(x)
    return bool((outputs - expected).abs().max() <= 1e-4 * expected.abs().max())


def remove_channels(model: nn.Module, example_input: Tensor, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of ``model`` without the given channels, by the name of their group's root."""
    modes = [module.training for module in model.modules()]
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model = copy.deepcopy(model)
    graph = _dependency_graph(model, example_input)
    modules = dict(model.named_modules())
    for root, channels in removed.items():
        if channels:
            prune = graph.get_pruner_of_module(modules[root]).prune_out_channels
            graph.get_pruning_group(modules[root], prune, list(channels)).prune()
    # Building the graph puts the model in eval mode, and pruned parameters come back trainable.
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
        parameter.grad = None
    return model


def _dependency_graph(model: nn.Module, example_input: Tensor) -> Any:
    """The graph of ``model`` (and of this very copy: it is keyed by module identity)."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # what autograd does not see, the graph does not see
    with torch.enable_grad(), evaluating(model), warnings.catch_warnings():
        # It tells what it does with parameters of no known layer; whether that is right is checked afterwards.
        warnings.filterwarnings("ignore", "Unwrapped parameters", UserWarning)
        return tp.DependencyGraph().build_dependency(
            model, example_inputs=(example_input.detach().to(device_of(model)).requires_grad_(True),)
        )


def _output_layers(graph: Any) -> list[nn.Module]:
    """The layers whose channels are the network's outputs."""
    layers: list[nn.Module] = []
    pending = [node for node in graph.module2node.values() if not node.outputs]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node.module, (*CONVOLUTIONS, nn.Linear)):
            layers.append(node.module)
            continue
        fresh = [before for before in node.inputs if before not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return layers


def _slices_of(
    found: Any, graph: Any, names: Mapping[nn.Module, str], bound: Collection[nn.Module]
) -> tuple[Slices, ...] | None:
    """What the items of a torch-pruning group remove; None if channels of it cannot go one by one."""
    slices = []
    for item in found:
        target, channels = item.dep.target, torch.tensor(item.root_idxs)
        if isinstance(target.module, nn.Parameter):
            places = [(graph._param_to_name[target.module], target.pruning_dim)]
            sizes = [target.module.shape[target.pruning_dim]]
        elif target.module in bound:
            return None
        elif target.module in names:
            prefix = names[target.module] + "."
            shrunk = _shrunk_dims(target.module, item.dep.handler, item.idxs[:1])
            if any(drop != 1 for _, _, _, drop in shrunk):
                return None
            places = [(prefix + name, dim) for name, dim, _, _ in shrunk]
            sizes = [size for _, _, size, _ in shrunk]
        else:
            continue  # an operation without parameters (add, flatten, concat)
        positions = torch.tensor(item.idxs)
        if any(size <= int(positions.max()) for size in sizes):
            return None
        slices += [Slices(parameter, dim, positions, channels) for parameter, dim in places]
    return tuple(slices)


def _parts_of(slices: Sequence[Slices], width: int) -> tuple[Tensor, ...]:
    """The channels grouped by the tensors that they reach."""
    reached: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(width, dtype=torch.bool))
    for s in slices:
        reached[s.parameter, s.dim][s.channels] = True
    _, part = torch.stack(list(reached.values())).unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return tuple((part == i).nonzero()[:, 0] for i in range(int(part.max()) + 1))


def _bound_modules(model: nn.Module) -> set[nn.Module]:
    """The layers whose channels cannot go one by one, or whose other channels would change if one went."""
    owners = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(module)
    sharing = {module for modules in owners.values() if len(modules) > 1 for module in modules}
    mixing = {module for module in model.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))}
    grouped = {m for m in model.modules() if isinstance(m, CONVOLUTIONS) and 1 < m.groups < m.out_channels}
    return sharing | mixing | grouped


def _shrunk_dims(module: nn.Module, prune: Any, idxs: Sequence[int]) -> list[tuple[str, int, int, int]]:
    """Which dimensions of a module's parameters ``prune`` shrinks: name, dimension, size, by how many.

    Found by pruning one channel of a copy without storage, so that whatever layer torch-pruning (or a pruner
    registered with it) knows is known here.
    """
    before = {name: p.shape for name, p in module.named_parameters(recurse=False)}
    if not before:
        return []
    trial = copy.deepcopy(module).to("meta")
    prune(trial, list(idxs))
    after = dict(trial.named_parameters(recurse=False))
    return [
        (name, dim, size, size - after[name].shape[dim])
        for name, shape in before.items()
        for dim, size in enumerate(shape)
        if after[name].shape[dim] != size
    ]


def sizes_along(groups: Sequence[Group], shapes: Mapping[str, torch.Size], order: Tensor) -> Tensor:
    """Parameters left after each removal of a sequence.

    Args:
        groups: The groups, whose channels are numbered one group after the other.
        shapes: Shape of every parameter of the model.
        order: Channel numbers in order of removal, shape ``(m,)``.

    Returns:
        Parameters in the whole model after 0, 1, …, m removals, shape ``(m + 1,)``. Exact: a weight that two
        groups touch (a filter of one, an input of the other) is counted once.
    """
    starts = first_channels(groups)
    entries: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(starts[-1], dtype=torch.long))
    for group, start in zip(groups, starts, strict=False):
        for s in group.slices:
            entries[s.parameter, s.dim] += torch.bincount(s.channels + start, minlength=starts[-1])
    total = torch.zeros(len(order) + 1, dtype=torch.long)
    for parameter, shape in shapes.items():
        left = torch.ones(1, dtype=torch.long)
        for dim, size in enumerate(shape):
            if (parameter, dim) in entries:
                gone = entries[parameter, dim][order].cumsum(0)
                left = left * torch.cat([torch.tensor([size]), size - gone])
            else:
                left = left * size
        total += left
    return total


def kept_entries(
    groups: Sequence[Group], removed: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """For each parameter that a group reaches: True where the entry stays (the parameter's shape)."""
    names = {s.parameter for group in groups for s in group.slices}
    kept = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in sorted(names)}
    for group in groups:
        gone = torch.zeros(group.width, dtype=torch.bool)
        gone[list(removed[group.root])] = True
        for s in group.slices:
            mask = kept[s.parameter]
            mask.index_fill_(s.dim, s.positions[gone[s.channels]].to(mask.device), False)
    return kept


def first_channels(groups: Sequence[Group]) -> list[int]:
    """The number of each group's first channel when all are counted on; at the end how many there are."""
    return list(accumulate((group.width for group in groups), initial=0))
