"""Whether a long study's memory stays flat: its resident set after 20 trials and after all, in one process.

    python tests/benchmarks/memory.py [TRIALS]

Runs real trials of the digits without recovery, 200 by default, through all of `tune` but its conclusion: folder,
journal, MLflow. Prints the resident set after some trials and its growth since trial 20; exits with 1 if that is
more than 5%.
"""

import contextlib
import sys
import tempfile
from typing import Any

import psutil

import autocompress as ac
from autocompress.studies.watcher import Silent

WARM, MOST = 20, 0.05


class Enough(Exception):
    """Raised when all trials have finished: the conclusion, which exports and draws, is not measured."""


class Sizes(Silent):
    """The resident set after each trial, in bytes."""

    def __init__(self, trials: int) -> None:
        self.trials, self.sizes = trials, list[int]()

    def trial(self, *_: Any) -> None:
        self.sizes.append(psutil.Process().memory_info().rss)
        if len(self.sizes) % WARM == 0:
            print(f"trial {len(self.sizes):4d}  {self.sizes[-1] / 2**20:7.1f} MiB", flush=True)
        if len(self.sizes) == self.trials:
            raise Enough


def main() -> int:
    watcher = Sizes(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(Enough):
        ac.tune(trials=watcher.trials, sampler="random", recovery="none", device="cpu", out=out, watcher=watcher)
    growth = watcher.sizes[-1] / watcher.sizes[min(WARM, watcher.trials) - 1] - 1
    print(f"{growth:+.1%} from trial {WARM} to trial {watcher.trials}")
    return 1 if growth > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
