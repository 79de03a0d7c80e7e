"""Pruning ratio against accuracy, parameters and multiply-accumulates: a ResNet-18 on photographs of the skin.

After Montanez, "Trade-Offs Between Compression and Accuracy for Skin Disease Classification in Edge Devices"
(2024): channels by Taylor importance over groups, the same share of every layer, then 15 epochs of AdamW at 0.001.
A pruning ratio r removes the share r of the channels. A layer loses input and output channels, so (1 - r)² of the
parameters remain, which is the density to ask for. The paper's table, 900 images in nine classes:

    ratio   accuracy  change   parameters [M]  change   MACs [M]  change
    dense    82.32               11.181                 1821.7
     5%      82.32     0.00      10.066        -1.115   1632.0     -189.7
    10%      81.77    -0.55       9.025        -2.156   1474.1     -347.6
    20%      82.87    +0.55       7.128        -4.053   1178.4     -643.3
    30%      79.01    -3.31       5.465        -5.716    905.4     -916.3
    40%      79.56    -2.76       4.014        -7.167    677.2    -1144.5
    50%      79.56    -2.76       2.801        -8.380    486.9    -1334.7
    60%      72.38    -9.94       1.779        -9.402    315.4    -1506.3
    70%      74.03    -8.29       0.999       -10.182    187.3    -1634.3

Run it with:  python examples/studies/pruning_ratio.py --data skin/
where skin/ holds a folder of images for each class, or train/, val/ and test/ with such folders.
"""

from collections.abc import Sequence

import common

import autocompress as ac
from autocompress.recovery import make_recovery


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.make_parser(__doc__, image_size="224", batch_size=12, train_epochs=15, epochs=15)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--ratios", type=common.numbers, default=[5, *range(10, 71, 10)], help="in percent")
    args = parser.parse_args(argv)

    found = ac.sweep(
        common.make_task(args, args.model, augment=("skin",)),
        "StructPrune(criterion=taylor, spread=uniform)",
        [(1 - ratio / 100) ** 2 for ratio in args.ratios],
        recovery=make_recovery("finetune", optimizer="adamw", lr=1e-3, distill=0.0, epochs=args.epochs),
        device=args.device,
        out=args.out,
        progress=common.SAY,
    )
    table, ratios = found.table, [0.0, *args.ratios]
    dense, rows = table.iloc[0], []
    for ratio, (_, at) in zip(ratios, table.iterrows(), strict=True):
        accuracy, params, macs = 100 * at["accuracy"], at["params"] / 1e6, at["macs"] / 1e6
        changes = 100 * at["change"], params - dense["params"] / 1e6, macs - dense["macs"] / 1e6
        said = [f"{accuracy:.2f}", f"{changes[0]:+.2f}", f"{params:.3f}", f"{changes[1]:+.3f}", f"{macs:.1f}"]
        rows.append([f"{ratio:g}%" if ratio else "dense", *said, f"{changes[2]:+.1f}"])
    header = ("ratio", "accuracy", "change", "parameters [M]", "change", "MACs [M]", "change")
    common.print_table(f"{args.model} on {found.task}, {found.n_test} test images", header, rows)
    against = {
        "pruning ratio [%]": ratios,
        "parameters [M]": table["params"] / 1e6,
        "MACs [M]": table["macs"] / 1e6,
    }
    scores = 100 * table["accuracy"]
    panels = [
        common.lines(label, "accuracy on test [%]", {args.model: (x, scores)}) for label, x in against.items()
    ]
    common.draw(args.out, "pruning_ratio", panels, columns=3)


if __name__ == "__main__":
    main()
