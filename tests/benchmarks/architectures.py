"""Structured pruning of every family of classifiers, at full image size with random weights: one row per density.

    python tests/benchmarks/architectures.py [NAME ...]

`plan s` is the time of analyze, pi and realize together, in processor seconds on one thread; the limit for
resnet50 is 1. `error` is the largest difference between the outputs of the realized and the masked model, divided
by the difference of the outputs for two images. `ok` means that the error is below 3e-3, that the number of
parameters is as predicted, and that the model trains, copies and loads. Exits with 1 if a row is not ok or a limit
is exceeded.
"""

import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_architectures import ARCHITECTURES, SCHEME, TOLERANCE, alive, assert_usable, images, prune

from autocompress.gauges.macs import count_macs

Result = TypeVar("Result")
MOST_SECONDS = {"resnet50": 1.0}
TRIES = 3  # of which the shortest counts where something is promised: what else runs takes the processor's cache


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    print(f"{'model':20}{'params':>9}{'plan s':>8}{'asked':>7}{'got':>8}{'lowest':>8}{'MACs':>20}{'error':>9}  ok")
    failed = sum(not row(name) for name in names or ARCHITECTURES)
    return 1 if failed else 0


def row(name: str) -> bool:
    """Prints a model's rows and the layers left whole; returns whether all rows are ok."""
    torch.manual_seed(0)
    side = ARCHITECTURES[name].full_side
    x = images(side)
    model = alive(ARCHITECTURES[name].make(), x)
    scheme = SCHEME
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        analyzing, facts = seconds(lambda: scheme.analyze(model, x[:1]), TRIES if name in MOST_SECONDS else 1)
    lowest = scheme.lowest_density(facts)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    dense_macs = count_macs(model, x)
    fine = True
    for density in (0.5, 0.1):
        pruned = prune(model, x, facts, density)
        projecting, theta = seconds(lambda: scheme.pi(weights, max(density, lowest), facts))  # noqa: B023  # called at once
        realizing, _ = seconds(lambda: scheme.realize(model, theta, facts))  # noqa: B023  # called at once
        planning = analyzing + projecting + realizing
        error = "" if pruned.error < TOLERANCE else "not exact"
        if planning > MOST_SECONDS.get(name, planning):
            error = f"planning takes more than {MOST_SECONDS[name]} s"
        try:
            assert_usable(pruned, model, x, facts, export=False)
        except Exception as failure:  # whatever goes wrong is what the table is for
            error = f"{type(failure).__name__}: {failure}"
        macs = f"{dense_macs / 1e6:.0f}M -> {count_macs(pruned.realized, x) / 1e6:.0f}M"
        print(
            f"{name:20}{sum(w.numel() for w in weights.values()) / 1e6:8.1f}M{planning:8.2f}"
            f"{density:7.1f}{pruned.density:8.4f}{lowest:8.4f}{macs:>20}{pruned.error:9.0e}  {error or 'ok'}",
            flush=True,
        )
        fine &= not error
    for warning in caught:
        print(textwrap.fill(str(warning.message), 105, initial_indent=" " * 4, subsequent_indent=" " * 6))
    return fine


def seconds(action: Callable[[], Result], tries: int = 1) -> tuple[float, Result]:
    """Returns the processor seconds of the fastest of some runs, and the last run's result."""
    taken = []
    for _ in range(tries):
        began = time.process_time()
        result = action()
        taken.append(time.process_time() - began)
    return min(taken), result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
