"""The smaller commands of the command line, which show studies and check this installation."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autocompress.disk.files import called, short
from autocompress.terminal.options import checked
from autocompress.terminal.profile_command import profile
from autocompress.terminal.shared_options import OUT, RUN, TRACKING_URI

if TYPE_CHECKING:
    from autocompress.disk.record import Record

FAILED = 1


@click.command()
@OUT
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the server.  [default: a free one]")
def ui(out: Path, port: int | None) -> None:
    """Open MLflow on the studies, to compare schemes and trials."""
    from autocompress.experiments.ui import serve_ui

    sys.exit(serve_ui(out, port=port))


@click.command()
def schemes() -> None:
    """List the schemes."""
    import inspect

    from autocompress.scheme import SCHEMES

    for name, make in SCHEMES:
        defaults = [f"{p.name}={p.default}" for p in inspect.signature(make).parameters.values()]
        _print_item(name, inspect.getdoc(make) or "", defaults)


@click.command()
def objectives() -> None:
    """List the objectives."""
    from autocompress.goal import OBJECTIVES

    for name, objective in OBJECTIVES:
        unit = f" [{objective.unit}]" if objective.unit else ""
        _print_item(name, f"{objective.description} ({objective.direction}){unit}", [])


def _print_item(name: str, doc: str, parameters: list[str]) -> None:
    click.echo(f"{name:24s}{doc.splitlines()[0] if doc else ''}")
    if parameters:
        click.echo(f"{'':24s}parameters: {', '.join(parameters)}")


@click.command("list")
@OUT
def list_studies(out: Path) -> None:
    """List the studies with what they found."""
    from autocompress.disk.record import read_record, study_folders
    from autocompress.terminal.show import make_console, show_list

    records = [read_record(folder, journal=False) for folder in study_folders(out)]
    if not records:
        raise click.BadParameter(f"there are no studies in {str(out)!r}", param_hint="'--out'")
    show_list(make_console(stderr=False), records)
    for record in records:
        for problem in record.problems:
            click.echo(f"note: {problem}", err=True)


@click.command()
@RUN
@OUT
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def show(run: str, out: Path, as_json: bool) -> None:
    """Print the result of a study again.

    RUN is a study's name, a beginning that only it has, its path, or "last", which is the default.
    """
    from autocompress.disk.record import damage_named, find_study, read_record
    from autocompress.sweeps.sweep_result import Sweep
    from autocompress.terminal.show import make_console, show_result, show_sweep

    record = read_record(checked("RUN", find_study, out, run), journal=False)
    if record.found is None:
        raise click.BadParameter(_without_result(record), param_hint="'RUN'")
    if as_json:
        click.echo(json.dumps(record.found))
        return
    with damage_named(record.name):
        if record.kind == "sweep":
            show_sweep(make_console(stderr=False), Sweep.from_json(record.found, record.folder.absolute()))
        else:
            show_result(make_console(stderr=False), record.found, record.folder.absolute())


def _without_result(record: "Record") -> str:
    """The reason why a study has no result, and what to do."""
    name, kind, state = record.name, record.kind, record.state
    if record.problems:
        return record.problems[-1]
    if state == "running":
        return f"the {kind} {name!r} is still running"
    command = "sweep" if kind == "sweep" else "tune"
    resume = f"autocompress {command} --resume {called(record.folder)}"
    return f"the {kind} {name!r} has no result; {resume} goes on with it"


@click.command()
@RUN
@OUT
def report(run: str, out: Path) -> None:
    """Write a study's report, or a sweep's table, again.

    From what lies on disk.

    RUN is a study's name, a beginning that only it has, its path, or "last", which is the default.
    """
    from autocompress.disk.record import damage_named, find_study, read_record
    from autocompress.report import write_report
    from autocompress.sweeps.sweep_files import write_sweep
    from autocompress.sweeps.sweep_result import Sweep

    folder = checked("RUN", find_study, out, run).absolute()
    record = read_record(folder, journal=False)
    with damage_named(folder.name):
        if record.kind != "sweep":
            written = write_report(folder)
        elif record.found is not None:
            written = write_sweep(Sweep.from_json(record.found, folder))
        else:
            raise click.BadParameter(_without_result(record), param_hint="'RUN'")
    for path in written:
        click.echo(short(path))


@click.command()
@RUN
@OUT
@TRACKING_URI
def replay(run: str, out: Path, tracking_uri: str | None) -> None:
    """Log a finished study to MLflow again.

    For when that failed, or for another server.

    RUN is a study's name, a beginning that only it has, its path, or "last", which is the default.
    """
    from autocompress.disk.record import damage_named, find_study
    from autocompress.disk.storage import study_settings
    from autocompress.experiments.mlflow_store import check_uri, without_secrets
    from autocompress.experiments.replay import replay as log_again

    folder = checked("RUN", find_study, out, run).absolute()
    if tracking_uri is not None:
        checked("--tracking-uri", check_uri, tracking_uri)
    tracking_uri = tracking_uri or study_settings(folder.parent, folder.name).get("tracking_uri")
    with damage_named(folder.name):
        run_id = log_again(folder, tracking_uri)
    where = without_secrets(tracking_uri) if tracking_uri else f"{short(folder.parent / 'mlflow.db')}"
    click.echo(f"{folder.name} is run {run_id} of {where}")


@click.command()
@OUT
@click.pass_context
def doctor(ctx: click.Context, out: Path) -> None:
    """Say whether autocompress can work here, and what is missing.

    Exit status: 0 it can, 1 something has to be mended first.
    """
    from autocompress.terminal.doctor import examine

    problem = False
    for finding in examine(out):
        mark = {"ok": " ", "note": "-", "problem": "!"}[finding.state]
        click.echo(f"{mark} {finding.what:17s} {finding.said}")
        problem = problem or finding.state == "problem"
    ctx.exit(FAILED if problem else 0)


COMMANDS = (ui, profile, schemes, objectives, list_studies, show, report, replay, doctor)
