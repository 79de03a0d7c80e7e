"""Shows a study's progress in the terminal."""

import time
from contextlib import ExitStack

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from autocompress.progress import heard_by
from autocompress.searching.posterior import Posterior
from autocompress.showing.comparison import as_bytes, as_count, in_unit, in_words
from autocompress.studies.watcher import Beginning
from autocompress.trial import TrialResult


class Display:
    """Shows a running study: a live table in a terminal, plain lines elsewhere. A `Watcher`.

    Args:
        console: The console to print on.
        verbose: Whether to show the logs of trials' recoveries and the posterior, too.
    """

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self.console = console
        self.verbose = verbose
        self._live: Live | None = None
        self._rows: list[tuple[str, ...]] = []
        self._footer: Footer | None = None
        self._unit = ""
        self._beginning: Beginning | None = None
        self._began_at = time.monotonic()
        self._seconds: list[float] = []
        self._printed_at = time.monotonic()
        self._listening = ExitStack()

    def __enter__(self) -> "Display":
        self._listening.enter_context(heard_by(self.progress))
        if self.console.is_terminal:
            self._live = Live(self._screen(), console=self.console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        if self._live is not None:
            self._footer = None
            self._live.update(self._screen(), refresh=True)
            self._live.stop()

    def doing(self, what: str) -> None:
        """Shows what takes time now."""
        topic = what.partition(":")[0]  # text after a colon is the progress of the same step
        if self._footer is not None and self._footer.what.partition(":")[0] == topic:
            self._footer.what = what
        else:
            self._footer = Footer(what)
        self._show(what)

    def progress(self, done: float) -> None:
        """Shows the completed fraction of the current step; without a terminal, in a line from time to time."""
        if self._footer is None:
            return
        self._footer.advance(done)
        now = time.monotonic()
        if self._live is None and now - max(self._printed_at, self._footer.began_at) >= SECONDS_BETWEEN_LINES:
            self._show(str(self._footer.__rich__()))

    def began(self, beginning: Beginning) -> None:
        """Shows the study's question, the dense model and the notes."""
        self._beginning, self._began_at = beginning, time.monotonic()
        self._unit = beginning.settings.unit
        settings, dense, metric = beginning.settings, beginning.dense, beginning.task.metric.name
        kind = "relative to the dense model's" if settings.bound.relative else "(absolute points)"
        amount = f"{100 * settings.bound.max_drop:g}{settings.unit}"
        sought = " and ".join(
            f"{'lowest' if objective.direction == 'minimize' else 'highest'} {objective.name}"
            for objective in settings.objectives
        )
        self._print(
            f"{beginning.task.name}: {settings.scheme}, {sought} that loses at most {amount} of {metric} {kind}"
        )
        self._print(
            f"dense: {metric} {beginning.dense_score:.4f} on {beginning.task.val.n_samples} val samples, "
            f"{dense.params:,} parameters, {as_bytes(dense.size_bytes)}, {as_count(dense.macs)} MACs"
        )
        for note in beginning.notes:
            self.warned(note)
        self._footer = Footer("trial 1", repeats=settings.trials)

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """Shows a finished trial in a row of the table, or a line."""
        self._seconds.append(result.seconds)
        besides = [*self._values(result), *(checked.shown for checked in result.constraints)]
        self._rows.append(
            (
                f"{result.number}",
                f"{result.density:.4f}",
                f"{result.score:.4f}",
                f"{100 * result.drop:+.2f}{self._unit}",
                result.standing,
                f"{result.seconds:.1f}",
                f"{best.density:.4f}" if best else "none yet",
                ", ".join(dict.fromkeys(besides)),
                in_words(result.params),
            )
        )
        cells = dict(zip(COLUMNS, self._rows[-1], strict=True))
        self._footer = Footer(f"trial {result.number + 1}", self._seconds_left())
        self._show(
            f"trial {cells['trial']:>2}  density {cells['density']}  val {cells['val']}  "
            f"drop {cells['drop']}  feasible {cells['feasible']:<8}  {cells['seconds']:>5} s  "
            f"best {cells['best']}  at most {self._seconds_left():.0f} s left"
            + "".join(f"  {cells[name]}" for name in OPTIONAL if cells[name])
        )
        if self.verbose:
            for name, values in result.curves.items():
                self._print(f"    {name}: {' '.join(f'{value:.3g}' for value in values)}")
            if belief is not None:
                low, high = belief.interval()
                self._print(f"    lowest feasible density: {low:.4f} to {high:.4f} with 80% probability")

    def _values(self, result: TrialResult) -> list[str]:
        """The trial's objectives in words, if there are several."""
        assert self._beginning is not None
        if len(result.values) == 1:
            return []
        pairs = zip(self._beginning.settings.objectives, result.values, strict=True)
        return [f"{objective.name} {in_unit(value, objective.unit)}" for objective, value in pairs]

    def failed(self, number: int, reason: str) -> None:
        """Shows a failed trial in a row of the table, or a line."""
        self._rows.append((f"{number}", "", "", "", "failed", "", "", "", ""))
        self._show(f"trial {number:>2}  failed: {reason}")

    def warned(self, message: str) -> None:
        """Shows a note in its own line."""
        self._print(f"note: {message}")

    def _seconds_left(self) -> float:
        """The time that the remaining trials take at most, by the mean of those so far."""
        assert self._beginning is not None
        settings, done = self._beginning.settings, len(self._rows)
        each = sum(self._seconds) / max(1, len(self._seconds)) / self._beginning.workers
        left = max(0, settings.trials - done) * each
        if settings.timeout_s:
            left = min(left, max(0.0, settings.timeout_s - (time.monotonic() - self._began_at)))
        return left

    def _show(self, line: str) -> None:
        """Redraws the live table, or prints the line if there is none."""
        self._printed_at = time.monotonic()
        if self._live is not None:
            self._live.update(self._screen())
        else:
            self.console.print(escape(line), soft_wrap=True)

    def _print(self, line: str) -> None:
        self.console.print(escape(line), soft_wrap=True)

    def _screen(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        empty = {name for name in OPTIONAL if not any(row[COLUMNS.index(name)] for row in self._rows)}
        columns = [(i, name) for i, name in enumerate(COLUMNS) if name not in empty]
        for _, column in columns:
            table.add_column(column, justify="left" if column in OPTIONAL else "right")
        for row in self._rows:
            table.add_row(*(escape(row[i]) for i, _ in columns), style="" if row[4] == "yes" else "dim")
        parts: list[Table | Spinner] = [table] if self._rows else []
        return Group(*parts, *([Spinner("dots", self._footer)] if self._footer else []))


class Footer:
    """The last line of the display: the current step, its elapsed time, and estimates of the time left.

    Rich renders it several times a second, so its times advance by themselves.

    Args:
        what: The current step.
        left_s: Seconds that the whole search may still take; None if unknown.
        repeats: How many such steps, including this one, the search consists of; used if ``left_s`` is None.
    """

    def __init__(self, what: str, left_s: float | None = None, *, repeats: int = 1) -> None:
        self.what, self.left_s, self.repeats, self.began_at = what, left_s, repeats, time.monotonic()
        self._first: tuple[float, float] | None = None
        self._last = (self.began_at, 0.0)

    def advance(self, done: float) -> None:
        """Records the completed fraction ``done`` of the step; a fraction below the last one is ignored."""
        if done > self._last[1]:
            self._last = time.monotonic(), min(1.0, done)
            self._first = self._first or self._last

    @property
    def done(self) -> float:
        """The completed fraction of the step."""
        return self._last[1]

    def _whole_s(self) -> float | None:
        """The estimated seconds of the whole step, by the pace since its first report; None if too early."""
        if self._first is None or self.done - self._first[1] < WORTH_SAYING:
            return None
        pace = (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
        return self._last[0] - self.began_at + (1 - self.done) * pace

    def __rich__(self) -> Text:
        """The line with the present times."""
        elapsed = time.monotonic() - self.began_at
        parts = [self.what, *([f"{elapsed:.0f} s"] if elapsed >= 2 else [])]
        left, whole = self.left_s, self._whole_s() if elapsed >= 2 else None
        of_search = ""
        if whole is not None and elapsed < whole and self.done < 1:
            of_search = " of the search"  # tells this time from the step's
            parts.append(f"{self.done:.0%}, about {whole - elapsed:.0f} s left")
        if left is None and whole is not None and self.repeats > 1:
            left = self.repeats * whole
        if left is not None and whole is not None:
            left = max(left, whole)  # a trial may be slower than those before it
        if left is not None and left > elapsed:
            parts.append(f"at most {left - elapsed:.0f} s{of_search} left")
        return Text(" · ".join(parts))


OPTIONAL = ("besides", "chosen")  # several objectives and constraints; parameters beside the density
COLUMNS = ("trial", "density", "val", "drop", "feasible", "seconds", "best", *OPTIONAL)
SECONDS_BETWEEN_LINES = 30.0  # of progress, without a terminal
WORTH_SAYING = 0.02  # completed fraction from which on the time of the rest can be estimated
