"""Exact selection of the highest of millions of scores, without sorting them.

A sorted sample gives an interval in which the threshold lies almost surely; only the scores in it are examined
further (Floyd & Rivest, "Expected Time Bounds for Selection", 1975). Where it turns out not to, a wider interval
is tried, up to all scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .criteria import lamp

SAMPLED = 64  # the sample has one of so many scores
FEW = SAMPLED * SAMPLED  # up to so many scores are all examined
MARGINS = (2.0, 8.0, math.inf)  # half widths of the interval: places in the sample, over the root of its size


def best(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """Masks that are True at the n highest of all the scores, in their shapes.

    Of equal scores those count as higher that come first in memory.
    """
    if n == 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    return _highest(scores, n, _nth_highest([_flat(s) for s in scores], n))


def best_with_floors(scores: Sequence[Tensor], n: int, floors: Sequence[int]) -> list[Tensor]:
    """Masks as of `best`, but each layer keeps at least its floor, at the expense of the others."""
    masks = best(scores, n)
    counts = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
    if all(count >= floor for count, floor in zip(counts, floors, strict=True)):
        return masks
    above = [s.masked_fill(best([s], floor)[0], torch.inf) for s, floor in zip(scores, floors, strict=True)]
    return best(above, n)


def best_by_lamp(scores: Sequence[Tensor], n: int, floors: Sequence[int]) -> list[Tensor]:
    """Masks that are True at the n highest of all LAMP scores; each layer keeps at least its floor.

    Args:
        scores: The scores of each layer (squared weights), of any shape. Those below zero count as zero.
        n: From the sum of the floors to the number of scores.
        floors: The number of entries that each layer keeps at least.
    """
    flat = [_flat(s) for s in scores]
    samples = [_Sample.of(s) for s in flat]
    threshold = _threshold(samples, n)
    for margin in MARGINS:
        contests = [
            _Contest.of(s, *sample.around(threshold, margin)) for s, sample in zip(flat, samples, strict=True)
        ]
        if (kept := _settled(contests, n, floors)) is not None:
            break
    assert kept is not None  # at the last margin every score is examined
    return [
        _highest([s], contest.n_above + k, contest.rising[-k])[0] if k else best([s], contest.n_above)[0]
        for s, contest, k in zip(scores, contests, kept, strict=True)
    ]


@dataclass(frozen=True)
class _Sample:
    """A sample of a layer's scores.

    Attributes:
        rising: The scores, the smallest first, shape ``(m,)``.
        lamps: Estimates of their LAMP scores in the layer, shape ``(m,)``.
        stride: The number of the layer's scores that each stands for.
    """

    rising: Tensor
    lamps: Tensor
    stride: int

    @classmethod
    def of(cls, flat: Tensor) -> "_Sample":
        stride = SAMPLED if len(flat) > FEW else 1
        rising = _rising(flat[::stride])
        return cls(rising, lamp(rising.clamp_min(0)) / stride, stride)

    def around(self, threshold: float, margin: float) -> tuple[float, float]:
        """The interval of scores around the one whose LAMP score is the threshold."""
        m, place = len(self.rising), int(torch.searchsorted(self.lamps, threshold))
        if self.stride == 1 or margin == math.inf:
            return -math.inf, math.inf
        width = int(margin * math.sqrt(m)) + 1
        low = float(self.rising[place - width]) if place >= width else -math.inf
        high = float(self.rising[place + width]) if place + width < m else math.inf
        return low, high


def _threshold(samples: Sequence[_Sample], n: int) -> float:
    """An estimate of the LAMP score that ``n`` of all scores reach."""
    lamps = torch.cat([sample.lamps for sample in samples])
    stand_for = torch.cat([torch.full_like(sample.lamps, sample.stride) for sample in samples])
    falling = lamps.sort(descending=True)
    reached = stand_for[falling.indices].cumsum(0, dtype=torch.double)
    return float(falling.values[min(int(torch.searchsorted(reached, n)), len(lamps) - 1)])


@dataclass(frozen=True)
class _Contest:
    """The scores of a layer in the interval that should contain the threshold.

    Attributes:
        rising: These scores, the smallest first.
        lamps: Their LAMP scores in the layer, which are exact.
        n_above: The number of scores above the interval: they are kept.
        n_below: The number of scores below it: they are not.
    """

    rising: Tensor
    lamps: Tensor
    n_above: int
    n_below: int

    @classmethod
    def of(cls, flat: Tensor, low: float, high: float) -> "_Contest":
        from_low = _chosen(flat, flat >= low)
        above = _chosen(from_low, from_low > high)
        rising = _rising(_chosen(from_low, from_low <= high))
        lamps = lamp(rising.clamp_min(0), float(above.sum(dtype=torch.double)))
        return cls(rising, lamps, len(above), len(flat) - len(above) - len(rising))

    def decided(self, kept: int, floor: int) -> bool:
        """Whether keeping ``kept`` of these scores proves that all above are kept, and none below."""
        return (kept > 0 or self.n_above <= floor) and (kept < len(self.rising) or self.n_below == 0)


def _settled(contests: Sequence[_Contest], n: int, floors: Sequence[int]) -> list[int] | None:
    """How many scores each layer keeps of its contest; None if the threshold may lie outside of one.

    Args:
        contests: Of each layer.
        n: The number of scores to keep, those above the contests included.
        floors: The number of scores that each layer keeps at least.
    """
    n_left = n - sum(contest.n_above for contest in contests)
    left = [max(0, floor - contest.n_above) for contest, floor in zip(contests, floors, strict=True)]
    if not sum(left) <= n_left <= sum(len(contest.rising) for contest in contests):
        return None
    if any(floor > len(contest.rising) for contest, floor in zip(contests, left, strict=True)):
        return None
    masks = best_with_floors([contest.lamps for contest in contests], n_left, left)
    kept = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
    decided = all(contest.decided(*counts) for contest, *counts in zip(contests, kept, floors, strict=True))
    return kept if decided else None


def rising_order(scores: Tensor) -> Tensor:
    """A stable argsort of scores on the CPU, none of them negative.

    It sorts integers: the bits of a float32 that is not negative rank as the number does, and its index in the
    lower bits makes keys distinct, so that the fastest sort, which is not stable, will do.
    """
    bits = scores.float().view(torch.int32).long()
    keys = (bits << 31) | torch.arange(len(scores))
    return _rising(keys) & (2**31 - 1)


def _highest(scores: Sequence[Tensor], n: int, nth: Tensor) -> list[Tensor]:
    """True at the n highest of all the scores, the lowest of which is ``nth``."""
    masks = [s >= nth for s in scores]
    surplus = int(torch.stack([mask.count_nonzero() for mask in masks]).sum()) - n
    for s, mask in zip(reversed(scores), reversed(masks), strict=True):
        if surplus:
            equal = _flat(s == nth)
            n_dropped = min(surplus, int(equal.sum()))
            first = equal.nonzero()[-n_dropped, 0] if n_dropped == surplus else 0  # all equal ones from it on go
            _flat(mask)[first:] &= ~equal[first:]
            surplus -= n_dropped
    return masks


def _flat(entries: Tensor) -> Tensor:
    """The entries as they lie in memory, shape ``(n,)``: without a copy, whatever the layout."""
    by_stride = sorted(range(entries.dim()), key=entries.stride, reverse=True)
    return entries.permute(by_stride).flatten()


# On a CPU numpy selects three to ten times, and sorts twenty times, as fast as torch does.


def _chosen(scores: Tensor, mask: Tensor) -> Tensor:
    if scores.device.type == "cpu":
        return torch.from_numpy(np.compress(mask.numpy(), scores.numpy()))
    return scores[mask]


def _nth_highest(flat: Sequence[Tensor], n: int) -> Tensor:
    k = sum(map(len, flat)) - n
    if flat[0].device.type == "cpu":
        return torch.from_numpy(_kth_lowest([s.numpy() for s in flat], k)[None])
    return torch.cat(list(flat)).kthvalue(k + 1, keepdim=True).values


def _kth_lowest(parts: Sequence[NDArray[Any]], k: int) -> Any:
    """The value at index ``k`` in rising order; of many scores, only those near it are examined."""
    n = sum(map(len, parts))
    sample = np.sort(np.concatenate([scores[::SAMPLED] for scores in parts]))
    place, ends = k * len(sample) // n, np.array([-np.inf, np.inf], sample.dtype)
    for margin in MARGINS if n > FEW else ():
        width = int(min(len(sample), margin * math.sqrt(len(sample)) + 1))
        low = sample[place - width] if place >= width else ends[0]
        high = sample[place + width] if place + width < len(sample) else ends[1]
        near = np.concatenate([np.compress((scores > low) & (scores < high), scores) for scores in parts])
        rank = k - sum(np.count_nonzero(scores <= low) for scores in parts)
        if 0 <= rank < len(near):
            return np.partition(near, rank)[rank]
        for tied in (low, high):  # many scores may be equal: zeros
            rank = k - sum(np.count_nonzero(scores < tied) for scores in parts)
            if 0 <= rank < sum(np.count_nonzero(scores == tied) for scores in parts):
                return tied
    return np.partition(np.concatenate(parts), k)[k]


def _rising(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy()))
    return scores.sort().values
