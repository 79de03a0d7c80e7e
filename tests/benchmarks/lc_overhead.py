"""What C steps, penalty and multipliers cost beside plain training: resnet18 on 1,000 images of 32 x 32.

    python tests/benchmarks/lc_overhead.py [STEPS]

Recovery by L-C beside plain training of as many gradient steps, with C steps as often as in the default budget of
30 epochs; the pass that calibrates BatchNorm afterwards is not counted. Prints processor seconds of each and the
overhead; exits with 1 where it exceeds 10%.
"""

import copy
import sys
import time

import torch
from torchvision.models import resnet18

from autocompress.lc import LearningCompression
from autocompress.learner import Learner, Penalty
from autocompress.scheme import parse_scheme
from autocompress.splits import TensorSplit
from autocompress.task import Task

EPOCHS, IMAGES, BATCH = 30, 1000, 64
SCHEMES = ("Prune", "StructPrune", "StructPrune(criterion=obd, normalize=parameters)", "FilterPrune")
MOST = 0.10


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    torch.manual_seed(0)
    split = TensorSplit(torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,)), BATCH)
    task = Task(resnet18(num_classes=10).eval(), split, split, split).on("cpu")
    default = LearningCompression(epochs=EPOCHS)
    c_steps = max(1, round(default.c_steps * steps / default.n_steps(split)))
    config = LearningCompression(steps=steps, c_steps=c_steps, distill=0.0, mu=1.0)
    print(f"{steps} gradient steps, {c_steps} C steps\n{'scheme':50s}{'plain s':>9s}{'lc s':>8s}{'overhead':>10s}")
    worst = 0.0
    for spec in SCHEMES:
        scheme = parse_scheme(spec)
        facts = scheme.analyze(task.model, task.example_input)
        began = time.process_time()
        Learner(config, copy.deepcopy(task.model), task, 0).l_step(steps, Penalty.none())
        between = time.process_time()
        config.recover(copy.deepcopy(task.model), scheme, facts, 0.1, task, 0)
        ended = time.process_time()
        # Whoever trains calibrates BatchNorm in the end; here only recovery has.
        forward = calibration(task)
        plain, lc = between - began, ended - between - forward
        worst = max(worst, lc / plain - 1)
        print(f"{spec:50s}{plain:9.1f}{lc:8.1f}{lc / plain - 1:10.1%}", flush=True)
    return 1 if worst > MOST else 0


def calibration(task: Task) -> float:
    """Processor seconds of one pass over the data in train mode."""
    model = copy.deepcopy(task.model).train()
    began = time.process_time()
    with torch.no_grad():
        for x, _ in task.train.batches():
            model(x)
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
