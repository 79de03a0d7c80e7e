"""The files of a sweep: its tables, and one figure of scores by density, arithmetic and L-C step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from autocompress.comparison import as_count
from autocompress.drawing import DENSE, FAINT, WIDTH_IN, density_ticks, make_axes, style, write_figure
from autocompress.sweep_result import DENSE as DENSE_MODEL
from autocompress.sweep_result import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw: TypeAlias = "Callable[[Axes], None]"

# Okabe and Ito's colours, which those who see few colours tell apart, too.
COLOURS = ("#148f86", "#d55e00", "#56789f", "#cc79a7", "#b58900", "#5e4fa2", "#7a9a01", "#8c564b")
MARKERS = "osD^vPX*"
PANEL_IN = 2.9
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")


def write_sweep(found: Sweep) -> tuple[Path, ...]:
    """Writes ``sweep.csv``, ``sweep.md`` and ``figures/`` into the sweep's folder."""
    table, text = found.folder / "sweep.csv", found.folder / "sweep.md"
    found.trials.to_csv(table, index=False)
    text.write_text(found.to_markdown(), encoding="utf-8")
    return table, text, draw_sweep(found)


def draw_sweep(found: Sweep) -> Path:
    """Writes ``figures/sweep.svg`` and ``.png`` into the sweep's folder; returns the folder of figures."""
    folder = found.folder / "figures"
    folder.mkdir(exist_ok=True)
    with style(found.folder.parent):
        panels = list(_panels(found))
        rows = math.ceil(len(panels) / 2)
        legend = math.ceil(len(_schemes(found)) / 2)
        height = PANEL_IN * rows + 0.22 * legend + 0.3
        canvas, axes = make_axes(height, rows, 2, width_in=2 * WIDTH_IN)
        for ax, panel in zip(axes.flat, panels, strict=False):
            panel(ax)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=9)
        write_figure(folder, "sweep", canvas)
    return folder


def _panels(found: Sweep) -> Iterator[Draw]:
    for name in found.metrics:
        yield lambda ax, name=name: _score(ax, found, name, "density_asked")  # type: ignore[misc]  # of a lambda
    yield lambda ax: _score(ax, found, found.metric, "macs")
    if not any(cell["curves"].get("lc_score") for cell in found.cells):
        return
    yield lambda ax: _steps(ax, found)
    yield lambda ax: _timeline(ax, found, 1, "free GPU memory [GB]", 1e-9)
    yield lambda ax: _timeline(ax, found, 2, "GPU utilization [%]", 1.0)


def _schemes(found: Sweep) -> dict[str, str]:
    """The schemes with their colours."""
    names = dict.fromkeys(cell["row"]["scheme"] for cell in found.cells if cell["row"]["scheme"] != DENSE_MODEL)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _score(ax: "Axes", found: Sweep, metric: str, against: str) -> None:
    """A metric on test against density or arithmetic: the mean over repeats, and their deviation."""
    table = found.table
    dense = table.iloc[0]
    ax.axhline(dense[metric], color=DENSE, lw=1.5, ls="--", label=f"dense, {dense[metric]:.4g}")
    for i, (scheme, colour) in enumerate(_schemes(found).items()):
        of_scheme = table[table["scheme"] == scheme].sort_values(against)
        spread = of_scheme[f"{metric}_sd"] if f"{metric}_sd" in table else None
        ax.errorbar(
            of_scheme[against],
            of_scheme[metric],
            spread,
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            ms=5,
            lw=1.5,
            elinewidth=0.8,
            capsize=2,
            label=scheme,
        )
    ax.set(xscale="log", ylabel=f"{metric.replace('_', ' ')} on test")
    if against == "macs":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_xlabel("multiply-accumulates of one sample")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: as_count(x)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlabel("density (share of the parameters kept)")
        density_ticks(ax)
    ax.grid()


def _lines(found: Sweep) -> Iterable[tuple[Mapping[str, Any], str, Any, str]]:
    """The first run of each scheme and density, with its colour, its dashes and what to call it."""
    schemes = _schemes(found)
    densities = sorted({cell["row"]["density_asked"] for cell in found.cells[1:]}, reverse=True)
    for cell in found.cells[1:]:
        row = cell["row"]
        if row["repeat"] == 1:
            dashes = DASHES[densities.index(row["density_asked"]) % len(DASHES)]
            yield cell, schemes[row["scheme"]], dashes, f"{row['density_asked']:g}"


def _steps(ax: "Axes", found: Sweep) -> None:
    """The metric on val after each L-C step."""
    from matplotlib.ticker import MaxNLocator

    for cell, colour, dashes, density in _lines(found):
        scores: Sequence[float] = cell["curves"].get("lc_score", ())
        if scores:
            ax.plot(range(1, len(scores) + 1), scores, color=colour, ls=dashes, lw=1.2)
            ax.annotate(density, (len(scores), scores[-1]), fontsize=7, color=colour, xytext=(3, -2), **_BESIDE)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="L-C step (at the end: the density)", ylabel=f"{found.metric.replace('_', ' ')} on val")
    ax.grid()


_BESIDE: Any = {"textcoords": "offset points"}  # matplotlib's own types know no such keyword in a dictionary


def _timeline(ax: "Axes", found: Sweep, column: int, label: str, scale: float) -> None:
    """What the driver said of the GPU while a trial ran; in words where there was none."""
    drawn = False
    for cell, colour, dashes, _ in _lines(found):
        seen = [(at[0], scale * at[column]) for at in cell["timeline"] if at[column] is not None]
        if seen:
            drawn = True
            ax.plot(*zip(*seen, strict=True), color=colour, ls=dashes, lw=1.2)
    ax.set(xlabel="seconds since the trial began", ylabel=label)
    ax.grid()
    if not drawn:
        ax.set(xticks=(), yticks=())
        words = f"n/a: measured on {found.device}, no GPU"
        ax.text(0.5, 0.5, words, ha="center", va="center", color=FAINT, transform=ax.transAxes)
