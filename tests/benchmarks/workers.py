"""Speed-up of two workers over one on a fixed set of trials: the digits, on the CPU.

    python tests/benchmarks/workers.py [TRIALS [EPOCHS]]

Runs the same trials in one process and in two, in turns, with one CPU thread each; the time to start the processes
counts. Prints the seconds of each turn and the ratio of the fastest; exits with 1 if the ratio is below 1.6. It
needs a machine with two cores and no other load. It also prints a trial's mean seconds: if these are larger with
two workers, the cores share a resource or other programs use them; the rest of a turn is the start of the
processes and the work of the coordinator.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from statistics import mean

import torch

from autocompress.data import digits
from autocompress.goal import as_objective
from autocompress.lc import LearningCompression
from autocompress.processes.parcel import pack_shared
from autocompress.processes.workers import LocalWorkers, Remote
from autocompress.scheme import parse_scheme
from autocompress.trial import Bound, TrialSpec, run_trial

TURNS, LEAST = 2, 1.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", type=int, nargs="?", default=16)
    parser.add_argument("epochs", type=int, nargs="?", default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = made(given.epochs)
    fastest = {1: math.inf, 2: math.inf}
    for turn in range(TURNS):
        for workers in fastest:
            seconds, each = finish(spec, given.trials, workers)
            fastest[workers] = min(fastest[workers], seconds)
            print(f"turn {turn}  workers {workers}  {seconds:6.1f} s  {each:5.2f} s a trial", flush=True)
    ratio = fastest[1] / fastest[2]
    print(f"{given.trials} trials of {given.epochs} epochs: two workers are {ratio:.2f} times as fast as one")
    return 1 if ratio < LEAST else 0


def made(epochs: int) -> TrialSpec:
    task, scheme = digits(), parse_scheme("StructPrune")
    return TrialSpec(
        number=0,
        density=0.1,
        task=task,
        scheme=scheme,
        facts=scheme.analyze(task.model, task.example_input),
        recovery=LearningCompression(epochs=epochs),
        objectives=(as_objective("density"),),
        bound=Bound(0.01),
        dense=task.evaluate(task.model, task.val),
        seed=0,
    )


def finish(spec: TrialSpec, trials: int, workers: int) -> tuple[float, float]:
    """Returns the seconds that these workers take for all trials, and the mean seconds of a trial."""
    began = time.perf_counter()
    shared, payload = pack_shared(vars(spec))
    with Remote(LocalWorkers(workers, payload, threads=1), shared) as executor:
        numbered = [replace(spec, number=number, seed=number) for number in range(1, trials + 1)]
        results = [future.result() for future in [executor.submit(run_trial, one) for one in numbered]]
        assert [result.number for result in results] == [one.number for one in numbered]
        return time.perf_counter() - began, mean(result.seconds for result in results)


if __name__ == "__main__":
    sys.exit(main())
