"""Several objectives as one: their product, each relative to the dense model."""

import math
from collections.abc import Sequence

from autocompress.goal import Term, combination


@combination
def product(terms: Sequence[Term]) -> float:
    """Product of objectives relative to the dense model; their weights are powers."""
    return math.prod(float(term.relative**term.weight) for term in terms)
