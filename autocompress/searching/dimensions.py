"""Dimensions: what a search may vary beside the density, as in ``criterion=l1,l2; stage-density; lr; lc.mu``.

A dimension is a parameter of the scheme, a setting of the recovery, or the relative density of one stage of the
network. Each has an Optuna distribution, and says what its value is applied to.
"""

import ast
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, Literal, TypeAlias

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from autocompress.arguments import text
from autocompress.lc import SOFT
from autocompress.notation import literal
from autocompress.recovery import Recovery, settings_of, with_settings
from autocompress.scheme import Compose, Scheme, Staged, describe, parts_of

STAGES = "stage-density"
FEW_STAGES, MANY_STAGES = 4, 6  # fewer are split, more are merged: each is a dimension
STAGE_RANGE = (0.25, 4.0)  # of a stage's density, relative to that of the first stage
WIDE = 10  # a range whose ends differ by this factor is searched on a log scale

Search: TypeAlias = str | Mapping[str, Any]

# Default ranges of the recovery's settings; factors are of a setting's present value.
_FACTORS = {"lr": (0.1, 3.0), "mu": (0.1, 10.0)}
_RANGES: Mapping[str, tuple[float, float]] = {
    "alternating": (0.2, 0.9),
    "c_steps": (8, 64),
    "distill": (0.0, 1.0),
    "momentum": (0.8, 0.99),
    "mu_growth": (1.0, 1.5),
    "temperature": (1.0, 8.0),
    "weight_decay": (1e-5, 1e-2),
}
_NOT_VARIED = ("method", "steps", "compile", "rounds")
_CHOICES: Mapping[str, tuple[Any, ...]] = {"optimizer": ("sgd", "adamw"), "augmented": (True, False)}


@dataclass(frozen=True)
class Dimension:
    """One dimension of a search.

    Attributes:
        name: Its name for users, Optuna and MLflow.
        distribution: The values it may take; a categorical distribution holds lists and mappings as text.
        of: What it belongs to.
        field: The name of the scheme's parameter, or of the recovery's setting.
        part: For a parameter of the scheme: the class of the part that has it; empty for any.
        modules: For a stage: the names of its modules; empty until the model's stages are known, see `on_model`.
    """

    name: str
    distribution: BaseDistribution
    of: Literal["scheme", "recovery", "stage"]
    field: str = ""
    part: str = ""
    modules: tuple[str, ...] = ()

    @property
    def is_categorical(self) -> bool:
        """Whether its values are a list, not a range."""
        return isinstance(self.distribution, CategoricalDistribution)

    @property
    def text(self) -> str:
        """The dimension as it is written: ``criterion=l1,l2`` or ``lr=0.01..0.3``."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return f"{self.name}={','.join(str(choice) for choice in d.choices)}"
        assert isinstance(d, FloatDistribution | IntDistribution)
        return f"{self.name}={d.low:g}..{d.high:g}"

    def applies_to(self, scheme: Scheme) -> bool:
        """Whether a trial with this scheme depends on it."""
        if self.of == "scheme":
            return any(True for _ in _parts_with(scheme, self.field, self.part))
        return self.of == "recovery" or any(isinstance(part, Staged) for part in parts_of(scheme))

    def put(self, scheme: Scheme, value: Any) -> Scheme:
        """The scheme with this parameter set to ``value`` in all parts that have it.

        Raises:
            ValueError: If the scheme refuses the value.
        """
        having = set(map(id, _parts_with(scheme, self.field, self.part)))
        parts = [
            replace(part, **{self.field: plain(value)}) if id(part) in having else part  # type: ignore[type-var]
            for part in parts_of(scheme)
        ]
        return Compose(*parts) if isinstance(scheme, Compose) else parts[0]


def plain(value: Any) -> Any:
    """The value that a categorical choice stands for: lists and mappings are parsed from their text."""
    return ast.literal_eval(value) if isinstance(value, str) and value[:1] in ("[", "{", "(") else value


def staged(scheme: Scheme, relative: Mapping[str, float]) -> Scheme:
    """The scheme with relative densities by module, in the parts that are `autocompress.scheme.Staged`."""
    parts = [part.staged(relative) if isinstance(part, Staged) else part for part in parts_of(scheme)]
    return Compose(*parts) if isinstance(scheme, Compose) else parts[0]


def parse_dimensions(search: Search, schemes: Sequence[Scheme], recovery: Recovery) -> tuple[Dimension, ...]:
    """The dimensions to search beside the density and the scheme.

    Args:
        search: ``"criterion=l1,l2; stage-density; lr=0.01..0.3; lc.mu"``, or a mapping from names to a list of
            values, a ``(low, high)`` range, or None for default values.
        schemes: The schemes that the search may use.
        recovery: How a trial compresses and trains.

    Raises:
        ValueError: If a name is unknown, or values are missing, refused or given twice; the message says what is
            allowed.
    """
    dimensions = []
    for name, values in _entries(search):
        make = _stage_dimension if name == STAGES else _dimension
        dimensions.append(make(name, values, schemes, recovery))
    targets = [(one.of, one.field, one.part) for one in dimensions]
    for one, target in zip(dimensions, targets, strict=True):
        if targets.count(target) > 1:
            raise ValueError(f"search: {one.name} is given twice; give each dimension once")
    return tuple(dimensions)


def on_model(dimensions: Sequence[Dimension], model: nn.Module) -> tuple[Dimension, ...]:
    """The dimensions of a search on a model: that of the stages becomes one for each stage but the first.

    Densities are relative to the first stage's, which has 1.

    Raises:
        ValueError: If the model has a single stage.
    """
    expanded = []
    for one in dimensions:
        if one.of != "stage" or one.modules:
            expanded.append(one)
            continue
        _, *others = stages(model)
        if not others:
            raise ValueError(f"search: {STAGES} needs a model of several stages; this one has a single one")
        expanded += [replace(one, name=f"{STAGES}.{names[0]}", modules=names) for names in others]
    return tuple(expanded)


def stages(model: nn.Module) -> list[tuple[str, ...]]:
    """The stages of a network, as names of modules: its children with weights, without a final classifier layer.

    While they are few, the largest sequence among them is split into its children. If they are many, as in a VGG,
    consecutive ones are merged into stages of about as many parameters each.
    """
    children = _with_weights("", model)
    while len(children) < FEW_STAGES:
        sequences = [
            i for i, (_, module) in enumerate(children) if isinstance(module, nn.Sequential | nn.ModuleList)
        ]
        if len(children) == 1 and _with_weights(*children[0]):
            sequences = [0]  # a wrapper
        if not sequences:
            break
        i = max(sequences, key=lambda i: _size(children[i][1]))
        children[i : i + 1] = _with_weights(*children[i])
    if len(children) > 1 and not list(children[-1][1].children()):
        del children[-1]
    if len(children) <= MANY_STAGES:
        return [(name,) for name, _ in children]
    total, passed = sum(_size(module) for _, module in children), 0
    cut: list[list[str]] = [[] for _ in range(MANY_STAGES)]
    for name, module in children:
        cut[min(MANY_STAGES - 1, int(MANY_STAGES * (passed + _size(module) / 2) / total))].append(name)
        passed += _size(module)
    return [tuple(stage) for stage in cut if stage]


def _with_weights(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module that have weights."""
    inside = ((f"{name}.{child}".lstrip("."), inner) for child, inner in module.named_children())
    return [(path, inner) for path, inner in inside if any(p.dim() > 1 for p in inner.parameters())]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Parsing


def _entries(search: Search) -> Iterator[tuple[str, Any]]:
    """The names, each with a list of values, a (low, high) tuple, or None."""
    if isinstance(search, Mapping):
        for name, values in search.items():
            yield text.convert("a name in search", name), values
        return
    names = set()
    for entry in filter(None, (one.strip() for one in search.split(";"))):
        name, _, values = (piece.strip() for piece in entry.partition("="))
        if name in names:
            raise ValueError(f"search: {name} is given twice; give each dimension once")
        names.add(name)
        yield name, _read(name, values) if "=" in entry else None


def _read(name: str, text: str) -> list[Any] | tuple[float, float]:
    """The list or the range that ``LOW..HIGH`` or ``a,b`` stands for."""
    low, dots, high = text.partition("..")
    if dots:
        try:
            return _number(low), _number(high)
        except ValueError:
            raise ValueError(f"search: {name}={text}: write a range as LOW..HIGH, as lr=0.01..0.3") from None
    try:
        elements = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError:
        raise ValueError(f"search: {name}={text}: write values with commas between them, as {name}=a,b") from None
    assert isinstance(elements, ast.List)
    return [literal(one, f"[{text}]") for one in elements.elts]


def _number(text: str) -> float:
    return int(text) if text.strip().lstrip("-").isdigit() else float(text)


def _dimension(name: str, values: Any, schemes: Sequence[Scheme], recovery: Recovery) -> Dimension:
    """The dimension of a scheme's parameter or a recovery's setting, its values tried on each scheme."""
    owner, _, field = name.rpartition(".")
    if owner in ("lc", "recovery") or (not owner and not _owners(schemes, field)):
        return _of_recovery(name, field, values, schemes, recovery)
    owners = _owners(schemes, field, owner)
    if not owners:
        raise _unknown(name, schemes, recovery)
    for scheme in schemes:
        having = [type(part).__name__ for part in _parts_with(scheme, field, owner)]
        if len(having) > 1:
            each = " or ".join(f"{part}.{field}" for part in having)
            raise ValueError(f"search: {' and '.join(having)} both have {name}; write {each}")
    values = _sensible(owners[0], field) if values is None else values
    if values is None:
        raise ValueError(f"search: {name} needs values, as {name}=a,b or {name}=LOW..HIGH")
    dimension = Dimension(name, _distribution(name, values, getattr(owners[0], field)), "scheme", field, owner)
    for value in _samples(dimension.distribution):
        for scheme in schemes:
            try:
                dimension.put(scheme, value)
            except (ValueError, TypeError) as error:
                raise ValueError(f"search: {name}={value}: {error}") from None
    return dimension


def _of_recovery(name: str, field: str, values: Any, schemes: Sequence[Scheme], recovery: Recovery) -> Dimension:
    settings = _settings(recovery)
    if field not in settings:
        raise _unknown(name, schemes, recovery)
    now = SOFT if settings[field] == "auto" else settings[field]
    if values is None and field in _FACTORS and math.isfinite(float(now)):
        values = tuple(float(f"{factor * float(now):.6g}") for factor in _FACTORS[field])
    elif values is None:
        values = _RANGES.get(field) or list(_CHOICES.get(field, ()))
    if values == []:
        raise ValueError(f"search: {name} needs values, as {name}=10,30 or {name}=LOW..HIGH")
    dimension = Dimension(name, _distribution(name, values, now), "recovery", field)
    for value in _samples(dimension.distribution):
        try:
            with_settings(recovery, **{field: value})
        except (ValueError, TypeError) as error:
            raise ValueError(f"search: {name}={value}: {error}") from None
    return dimension


def _stage_dimension(name: str, values: Any, schemes: Sequence[Scheme], recovery: Recovery) -> Dimension:
    for scheme in schemes:
        if not any(isinstance(part, Staged) for part in parts_of(scheme)):
            raise ValueError(f"search: {describe(scheme)} takes no densities by stage ({name})")
    distribution = _distribution(name, STAGE_RANGE if values is None else values, 1.0)
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in _samples(distribution)):
        raise ValueError(f"search: {name} takes relative densities above 0, as {name}=0.25..4")
    return Dimension(name, distribution, "stage")


def _distribution(name: str, values: Any, now: Any) -> BaseDistribution:
    """The distribution of a list, or of a range: of integers between integer ends, unless ``now`` is a float."""
    if isinstance(values, tuple):
        if len(values) != 2 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ValueError(f"search: {name}={values!r}; a range is two finite numbers (low, high)")
        low, high = values
        if not low < high:
            raise ValueError(f"search: {name}={low:g}..{high:g}; the first end must be below the second")
        log = low > 0 and high / low >= WIDE
        if isinstance(low, int) and isinstance(high, int) and not isinstance(now, float | bool):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"search: {name} has no values; write {name}=a,b, or {name} alone for those that make sense"
        )
    choices = [v if isinstance(v, str | int | float | bool | NoneType) else repr(v) for v in values]
    _refuse_repeats(choices, name)
    return CategoricalDistribution(choices)


def _samples(distribution: BaseDistribution) -> tuple[Any, ...]:
    """The values to try out: all of a list, the ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(map(plain, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def _refuse_repeats(values: Sequence[Any], name: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"search: {name} has {value} twice; give each value once")


def _unknown(name: str, schemes: Sequence[Scheme], recovery: Recovery) -> ValueError:
    parameters = dict.fromkeys(f.name for scheme in schemes for part in parts_of(scheme) for f in _fields(part))
    staging = any(isinstance(part, Staged) for scheme in schemes for part in parts_of(scheme))
    allowed = [*parameters, *[STAGES] * staging, *(f"lc.{setting}" for setting in _settings(recovery))]
    return ValueError(f"search: there is nothing called {name!r} to vary (there is: {', '.join(allowed)})")


def _settings(recovery: Recovery) -> dict[str, Any]:
    """The settings of a recovery that may be varied, with their values."""
    return {name: value for name, value in settings_of(recovery).items() if name not in _NOT_VARIED}


def _fields(part: Scheme) -> list[Any]:
    return list(fields(part)) if is_dataclass(part) else []


def _parts_with(scheme: Scheme, field: str, part: str = "") -> Iterator[Scheme]:
    """The parts of a scheme that have the parameter ``field``; of the class named ``part``, if that is given."""
    for one in parts_of(scheme):
        if part in ("", type(one).__name__) and any(f.name == field for f in _fields(one)):
            yield one


def _owners(schemes: Sequence[Scheme], field: str, part: str = "") -> list[Scheme]:
    return [one for scheme in schemes for one in _parts_with(scheme, field, part)]


def _sensible(part: Scheme, field: str) -> list[Any] | None:
    """Default values for a parameter: the scheme's ``searched``, or those in its type hint; None if neither."""
    values = getattr(part, "searched", {}).get(field)
    return list(values or _literals(typing.get_type_hints(type(part)).get(field))) or None


def _literals(hint: Any) -> Iterator[Any]:
    """The values that a type hint lists: those of bool and Literal, also within a union."""
    if hint is bool:
        yield from (True, False)
    elif typing.get_origin(hint) is Literal:
        yield from typing.get_args(hint)
    else:
        for inner in typing.get_args(hint):
            if typing.get_origin(inner) is Literal:
                yield from typing.get_args(inner)
