"""Scheme: what may be compressed and how. Recovery and the search see only this protocol.

A scheme is a frozen dataclass. In the terms of Carreira-Perpiñán & Idelbayev, "Learning-Compression Algorithms
for Neural Net Pruning" (CVPR 2018), `Scheme.pi` is the C step Π and `Scheme.delta` the decompression Δ;
`Scheme.realize` turns the result into the model that ships.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from autocompress.arguments import listing
from autocompress.notation import Term, in_quotes, listed, terms
from autocompress.plugins import Registry, load_from_file, spec_of
from autocompress.splits import Batch
from autocompress.task import Loss

Weights: TypeAlias = dict[str, Tensor]
Facts: TypeAlias = Any


def as_numbers(mask: Tensor) -> Tensor:
    """A view of a bool mask as zeros and ones of type uint8, with which torch computes three times as fast."""
    return mask.view(torch.uint8)


@dataclass(frozen=True)
class Theta:
    """Compressed weights θ, the result of a C step.

    Attributes:
        values: The weights as the scheme stores them; `Scheme.delta` decompresses them. A tensor that replaces a
            weight, such as a factor, is stored under its name in the realized model.
        support: For each weight by name, which of its entries the compressed model keeps (bool, the weight's
            shape). Weights that are not named are kept whole. Kept entries are free: θ equals w there. Of a weight
            that is replaced as a whole, by factors for instance, no entry is kept.
        kept: Number of parameters of the realized model.
        plan: What `Scheme.realize` must know to build the compressed architecture: JSON types only.
        drawn: Names of the weights whose kept entries are not free: they are quantized to a coarse grid, and the
            L step draws w towards θ there too.
    """

    values: Weights
    support: Mapping[str, Tensor]
    kept: int
    plan: Mapping[str, Any] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()


@runtime_checkable
class Scheme(Protocol):
    """What may be compressed and how."""

    @property
    def takes_density(self) -> bool:
        """Whether there is a density to search over. A scheme without one (a cast to 16 bits) is tried once."""

    @property
    def tolerance(self) -> float:
        """How far the realized model's outputs may differ from the masked model's, relative to the largest output.

        1e-5 for schemes that are exact, larger for those that compute in fewer bits.
        """

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        """Analyzes the architecture, once per study. The model is not changed.

        Args:
            model: The dense model, on the device on which it will be compressed.
            example_input: A batch of one sample, on the same device.

        Returns:
            The facts that the other methods need of the architecture, of any type.

        Raises:
            ValueError: If the scheme can compress nothing in the model; the message names the scheme.
        """

    def lowest_density(self, facts: Facts) -> float:
        """The lowest density that `pi` can reach on this model."""

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        """The C step: the compressed weights nearest to ``weights`` (all the model's parameters by name).

        Idempotent and deterministic: it depends on no earlier call and uses no global random generator. The
        density reached, ``theta.kept`` over the number of the dense model's parameters, is at most ``density``.

        Raises:
            ValueError: If ``density`` is below `lowest_density`.
        """

    def delta(self, theta: Theta) -> Weights:
        """Decompresses θ to weights in the dense model's shapes, with zeros for pruned entries."""

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        """Builds the model that ships, as a new module; ``model`` is not changed.

        Args:
            model: A model of the dense architecture with the weights ``delta(theta)``; with arbitrary weights if
                only the compressed architecture is wanted, as when a saved model is loaded.
            theta: The result of the last C step.
            facts: The result of `analyze`.
        """


@dataclass(frozen=True)
class Evidence:
    """What a scheme may observe before a C step, beside the weights.

    Attributes:
        model: The current network on its device; not to be changed.
        batches: Serves some training batches ``(x, y)``, the same ones at every call.
        loss: Maps logits and targets to a scalar.
        gradient_moments: Returns, by weight, a running mean of the gradient's power: 1, or 2 (the diagonal of the
            empirical Fisher matrix, up to a factor). Training records it from the first call on; empty until then.
        last: Whether the result of this C step ships. Until then, facts that `Scheme.realize` alone needs, such as
            the ranges of activations, need not be collected.
        provisional: Whether a C step to a lower density follows, with more gradients recorded by then, so that
            few batches suffice now.
    """

    model: nn.Module
    batches: Callable[[], Iterable[Batch]]
    loss: Loss
    gradient_moments: Callable[[int], Weights] = lambda power: {}
    last: bool = True
    provisional: bool = False


@runtime_checkable
class Observer(Protocol):
    """A scheme that also depends on data: on gradients, or on the outputs of layers."""

    def observe(self, evidence: Evidence, facts: Facts) -> Facts:
        """Returns the facts completed with what `Scheme.pi` needs of the data. Called before every C step.

        The result must not depend on earlier calls: a recovery that is resumed has not made them.
        """


@runtime_checkable
class Hard(Protocol):
    """A scheme that says whether its C step should take full effect at once (an infinite penalty μ)."""

    @property
    def hard(self) -> bool:
        """Whether weights are best set to θ at once and for good, as whole channels are, and not drawn to it."""


@runtime_checkable
class Masking(Protocol):
    """A scheme that says whether θ is w with some entries set to zero: weights at θ can still be trained."""

    @property
    def masks(self) -> bool:
        """Whether a C step only sets entries to zero; then it may take effect at once if steps are few."""


def is_hard(scheme: Scheme) -> bool:
    """Whether a scheme's C step should take effect at once; for a composition, whether all parts' should."""
    return all(isinstance(part, Hard) and part.hard for part in parts_of(scheme))


def can_be_hard(scheme: Scheme) -> bool:
    """Whether a C step can take effect at once (`Hard` or `Masking`); of a composition, whether all parts' can."""
    return all(is_hard(part) or (isinstance(part, Masking) and part.masks) for part in parts_of(scheme))


@runtime_checkable
class Choosy(Protocol):
    """A scheme that cannot be composed with every other."""

    def check_parts(self, parts: tuple[Scheme, ...]) -> None:
        """Checks the parts of a composition, of which this scheme is one.

        Raises:
            ValueError: If this scheme cannot be composed with the others.
        """


def observe(scheme: Scheme, evidence: Evidence, facts: Facts) -> Facts:
    """The facts as `Observer.observe` completes them; unchanged if the scheme is not an `Observer`."""
    return scheme.observe(evidence, facts) if isinstance(scheme, Observer) else facts


@runtime_checkable
class Staged(Protocol):
    """A scheme whose density can differ from one part of the network to another."""

    def staged(self, relative: Mapping[str, float]) -> "Scheme":
        """The same scheme with these relative densities by module name; 1 for modules that are not named."""


def density_error(density: float, lowest: float) -> ValueError:
    """The error for a density that cannot be reached; it names the lowest one that can."""
    return ValueError(f"density {density:.4g} cannot be reached; the lowest possible here is {lowest:.4g}")


@dataclass(frozen=True, init=False)
class Compose:
    """Several schemes, applied in order; ``A+B`` on the command line. Only the first may take a density.

    Raises:
        ValueError: If there are no parts, several of them take a density, one that does is not the first, or a
            part refuses the others.
    """

    parts: tuple[Scheme, ...]

    def __init__(self, *parts: Scheme) -> None:
        parts = tuple(leaf for part in parts for leaf in parts_of(part))
        if not parts:
            raise ValueError("a composition needs at least one scheme")
        with_density = [describe(part) for part in parts if part.takes_density]
        if len(with_density) > 1:
            raise ValueError(f"{' and '.join(with_density)} each take a density; compose at most one of them")
        if with_density and not parts[0].takes_density:
            raise ValueError(
                f"{with_density[0]} takes a density and must come first; begin the composition with it"
            )
        for part in parts:
            if isinstance(part, Choosy):
                part.check_parts(parts)
        object.__setattr__(self, "parts", parts)

    @property
    def takes_density(self) -> bool:
        """Whether one of the parts has a density to search over."""
        return any(part.takes_density for part in self.parts)

    @property
    def tolerance(self) -> float:
        """The loosest of the parts' tolerances."""
        return max(part.tolerance for part in self.parts)

    def analyze(self, model: nn.Module, example_input: Tensor) -> Facts:
        """Each part's facts, see `Scheme.analyze`."""
        return [part.analyze(model, example_input) for part in self.parts]

    def observe(self, evidence: Evidence, facts: Facts) -> Facts:
        """Each part's facts, see `Observer.observe`."""
        return [observe(part, evidence, f) for part, f in zip(self.parts, facts, strict=True)]

    def lowest_density(self, facts: Facts) -> float:
        """See `Scheme.lowest_density`."""
        return min(part.lowest_density(f) for part, f in zip(self.parts, facts, strict=True))

    def pi(self, weights: Weights, density: float, facts: Facts) -> Theta:
        """Projects with one part after the other, each applied to the values that the part before it stores."""
        support: dict[str, Tensor] = {}
        kept, plans, drawn = None, [], frozenset[str]()
        theta = None
        for part, part_facts in zip(self.parts, facts, strict=True):
            theta = part.pi(weights, density, part_facts)
            weights = theta.values
            if twice := support.keys() & theta.support.keys():
                raise ValueError(
                    f"{describe(part)} takes entries out of {min(twice)}, as a part before it does; "
                    "compose at most one scheme that removes weights with others that do not"
                )
            support |= theta.support
            drawn |= theta.drawn
            kept = theta.kept if kept is None else min(kept, theta.kept)
            plans.append(dict(theta.plan))
        assert theta is not None and kept is not None
        return Theta(theta.values, support, kept, {"parts": plans}, drawn)

    def delta(self, theta: Theta) -> Weights:
        """Decompresses with one part after the other, the last one first."""
        for part, plan in reversed(list(zip(self.parts, theta.plan["parts"], strict=True))):
            theta = replace(theta, values=part.delta(replace(theta, plan=plan)))
        return theta.values

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        """Realizes with one part after the other."""
        for _, realized in realize_by_part(self, model, theta, facts):
            model = realized
        return model


def parts_of(scheme: Scheme) -> tuple[Scheme, ...]:
    """The parts of a composition, or the scheme itself alone."""
    return scheme.parts if isinstance(scheme, Compose) else (scheme,)


def by_part(scheme: Scheme, theta: Theta, facts: Facts) -> list[tuple[Scheme, Theta, Facts]]:
    """Each part of a composition with θ under that part's plan, and its facts; a plain scheme is its own part."""
    if not isinstance(scheme, Compose):
        return [(scheme, theta, facts)]
    thetas = [replace(theta, plan=plan) for plan in theta.plan["parts"]]
    return list(zip(scheme.parts, thetas, facts, strict=True))


def realize_by_part(
    scheme: Scheme, model: nn.Module, theta: Theta, facts: Facts
) -> Iterator[tuple[Scheme, nn.Module]]:
    """Realizes like `Scheme.realize`, and yields the model after each part of a composition."""
    for part, planned, part_facts in by_part(scheme, theta, facts):
        model = part.realize(model, planned, part_facts)
        yield part, model


SCHEMES: Registry[Callable[..., Scheme]] = Registry("scheme")

MakesScheme = TypeVar("MakesScheme", bound=Callable[..., Any])


def register_scheme(make: MakesScheme) -> MakesScheme:
    """Registers a scheme class, or a function that returns a composition, under its own name. A decorator.

    Its docstring's first line is what ``autocompress schemes`` prints; its parameters can be set on the
    command line, as in ``StructPrune(min_keep=4)``.
    """
    SCHEMES.add(make.__name__, make)
    return make


AUTO = "auto"  # stands for all schemes that were registered with `automatic`
AUTOMATIC: dict[str, Callable[..., Scheme]] = {}


def automatic(make: MakesScheme) -> MakesScheme:
    """Adds a registered scheme to those that ``--scheme auto`` tries on models it can compress. A decorator."""
    AUTOMATIC[make.__name__] = make
    return make


def parse_schemes(spec: str) -> tuple[Scheme, ...]:
    """The schemes that ``spec`` lists, each as `parse_scheme` takes it: ``StructPrune, Prune+Quantize16``.

    ``auto`` lists all those that are `automatic`.

    Raises:
        ValueError: As `parse_scheme`, or if one is listed twice.
    """
    if spec.strip() == AUTO:
        list(SCHEMES)  # loads the plugins
        return _distinct([make() for _, make in sorted(AUTOMATIC.items())])
    return _distinct(map(parse_scheme, listed(spec)))


def as_schemes(given: str | Scheme | Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    """One scheme or several, each as an object or a spec; a single text may list several, see `parse_schemes`.

    Raises:
        ValueError: As `parse_schemes`, or if there are none.
    """
    items = listing(given)
    if len(items) == 1 and isinstance(items[0], str):
        return parse_schemes(items[0])
    schemes = tuple(parse_scheme(item) if isinstance(item, str) else _checked(item) for item in items)
    if not schemes:
        raise ValueError("there is no scheme in an empty list; name one")
    return _distinct(schemes)


def _distinct(given: Iterable[Scheme]) -> tuple[Scheme, ...]:
    """The schemes as a tuple; ValueError if two are equal."""
    schemes = tuple(given)
    names = list(map(describe, schemes))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the scheme {twice} is listed twice; list each once")
    return schemes


def is_auto(given: str | Scheme | Sequence[str | Scheme]) -> bool:
    """Whether an argument of `as_schemes` is ``auto``."""
    return [item.strip() for item in listing(given) if isinstance(item, str)] == [AUTO]


def parse_scheme(spec: str, *, run_files: bool = True) -> Scheme:
    """The scheme that ``spec`` names: ``Prune``, ``StructPrune(min_keep=4)``, ``StructPrune+Quantize16``.

    A name may also be ``path/to/file.py:Name``, where Name is a class or a function that returns a scheme. The
    file is run and the scheme registered.

    Args:
        spec: A name, a name with parameters, or a sum of them.
        run_files: Whether files may be run. If not, the scheme of a file must be registered already.

    Raises:
        ValueError: If a name is unknown, a parameter does not exist or its value is refused; or if a file does not
            exist, raises when it is run or does not define the scheme.
    """
    parts = [_make(term, run_files) for term in terms(spec)]
    return parts[0] if len(parts) == 1 else Compose(*parts)


def _make(term: Term, run_files: bool) -> Scheme:
    make = _from_file(term.name, run_files) if term.is_in_file else SCHEMES.get(term.name)
    allowed = list(inspect.signature(make).parameters)
    if unknown := [name for name in term.parameters if name not in allowed]:
        takes = ", ".join(allowed) or "none"
        raise ValueError(f"{term.name} has no parameter {unknown[0]!r} (it has: {takes})")
    try:
        scheme = _checked(make(**term.parameters), f"{term.name} gives")
    except TypeError as error:
        raise ValueError(f"{term.name}: {error}") from error
    for scheme_class in map(type, parts_of(scheme)):
        if spec_of(scheme_class) != scheme_class.__name__:  # from a file: found by its name from now on
            register_scheme(scheme_class)
    return scheme


def _from_file(spec: str, run: bool) -> Callable[..., Scheme]:
    """The class or function that ``file.py:Name`` names; without ``run``, the one registered as Name."""
    if not run:
        registered = SCHEMES.find(spec.rpartition(":")[2])
        if registered is None:
            raise ValueError(f"the scheme {spec} is in a file, which is not run for this; import it first")
        return registered
    make: Callable[..., Scheme] = load_from_file(spec)
    if not callable(make):
        raise ValueError(
            f"{spec!r} is a {type(make).__name__}; name a scheme's class or a function that makes one"
        )
    return make


def _checked(candidate: Any, subject: str = "scheme= is") -> Scheme:
    """The given object if it has all members of `Scheme`; else ValueError, which begins with ``subject``."""
    if isinstance(candidate, type):
        name = candidate.__name__
        raise ValueError(f"{subject} the class {name}, not a scheme; write {name}()")
    if lacking := [member for member in vars(Scheme) if member[0] != "_" and not hasattr(candidate, member)]:
        name = type(candidate).__name__
        raise ValueError(f"{subject} a {name}, which is no scheme: without {', '.join(lacking)}")
    scheme: Scheme = candidate
    return scheme


def describe(scheme: Scheme) -> str:
    """The spec that `parse_scheme` turns into an equal scheme; parameters at their defaults are left out."""
    if isinstance(scheme, Compose):
        return "+".join(describe(part) for part in scheme.parts)
    name = in_quotes(spec_of(type(scheme)))
    if not is_dataclass(scheme):
        return name
    changed = [
        f"{f.name}={getattr(scheme, f.name)!r}" for f in fields(scheme) if getattr(scheme, f.name) != f.default
    ]
    return f"{name}({', '.join(changed)})" if changed else name
