"""What the studies share: their arguments, the task that these describe, tables and figures."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import autocompress as ac
from autocompress.showing.drawing import make_axes, style, write_figure

SAY = print  # where progress goes


def make_parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of what all studies take; ``defaults`` are the paper's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as of autocompress tune: .npz, folder of images, .csv, ...")
    parser.add_argument("--label", action="append", default=[], help="a column of labels in a .csv; repeatable")
    parser.add_argument("--group", default="", help="keeps a patient's images in one part, see autocompress tune")
    parser.add_argument("--image-size", help="in pixels")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--train-epochs", type=int, help="of the dense model")
    parser.add_argument("--epochs", type=float, help="of each compressed one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("autocompress-runs"))
    parser.set_defaults(**defaults)
    return parser


def make_task(args: argparse.Namespace, model: str, **options: Any) -> ac.Task:
    """The task that the arguments describe, its dense model trained or taken from the cache."""
    described = {
        "data": args.data,
        "label": tuple(args.label),
        "group": args.group,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "train_epochs": args.train_epochs,
    }
    device = "cpu" if args.device == "auto" else args.device
    return ac.make_task(model=model, out=args.out, device=device, progress=SAY, **(described | options))


def numbers(text: str) -> list[float]:
    """``5,10,20`` as numbers."""
    return [float(one) for one in text.split(",")]


def names(text: str) -> list[str]:
    """``resnet18,vgg16`` as names."""
    return text.split(",")


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints columns as wide as what is in them."""
    lines = [list(header), *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    SAY(f"\n{title}")
    for line in lines:
        SAY("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def draw(out: Path, name: str, panels: Sequence[Callable[[Any], None]], columns: int = 2) -> Path:
    """A figure of panels in ``out/studies/``, as SVG and PNG; each panel is a function of its axes."""
    folder = out / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(panels) // columns)
    with style(out):
        canvas, axes = make_axes(3.2 * rows, rows, columns, width_in=4.2 * columns)
        flat = axes.flat if hasattr(axes, "flat") else [axes]
        for ax, panel in zip(flat, panels, strict=False):
            panel(ax)
        for ax in list(flat)[len(panels) :]:
            ax.set_axis_off()
        write_figure(folder, name, canvas)
    SAY(f"figure: {folder / name}.svg")
    return folder / f"{name}.svg"


def lines(x_label: str, y_label: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], **how: Any):
    """A panel of curves by name, each its x and y; ``how`` goes to the axes."""

    def panel(ax: Any) -> None:
        for name, (x, y) in curves.items():
            ax.plot(x, y, marker="o", ms=4, label=name)
        ax.set(xlabel=x_label, ylabel=y_label, **how)
        ax.grid()
        if len(curves) > 1:
            ax.legend(fontsize=8)

    return panel


def heat_map(title: str, table: Any) -> Callable[[Any], None]:
    """A panel of a table of numbers between 0 and 1, of one network or of two: ``"rows, columns"``."""
    rows, _, columns = title.partition(", ")

    def panel(ax: Any) -> None:
        image = ax.imshow(table.to_numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        ax.set(title=title, xlabel=f"layer, {columns or rows}", ylabel=f"layer, {rows}")
        ax.figure.colorbar(image, ax=ax, label="linear CKA")

    return panel
