"""The style of figures, and writing them as SVG and PNG."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib takes half a second to import; `style` does it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DENSE, COMPRESSED, BOUND = "#8a94a6", "#148f86", "#cf4a5a"  # legible on light and on dark pages
INK, FAINT = "#1f2430", "#8b93a1"
WIDTH_IN = 4.9
PNG_DPI = 160
_STYLE: Any = {  # matplotlib types its keys, all 300 of them
    "text.parse_math": False,  # names of classes may contain dollars
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "svg.hashsalt": "autocompress",  # makes the files of equal figures equal
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",  # the page has its own
    "axes.facecolor": "none",
}


@contextmanager
def style(home: Path) -> Iterator[None]:
    """Gives the figures made in a ``with`` block one style.

    Args:
        home: The folder of all studies, whose cache holds matplotlib's list of fonts.
    """
    # Nothing may be written outside the folder of studies.
    os.environ.setdefault("MPLCONFIGDIR", str(home / "cache" / "matplotlib"))
    logging.getLogger("matplotlib").addFilter(_is_no_advice)
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def _is_no_advice(record: logging.LogRecord) -> bool:
    """False for what matplotlib says of its cache where ``home`` is read-only; MPLCONFIGDIR is set already."""
    return not any(part in record.getMessage() for part in ("mkdir -p failed", "MPLCONFIGDIR"))


def make_axes(
    height_in: float, rows: int = 1, columns: int = 1, *, width_in: float = WIDTH_IN
) -> tuple["Canvas", Any]:
    """An empty figure and its axes: one, or an array if there are several."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width_in, height_in))
    axes = canvas.subplots(rows, columns)
    return canvas, axes


def density_ticks(ax: "Axes") -> None:
    """Labels a logarithmic axis of densities in percent."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    ax.xaxis.set_minor_formatter(NullFormatter())


_PAPER = '<rect width="100%" height="100%" fill="#ffffff"/>'  # a background: a viewer's page may be dark


def write_figure(folder: Path, name: str, canvas: "Canvas") -> str:
    """Writes ``name.svg`` and ``name.png``; returns the SVG without a background, for use in HTML."""
    svg = _svg(canvas)
    canvas.set_layout_engine("none")  # the layout of the SVG is valid for the PNG
    _write(folder / f"{name}.svg", svg.replace("<defs>", _PAPER + "<defs>", 1).encode())
    _write(folder / f"{name}.png", _png(canvas))
    return svg


# The two functions below use the canvases and not `savefig`, which draws everything twice to find the layout.


def _svg(canvas: "Canvas") -> str:
    """The drawing as SVG, without a background."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(canvas).print_svg(file, metadata=nothing)  # type: ignore[no-untyped-call]
    return file.getvalue()


def _png(canvas: "Canvas") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    canvas.set(facecolor="white", dpi=PNG_DPI)
    fast = {"compress_level": 1}  # files are a tenth larger
    FigureCanvasAgg(canvas).print_png(  # type: ignore[no-untyped-call]
        file, metadata={"Software": None}, pil_kwargs=fast
    )
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
