"""How a change of the score is called: a negative drop is a gain."""

from typing import TypeVar

T = TypeVar("T")


def loss_or_gain(drop: float, loss: T, gain: T) -> tuple[T, float]:
    """What a drop is called, and its size.

    An upper bound on a drop, if negative, is a lower bound on a gain: beside the words, ``loss`` and ``gain`` may
    hold how to round it.

    Args:
        drop: The drop, or a bound on it, in any unit.
        loss: What is returned beside it if it is a loss, or zero.
        gain: The same if it is a gain.
    """
    return gain if drop < 0 else loss, abs(drop)
