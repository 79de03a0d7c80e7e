"""Overhead of C steps, penalty and multipliers over plain training: resnet18 on 1,000 images of 32 x 32.

    python tests/benchmarks/lc_overhead.py [STEPS]

Runs an L-C recovery of STEPS gradient steps, with C steps as frequent as in the default budget of epochs, and
measures the processor time of everything that plain training does not do: the penalty and the running means of
gradients after each step, C steps with their multipliers, and the start and end of a recovery. The rest of the
same run is the plain training that it is compared with, so that other load on the machine affects both alike. The
pass that calibrates BatchNorm is not counted, as plain training needs it as well. The polish trains the masked
network here, as steps on the network without the removed channels would not be plain training. Prints milliseconds
and the overhead over the default budget, in which the start and the end come once; exits with 1 if it exceeds 10%.

With fewer than the default of 126 steps, the memory that the first C steps allocate counts too much.
"""

import copy
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torchvision.models import resnet18

from autocompress import lc
from autocompress.lc import LearningCompression
from autocompress.learning import polish
from autocompress.learning.learner import Penalty
from autocompress.learning.shrunk import Shrunk
from autocompress.learning.training import Descent
from autocompress.scheme import parse_scheme
from autocompress.splits import TensorSplit
from autocompress.task import Task

EPOCHS, IMAGES, BATCH = LearningCompression.epochs, 1000, 64
SCHEMES = ("Prune", "StructPrune", "StructPrune(criterion=l2)", "FilterPrune")
MOST = 0.10

TAKEN: dict[str, list[float]] = defaultdict(list)
"""Processor milliseconds of each call, by the name of the function."""


def clocked(owner: Any, name: str) -> None:
    """Wraps a function so that the processor time of every call is recorded."""
    work: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return work(*args, **kwargs)
        finally:
            TAKEN[name].append(1e3 * (time.process_time() - began))

    setattr(owner, name, timed)


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 126
    torch.manual_seed(0)
    split = TensorSplit(torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,)), BATCH)
    task = Task(resnet18(num_classes=10).eval(), split, split, split).on("cpu")
    budget = LearningCompression(epochs=EPOCHS).n_steps(split)
    often = LearningCompression.c_steps / budget
    config = LearningCompression(steps=steps, c_steps=max(1, round(often * steps)), distill=0.0, mu=1.0)
    for owner, name in (
        (Penalty, "apply"),
        (Descent, "_remember_gradients"),
        (LearningCompression, "constrain"),
        *((module, name) for module in (lc, polish) for name in ("observe", "freeze")),
        (polish, "recalibrate_batchnorm"),
    ):
        clocked(owner, name)
    Shrunk._realized = lambda *_: None  # type: ignore[method-assign]
    print(f"{steps} gradient steps, {config.c_steps} C steps; of {budget} and {LearningCompression.c_steps}")
    columns = ("step ms", "+ penalty", "+ means", "C step", "ends", "overhead")
    print(f"{'scheme':50s}" + "".join(f"{column:>10s}" for column in columns))
    worst = 0.0
    for spec in SCHEMES:
        scheme = parse_scheme(spec)
        facts = scheme.analyze(task.model, task.example_input)
        TAKEN.clear()
        began = time.process_time()
        config.recover(copy.deepcopy(task.model), scheme, facts, 0.1, task, 0)
        whole = 1e3 * (time.process_time() - began)
        plain = (whole - sum(map(sum, TAKEN.values()))) / steps
        penalty, means = (sum(TAKEN[name]) / steps for name in ("apply", "_remember_gradients"))
        first_look, *looks = TAKEN["observe"]
        c_step = (sum(TAKEN["constrain"]) + sum(looks)) / config.c_steps
        ends = first_look + sum(TAKEN["freeze"])
        overhead = (penalty + means + often * c_step + ends / budget) / plain
        worst = max(worst, overhead)
        shown = "".join(f"{ms:10.1f}" for ms in (plain, penalty, means, c_step, ends))
        print(f"{spec:50s}{shown}{overhead:10.1%}", flush=True)
    return 1 if worst > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
