"""The grid of a sweep: schemes × densities × repeats, checked and ordered."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from autocompress.arguments import listing
from autocompress.notation import listed
from autocompress.scheme import AUTO, Scheme, as_schemes, describe


def distinct_schemes(given: str | Scheme | Sequence[str | Scheme]) -> dict[str, Scheme]:
    """Schemes by their specs; a text may list several.

    Raises:
        ValueError: If one is unknown, given twice or ``auto``.
    """
    schemes = [part for item in listing(given) for part in (listed(item) if isinstance(item, str) else [item])]
    if AUTO in schemes:
        raise ValueError("a sweep runs every scheme that it is given; name them in the place of 'auto'")
    return {describe(scheme): scheme for scheme in as_schemes(schemes)}


def distinct_densities(given: float | Sequence[float]) -> tuple[float, ...]:
    """Densities as a tuple.

    Raises:
        ValueError: If there are none, one is not in (0, 1], or one is given twice.
    """
    densities = tuple(map(float, listing(given)))
    if not densities or not all(0 < density <= 1 for density in densities):
        raise ValueError(f"densities={list(densities)}; give one or more numbers above 0 and at most 1")
    if len(set(densities)) < len(densities):
        raise ValueError(f"densities={list(densities)}; one is given twice")
    return densities


@dataclass(frozen=True)
class Cell:
    """One trial of a sweep.

    Attributes:
        number: Its number, from 1.
        scheme: The spec of its scheme.
        density: The target density.
        repeat: The number of the run with this scheme and density, from 1.
    """

    number: int
    scheme: str
    density: float
    repeat: int

    @property
    def key(self) -> dict[str, Any]:
        """The first columns of the cell's row, by name."""
        return {
            "number": self.number,
            "scheme": self.scheme,
            "density_asked": self.density,
            "repeat": self.repeat,
        }


def grid(schemes: Mapping[str, Scheme], densities: Sequence[float], repeats: int) -> Iterator[Cell]:
    """All cells, the first runs of all before any second run, so that a sweep cut short has some of each."""
    combinations = [
        (repeat, name, density)
        for repeat, (name, scheme) in product(range(1, repeats + 1), schemes.items())
        for density in (densities if scheme.takes_density else (1.0,))
    ]
    for number, (repeat, name, density) in enumerate(combinations, start=1):
        yield Cell(number, name, density, repeat)
