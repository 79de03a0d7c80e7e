"""The Condensa study: schemes by densities, accuracy by L-C step, and the GPU's memory and utilization over time.

After a thesis that compresses with Condensa for the NIH's malaria cells (two classes, 32 x 32) and chest X-rays
(several labels, 64 x 64, split by patient, classes weighted), both with a ResNet-18. Its results for the X-rays:

    scheme           density  accuracy        class (density 0.1)   accuracy   class               accuracy
    Prune              0.1     0.27           Atelectasis             0.84     Hernia                0.90
    Prune              0.5     0.26           Cardiomegaly            0.96     Infiltration          0.83
    PruneQuantize16    0.1     0.39           Consolidation           0.92     Mass                  0.95
    PruneQuantize16    0.5     0.48           Edema                   0.97     Nodule                0.90
    PruneQuantize32    0.1     0.36           Effusion                0.85     Pleural thickening    0.97
    PruneQuantize32    0.5     0.32           Emphysema               0.97     Pneumonia             0.97
                                              Fibrosis                0.98     Pneumothorax          0.96

Here PruneQuantize32 is Prune: weights are stored in 32 bits anyway. In the thesis, lower densities left more
memory free; the accuracy fell and recovered over the L-C steps, less regularly at lower densities. Without a GPU,
memory and utilization are n/a, and the figure says so.

Run it with:  python examples/studies/condensa.py --data cells/ --augment cells
         or:  python examples/studies/condensa.py --data chest.csv --label Edema --label Hernia ... \\
                  --group patient --image-size 64 --augment xray --balance weights
"""

from collections.abc import Sequence

import common

import autocompress as ac
from autocompress.recovery import make_recovery
from autocompress.sweeping import load_model
from autocompress.verdict.scores import decisions

SCHEMES = ["Prune", "PruneQuantize16", "FilterPrune", "StructPrune", "StructPruneQuantize16", "Quantize16"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.make_parser(__doc__, image_size="32", train_epochs=20, epochs=45)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--schemes", type=common.names, default=SCHEMES)
    parser.add_argument("--densities", type=common.numbers, default=[0.5, 0.1])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--augment", action="append", default=[], help="cells or xray, see autocompress tune")
    parser.add_argument("--balance", default="none", help="weights, for classes that are not as frequent")
    args = parser.parse_args(argv)

    task = common.make_task(args, args.model, augment=tuple(args.augment), balance=args.balance)
    found = ac.sweep(
        task,
        args.schemes,
        args.densities,
        repeats=args.repeats,
        recovery=make_recovery("lc", c_steps=45, mu_growth=1.07, score_steps=True, epochs=args.epochs),
        device=args.device,
        out=args.out,
        progress=common.SAY,
    )
    header, rows = found.to_rows()
    common.print_table(f"{args.model} on {found.task}, measured on {found.device}", header, rows)

    trials = found.trials
    sparsest = trials.iloc[trials["density"].argmin()]
    seen = task.evaluate(load_model(found, int(sparsest["number"]), task), task.test)
    right = decisions(seen.targets, seen.outputs) == seen.targets
    of_class = right.T if right.ndim == 2 else [right[seen.targets == k] for k in range(len(task.classes))]
    rows = [(name, float(answers.mean())) for name, answers in zip(task.classes, of_class, strict=True)]
    title = f"Accuracy of each class, {sparsest['scheme']} at density {sparsest['density']:.3g}"
    common.print_table(title, ("class", "accuracy"), rows)
    common.SAY(f"figure: {found.folder / 'figures' / 'sweep.svg'}")


if __name__ == "__main__":
    main()
