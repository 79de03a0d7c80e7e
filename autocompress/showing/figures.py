"""Draws the figures of a study's report, as SVG and PNG files and as SVG for use in HTML."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress import progress
from autocompress.disk.record import Record
from autocompress.showing.comparison import RUNTIMES, in_unit, timed, timed_together
from autocompress.showing.drawing import (
    BOUND,
    COMPRESSED,
    DENSE,
    FAINT,
    INK,
    density_ticks,
    make_axes,
    style,
    write_figure,
)

if TYPE_CHECKING:  # matplotlib takes half a second to import; `draw` does it
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

MOST_FIGURES = 7
MANY_LAYERS = 30  # more are drawn as an area, not as bars with names
MANY_CLASSES = 24  # at most so many are shown, or named
MANY_CURVES = 6  # at most so many are shown
MAX_MEDIANS = 2.5  # where the axis of latencies ends, in multiples of the largest median


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: The name of its file without the extension.
        title: Its title.
        description: Its content in words, also for screen readers.
        svg: The drawing for use in HTML, in the page's text colour and font.
    """

    name: str
    title: str
    description: str
    svg: str


def draw(record: Record, folder: Path) -> list[Figure]:
    """Draws all figures for which the study has data, and writes each as SVG and PNG.

    Args:
        record: The study.
        folder: The folder to write to; created if it does not exist.
    """
    drawn: list[Figure] = []
    folder.mkdir(exist_ok=True)
    with style(record.folder.parent):
        for name, title, description, canvas in _drawings(record):
            svg = write_figure(folder, name, canvas)
            progress.report((len(drawn) + 1) / MOST_FIGURES)
            drawn.append(Figure(name, title, description, _inline(svg, name, title, description)))
    return drawn


def _drawings(record: Record) -> Iterator[tuple[str, str, str, "Canvas"]]:
    """Name, title, description and drawing of each figure."""
    found = record.found or {}
    if record.trials:
        yield _drop_curve(record)
    if found.get("front"):
        yield _front(record, found)
    measured = found.get("measurements", {})
    if "compressed" in measured and timed_together(measured):
        yield _latency(measured)
    if found.get("layers"):
        yield _layers(found["layers"])
    if any(of_class["support"] for of_class in found.get("classes") or ()):
        yield _classes(found["classes"])
    if found.get("confusion"):
        confusion = found["confusion"]
        several = isinstance(confusion["dense"][0][0], list)  # a matrix for each label
        yield (_labels if several else _confusion)(confusion, found.get("classes") or [])
    if record.answer is not None and _curves(record.answer):
        yield _recovery(record.answer)


def _drop_curve(record: Record) -> tuple[str, str, str, "Canvas"]:
    """The drop of each trial, and the posterior of the curve, against density."""
    canvas, ax = make_axes(3.5)
    bound = 100 * float(record.asked.get("max_drop", 0.0))
    trials, answer = record.trials, record.answer
    drops = [100 * trial["drop"] for trial in trials]
    top = max(min(max(drops), 6 * bound + 2), 2 * bound, 1.0) * 1.1
    if belief := (record.found or {}).get("posterior"):
        band = f"believed drop, {100 * belief['mass']:.0f}% of probability"
        ax.fill_between(
            belief["density"], belief["low_pp"], belief["high_pp"], color=DENSE, alpha=0.25, lw=0, label=band
        )
        ax.plot(belief["density"], belief["drop_pp"], color=DENSE, lw=1.5)
    ax.axhline(bound, color=BOUND, lw=1.5, ls="--", label=f"bound, {bound:g}{record.unit}")
    _trials(ax, record, top)
    if answer is not None:
        at = answer["density"], 100 * answer["drop"]
        ax.plot(*at, "o", ms=13, mfc="none", mec=INK, mew=1.5, label="the answer")
    low = min(0.0, *drops)
    ax.set(xscale="log", xlabel="density (share of the parameters kept)", ylim=(1.2 * low - 0.05 * top, top))
    ax.set_ylabel(f"drop on validation data [{record.unit.strip()}]")
    density_ticks(ax)
    ax.grid()
    canvas.legend(loc="outside upper left", ncols=2, fontsize=9)
    within = sum(bool(trial["feasible"]) for trial in trials)
    n = f"{len(trials)} trial{'s' * (len(trials) != 1)}"
    outcome = f"{n}, {within} of them within the bound of {bound:g}{record.unit}"
    if answer is not None:
        drop = f"{100 * answer['drop']:.2f}{record.unit}"
        outcome += f"; the answer has density {answer['density']:.3g} and drops {drop}"
    return (
        "drop",
        "Accuracy lost against size kept",
        f"Drop on validation data against density: {outcome}.",
        canvas,
    )


def _trials(ax: "Axes", record: Record, top: float) -> None:
    """Draws the trials with their standard errors; those with a drop above ``top``, in points, at that height."""
    drops = [100 * trial["drop"] for trial in record.trials]
    kinds = (
        ("yes", "o", "trial within the bound"),
        ("no", "x", "trial beyond it"),
        ("rejected", "1", "given up early"),
    )
    for kind, marker, label in kinds:
        pairs = zip(record.trials, drops, strict=True)
        shown = [(trial, drop) for trial, drop in pairs if _standing(trial) == kind and drop <= top]
        if shown:
            ax.errorbar(
                [trial["density"] for trial, _ in shown],
                [drop for _, drop in shown],
                [100 * (trial.get("drop_se") or 0.0) for trial, _ in shown],
                fmt=marker,
                color=COMPRESSED if kind == "yes" else BOUND,
                ms=6,
                elinewidth=0.7,
                label=label,
            )
    beyond = [trial["density"] for trial, drop in zip(record.trials, drops, strict=True) if drop > top]
    if beyond:
        label = f"more than {top:.0f}{record.unit}"
        ax.plot(beyond, [0.98 * top] * len(beyond), "^", color=BOUND, ms=6, label=label)


def _front(record: Record, found: Mapping[str, Any]) -> tuple[str, str, str, "Canvas"]:
    """The first two objectives of each trial, and the Pareto front of the feasible ones."""
    canvas, ax = make_axes(3.5)
    first, second = found["objectives"][:2]
    kinds = (("yes", "o", "trial within the bound"), ("no", "x", "trial beyond it"), ("rejected", "1", "given up"))
    for kind, marker, label in kinds:
        values = [trial["values"][:2] for trial in record.trials if _standing(trial) == kind]
        if values:
            colour = COMPRESSED if kind == "yes" else BOUND
            ax.plot(*zip(*values, strict=True), marker, color=colour, ms=6, label=label)
    points = [(trial["values"][first["name"]], trial["values"][second["name"]]) for trial in found["front"]]
    ax.plot(*zip(*sorted(points), strict=True), color=COMPRESSED, lw=1.2, alpha=0.6, label="the front")
    if record.answer is not None:
        ax.plot(*record.answer["values"][:2], "o", ms=13, mfc="none", mec=INK, mew=1.5, label="the answer")
    labels = [f"{axis['name']} [{axis['unit']}]" if axis["unit"] else axis["name"] for axis in (first, second)]
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.grid()
    canvas.legend(loc="outside upper left", ncols=2, fontsize=9)

    def in_words(trial: Mapping[str, Any]) -> str:
        values = [f"{a['name']} {in_unit(trial['values'][a['name']], a['unit'])}" for a in (first, second)]
        return f"trial {trial['number']} with {' and '.join(values)}"

    trials = "; ".join(map(in_words, found["front"]))
    title = f"{first['name']} against {second['name']}".capitalize()
    return "front", title, f"Within the bound and beaten by no other in both: {trials}.", canvas


def _standing(trial: Mapping[str, Any]) -> str:
    """`autocompress.trial.TrialResult.standing` of a stored trial."""
    if trial.get("given_up_at") is not None:
        return "rejected"
    return "yes" if trial["feasible"] else "no"


def _latency(measured: Mapping[str, Any]) -> tuple[str, str, str, "Canvas"]:
    """Median and 95th percentile of one forward pass, a panel for each batch size."""
    pairs = [(before, after) for _, before, after in timed(measured) if before and after]
    canvas, axes = make_axes(0.5 + 0.95 * len(pairs), rows=len(pairs))
    panels = axes if len(pairs) > 1 else [axes]
    sentences = []
    for ax, pair in zip(panels, pairs, strict=True):
        # On a busy machine the 95th percentile is far away; an arrow points to it, so that the medians stay
        # visible.
        limit = min(max(at["p95_ms"] for at in pair), MAX_MEDIANS * max(at["p50_ms"] for at in pair))
        for y, (latency, colour) in enumerate(zip(pair, (DENSE, COMPRESSED), strict=True)):
            median, p95 = latency["p50_ms"], latency["p95_ms"]
            ax.barh(y, median, color=colour, height=0.7)
            end, mark = (limit, ">") if p95 > limit else (p95, "|")
            ax.plot([median, end], [y, y], color=INK, lw=1.2, marker=mark, ms=6, markevery=[1], clip_on=False)
        ax.set(yticks=(0, 1), yticklabels=("dense", "compressed"), ylim=(1.6, -0.6), xlim=(0, limit))
        where = f"{RUNTIMES[pair[0].get('runtime', 'eager')]}, batch of {pair[0]['batch']}"
        ax.set_title(where, loc="left")
        ax.locator_params(axis="x", nbins=6)  # small times have long labels
        ax.grid(axis="x")
        medians = " and ".join(f"{at['p50_ms']:.3g}" for at in pair)
        sentences.append(f"{where}: {medians} ms")
    panels[-1].set_xlabel("ms a forward pass; the line: to the 95th percentile")
    device = measured["compressed"]["device"]
    description = f"Median latency on {device}, dense and compressed. {'; '.join(sentences)}."
    return "latency", f"Time of a forward pass on {device}", description, canvas


def _layers(layers: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, "Canvas"]:
    """The width of each layer, dense and compressed; its parameters if no width has changed."""
    by_width = any(layer["width"] != layer["dense_width"] for layer in layers)
    before, after, what = (
        ("dense_width", "width", "channels or neurons") if by_width else ("dense_params", "params", "parameters")
    )
    old = [layer[before] for layer in layers]
    new = [layer[after] or 0 for layer in layers]
    if len(layers) > MANY_LAYERS:
        canvas, ax = make_axes(3.2)
        x = range(1, len(layers) + 1)
        ax.fill_between(x, old, step="mid", color=DENSE, alpha=0.35, lw=0, label="dense")
        ax.fill_between(x, new, step="mid", color=COMPRESSED, alpha=0.9, lw=0, label="compressed")
        ax.set(xlabel="layer, from input to output", ylabel=what, xlim=(1, len(layers)), ylim=(0, None))
    else:
        canvas, ax = make_axes(0.9 + 0.24 * len(layers))
        ax.barh(range(len(layers)), old, color=DENSE, alpha=0.35, height=0.8, label="dense")
        ax.barh(range(len(layers)), new, color=COMPRESSED, height=0.8, label="compressed")
        names = [_shortened(layer["name"]) for layer in layers]
        ax.set(yticks=range(len(layers)), yticklabels=names, ylim=(len(layers) - 0.4, -0.6), xlabel=what)
        for y, (a, b) in enumerate(zip(old, new, strict=True)):
            ax.text(a, y, f" {b} of {a}", va="center", fontsize=8)
        ax.set_xlim(0, 1.18 * max(old))
        ax.grid(axis="x")
    canvas.legend(loc="outside upper left", ncols=2, fontsize=9)
    least = min(layers, key=lambda layer: (layer[after] or 0) / max(1, layer[before]))
    description = (
        f"{what.capitalize()} of {len(layers)} layers before and after: {sum(old):,} and {sum(new):,} in all; "
        f"least is left of {least['name']}, {least[after] or 0:,} of {least[before]:,}."
    )
    return "layers", f"What is left of each layer: {what}", description, canvas


def _classes(classes: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, "Canvas"]:
    """The recall of each class, dense and compressed, the largest losses first."""
    known = [of_class for of_class in classes if of_class["support"]]  # others have no recall
    shown = sorted(known, key=lambda of_class: of_class["recall"] - of_class["dense_recall"])[:MANY_CLASSES]
    canvas, ax = make_axes(0.9 + 0.24 * len(shown))
    before, after = ([100 * of_class[key] for of_class in shown] for key in ("dense_recall", "recall"))
    ax.hlines(range(len(shown)), before, after, color=FAINT, lw=2)
    ax.plot(before, range(len(shown)), "o", color=DENSE, ms=7, label="dense")
    ax.plot(after, range(len(shown)), "o", color=COMPRESSED, ms=5, label="compressed")
    names = [f"{_beginning(str(of_class['name']))} (n={of_class['support']})" for of_class in shown]
    ax.set(yticks=range(len(shown)), yticklabels=names, ylim=(len(shown) - 0.4, -0.6))
    ax.set_xlabel("share of the class that is found on test [%]")
    ax.grid(axis="x")
    canvas.legend(loc="outside upper left", ncols=2, fontsize=9)
    title = "Each class, what is found of it"
    if len(classes) > len(shown):
        title += f": the {len(shown)} that lost most of {len(classes)}"
    worst = shown[0]
    description = (
        f"Recall of each class on test. The class that lost most is {worst['name']}: "
        f"{100 * worst['dense_recall']:.1f}% before, {100 * worst['recall']:.1f}% after."
    )
    return "classes", title, description, canvas


def _confusion(
    confusion: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[Mapping[str, Any]]
) -> tuple[str, str, str, "Canvas"]:
    """The confusion matrices of the dense and of the compressed model."""
    import numpy as np

    n = len(confusion["dense"])
    names = _short_names(classes, n)
    canvas, panels = make_axes(3.1, columns=2)
    wrong = {}
    for ax, (who, counts) in zip(panels, confusion.items(), strict=True):
        matrix = np.asarray(counts, dtype=float)
        share = matrix / np.maximum(1.0, matrix.sum(axis=1, keepdims=True))
        ax.imshow(_shaded(share), interpolation="nearest")
        wrong[who] = int(matrix.sum() - np.trace(matrix))
        ax.set_title(f"{who}: {wrong[who]} mistakes")
        if n <= MANY_CLASSES:
            ax.set(xticks=range(n), yticks=range(n))
            ax.set_xticklabels(names, fontsize=7, rotation=90 if max(map(len, names)) > 2 else 0)
            ax.set_yticklabels(names, fontsize=7)
        if n <= 12:
            for i, j in zip(*np.nonzero(matrix), strict=True):
                ax.text(j, i, f"{counts[i][j]}", ha="center", va="center", fontsize=7)
        ax.set_xlabel("predicted")
        ax.spines[:].set_visible(True)
    panels[0].set_ylabel("true class")
    description = (
        f"Confusion matrices of the test data, {n} classes: the dense model makes {wrong['dense']} mistakes, "
        f"the compressed one {wrong['compressed']}."
    )
    return "confusion", "What is taken for what, on test", description, canvas


def _labels(confusion: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, "Canvas"]:
    """How often each of several labels is right and wrong, with the dense and with the compressed model."""
    import numpy as np

    n = len(confusion["dense"])
    names = _short_names(classes, n)
    canvas, panels = make_axes(min(8.0, 2.0 + 0.3 * n), columns=2)
    wrong = {}
    for ax, (who, counts) in zip(panels, confusion.items(), strict=True):
        by_truth = np.asarray(counts, dtype=float)[:, ::-1, ::-1]  # of each label: those that have it come first
        share = by_truth / np.maximum(1.0, by_truth.sum(axis=2, keepdims=True))
        ax.imshow(_shaded(share.reshape(n, 4)), interpolation="nearest", aspect="auto")
        wrong[who] = int(by_truth[:, 0, 1].sum() + by_truth[:, 1, 0].sum())
        ax.set_title(f"{who}: {wrong[who]} mistakes")
        ax.set(xticks=range(4))
        ax.set_xticklabels(("found", "missed", "false\nalarm", "rightly\nabsent"), fontsize=7)
        if n <= MANY_CLASSES:
            ax.set(yticks=range(n))
            ax.set_yticklabels(names, fontsize=7)
        if n <= 12:
            for i, row in enumerate(by_truth.reshape(n, 4)):
                for j, count in enumerate(row):
                    ax.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=7)
        ax.spines[:].set_visible(True)
    panels[0].set_ylabel("label")
    description = (
        f"How often each of {n} labels is found, missed, given wrongly and rightly absent: on test the dense "
        f"model makes {wrong['dense']} mistakes, the compressed one {wrong['compressed']}."
    )
    return "confusion", "What is found and what is missed, on test", description, canvas


def _short_names(classes: Sequence[Mapping[str, Any]], n: int) -> list[str]:
    """The names of ``n`` classes for a small axis; their numbers if not all have names."""
    names = [_beginning(str(of_class["name"]), 10) for of_class in classes]
    return names if len(names) == n else list(map(str, range(n)))


def _shaded(share: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """An image of shares, shape ``(rows, columns, 4)``: the larger, the more opaque."""
    import numpy as np

    image = np.empty((*share.shape, 4))
    image[..., :3] = [int(COMPRESSED[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    image[..., 3] = 0.9 * np.sqrt(share)  # the root makes few mistakes visible
    return image


def _recovery(answer: Mapping[str, Any]) -> tuple[str, str, str, "Canvas"]:
    """The logs of the recovery in the answer's trial, a panel for each curve."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    curves = _curves(answer)
    canvas, axes = make_axes(0.4 + 1.25 * len(curves), rows=len(curves))
    panels = axes if len(curves) > 1 else [axes]
    for ax, (name, values) in zip(panels, curves.items(), strict=True):
        ax.plot(range(1, len(values) + 1), values, color=COMPRESSED, lw=1.6, marker="o", ms=3)
        positive = [value for value in values if value > 0]
        if len(positive) == len(values) and max(values) > 50 * min(values):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(name.removeprefix("lc_").replace("_", " "), loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid()
        if ax is not panels[-1]:
            ax.set_xticklabels([])
    panels[-1].set_xlabel("C step")
    spans = [f"{name.removeprefix('lc_')} from {v[0]:.3g} to {v[-1]:.3g}" for name, v in curves.items()]
    description = f"Recovery of trial {answer['number']}, by C step: {'; '.join(spans)}."
    return "recovery", f"Recovery of the answer, trial {answer['number']}", description, canvas


def _curves(trial: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """The curves of a trial that have more than one point."""
    curves = [(name, values) for name, values in trial.get("curves", {}).items() if len(values) > 1]
    return dict(curves[:MANY_CURVES])


def _shortened(name: str, length: int = 22) -> str:
    """The end of a layer's long name, which tells more than its beginning."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _beginning(name: str, length: int = 22) -> str:
    """The beginning of a class's long name."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """The drawing for use in HTML: with a title and unique ids, in the page's text colour and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"(font: [0-9.]+px) [^;\"]*", r"\1 var(--font)", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version|xmlns)="[^"]*"| xmlns:xlink="[^"]*"', "", head)
    head += f' role="img" aria-labelledby="{name}-title {name}-desc"'
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return f"{head}>{words}{rest.replace('xlink:href', 'href')}"
