"""Beta-Rank against L1 and HRank with imbalanced classes: accuracy, stability of the ranking, and Grad-CAM.

After Homayounfar et al., "Beta-Rank: A Robust Convolutional Filter Pruning Method for Imbalanced Medical Image
Analysis" (2023). The same network is pruned by three rankings of its filters and then fine-tuned, three times.
Part of the paper's table, mean and standard deviation in percent, ResNet-56:

    data   FLOPs  ranking    accuracy      precision     recall        specificity
    ISIC          dense      73.33         66.5          63.2          85.5
           -24%   L1         69.56 ± 4.91  62.07 ± 1.55  56.60 ± 4.16  81.13 ± 3.59
                  HRank      59.56 ± 3.01  44.57 ± 7.70  46.97 ± 3.31  72.93 ± 1.43
                  Beta-Rank  73.56 ± 1.68  69.53 ± 2.32  64.70 ± 1.35  84.00 ± 0.98
    IDRiD         dense      82.52         55.4          61.3          89.5
           -46%   L1         75.08 ± 1.12  57.53 ± 2.90  62.60 ± 2.71  84.80 ± 0.72
                  HRank      70.87 ± 0.97  54.80 ± 2.35  58.10 ± 2.69  82.10 ± 0.93
                  Beta-Rank  80.58 ± 1.68  61.37 ± 7.51  65.60 ± 6.12  88.27 ± 1.14

Stability: the top and the least 25% of each layer's filters are chosen by three random batches; the share of
different filters among the choices is 1/3 at best, when all three agree, and 1 at worst.

Run it with:  python examples/studies/beta_rank.py --data isic/
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import autocompress as ac
from autocompress.recovery import make_recovery
from autocompress.scheme import Evidence, parse_scheme
from autocompress.schemes.importance import channel_scores
from autocompress.sweeping import load_model
from autocompress.sweeps.sweep_result import Sweep
from autocompress.task import evaluating

RANKINGS = {"L1": "l1", "HRank": "hrank", "Beta-Rank": "beta_rank"}


def resnet(depth: int = 56, classes: int = 10) -> nn.Module:
    """The ResNet of depth 6n + 2 for small images: 16, 32 and 64 channels (He et al., CVPR 2016, section 4.2)."""
    blocks: list[nn.Module] = []
    width = 16
    for planes in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stride, shortcut = planes // width, None
            if stride > 1:
                conv = nn.Conv2d(width, planes, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))
            blocks.append(BasicBlock(width, planes, stride, shortcut))
            width = planes
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def instability(task: ac.Task, criterion: str, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Per layer, the share of different filters among those that the batches choose as top and least 25%."""
    scheme = parse_scheme(f"FilterPrune(criterion={criterion})")
    facts = scheme.analyze(task.model, task.example_input)
    rankings = []
    for batch in batches:
        seen = facts
        if hasattr(scheme, "observe"):
            seen = scheme.observe(Evidence(task.model, lambda batch=batch: [batch], task.loss), facts)
        weights = dict(task.model.named_parameters())
        scores = channel_scores(criterion, facts.groups, weights, facts.roles, seen.observed)
        by_layer = scores.detach().split([group.width for group in facts.groups])
        rankings.append([of_layer.argsort() for of_layer in by_layer])
    found: dict[str, list[float]] = {"top": [], "least": []}
    for layer in zip(*rankings, strict=True):
        n = max(1, len(layer[0]) // 4)
        for which, part in (("top", slice(-n, None)), ("least", slice(n))):
            chosen = {int(filter_) for ranking in layer for filter_ in ranking[part]}
            found[which].append(len(chosen) / (n * len(layer)))
    return found


def grad_cam(model: nn.Module, x: Tensor, label: int) -> tuple[Tensor, float]:
    """Where the model looks for ``label`` in an image ``(channels, height, width)``, and the label's probability.

    Selvaraju et al., "Grad-CAM" (ICCV 2017): the last convolution's maps, weighed by their mean gradients.
    """
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    maps: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with evaluating(model):
        logits = model(x[None].requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, label], maps)
    heat = (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True).relu().detach()
    heat = nn.functional.interpolate(heat, x.shape[1:], mode="bilinear")[0, 0]
    return heat / heat.max().clamp_min(1e-12), float(logits.detach().softmax(1)[0, label])


def grad_cam_panels(found: Sweep, task: ac.Task) -> list:
    """A row for each class: an image of it, and where the dense and the pruned networks look."""
    x, y = (torch.cat(parts) for parts in zip(*task.test.batches(), strict=True))
    first_runs = ("dense", *RANKINGS)  # their numbers are 0 to 3
    models = {name: load_model(found, number, task) for number, name in enumerate(first_runs)}
    panels = []
    for k in y.unique().tolist():
        image = x[y == k][0]
        panels.append(partial(_show, image=image, heat=None, title=f"class {task.classes[k]}"))
        for name, model in models.items():
            heat, p = grad_cam(model, image, k)
            panels.append(partial(_show, image=image, heat=heat, title=f"{name}, P = {p:.2f}"))
    return panels


def _show(ax, image: Tensor, heat: Tensor | None, title: str) -> None:
    ax.imshow(image.mean(0).numpy(), cmap="gray", interpolation="nearest")
    if heat is not None:
        ax.imshow(heat.numpy(), cmap="magma", alpha=0.55, vmin=0, vmax=1)
    ax.set(title=title, xticks=(), yticks=())


def report_stability(args: argparse.Namespace, task: ac.Task) -> None:
    """The table and the figure of the stability of each ranking."""
    batches = list(islice(task.train.batches(torch.Generator().manual_seed(0)), 3))
    found = {name: instability(task, criterion, batches) for name, criterion in RANKINGS.items()}
    rows = [[name, *(float(np.mean(one[which])) for which in ("top", "least"))] for name, one in found.items()]
    header = ("ranking", "top 25%", "least 25%")
    common.print_table("Different filters among the choices of 3 batches", header, rows)
    panels = []
    for which in ("top", "least"):
        curves = {name: (range(len(one[which])), one[which]) for name, one in found.items()}
        panels.append(common.lines("layer", f"share of different filters, {which} 25%", curves))
    common.draw(args.out, "beta_rank-stability", panels)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.make_parser(__doc__, image_size="256", batch_size=16, train_epochs=60, epochs=60)
    parser.add_argument("--model", default=f"{Path(__file__).resolve()}:resnet")
    parser.add_argument("--depth", type=int, default=56, help="of the ResNet, 6n + 2")
    parser.add_argument("--density", type=float, default=0.65, help="share of the parameters that is kept")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)

    factory = {"model_args": (f"depth={args.depth}",), "channels": 3} if ":" in args.model else {}
    task = common.make_task(args, args.model, **factory)
    schemes = [f"FilterPrune(criterion={c}, spread=uniform)" for c in RANKINGS.values()]
    found = ac.sweep(
        task,
        schemes,
        [args.density],
        repeats=args.repeats,
        also=["precision", "sensitivity", "specificity"],
        recovery=make_recovery("finetune", distill=0.0, epochs=args.epochs),
        timing=False,
        device=args.device,
        out=args.out,
        progress=common.SAY,
    )
    rows = []
    for name, (_, at) in zip(("dense", *RANKINGS), found.table.iterrows(), strict=True):
        change = 100 * (at["macs"] / found.table["macs"][0] - 1)
        scores = [
            f"{100 * at[metric]:.2f}" + (f" ± {100 * at[f'{metric}_sd']:.2f}" if at["runs"] > 1 else "")
            for metric in found.metrics
        ]
        rows.append([name, f"{change:+.0f}%", *scores])
    header = ("ranking", "MACs", "accuracy", "precision", "recall", "specificity")
    common.print_table(f"{found.task}, {found.n_test} test images, mean ± sd of {args.repeats} runs", header, rows)
    report_stability(args, task)
    common.draw(args.out, "beta_rank-grad_cam", grad_cam_panels(found, task), columns=2 + len(RANKINGS))


if __name__ == "__main__":
    main()
