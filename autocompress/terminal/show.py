"""What a person sees of studies in the terminal when they are done: one result, or the list of all."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autocompress.disk.files import called, out_option, short
from autocompress.disk.record import Record
from autocompress.showing.comparison import (
    Found,
    as_bytes,
    classes_that_lost,
    comparison,
    conditions,
    in_unit,
    in_words,
)
from autocompress.showing.words import trials_in_time
from autocompress.sweeps.sweep_result import Sweep

LIST_WIDTH = 400  # of the list of studies where there is no terminal
PLAIN_WIDTH = 110  # of a console that is not a terminal and so has no width of its own


def make_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr; plain text without wrapping surprises where that is not a terminal."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


def show_result(console: Console, found: Found, folder: Path) -> None:
    """Prints the table dense | compressed | ratio, the verdict, where things are and what to do next.

    Args:
        console: Where to print.
        found: What `autocompress.Result.to_json` returned.
        folder: Where the study lies now.
    """

    def say(line: str, style: str = "") -> None:
        console.print(escape(line), style=style, soft_wrap=True)

    rows = comparison(found)
    if rows:
        console.print()
        show_table(console, ("", "dense", "compressed", "ratio"), rows)
        for line in conditions(found["measurements"]):
            say(line, "dim")
    if lost := classes_that_lost(found):
        table = Table(box=None, padding=(0, 3, 0, 0))
        for column in ("classes that lost more than the bound", "samples", "recall dense", "compressed", "change"):
            table.add_column(column, justify="left" if column.startswith("classes") else "right")
        for one in lost:
            table.add_row(*map(escape, one))
        console.print()
        console.print(table)
    if found.get("front"):
        console.print()
        show_table(console, *_front(found))
    console.print()
    colours = {"certified": "bold green", "not met": "bold red"}
    say(found["sentence"], colours.get(found["verdict"], "bold yellow"))
    if chosen := found.get("chosen"):
        say(f"Chosen: {in_words(chosen)}.")
    say(f"{trials_in_time(found)}; {found['stopped']}.")
    for name, file in found["artifacts"].items():
        path = folder / "best" / Path(file).name
        size = as_bytes(path.stat().st_size) if path.is_file() else "missing"
        say(f"  {name:12s} {size:>9s}  {short(path)}")
    for name, reason in found["not_exported"].items():
        say(f"  {name:12s} not offered: {reason}")
    say(f"Everything is in {short(folder)}")
    for step in _next(found, folder):
        say(f"Next: {step}")


def _front(found: Found) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header and the rows of the trials that no other feasible one beats in all objectives."""
    units = {one["name"]: one["unit"] for one in found["objectives"]}
    rows = []
    for one in found["front"]:
        name = f"trial {one['number']}" + " (the answer)" * (one["number"] == found["answer"])
        values = [in_unit(value, units[what]) for what, value in one["values"].items()]
        rows.append((name, f"{one['density']:.4f}", f"{one['drop_pp']:+.2f}", *values))
    return ("", "density", "drop on val", *units), rows


def show_sweep(console: Console, found: Sweep) -> None:
    """Prints a sweep's table, what failed, and where everything is."""
    header, rows = found.to_rows()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in header:
        table.add_column(column, justify="left" if column == "scheme" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print()
    if not console.is_terminal:
        console.width = LIST_WIDTH
    console.print(table)
    console.print()
    n = len(found.cells) - 1
    home = short(found.folder)
    lines = [
        *(f"failed: {found.failure(one)}" for one in found.failed),
        f"{n} model{'' if n == 1 else 's'} in {found.seconds:.0f} s, scored on {found.n_test} test samples, "
        f"measured on {found.device}; {found.stopped}.",
        found.note,
        f"Everything is in {home}: sweep.csv, sweep.md, figures/sweep.svg",
    ]
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def show_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows of a name and cells."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _next(found: Found, folder: Path) -> list[str]:
    """What to do now, one command or file a line."""
    if found["stopped"] == "interrupted":
        return [f"autocompress tune --resume {called(folder)}"]
    steps = [f"{short(folder / 'report.html')}   (look at it in a browser)"] * (folder / "report.html").is_file()
    if found["verdict"] != "not met":
        steps.append(f"{short(folder / 'best' / 'README.md')}   (how to load it)")
    return [*steps, f"autocompress ui{out_option(folder.parent)}   (compare the trials in MLflow)"]


def show_list(console: Console, records: Iterable[Record]) -> None:
    """Prints one row a study, the latest last."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "begun (UTC)", "scheme", "state", "trials", "density", "drop", "verdict"):
        right = column in ("trials", "density", "drop")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for record in sorted(records, key=lambda record: (record.begun, record.name)):
        try:
            row = _row(record)
        except (LookupError, TypeError, ValueError):  # one that is damaged does not hide the others
            row = (record.name, record.begun, "", "damaged")
        table.add_row(*map(escape, row))
    if not console.is_terminal:
        console.width = LIST_WIDTH  # what is read by a program is not abridged
    console.print(table)


def _row(record: Record) -> tuple[str, ...]:
    found = record.found or {}
    compressed = found.get("answer") is not None
    density, drop = (found["density"], found["drop_pp"]["test"]) if compressed else (None, None)
    return (
        record.name,
        record.begun,
        str(record.asked.get("scheme", "")),
        record.state,
        f"{len(record.trials)}",
        f"{density:.4f}" if density is not None else "",
        f"{drop:+.2f}{record.unit}" if drop is not None else "",
        str(found.get("verdict", "")),
    )
