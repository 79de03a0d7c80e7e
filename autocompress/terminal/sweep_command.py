"""``autocompress sweep``: schemes × densities as a table and a figure."""

import json
from functools import partial
from typing import Any

import click

from autocompress.task_options import take_options, task_options
from autocompress.terminal.options import Densities, Sectioned, checked
from autocompress.terminal.resuming import take_from_sweep
from autocompress.terminal.shared_options import (
    AS_JSON,
    DEVICE,
    HOW_TO_COMPRESS,
    QUIET,
    SECTIONS,
    SEED,
    check_shared,
    recovery_options,
    study_options,
)

INTERRUPTED = 130


@click.command(
    cls=Sectioned,
    sections={
        **SECTIONS,
        "schemes": "Models to compare",
        "device": "Measurements",
        "out": "Sweep and output",
    },
)
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    default=("StructPrune",),
    show_default=True,
    help=f"{HOW_TO_COMPRESS}; several with commas, or repeated.",
)
@click.option(
    "--densities",
    type=Densities(),
    default="0.5,0.25,0.1,0.05",
    show_default=True,
    help="Densities to compress to: shares of the parameters that are kept.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs of each scheme and density, by seed.",
)
@SEED
@recovery_options
@DEVICE
@click.option("--also", multiple=True, metavar="METRIC", help="Another metric to score; repeatable.")
@click.option("--score-steps", is_flag=True, help="Also score on val after each L-C step, for the figure.")
@click.option(
    "--timing/--no-timing",
    default=True,
    show_default=True,
    help="Whether to measure latency, memory and energy.",
)
@task_options
@study_options("sweep", named_after="task and time")
@AS_JSON
@QUIET
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors.")
@click.pass_context
def sweep(ctx: click.Context, /, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Compress with every scheme to every density: a table.

    Nothing is searched: this shows how accuracy falls as the network shrinks. Results go to --out as sweep.csv,
    sweep.md and figures/sweep.svg, and to MLflow.

    Exit status: 0 done, 2 bad usage, 130 interrupted.
    """
    from autocompress import sweeping
    from autocompress.disk.storage import prepare_out
    from autocompress.own_task import make_task
    from autocompress.sweeps.sweep_grid import distinct_schemes
    from autocompress.terminal.show import make_console, show_sweep

    if options["resume"]:
        take_from_sweep(ctx, options)
    options["out"] = checked("--out", prepare_out, options["out"])
    options["schemes"] = list(checked("--scheme", distinct_schemes, options["schemes"]).values())
    check_shared(ctx, options, score_steps=options.pop("score_steps") or None)
    task_options = take_options(options)

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=as_json)

    shared = {name: options[name] for name in ("out", "device")}
    task = None if task_options.is_default else partial(make_task, task_options, **shared, progress=say)
    result = sweeping.sweep(task, **options, progress=say)
    if as_json:
        click.echo(json.dumps(result.to_json(), allow_nan=False))
    else:
        show_sweep(make_console(stderr=False), result)
    ctx.exit(INTERRUPTED if result.interrupted else 0)
