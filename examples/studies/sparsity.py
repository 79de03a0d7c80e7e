"""Sparsity against AUC, sensitivity and specificity, for large networks and a small one, on lesions of the skin.

After Jun, "Pruned Neural Networks for Skin Cancer Detection": for each network, the share of frozen layers and the
learning rate are searched first, by AUC on val; then 25 to 90% of its weights are pruned by magnitude and the rest
is fine-tuned. The paper's table of the dense networks, 3,908 images of HAM10000, half of them malignant:

    model         AUC     accuracy  sensitivity  specificity  % TP  % TN  % FP  % FN
    MobileNet v2  0.8853   81.9%     84.4%        79.6%       41.5  40.5  10.4   7.7
    Inception v3  0.9246   84.3%     87.0%        81.6%       42.8  41.5   9.3   6.4
    ResNet-50     0.8899   81.3%     84.1%        78.6%       41.4  39.9  10.9   7.8
    ResNet-152    0.9050   83.9%     86.7%        81.1%       42.6  41.2   9.6   6.5

All did best with every layer trained and a learning rate of 1e-4. Up to 75% sparsity the large networks kept their
AUC or gained; MobileNet v2 lost from the start, but was better than large networks with as many non-zeros.

Run it with:  python examples/studies/sparsity.py --data ham10000/
where ham10000/ holds the folders benign/ and malignant/. Freezing is of use with trained weights: torchvision's,
if they are in torch's cache.
"""

import argparse
from collections.abc import Sequence

import common
import optuna
import pandas as pd

import autocompress as ac
from autocompress.recovery import make_recovery

SIZES = {"inception_v3": "299"}


def make_best_task(args: argparse.Namespace, model: str) -> ac.Task:
    """The network with its best training: Optuna searches the share of frozen layers and the learning rate."""

    def trained(frozen: float, lr: float) -> ac.Task:
        size = args.image_size or SIZES.get(model, "224")
        how = {"image_size": size, "freeze": (f"{frozen:.2f}",), "train_lr": lr, "metric": "auc"}
        return common.make_task(args, model, **how)

    def auc(trial: optuna.Trial) -> float:
        task = trained(trial.suggest_float("frozen", 0.0, 0.9), trial.suggest_float("lr", 1e-5, 1e-2, log=True))
        return task.evaluate(task.model, task.val).score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial({"frozen": 0.0, "lr": 1e-4})  # the paper's answer
    study.optimize(auc, n_trials=args.searches)
    common.SAY(f"{model}: {study.best_params}, AUC {study.best_value:.4f} on val")
    return trained(**study.best_params)  # from the cache


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.make_parser(__doc__, batch_size=16, train_epochs=15, epochs=10)
    models = ["mobilenet_v2", "inception_v3", "resnet50", "resnet152"]
    parser.add_argument("--models", type=common.names, default=models)
    parser.add_argument("--sparsities", type=common.numbers, default=[25, 50, 75, 90], help="in percent")
    parser.add_argument("--searches", type=int, default=8, help="dense trainings of each network")
    args = parser.parse_args(argv)

    tables = {}
    for model in args.models:
        tables[model] = ac.sweep(
            make_best_task(args, model),
            "Prune(criterion=l1)",
            [1 - sparsity / 100 for sparsity in args.sparsities],
            also=["accuracy", "sensitivity", "specificity"],
            recovery=make_recovery("gradual", lr=0.01, distill=0.0, epochs=args.epochs),
            device=args.device,
            out=args.out,
            progress=common.SAY,
        ).table.assign(sparsity=[0.0, *args.sparsities], millions=lambda table: table["params"] / 1e6)

    dense = [[model, *_with_shares(table.iloc[0])] for model, table in tables.items()]
    header = ("model", "AUC", "accuracy", "sensitivity", "specificity", "% TP", "% TN", "% FP", "% FN")
    common.print_table("Dense, on test", header, dense)
    columns = ["sparsity", "auc", "sensitivity", "specificity", "params"]
    rows = [[model, *at] for model, table in tables.items() for at in table[columns].itertuples(index=False)]
    common.print_table("By sparsity, on test", ("model", "% zeros", *columns[1:4], "non-zeros"), rows)
    against = {"sparsity": "sparsity [%]", "millions": "parameters that are not zero [M]"}
    common.draw(
        args.out,
        "sparsity",
        [
            common.lines(label, f"{name} on test", {m: (t[x], t[metric]) for m, t in tables.items()})
            for metric, name in (("auc", "AUC"), ("sensitivity", "sensitivity"), ("specificity", "specificity"))
            for x, label in against.items()
        ],
    )


def _with_shares(at: pd.Series) -> list[float]:
    """The scores, and the shares of true and false positives and negatives among the images, in percent."""
    sensitivity, specificity = at["sensitivity"], at["specificity"]
    apart = sensitivity - specificity
    # accuracy = ill x sensitivity + (1 - ill) x specificity, which says how many are ill
    ill = (at["accuracy"] - specificity) / apart if apart else float("nan")
    found, cleared = ill * sensitivity, (1 - ill) * specificity
    shares = [found, cleared, 1 - ill - cleared, ill - found]
    return [at["auc"], at["accuracy"], sensitivity, specificity, *(100 * share for share in shares)]


if __name__ == "__main__":
    main()
