"""Cost of a C step relative to the L step that follows it: ResNet-18 on 1,000 images of 32 x 32, on one core.

    OMP_NUM_THREADS=1 python tests/benchmarks/c_step.py [SCHEME ...]

The limit is 5% of the L step, which is one epoch under the scheme's own penalty. A C step is all work between two
L steps: observing data, Π and Δ. Both are timed in turns, in processor seconds, so that other load on the machine
affects both alike, and the shortest of some rounds counts. The first round is left out: in it a scheme may observe
data for statistics that training gathers later on. Exits with 1 if a scheme takes more.
"""

import copy
import itertools
import sys
import time
from dataclasses import dataclass

import torch
import torchvision

from autocompress.lc import LearningCompression
from autocompress.learning.learner import Learner, Penalty
from autocompress.learning.polish import free_entries
from autocompress.scheme import Scheme, observe, parse_scheme
from autocompress.schemes.criteria import ENTRY_CRITERIA
from autocompress.schemes.importance import CHANNEL_CRITERIA
from autocompress.splits import TensorSplit
from autocompress.task import Task, channels_last

SCHEMES = (
    *(f"Prune(criterion={criterion})" for criterion in ENTRY_CRITERIA),
    *(f"Prune(spread={spread})" for spread in ("uniform", "erk", "lamp")),
    *(f"StructPrune(criterion={criterion})" for criterion in CHANNEL_CRITERIA),
    *(f"StructPrune(spread={spread})" for spread in ("uniform", "erk", "lamp")),
    "StructPrune(normalize=parameters, align=8)",
    "FilterPrune",
    "BlockPrune",
    "NMPrune",
    "LowRank",
    "Quantize16",
    "Quantize8",
    "StructPrune+Quantize8",
)
MAX_SHARE = 0.05
IMAGES, BATCH, DENSITY = 1000, 64, 0.2
ROUNDS, STEPS = 9, 2  # in each a C step and so many gradient steps, which stand for those of an epoch


@dataclass(frozen=True)
class Seconds:
    """Processor seconds of the parts of a round."""

    observe: float
    pi: float
    delta: float
    l_step: float


def rounds(scheme: Scheme, task: Task) -> list[Seconds]:
    """Trains for some rounds and returns the times of each, its L step scaled to an epoch."""
    recipe = LearningCompression(epochs=1, lr=0.01, distill=0.0).suiting(scheme, task.train)
    facts = scheme.analyze(task.model, task.example_input)
    learner = Learner(recipe, copy.deepcopy(task.model), task, seed=0)
    mu = recipe.first_mu / (recipe.peak_lr * learner.descent.steps)
    taken = []
    for _ in range(ROUNDS):
        times = [time.process_time()]
        seen = observe(scheme, learner.evidence(), facts)
        times.append(time.process_time())
        theta = scheme.pi({name: w.detach() for name, w in learner.weights.items()}, DENSITY, seen)
        times.append(time.process_time())
        values = scheme.delta(theta)
        times.append(time.process_time())
        penalty = Penalty.towards(values, free_entries(theta), {}, mu)
        training = time.process_time()
        learner.l_step(STEPS, penalty)
        epoch = (time.process_time() - training) * IMAGES / (STEPS * BATCH)
        taken.append(Seconds(*(after - before for before, after in itertools.pairwise(times)), epoch))
    return taken[1:]


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = TensorSplit(torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % 10, BATCH)
    model = channels_last(torchvision.models.resnet18(num_classes=10)).eval()
    task = Task(model, split, split, split).on("cpu")
    missed = 0
    print(f"{'scheme':44s}{'observe ms':>10s}{'pi ms':>8s}{'delta ms':>10s}{'L step s':>10s}{'share':>8s}")
    for spec in sys.argv[1:] or SCHEMES:
        taken = rounds(parse_scheme(spec), task)
        observing, projecting, decompressing, training = (
            min(getattr(one, part) for one in taken) for part in ("observe", "pi", "delta", "l_step")
        )
        share = (observing + projecting + decompressing) / training
        missed += share > MAX_SHARE
        print(
            f"{spec:44s}{observing * 1e3:10.0f}{projecting * 1e3:8.0f}{decompressing * 1e3:10.0f}{training:10.2f}"
            f"{share:8.1%}{'' if share <= MAX_SHARE else '   MISSED'}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
