"""Seconds of a C step, and what share of an epoch they are: ResNet-18 on 1,000 images of 32 x 32, on one core.

    python tests/benchmarks/c_step.py [SCHEME ...]

Promised: at most 5% of the epoch that the L step after it takes, looking at data included.
"""

import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from autocompress.learner import EVIDENCE_BATCHES
from autocompress.scheme import Evidence, observe, parse_scheme
from autocompress.task import TensorSplit, channels_last
from autocompress.training import fit

SCHEMES = (
    "Prune",
    "Prune(criterion=obd)",
    "Prune(spread=erk)",
    "Prune(spread=lamp)",
    "StructPrune",
    "StructPrune(criterion=obd)",
    "StructPrune(criterion=taylor)",
    "StructPrune(criterion=fpgm)",
    "StructPrune(criterion=activation)",
    "StructPrune(criterion=beta_rank)",
    "StructPrune(criterion=hrank)",
    "StructPrune(spread=uniform, align=8)",
)
MAX_SHARE = 0.05
IMAGES, BATCH = 1000, 64


def best_of(n: int, action: Callable[[], object]) -> float:
    """The shortest of n runs, in seconds."""
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = channels_last(torchvision.models.resnet18(num_classes=10)).eval()
    x, y = torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % 10
    split = TensorSplit(x, y, BATCH)
    batches = [batch for batch, _ in zip(split.batches(), range(EVIDENCE_BATCHES), strict=False)]
    epoch = best_of(2, lambda: fit(model, split, nn.functional.cross_entropy, epochs=1, lr=0.01, seed=0))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    # As recovery has them from the second C step on.
    gathered = {name: torch.rand_like(w) for name, w in weights.items()}
    evidence = Evidence(model, lambda: batches, nn.functional.cross_entropy, lambda power: gathered)
    missed = 0
    print(f"an epoch: {epoch:.2f} s\n{'scheme':40s}  pi ms  observe ms  % of the epoch")
    for spec in sys.argv[1:] or SCHEMES:
        scheme = parse_scheme(spec)
        facts = scheme.analyze(model, x[:1])
        observing = best_of(3, lambda: observe(scheme, evidence, facts))  # noqa: B023  # called at once
        seen = observe(scheme, evidence, facts)
        projecting = best_of(3, lambda: scheme.pi(weights, 0.2, seen))  # noqa: B023  # called at once
        share = (observing + projecting) / epoch
        missed += share > MAX_SHARE
        print(
            f"{spec:40s}  {projecting * 1e3:5.0f}  {observing * 1e3:10.0f}  {share:14.1%}"
            f"{'' if share <= MAX_SHARE else '   MISSED'}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
