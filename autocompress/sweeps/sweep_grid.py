"""The grid of a sweep: schemes × densities × repeats, checked and put in order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from autocompress.arguments import listing
from autocompress.notation import listed
from autocompress.scheme import AUTO, Scheme, as_schemes, describe


def distinct_schemes(given: str | Scheme | Sequence[str | Scheme]) -> dict[str, Scheme]:
    """Schemes by what describes them; a text may list several."""
    apart = [part for one in listing(given) for part in (listed(one) if isinstance(one, str) else [one])]
    if AUTO in apart:
        raise ValueError("a sweep runs every scheme that it is given; name them in the place of 'auto'")
    return {describe(scheme): scheme for scheme in as_schemes(apart)}


def distinct_densities(given: float | Sequence[float]) -> tuple[float, ...]:
    """Densities, each within its bounds and given once."""
    densities = tuple(map(float, listing(given)))
    if not densities or not all(0 < one <= 1 for one in densities):
        raise ValueError(f"densities={list(densities)}; give one or more numbers above 0 and at most 1")
    if len(set(densities)) < len(densities):
        raise ValueError(f"densities={list(densities)}; one is given twice")
    return densities


@dataclass(frozen=True)
class Cell:
    """One trial of a sweep.

    Attributes:
        number: From 1.
        scheme: What describes its scheme.
        density: What it shall have.
        repeat: Which run of the scheme and the density it is, from 1.
    """

    number: int
    scheme: str
    density: float
    repeat: int

    @property
    def key(self) -> dict[str, Any]:
        """The cell as the first columns of its row."""
        return {
            "number": self.number,
            "scheme": self.scheme,
            "density_asked": self.density,
            "repeat": self.repeat,
        }


def grid(schemes: Mapping[str, Scheme], densities: Sequence[float], repeats: int) -> Iterator[Cell]:
    """All cells, the first run of each before the second of any: a sweep cut short has something of all."""
    wanted = [
        (repeat, name, density)
        for repeat, (name, scheme) in product(range(1, repeats + 1), schemes.items())
        for density in (densities if scheme.takes_density else (1.0,))
    ]
    for number, (repeat, name, density) in enumerate(wanted, start=1):
        yield Cell(number, name, density, repeat)
