"""Several objectives as one: their sum, each relative to the dense model."""

from collections.abc import Sequence

from autocompress.goal import Term, combination


@combination
def weighted_sum(terms: Sequence[Term]) -> float:
    """Weighted mean of objectives relative to the dense model."""
    return sum(term.weight * term.relative for term in terms) / sum(term.weight for term in terms)
