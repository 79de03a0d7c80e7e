"""One-shot, iterative and layer-wise pruning, and the similarity of the layers of the pruned networks.

After Akhtar and Bathula, "Exploring the Impact of Network Pruning Techniques on Model Efficiency and Layer
Similarity in Medical Image Analysis": single weights by magnitude, at two levels; then linear CKA between all
layers of the pruned networks, and of a smaller student that was distilled from one of them. The paper's accuracies
(200 epochs of SGD):

                                  80% pruned                     50% pruned
    model         data       iterative one-shot layer-wise   iterative one-shot layer-wise
    VGG-16        CIFAR-100    65.79    62.28    55.35         67.97    63.40    56.27
    VGG-16        HAM10000     88.59    88.09    83.02         88.26    88.16    87.56
    DenseNet-169  CIFAR-100    64.24    63.58    59.76         63.28    59.88    60.26
    DenseNet-169  HAM10000     86.60    88.23    87.99         88.96    86.10    88.19

Layers were most alike after layer-wise pruning; one-shot and iterative pruning learned similar features; a student
(VGG-11) learned those of its pruned teacher in its first layers.

Run it with:  python examples/studies/layer_similarity.py --data ham10000/
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice

import common
import torch
from torch import nn

import autocompress as ac
from autocompress.learning.learner import Learner, Penalty
from autocompress.recovery import make_recovery
from autocompress.sweeping import load_model

# Layer-wise pruning removes the same share of each layer, the others the smallest weights of the whole network.
METHODS = {
    "iterative": ("iterative", "Prune(criterion=l1)"),
    "one-shot": ("rewind", "Prune(criterion=l1)"),
    "layer-wise": ("layerwise", "Prune(criterion=l1, spread=uniform)"),
}


def distilled(args: argparse.Namespace, teacher: nn.Module, task: ac.Task) -> nn.Module:
    """A student that learns the teacher's outputs more than the labels."""
    student = common.make_task(args, args.student, train_epochs=0).model
    taught = ac.Task(teacher, task.train, task.val, task.test, loss=task.loss, metric=task.metric)
    learner = Learner(ac.LearningCompression(epochs=args.epochs, lr=0.01, distill=0.9), student, taught, seed=0)
    learner.l_step(learner.descent.steps_left, Penalty.none())
    return student.eval()


def similarities(x: torch.Tensor, pruned: Mapping[str, nn.Module], student: nn.Module) -> list:
    """The paper's heat maps: each pruned network with itself, pairs of them, and the student with its teacher."""
    pairs = {name: (model, model) for name, model in pruned.items()}
    pairs |= {f"iterative, {other}": (pruned["iterative"], pruned[other]) for other in ("layer-wise", "one-shot")}
    pairs["student, teacher"] = (student, pruned["iterative"])
    tables = {name: ac.layer_similarity(a, b, x) for name, (a, b) in pairs.items()}
    means = [(name, float(table.to_numpy().mean())) for name, table in tables.items()]
    common.print_table("Linear CKA, mean over all pairs of layers", ("networks", "CKA"), means)
    return [common.heat_map(name, table) for name, table in tables.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.make_parser(__doc__, image_size="224", batch_size=32, train_epochs=50, epochs=200)
    parser.add_argument("--models", type=common.names, default=["vgg16", "densenet169"])
    parser.add_argument("--student", default="vgg11")
    parser.add_argument("--levels", type=common.numbers, default=[80, 50], help="pruned, in percent")
    parser.add_argument("--samples", type=int, default=256, help="that layers are compared on")
    args = parser.parse_args(argv)

    rows = []
    for model in args.models:
        task = common.make_task(args, model)
        x = torch.cat([x for x, _ in islice(task.test.batches(), -(-args.samples // task.test.batch_size))])
        found = {}
        for method, (recovery, scheme) in METHODS.items():
            found[method] = ac.sweep(
                task,
                scheme,
                [1 - level / 100 for level in args.levels],
                recovery=make_recovery(recovery, lr=0.01, distill=0.0, epochs=args.epochs),
                timing=False,
                device=args.device,
                out=args.out,
                progress=common.SAY,
            )
        accuracies = {method: 100 * sweep.table["accuracy"][1:] for method, sweep in found.items()}
        for level, *of_methods in zip(args.levels, *accuracies.values(), strict=True):
            rows.append([model, f"{level:g}%", *(f"{accuracy:.2f}" for accuracy in of_methods)])
        pruned = {method: load_model(sweep, 1, task) for method, sweep in found.items()}
        student = distilled(args, pruned["iterative"], task)
        score = 100 * task.evaluate(student, task.test).score
        common.SAY(f"{args.student}, distilled from {model} pruned iteratively: {score:.2f}")
        maps = similarities(x[: args.samples], pruned, student)
        common.draw(args.out, f"layer_similarity-{model}", maps, columns=3)
    common.print_table("Accuracy on test", ("model", "pruned", *METHODS), rows)


if __name__ == "__main__":
    main()
