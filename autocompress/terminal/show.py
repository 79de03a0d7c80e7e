"""Prints results in the terminal: one study's, one sweep's, or the list of all studies."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autocompress.disk.files import called, out_option, read_json, short
from autocompress.disk.record import Record
from autocompress.experiments.mlflow_store import DATABASE
from autocompress.showing.comparison import (
    Found,
    as_bytes,
    classes_that_lost,
    comparison,
    conditions,
    decisions,
    in_unit,
    in_words,
)
from autocompress.showing.words import trials_in_time
from autocompress.sweeps.sweep_result import Sweep

LIST_WIDTH = 400  # characters per line of wide tables, if the output is not a terminal
PLAIN_WIDTH = 110  # and of all others


def make_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr; if that is not a terminal, it has a fixed width."""
    file = sys.stderr if stderr else sys.stdout  # bound now: exports redirect both while other threads write
    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=PLAIN_WIDTH)


def show_result(console: Console, found: Found, folder: Path) -> None:
    """Prints the comparison of dense and compressed, the verdict, the files and what to do next.

    Args:
        console: The console to print on.
        found: The result of `autocompress.Result.to_json`.
        folder: The study's present folder.
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
        columns = ("classes that lost more than the bound", "samples", "recall dense", "compressed", "change")
        console.print()
        show_table(console, columns, lost)
    if thresholds := decisions(found):
        console.print()
        show_table(console, *_thresholds(thresholds))
        confidence = f"{100 * found['certificate']['confidence']:g}%"
        say(
            f">=: at least, with {confidence} confidence each; expect these rates in use, not the score on test,",
            "dim",
        )
        say("which is that of the best threshold for the test data", "dim")
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


def _thresholds(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header and the rows of the table of decision thresholds."""
    header = ("decision thresholds, chosen on val", "probability", "sensitivity on test", "specificity on test")
    several = len({metric for _, _, metric, *_ in rows}) > 1
    return header, [
        (", ".join((name, model, *[metric] * several)), probability, *on_test)
        for name, model, metric, probability, _, _, *on_test in rows
    ]


def _front(found: Found) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header and the rows of the table of Pareto-optimal trials."""
    units = {objective["name"]: objective["unit"] for objective in found["objectives"]}
    rows = []
    for trial in found["front"]:
        name = f"trial {trial['number']}" + " (the answer)" * (trial["number"] == found["answer"])
        values = [in_unit(value, units[objective]) for objective, value in trial["values"].items()]
        rows.append((name, f"{trial['density']:.4f}", f"{trial['drop_pp']:+.2f}", *values))
    return ("", "density", "drop on val", *units), rows


def show_sweep(console: Console, sweep: Sweep) -> None:
    """Prints a sweep's table, its failed cells and its folder."""
    header, rows = sweep.to_rows()
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
    n = len(sweep.cells) - 1
    lines = [
        *(f"failed: {sweep.failure(cell)}" for cell in sweep.failed),
        f"{n} model{'' if n == 1 else 's'} in {sweep.seconds:.0f} s, scored on {sweep.n_test} test samples, "
        f"measured on {sweep.device}; {sweep.stopped}.",
        sweep.note,
        f"Everything is in {short(sweep.folder)}: sweep.csv, sweep.md, figures/sweep.svg",
    ]
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def show_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table whose rows begin with a name."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _next(found: Found, folder: Path) -> list[str]:
    """Suggestions what to do next, each a command or a file."""
    if found["stopped"] == "interrupted":
        return [f"autocompress tune --resume {called(folder)}"]
    steps = [f"{short(folder / 'report.html')}   (look at it in a browser)"] * (folder / "report.html").is_file()
    if found["verdict"] != "not met":
        steps.append(f"{short(folder / 'best' / 'README.md')}   (how to load it)")
    return [*steps, f"{_mlflow(folder)}   (compare the trials in MLflow)"]


def _mlflow(folder: Path) -> str:
    """The command, or the address of the server, that shows a study's trials in MLflow."""
    try:
        uri = read_json(folder / "study.json").get("tracking_uri")
    except (OSError, ValueError):  # an absent or damaged file must not hide the result
        uri = None
    if not uri or uri == f"sqlite:///{(folder.parent / DATABASE).as_posix()}":
        return f"autocompress ui{out_option(folder.parent)}"
    served = uri.startswith(("http://", "https://", "databricks"))
    return str(uri) if served else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def show_list(console: Console, records: Iterable[Record]) -> None:
    """Prints a table with one row per study, the latest last."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "begun (UTC)", "scheme", "state", "trials", "density", "drop", "verdict"):
        right = column in ("trials", "density", "drop")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for record in sorted(records, key=lambda record: (record.begun, record.name)):
        try:
            row = _row(record)
        except (LookupError, TypeError, ValueError):  # a damaged study must not hide the others
            row = (record.name, record.begun, "", "damaged")
        table.add_row(*map(escape, row))
    if not console.is_terminal:
        console.width = LIST_WIDTH  # programs that read the list need unabridged cells
    console.print(table)


def _row(record: Record) -> tuple[str, ...]:
    found = record.found or {}
    has_answer = found.get("answer") is not None
    density, drop = (found["density"], found["drop_pp"]["test"]) if has_answer else (None, None)
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
