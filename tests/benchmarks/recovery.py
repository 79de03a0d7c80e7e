"""The default recovery against the others at equal gradient steps: ``python tests/benchmarks/recovery.py``.

Prints, for every scheme, budget and density, the compressed models' score on val and test together, as mean and
standard error over seeds: L-C and the other recoveries with the scheme's default criterion, and the other
recoveries with another criterion. Exit status 1 if the default, ``auto`` with the scheme's default criterion, is
worse than the best of the others by more than one standard error of the difference in any row.

Give the path of a ``.npz`` file in MedMNIST's layout, such as PneumoniaMNIST, for a second task.
"""

import argparse
import copy
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from autocompress import digits
from autocompress.learning.training import fit
from autocompress.models import SmallResNet
from autocompress.recovery import make_recovery, suiting
from autocompress.scheme import parse_scheme
from autocompress.splits import TensorSplit
from autocompress.task import Task, predict

SCHEMES = {
    "Prune": ("Prune", "Prune(criterion=l2)"),
    "StructPrune": ("StructPrune", "StructPrune(criterion=l2, normalize=mean)"),  # the other: group magnitude
}
CELLS = {
    "digits": {"epochs": (10, 30), "Prune": (0.03, 0.015, 0.01), "StructPrune": (0.06, 0.03, 0.015)},
    "medmnist": {"epochs": (1,), "Prune": (0.02, 0.01), "StructPrune": (0.03, 0.01)},
}
PLAIN = {"digits": ("gradual", "iterative", "rewind", "finetune"), "medmnist": ("gradual", "rewind")}


@dataclass(frozen=True)
class Run:
    """One recovery."""

    task: str
    data: str
    scheme: str
    spec: str
    method: str
    epochs: float
    density: float
    seed: int

    @property
    def cell(self) -> tuple[str, str, float, float]:
        """The cell of the comparison that the run belongs to."""
        return self.task, self.scheme, self.epochs, self.density


def check_filters_are_all_there_is(task: Task) -> None:
    """Checks that FilterPrune is StructPrune here: the network has no hidden neurons."""
    groups = [
        [(g.root, g.width) for g in parse_scheme(name).analyze(task.model, task.example_input).groups]
        for name in ("StructPrune", "FilterPrune")
    ]
    assert groups[0] == groups[1], groups


@cache
def dense_task(task: str, data: str, seed: int) -> Task:
    """The trained dense model and its data."""
    if task == "digits":
        return digits(seed=seed)
    with np.load(data, allow_pickle=False) as arrays:
        images = {part: torch.from_numpy(arrays[f"{part}_images"]).float() for part in ("train", "val", "test")}
        labels = {part: torch.from_numpy(arrays[f"{part}_labels"]).long() for part in images}
    mean, std = images["train"].mean(), images["train"].std()
    parts = [TensorSplit(((images[part] - mean) / std).unsqueeze(1), labels[part]) for part in images]
    torch.manual_seed(seed)
    model = SmallResNet(1, int(labels["train"].max()) + 1)
    fit(model, parts[0], torch.nn.functional.cross_entropy, epochs=6, lr=0.1, seed=seed)
    return Task(model, *parts)


def score(task: Task, model: torch.nn.Module) -> float:
    """Accuracy on val and test together; with two classes, the area under the ROC curve, in percent."""
    outputs, targets = (
        np.concatenate(both) for both in zip(predict(model, task.val), predict(model, task.test), strict=True)
    )
    if outputs.shape[1] == 2:
        return 100 * float(roc_auc_score(targets, outputs[:, 1] - outputs[:, 0]))
    return 100 * float((outputs.argmax(1) == targets).mean())


def recovered(run: Run) -> float:
    """The score of the compressed model."""
    torch.set_num_threads(1)
    task = dense_task(run.task, run.data, run.seed).on("cpu")
    scheme, model = parse_scheme(run.spec), copy.deepcopy(task.model)
    facts = scheme.analyze(task.model, task.example_input)
    recovery = make_recovery(run.method, epochs=run.epochs)
    recovery.recover(model, scheme, facts, run.density, task, run.seed)
    return score(task, model)


def runs(task: str, data: str, seeds: int) -> Iterator[Run]:
    """Everything that is compared on a task, cell after cell."""
    cells = CELLS[task]
    for scheme, specs in SCHEMES.items():
        for epochs in cells["epochs"]:
            for density in cells[scheme]:
                contenders = [("lc", specs[0])] + [(method, spec) for method in PLAIN[task] for spec in specs]
                for method, spec in contenders:
                    for seed in range(seeds):
                        yield Run(task, data, scheme, spec, method, epochs, density, seed)


def main() -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", nargs="?", type=Path, help="a second task")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scheme", choices=SCHEMES, action="append", help="only this one")
    parser.add_argument("--task", choices=CELLS, action="append", help="only this one")
    given = parser.parse_args()
    tasks = [("digits", "")] + ([("medmnist", str(given.npz))] if given.npz else [])
    check_filters_are_all_there_is(dense_task("digits", "", 0))
    todo = [run for task, data in tasks for run in runs(task, data, given.seeds)]
    todo = [run for run in todo if run.scheme in (given.scheme or SCHEMES) and run.task in (given.task or CELLS)]
    found: dict[tuple[str, str, float, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    worse = 0
    with ProcessPoolExecutor(given.workers) as executor:
        for run, value in zip(todo, executor.map(recovered, todo), strict=True):
            contender = f"{run.method}, {'obd' if 'obd' in repr(parse_scheme(run.spec)) else 'l2'}"
            found[run.cell][contender].append(value)
            n_contenders = 1 + 2 * len(PLAIN[run.task])
            done = found[run.cell]
            if len(done) == n_contenders and all(len(values) == given.seeds for values in done.values()):
                worse += report(run.cell, shipped(run), done)
    print(f"\nThe default is worse than the best of the others beyond the noise in {worse} of {len(found)}")
    return 1 if worse else 0


def shipped(run: Run) -> str:
    """The method that ``auto`` selects in a run's cell."""
    train = dense_task(run.task, run.data, 0).train
    return suiting(make_recovery("auto", epochs=run.epochs), parse_scheme(SCHEMES[run.scheme][0]), train).method


def report(cell: tuple[str, str, float, float], shipped: str, values: dict[str, list[float]]) -> int:
    """Prints a cell; returns 1 if the default is worse than the best of the others beyond the noise."""
    task, scheme, epochs, density = cell
    means = {contender: statistics.mean(v) for contender, v in values.items()}
    ours = next(contender for contender in means if contender.startswith(f"{shipped},"))
    best = max((contender for contender in means if contender != ours), key=lambda contender: means[contender])
    differences = [a - b for a, b in zip(values[ours], values[best], strict=True)]
    gain, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    print(f"\n{task}, {scheme}, {epochs:g} epochs, density {density:g}")
    for contender, v in sorted(values.items(), key=lambda item: -means[item[0]]):
        print(f"  {contender:16s} {means[contender]:6.2f} ± {statistics.stdev(v) / len(v) ** 0.5:.2f}")
    print(f"  {ours} (the default) - {best}: {gain:+.2f} ± {error:.2f}", flush=True)
    return int(gain < -error)


if __name__ == "__main__":
    sys.exit(main())
