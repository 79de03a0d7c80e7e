"""Structured pruning: whole channels and neurons are removed; the model is smaller and faster on any runtime."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Theta, Weights, automatic, density_error, register_scheme

from .criteria import Observed, check_criterion
from .feature_maps import MAP_CRITERIA, in_eval_mode
from .groups import (
    Group,
    find_groups,
    first_channels,
    kept_entries,
    remove_channels,
    sizes_along,
    warn_of_whole,
    zeroed,
)
from .importance import (
    CHANNEL_CRITERIA,
    NORMALIZATIONS,
    ChannelCriterion,
    Normalization,
    can_rate,
    channel_scores,
    normalized,
    observe_channels,
)
from .patterns import checked_min_keep, checked_skip, modules_matching, per_module
from .roles import Roles
from .spread import Layer, Order, Spread, as_lamp, checked_spread, relative_density, removal_order

MIN_KEEP = 2
WIDE, SUITS_HARDWARE = 32, 8  # with align="auto", widths above the first are multiples of the second


@dataclass(frozen=True)
class Structure:
    """The facts of a model for structured pruning.

    Attributes:
        groups: The groups of coupled channels that may shrink.
        layers: The layers that their channels live in, and how far each may shrink.
        shapes: The shape of every parameter of the model.
        roles: The roles of the parameters.
        example_input: A batch of one sample to trace the model with.
        observed: What the criterion observed on data.
    """

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    shapes: dict[str, torch.Size]
    roles: Roles
    example_input: Tensor
    observed: Observed | None = None


@automatic
@register_scheme
@dataclass(frozen=True)
class StructPrune:
    """Removes channels and neurons with all that is coupled to them.

    The least important channels of the whole network go, until what is left fits the density. The classes at
    the output are never pruned, and every layer keeps some channels.

    Args:
        criterion: What makes a channel important, see `autocompress.schemes.importance.channel_scores`. Layers
            that it cannot rate (``hrank`` a linear layer, ``bn_scale`` one without BatchNorm) are left whole,
            with a warning that names them. Feature maps (``activation``, ``hrank``, ``beta_rank``) are looked at
            in eval mode: channels that are there in training alone, as in auxiliary heads, go first, with a
            warning, too.
        spread: How the density is spread over the layers: ``global`` (one threshold for the whole network),
            ``uniform`` (the same share of channels in each), ``erk`` (Erdős-Rényi kernel: small layers stay
            wider), ``lamp`` (one threshold on each score over those that are no smaller in its layer), or
            relative widths by module, as ``{"layer1.*": 1.0, "layer4.*": 0.3}``: layer4 is to keep 0.3 times
            the share of channels that layer1 keeps, as far as no layer is more than whole. Modules without a
            match have 1; of coupled layers the largest counts; the density asked for is always met.
        align: The number of channels that a layer is left with is a multiple of it (8 suits most hardware).
            Layers that are too narrow for that are left whole, with a warning that names them. ``auto``: widths
            above 32 are multiples of 8, as a width of 31 or 33 is slower than one of 32; below, where eight
            channels are a large share of a layer, any width will do.
        min_keep: Channels that every layer keeps at least; or by module, as ``{"layer1.*": 16}``, and 2
            elsewhere.
        skip: Layers whose channels are all kept, with the channels coupled to them: names of modules, globs or
            types, as ``["conv1", "Linear"]``.
        normalize: What scores are divided by before ``global`` and ``lamp`` compare layers. ``mean``: the mean of
            their layer, so that one threshold suits layers of all scales; it leaves the least arithmetic at a
            density. ``none``: nothing, so that the importance of a layer as a whole counts. ``sqrt``: the square
            root of the mean, a compromise that is the most accurate at a density. ``parameters``: the parameters
            that are removed with a channel of the dense model, so that the least loss per parameter goes first.
    """

    criterion: ChannelCriterion = "obd"
    spread: Spread = "global"
    align: int | Literal["auto"] = "auto"
    min_keep: int | Mapping[str, int] = MIN_KEEP
    skip: Sequence[str] = ()
    normalize: Normalization = "sqrt"
    takes_density: ClassVar[bool] = True
    hard: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5
    searched: ClassVar[Mapping[str, Sequence[object]]] = {
        "criterion": ("obd", "l2", "taylor", "fpgm"),
        "spread": ("global", "uniform", "lamp"),
        "normalize": ("sqrt", "mean"),
        "align": (1, 8),
    }

    def __post_init__(self) -> None:
        check_criterion(self, self.criterion, CHANNEL_CRITERIA)
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize={self.normalize!r}; it must be one of {', '.join(NORMALIZATIONS)}")
        if self.align != "auto" and (not isinstance(self.align, int) or self.align < 1):
            allowed = "widths can be multiples of a whole number from 1 up, or auto"
            raise ValueError(f"align={self.align!r}; {allowed}")
        object.__setattr__(self, "spread", checked_spread(self.spread))
        object.__setattr__(self, "min_keep", checked_min_keep(self.min_keep, "channel"))
        object.__setattr__(self, "skip", checked_skip(self.skip))

    def staged(self, relative: Mapping[str, float]) -> "StructPrune":
        """The same scheme with relative widths by module."""
        return replace(self, spread=relative)

    def prunes(self, group: Group) -> bool:
        """Whether the scheme removes the channels of a group."""
        return True

    def analyze(self, model: nn.Module, example_input: Tensor) -> Structure:
        """Finds the coupled groups, and how far the layers that they live in may shrink.

        Raises:
            ValueError: If nothing can be removed, or a pattern matches no module.
        """
        roles = Roles.of(model)
        if self.criterion in MAP_CRITERIA:
            roles = in_eval_mode(roles, model, example_input)
        skipped = modules_matching(model, self.skip, "skip")
        least_of, relative_of = self._floors(model, roles), self._relative_widths(model, roles)
        whole: dict[str, list[str]] = {}  # layers that keep all their channels, by the reason
        every = find_groups(model, example_input, whole.__setitem__)
        allowed = [g for g in every if self.prunes(g) and not roles.owners(g) & skipped]
        rated = [g for g in allowed if can_rate(self.criterion, g, roles)]
        steps = {g.root: self._step(g, roles) for g in rated}
        fine = WIDE if self.align == "auto" else 0
        floors = {g.root: _floor(least_of(g), steps[g.root], fine) for g in rated}
        narrow = [g for g in rated if any(least_of(g) < len(part) <= floors[g.root] for part in g.parts)]
        groups = tuple(g for g in rated if any(len(part) > floors[g.root] for part in g.parts))
        whole |= _named(
            (f"criterion={self.criterion!r} cannot rate their channels", _but(allowed, rated)),
            (f"align={self.align} leaves them no narrower width", narrow),
        )
        if not groups:
            whole |= _named(
                (f"they are not what {type(self).__name__} removes", [g for g in every if not self.prunes(g)]),
                ("skip names them", _but((g for g in every if self.prunes(g)), allowed)),
                ("min_keep keeps all of them", _but(rated, narrow)),
            )
            why = "; ".join(f"{why}: {', '.join(layers)}" for why, layers in whole.items())
            raise ValueError(
                f"{type(self).__name__} finds no channels in this model that it can remove; "
                + (f"left at full width, as {why}" if whole else "there are none but those of the output")
            )
        for why, names in whole.items():
            warn_of_whole(why, names)
        if first := [group.root for group in groups if roles.only_train(group)]:
            unused = "which the model uses in training alone, go first"
            warnings.warn(f"criterion={self.criterion!r}: channels of {', '.join(first)}, {unused}", stacklevel=2)
        layers = [
            Layer(part + start, floors[group.root], steps[group.root], relative_of(group), fine)
            for group, start in zip(groups, first_channels(groups), strict=False)
            for part in group.parts
            if len(part) > floors[group.root]
        ]
        shapes = {name: p.shape for name, p in model.named_parameters()}
        return Structure(groups, tuple(layers), shapes, roles, example_input.detach().clone())

    def _step(self, group: Group, roles: Roles) -> int:
        """The number of channels to remove at a time: fewer where one, as a head, is several of a layer's."""
        counts = [torch.bincount(s.channels)[s.channels] for s in roles.filters(group)]
        align = SUITS_HARDWARE if self.align == "auto" else self.align
        return align // math.gcd(align, *set(torch.cat(counts).tolist())) if counts else align

    def _floors(self, model: nn.Module, roles: Roles) -> Callable[[Group], int]:
        """A function of a group: the number of channels that its layers keep at least."""
        floors, elsewhere = per_module(model, self.min_keep, MIN_KEEP, "min_keep")
        return lambda group: max((floors[m] for m in roles.owners(group) if m in floors), default=elsewhere)

    def _relative_widths(self, model: nn.Module, roles: Roles) -> Callable[[Group], float]:
        """A function of a group: the relative width of its layers, for the spreads that use it."""
        named, _ = per_module(model, self.spread if isinstance(self.spread, Mapping) else {}, 1.0, "spread")
        weights = dict(model.named_parameters())

        def relative_of(group: Group) -> float:
            shapes = [weights[s.parameter].shape for s in roles.filters(group) or group.slices]
            relative = relative_density(self.spread, shapes, named, roles.owners(group))
            # A layer loses inputs as well as outputs: its density is about the square of its relative width.
            return math.sqrt(relative) if self.spread == "erk" else relative

        return relative_of

    def observe(self, evidence: Evidence, facts: Structure) -> Structure:
        """Looks at gradients or at feature maps, if the criterion needs them."""
        criterion, _ = as_lamp(self.criterion, self.spread)
        return replace(facts, observed=observe_channels(criterion, evidence, facts.groups, facts.roles))

    def lowest_density(self, facts: Structure) -> float:
        """The density at which every layer is as narrow as ``min_keep``, ``align`` and ``skip`` let it be."""
        removable = torch.cat([layer.channels[layer.floor :] for layer in facts.layers])
        sizes = sizes_along(facts.groups, facts.shapes, removable)
        return int(sizes[-1]) / int(sizes[0])

    def pi(self, weights: Weights, density: float, facts: Structure) -> Theta:
        """Removes the least important channels until what is left fits ``density``."""
        order = self._removal_order(weights, facts)
        sizes = sizes_along(facts.groups, facts.shapes, order.channels)[order.ends]
        fits = sizes.double() / int(sizes[0]) <= density  # float32 cannot tell millions of parameters apart
        if not fits.any():
            raise density_error(density, self.lowest_density(facts))
        # Channels that are zero already are always removed: it costs nothing, and makes pi idempotent.
        steps = max(int(fits.int().argmax()), order.n_dead)
        removed = _by_group(facts.groups, order.channels[: order.ends[steps]])
        values, kept = zeroed(facts.groups, removed, weights), kept_entries(facts.groups, removed, weights)
        return Theta(values, kept, int(sizes[steps]), {"removed": removed})

    def _removal_order(self, weights: Weights, facts: Structure) -> Order:
        """The order in which channels are removed, those first that are zero already."""
        criterion, spread = as_lamp(self.criterion, self.spread)
        scores = channel_scores(criterion, facts.groups, weights, facts.roles, facts.observed)
        # Where w² is 0, so is w²F: scores that are all positive show that no channel is zero.
        shows_zeros = criterion == "l2" or (criterion == "obd" and bool(scores.all()))
        energy = scores if shows_zeros else channel_scores("l2", facts.groups, weights, facts.roles, None)
        scores = normalized(self.normalize, scores, facts.groups, facts.shapes)
        return removal_order(scores, energy == 0, facts.layers, spread)

    def delta(self, theta: Theta) -> Weights:
        """The weights, with zeros in place of the removed channels."""
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Structure) -> nn.Module:
        """A copy of the model without the removed channels."""
        return remove_channels(model, facts.groups, theta.plan["removed"])


@register_scheme
@dataclass(frozen=True)
class FilterPrune(StructPrune):
    """Removes filters of convolutions with all that is coupled to them; linear layers keep their neurons.

    Args: those of `StructPrune`.
    """

    def prunes(self, group: Group) -> bool:
        """Only groups whose channels are filters."""
        return group.is_filter


@register_scheme
@dataclass(frozen=True)
class NeuronPrune(StructPrune):
    """Removes neurons of linear layers with all that is coupled to them; convolutions keep their filters.

    Args: those of `StructPrune`.
    """

    def prunes(self, group: Group) -> bool:
        """Only groups whose channels are neurons."""
        return not group.is_filter


def _floor(least: int, step: int, fine: int) -> int:
    """The lowest width that a layer may have."""
    return least if least <= fine else math.ceil(least / step) * step


def _but(groups: Iterable[Group], others: Sequence[Group]) -> list[Group]:
    """The groups that are not among ``others``."""
    roots = {group.root for group in others}
    return [group for group in groups if group.root not in roots]


def _named(*groups: tuple[str, Iterable[Group]]) -> dict[str, list[str]]:
    """The roots of groups by the reason why they stay whole, without reasons for which there are none."""
    named = {why: [group.root for group in members] for why, members in groups}
    return {why: names for why, names in named.items() if names}


def _by_group(groups: tuple[Group, ...], channels: Tensor) -> dict[str, list[int]]:
    """Channels, given by their numbers among those of all groups, as sorted lists by the root of their group."""
    starts = first_channels(groups)
    return {
        group.root: sorted((channels[(channels >= start) & (channels < end)] - start).tolist())
        for group, start, end in zip(groups, starts, starts[1:], strict=False)
    }
