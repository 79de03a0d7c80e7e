"""What a person sees in the terminal: the search as it runs, and the result."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from autocompress.measurement import Measurement
from autocompress.posterior import Posterior
from autocompress.result import Beginning, Result
from autocompress.scheme import describe
from autocompress.trial import TrialResult

PLAIN_WIDTH = 110  # of a console that is not a terminal and so has no width of its own


def make_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr; plain text without wrapping surprises where that is not a terminal."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


class Display:
    """Shows a study while it runs: a live table in a terminal, plain lines elsewhere. A `Watcher`.

    Args:
        console: Where to show it.
        verbose: Whether to show what a trial's recovery logged, too.
    """

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self.console = console
        self.verbose = verbose
        self._live: Live | None = None
        self._rows: list[tuple[str, ...]] = []
        self._footer = ""
        self._unit = ""
        self._beginning: Beginning | None = None
        self._began_at = time.monotonic()
        self._seconds: list[float] = []

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live = Live(self._screen(), console=self.console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._footer = ""
            self._live.update(self._screen(), refresh=True)
            self._live.stop()

    def doing(self, what: str) -> None:
        """What takes time now."""
        self._footer = what
        self._show(what)

    def began(self, beginning: Beginning) -> None:
        """Says what is asked and what the dense model is."""
        self._beginning, self._began_at = beginning, time.monotonic()
        self._unit = beginning.settings.unit
        settings, dense, metric = beginning.settings, beginning.dense, beginning.task.metric.name
        kind = "relative to the dense model's" if settings.bound.relative else "(absolute points)"
        amount = f"{100 * settings.bound.max_drop:g}{settings.unit}"
        extreme = "lowest" if settings.objective.direction == "minimize" else "highest"
        self._print(
            f"{beginning.task.name}: {describe(settings.scheme)}, {extreme} {settings.objective.name} "
            f"that loses at most {amount} of {metric} {kind}"
        )
        self._print(
            f"dense: {metric} {beginning.dense_score:.4f} on {beginning.task.val.n_samples} val samples, "
            f"{dense.params:,} parameters, {as_bytes(dense.size_bytes)}, {as_count(dense.macs)} MACs"
        )
        for note in beginning.notes:
            self.warned(note)
        self._footer = "trial 1"

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """One row, or one line."""
        self._seconds.append(result.seconds)
        self._rows.append(
            (
                f"{result.number}",
                f"{result.density:.4f}",
                f"{result.score:.4f}",
                f"{100 * result.drop:+.2f}{self._unit}",
                "yes" if result.feasible else "no",
                f"{result.seconds:.1f}",
                f"{best.density:.4f}" if best else "none yet",
            )
        )
        cells = dict(zip(COLUMNS, self._rows[-1], strict=True))
        self._footer = f"next trial · {self._time_left()}"
        self._show(
            f"trial {cells['trial']:>2}  density {cells['density']}  val {cells['val']}  "
            f"drop {cells['drop']}  feasible {cells['feasible']:<3}  {cells['seconds']:>5} s  "
            f"best {cells['best']}  {self._time_left()}"
        )
        if self.verbose:
            for name, values in result.curves.items():
                self._print(f"    {name}: {' '.join(f'{value:.3g}' for value in values)}")
            if belief is not None:
                low, high = belief.interval()
                self._print(f"    lowest feasible density: {low:.4f} to {high:.4f} with 80% probability")

    def failed(self, number: int, reason: str) -> None:
        """One row, or one line."""
        self._rows.append((f"{number}", "", "", "", "failed", "", ""))
        self._show(f"trial {number:>2}  failed: {reason}")

    def warned(self, message: str) -> None:
        """A line of its own."""
        self._print(f"note: {message}")

    def _time_left(self) -> str:
        assert self._beginning is not None
        settings, done = self._beginning.settings, len(self._rows)
        left = max(0, settings.trials - done) * sum(self._seconds) / max(1, len(self._seconds))
        if settings.timeout_s:
            left = min(left, max(0.0, settings.timeout_s - (time.monotonic() - self._began_at)))
        return f"at most {left:.0f} s left"

    def _show(self, line: str) -> None:
        """Redraws the live table, or prints the line where there is none."""
        if self._live is not None:
            self._live.update(self._screen())
        else:
            self.console.print(escape(line), soft_wrap=True)

    def _print(self, line: str) -> None:
        self.console.print(escape(line), soft_wrap=True)

    def _screen(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for row in self._rows:
            table.add_row(*row, style="" if row[4] == "yes" else "dim")
        parts: list[Table | Spinner] = [table] if self._rows else []
        return Group(*parts, *([Spinner("dots", Text(self._footer))] if self._footer else []))


COLUMNS = ("trial", "density", "val", "drop", "feasible", "seconds", "best")


def show_result(console: Console, result: Result) -> None:
    """Prints the table dense | compressed | ratio, the verdict, where things are and what to do next."""
    if "compressed" in result.measurements:
        console.print()
        console.print(_comparison(result))
    if result.per_class is not None and result.classes_that_lost:
        console.print()
        console.print(_per_class(result))
    console.print()
    style = "bold green" if result.verdict == "certified" else "bold yellow" if result.met else "bold red"
    console.print(escape(result.sentence), style=style, soft_wrap=True)
    trials = "1 trial" if len(result.records) == 1 else f"{len(result.records)} trials"
    console.print(escape(f"{trials} in {result.seconds:.0f} s; {result.stopped}."), soft_wrap=True)
    for artifact in result.exported.artifacts:
        line = f"  {artifact.format:12s} {as_bytes(artifact.size_bytes):>9s}  {_short(artifact.path)}"
        console.print(escape(line), soft_wrap=True)
    for name, reason in result.exported.refused.items():
        console.print(escape(f"  {name:12s} not offered: {reason}"), soft_wrap=True)
    console.print(escape(f"Everything is in {_short(result.folder)}"), soft_wrap=True)
    for step in _next(result):
        console.print(escape(f"Next: {step}"), soft_wrap=True)


def _next(result: Result) -> list[str]:
    """What to do now, one command or file a line."""
    home = _short(result.folder.parent)
    out = "" if home == Path("autocompress-runs") else f" --out {shlex.quote(str(home))}"
    if result.interrupted:
        return [f"autocompress tune --resume {result.name}{out}"]
    look = f"autocompress ui{out}   (compare the trials in MLflow)"
    return [f"{_short(result.folder / 'best' / 'README.md')}   (how to load it)", look] if result.met else [look]


def _short(path: Path) -> Path:
    """The path as seen from the current folder, if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _comparison(result: Result) -> Table:
    dense, compressed = result.measurements["dense"], result.measurements["compressed"]
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("")
    for column in ("dense", "compressed", "ratio"):
        table.add_column(column, justify="right")
    for split in ("val", "test"):
        a, b = result.scores["dense"][split], result.scores["compressed"][split]
        table.add_row(f"score on {split}", f"{a:.4f}", f"{b:.4f}", f"{100 * (b - a):+.2f} pp")
    for val, test in result.constraints:
        for split, one in (("val", val), ("test", test)):
            table.add_row(
                escape(f"{val.metric} on {split}"), "", f"{one.value:.4f}", "" if one.met else "violated"
            )
    table.add_row("density", f"{dense.density:.4f}", f"{compressed.density:.4f}", "")
    for name, get, show in ROWS:
        costs = get(dense), get(compressed)
        table.add_row(name, *("n/a" if cost is None else show(cost) for cost in costs), _ratio(*costs))
    for before, after in zip(dense.latency, compressed.latency, strict=True):
        times = (f"{at.p50_ms:.3f} ms (p95 {at.p95_ms:.3f})" for at in (before, after))
        table.add_row(f"latency, batch {before.batch}", *times, _ratio(before.p50_ms, after.p50_ms))
    return table


def _per_class(result: Result) -> Table:
    """The classes that lost more recall than the bound allows the metric: the mean must not hide them."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for column in ("classes that lost more than the bound", "samples", "recall dense", "compressed", "change"):
        table.add_column(column, justify="right" if column != "classes that lost more than the bound" else "left")
    for before, after in result.classes_that_lost:
        assert before.recall is not None and after.recall is not None
        lost = f"{100 * (after.recall - before.recall):+.2f} pp"
        table.add_row(
            escape(before.name), f"{before.support}", f"{before.recall:.4f}", f"{after.recall:.4f}", lost
        )
    return table


def _ratio(dense: float | None, compressed: float | None) -> str:
    return f"{dense / compressed:.2f}x" if dense and compressed else ""


def as_bytes(n: float) -> str:
    """A size in the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if round(n, 1) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def as_count(n: float) -> str:
    """A count in thousands, millions, billions or trillions."""
    for unit in ("", "k", "M", "G"):
        if float(f"{n:.4g}") < 1000:
            return f"{n:.4g}{unit}"
        n /= 1000
    return f"{n:.4g}T"


ROWS: tuple[tuple[str, Callable[[Measurement], float | None], Callable[[float], str]], ...] = (
    ("parameters", lambda m: m.params, lambda n: f"{n:,.0f}"),
    ("weights on disk", lambda m: m.size_bytes, as_bytes),
    ("MACs", lambda m: m.macs, as_count),
    ("peak memory", lambda m: m.peak_memory_bytes, as_bytes),
    ("GPU memory in use", lambda m: m.gpu_memory_bytes, as_bytes),
    ("GPU utilization", lambda m: m.gpu_utilization_pct, lambda x: f"{x:.0f}%"),
    ("GPU power", lambda m: m.gpu_power_w, lambda x: f"{x:.0f} W"),
    ("energy an inference", lambda m: m.energy_j, lambda x: f"{1000 * x:.3f} mJ"),
)
