"""Importance of single weights: how much is lost when one of them becomes zero.

`entry_scores` gives every entry of a weight a score, the larger the more important. Criteria that depend on data
need the result of `observe_entries`, which a scheme calls in its `autocompress.scheme.Observer.observe`.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Weights
from autocompress.splits import Batch
from autocompress.task import device_of, evaluating

EntryCriterion: TypeAlias = Literal["l1", "l2", "lamp", "taylor", "obd", "random"]
ENTRY_CRITERIA: tuple[str, ...] = get_args(EntryCriterion)

POWERS: Mapping[str, int] = {"taylor": 1, "obd": 2}  # the criterion needs the mean of this power of the gradient

SHORT_LOOK = 2  # batches that suffice for a C step that others follow

Observed: TypeAlias = Mapping[str, Tensor]
"""What a criterion has observed on data: tensors by the name of a weight, or of a group of channels."""


def entry_scores(
    criterion: str, weights: Weights, names: Collection[str], observed: Observed | None = None
) -> Weights:
    """The importance of every entry of some weights.

    Args:
        criterion: With w an entry and g its gradient of the loss:

            - ``l1``: |w|; ``l2``: w² (Han et al., "Learning both Weights and Connections for Efficient Neural
              Networks", NeurIPS 2015). Single weights rank alike under both.
            - ``lamp``: w² over the sum of the squares that are no smaller in its layer (Lee et al.,
              "Layer-Adaptive Sparsity for the Magnitude-Based Pruning", ICLR 2021).
            - ``taylor``: (g·w)², the change of the loss to first order (Molchanov et al., "Importance
              Estimation for Neural Network Pruning", CVPR 2019), g the mean over batches.
            - ``obd``: w²·F, the change of the loss to second order with the diagonal of the empirical Fisher
              matrix F = E[g²] for the Hessian (LeCun et al., "Optimal Brain Damage", NeurIPS 1989; Theis et
              al., "Faster Gaze Prediction with Dense Networks and Fisher Pruning", 2018).
            - ``random``: a fixed draw, the baseline of all others.
        weights: The weights, by name.
        names: Which of them to score.
        observed: What `observe_entries` returned.

    Returns:
        Scores by name, each of its weight's shape, on its device, none negative.

    Raises:
        ValueError: If the criterion looks at data and nothing was observed.
    """
    seen = required(observed, criterion) if criterion in ("taylor", "obd") else {}
    return {name: _scores(criterion, name, at_least_float32(weights[name]), seen.get(name)) for name in names}


def at_least_float32(w: Tensor) -> Tensor:
    """A 16-bit weight in float32: in fp16 the squares of small weights are zero, and sums of many are coarse."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def _scores(criterion: str, name: str, w: Tensor, seen: Tensor | None) -> Tensor:
    match criterion:
        case "l1":
            return w.abs()
        case "l2":
            return w.square()
        case "lamp":
            ranked = w.square().flatten().sort()
            return torch.empty_like(ranked.values).scatter_(0, ranked.indices, lamp(ranked.values)).view_as(w)
        case "taylor" if seen is not None:
            return (w * seen).square_()
        case "obd" if seen is not None:
            return w.square().mul_(seen)
        case "random":
            return draw(name, w.numel()).to(w).view_as(w)
    raise AssertionError(f"no criterion {criterion!r} for single weights")


def observe_entries(criterion: str, evidence: Evidence, names: Collection[str]) -> Observed | None:
    """The mean of the gradient (``taylor``) or its square (``obd``) by weight; None for the other criteria.

    It is the running mean that training has gathered if there is one, and the mean over the evidence's batches
    otherwise. The model is not changed.
    """
    if criterion not in POWERS:
        return None
    gathered = evidence.gradient_moments(POWERS[criterion])
    return gathered if set(names) <= gathered.keys() else _mean_gradients(evidence, names, POWERS[criterion])


def check_criterion(scheme: object, criterion: str, allowed: Collection[str]) -> None:
    """Checks a scheme's criterion.

    Raises:
        ValueError: If the scheme does not know it.
    """
    if criterion not in allowed:
        raise ValueError(f"criterion={criterion!r}; {type(scheme).__name__} takes {', '.join(allowed)}")


def required(observed: Observed | None, criterion: str) -> Observed:
    """What was observed, checked not to be None.

    Raises:
        ValueError: If nothing was observed.
    """
    if observed is None:
        raise ValueError(
            f"criterion={criterion!r} looks at data and has seen none; pass the facts through observe before pi"
        )
    return observed


def lamp(rising: Tensor, larger: float = 0.0) -> Tensor:
    """Each score over the sum of those that are no smaller: the LAMP score, if these are squared weights.

    Lee et al., "Layer-Adaptive Sparsity for the Magnitude-Based Pruning" (ICLR 2021), equation 1.

    Args:
        rising: The scores of a layer, none negative, the smallest first, shape ``(n,)``.
        larger: The sum of the layer's scores that are larger than these.

    Returns:
        The LAMP scores, rising, shape ``(n,)``; a layer's largest is 1 (or 0 if all are 0).
    """
    sums = rising.flip(0).cumsum(0, dtype=torch.double).flip(0).add_(larger).to(rising.dtype)
    return rising / sums.clamp_min_(torch.finfo(rising.dtype).tiny)


def draw(name: str, n: int) -> Tensor:
    """Random numbers from 0 to 1 that depend on ``name`` alone, shape ``(n,)``."""
    return torch.rand(n, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@contextmanager
def looking_at(evidence: Evidence) -> Iterator[Iterator[Batch]]:
    """For a ``with`` block: the batches on the model's device, the model in eval mode, the RNG state protected."""
    device = device_of(evidence.model)
    cuda = [device] if device.type == "cuda" else []
    with evaluating(evidence.model), torch.random.fork_rng(devices=cuda):
        yield ((x.to(device), y.to(device)) for x, y in evidence.batches())


@contextmanager
def _trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Enables gradients of frozen parameters, for a ``with`` block.

    In place, as `torch.func.functional_call` fails on modules that have two names.
    """
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _mean_gradients(evidence: Evidence, names: Collection[str], power: int) -> Weights:
    """The mean over the batches of the loss's gradient to a power, entry by entry."""
    weights = dict(evidence.model.named_parameters())
    total = {name: torch.zeros_like(weights[name], requires_grad=False) for name in names}
    n = 0
    with looking_at(evidence) as batches, torch.enable_grad(), _trainable(weights[name] for name in names):
        for x, y in islice(batches, SHORT_LOOK if evidence.provisional else None):
            n += 1
            loss = evidence.loss(evidence.model(x), y)
            gradients = torch.autograd.grad(loss, [weights[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.pow(power)
    if not n:
        raise ValueError("there are no batches to look at; the training data must serve at least one")
    return {name: value / n for name, value in total.items()}
