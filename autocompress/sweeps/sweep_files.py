"""The files of a sweep: its tables, and one figure of scores by density, arithmetic and L-C step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from autocompress.showing.comparison import as_count
from autocompress.showing.drawing import DENSE, FAINT, WIDTH_IN, density_ticks, make_axes, style, write_figure
from autocompress.sweeps.sweep_result import DENSE as DENSE_MODEL
from autocompress.sweeps.sweep_result import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw: TypeAlias = "Callable[[Axes], None]"

# After Okabe and Ito, so that colour-blind readers can tell them apart.
COLOURS = ("#148f86", "#d55e00", "#56789f", "#cc79a7", "#b58900", "#5e4fa2", "#7a9a01", "#8c564b")
MARKERS = "osD^vPX*"
PANEL_IN = 2.9
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))


def write_sweep(sweep: Sweep) -> tuple[Path, ...]:
    """Writes ``sweep.csv``, ``sweep.md`` and ``figures/`` into the sweep's folder."""
    table, text = sweep.folder / "sweep.csv", sweep.folder / "sweep.md"
    sweep.trials.to_csv(table, index=False)
    text.write_text(sweep.to_markdown(), encoding="utf-8")
    return table, text, draw_sweep(sweep)


def draw_sweep(sweep: Sweep) -> Path:
    """Writes ``figures/sweep.svg`` and ``.png`` into the sweep's folder; returns the folder of figures."""
    folder = sweep.folder / "figures"
    folder.mkdir(exist_ok=True)
    with style(sweep.folder.parent):
        panels = list(_panels(sweep))
        rows = math.ceil(len(panels) / 2)
        legend = math.ceil(len(_schemes(sweep)) / 2)
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


def _panels(sweep: Sweep) -> Iterator[Draw]:
    for name in sweep.metrics:
        yield lambda ax, name=name: _score(ax, sweep, name, "density_asked")  # type: ignore[misc]  # of a lambda
    yield lambda ax: _score(ax, sweep, sweep.metric, "macs")
    if not any(cell["curves"].get("lc_score") for cell in sweep.cells):
        return
    yield lambda ax: _steps(ax, sweep)
    if any(value is not None for cell in sweep.cells for at in cell["timeline"] for value in at[1:]):
        yield lambda ax: _timeline(ax, sweep, 1, "free GPU memory [GB]", 1e-9)
        yield lambda ax: _timeline(ax, sweep, 2, "GPU utilization [%]", 1.0)
    else:
        yield lambda ax: _in_words(ax, f"GPU memory and utilization: n/a\n(measured on {sweep.device}, no GPU)")


def _schemes(sweep: Sweep) -> dict[str, str]:
    """The schemes with their colours."""
    names = dict.fromkeys(cell["row"]["scheme"] for cell in sweep.cells if cell["row"]["scheme"] != DENSE_MODEL)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _score(ax: "Axes", sweep: Sweep, metric: str, against: str) -> None:
    """A metric on test against density or arithmetic: the mean over repeats, and their deviation."""
    table = sweep.table
    dense = table.iloc[0]
    ax.axhline(dense[metric], color=DENSE, lw=1.5, ls="--", label=f"dense, {dense[metric]:.4g}")
    for i, (scheme, colour) in enumerate(_schemes(sweep).items()):
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


def _dashes(sweep: Sweep) -> dict[float, Any]:
    """The line style of each density, highest density first."""
    densities = sorted({cell["row"]["density_asked"] for cell in sweep.cells[1:]}, reverse=True)
    return {density: DASHES[i % len(DASHES)] for i, density in enumerate(densities)}


def _lines(sweep: Sweep) -> Iterable[tuple[Mapping[str, Any], dict[str, Any]]]:
    """The first run of each scheme and density, with its colour (the scheme's) and line style (the density's)."""
    schemes, dashes = _schemes(sweep), _dashes(sweep)
    for cell in sweep.cells[1:]:
        row = cell["row"]
        if row["repeat"] == 1:
            yield cell, {"color": schemes[row["scheme"]], "ls": dashes[row["density_asked"]], "lw": 1.2}


def _steps(ax: "Axes", sweep: Sweep) -> None:
    """The metric on val after each L-C step."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    for cell, line in _lines(sweep):
        scores: Sequence[float] = cell["curves"].get("lc_score", ())
        has_one_step = len(scores) == 1  # w and θ agreed at once, and a line needs two points
        marker: dict[str, Any] = {"marker": "o", "ms": 4} if has_one_step else {}
        ax.plot(range(1, len(scores) + 1), scores, **line, **marker)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="L-C step", ylabel=f"{sweep.metric.replace('_', ' ')} on val")
    ax.grid()
    handles = [Line2D([], [], color=DENSE, ls=dashes, label=f"{d:g}") for d, dashes in _dashes(sweep).items()]
    ax.legend(handles=handles, title="density", fontsize=8, title_fontsize=8)


def _timeline(ax: "Axes", sweep: Sweep, column: int, label: str, scale: float) -> None:
    """A column of the GPU's timeline while trials ran; words if the driver does not report it."""
    drawn = False
    for cell, line in _lines(sweep):
        points = [(sample[0], scale * sample[column]) for sample in cell["timeline"] if sample[column] is not None]
        if points:
            drawn = True
            ax.plot(*zip(*points, strict=True), **line)
    if not drawn:
        _in_words(ax, f"{label}: n/a")
        return
    ax.set(xlabel="seconds since the trial began", ylabel=label)
    ax.grid()


def _in_words(ax: "Axes", words: str) -> None:
    """Draws a panel with words instead of data."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, words, ha="center", va="center", color=FAINT, transform=ax.transAxes)
