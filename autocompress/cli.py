"""The command line: parses options, calls the Python API, prints results.

Slow imports, such as torch, are made within the commands, so that ``--help`` is fast.
"""

import io
import json
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autocompress.task_options import CONSTRAINT, take_options, task_options
from autocompress.terminal.commands import COMMANDS
from autocompress.terminal.options import (
    Duration,
    MaxDrop,
    Positive,
    Sectioned,
    Share,
    checked,
    read_config,
    write_config,
)
from autocompress.terminal.resuming import take_from_study
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
from autocompress.terminal.sweep_command import sweep

if TYPE_CHECKING:
    from autocompress.studies.result import Result
    from autocompress.studies.watcher import Watcher

NOT_MET, USAGE, INTERRUPTED = 3, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autocompress")
def cli() -> None:
    """Finds the smallest version of a trained network that stays within an accuracy bound.

    Start with:  autocompress tune --scheme StructPrune --max-drop 1%
    """


@cli.command(
    cls=Sectioned,
    sections={
        **SECTIONS,
        "scheme": "Goal",
        "trials": "Search",
        "device": "Where it runs",
        "out": "Study and output",
    },
)
@click.option(
    "--scheme",
    default="StructPrune",
    show_default=True,
    help=f"{HOW_TO_COMPRESS}; A,B or auto to choose the best of several.",
)
@click.option(
    "--max-drop",
    type=MaxDrop(),
    default="1%",
    show_default=True,
    help="Largest drop of the metric: 1%, 1pp and 0.01 all mean one point. See --drop.",
)
@click.option(
    "--drop",
    type=click.Choice(["absolute", "relative"]),
    default="absolute",
    show_default=True,
    help="Whether --max-drop is in points of the metric or relative to the dense model's score.",
)
@click.option(
    "--objective",
    multiple=True,
    help="Quantity to optimize: NAME, FILE.py:NAME, or several as product(size, latency); repeat it for a "
    "Pareto front.  [default: density; size where schemes are compared]",
)
@CONSTRAINT
@click.option("--trials", type=click.IntRange(min=1), default=8, show_default=True, help="Most trials to run.")
@click.option("--timeout", type=Duration(), help="Begin no trial after this time: 90s, 15m, 2h.")
@click.option(
    "--epochs-total",
    type=Positive(),
    help="Begin no trial after this many epochs of recovery, over all trials.",
)
@click.option(
    "--tolerance",
    type=Share(0, 1),
    default="15%",
    show_default=True,
    help="Stop when the lowest density within the bound is known to this relative precision, or, in the last "
    "quarter of the trials, when an answer is as near to it.",
)
@click.option(
    "--confidence",
    type=Share(0.5, 1),
    default="95%",
    show_default=True,
    help="Confidence level of the verdict on test.",
)
@click.option(
    "--sampler",
    type=click.Choice(["threshold", "gp", "tpe", "bisection", "grid", "random"]),
    help="Search algorithm.  [default: threshold; gp where --search has a range]",
)
@click.option(
    "--search",
    default="",
    metavar="NAMES",
    help="Search more than the density: 'criterion=l1,l2; stage-density; lr=0.01..0.3; lc.mu'. "
    "A name alone stands for its usual values.",
)
@SEED
@recovery_options
@click.option(
    "--cheap-trials",
    is_flag=True,
    help="Start each trial from the nearest denser model, with fewer steps, and give up trials that cannot meet "
    "the bound.",
)
@DEVICE
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trials to run at a time, each in a process with its own GPU or share of the CPU.",
)
@click.option(
    "--cluster", metavar="ADDRESS", help="Run the trials on a Dask cluster, such as tcp://scheduler:8786."
)
@click.option(
    "--storage",
    metavar="URL",
    help="Keep the search in postgresql://USER@HOST/DATABASE, so that other machines can join by --resume.",
)
@click.option(
    "--runtime",
    type=click.Choice(["eager", "compile", "onnxruntime"]),
    default="eager",
    show_default=True,
    help="Runtime in which objectives measure latency.",
)
@click.option(
    "--profile-device", help="Device on which latency, memory and energy are measured.  [default: as --device]"
)
@task_options
@study_options("study", named_after="task, scheme and time")
@click.option(
    "--export",
    "formats",
    type=click.Choice(["executorch"]),
    multiple=True,
    help="Write the answer in this format as well; repeatable.",
)
@click.option("--register", metavar="NAME", help="Register the answer as a model in MLflow under this name.")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=read_config,
    is_eager=True,
    expose_value=False,
    help="Take options from this TOML file, such as max-drop = '1%'; those given here win.",
)
@click.option(
    "--save-config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the options of this call to a TOML file for --config.",
)
@AS_JSON
@QUIET
@click.option("-v", "--verbose", is_flag=True, help="Show more, and tracebacks of errors.")
@click.pass_context
def tune(
    ctx: click.Context, /, as_json: bool, quiet: bool, verbose: bool, save_config: Path | None, **options: Any
) -> None:
    """Find the smallest model within the bound.

    The search scores models on val; its answer is proven on test, and saved.

    Without --model and --data it runs on scikit-learn's scanned digits and a small ResNet.

    Exit status: 0 found and met, 3 nothing but the dense model meets the bound, 2 bad usage, 130 interrupted.
    """
    from autocompress import tuning
    from autocompress.goal import ObjectiveError
    from autocompress.own_task import make_task
    from autocompress.studies.watcher import Silent
    from autocompress.terminal.display import Display
    from autocompress.terminal.show import make_console, show_result

    _check_options(ctx, options)
    if save_config is not None:
        write_config(ctx, save_config)
    task_options = take_options(options)
    progress, results = make_console(stderr=as_json), make_console(stderr=False)

    def run(watcher: "Watcher") -> "Result":
        shared = {name: options[name] for name in ("out", "device", "constraints")}
        make = partial(make_task, task_options, **shared, progress=watcher.doing)
        return tuning.tune(None if task_options.is_default else make, **options, watcher=watcher)

    try:
        if quiet:
            result = run(Silent())
        else:
            with Display(progress, verbose=verbose) as display:
                result = run(display)
    except ObjectiveError as error:
        raise click.BadParameter(str(error), param_hint="'--objective'") from error
    if as_json:
        click.echo(json.dumps(result.to_json(), allow_nan=False))
    else:
        show_result(results, result.to_json(), result.folder)
    ctx.exit(_status(result))


def _status(result: "Result") -> int:
    """The exit status of `tune`."""
    if result.interrupted:
        return INTERRUPTED
    return 0 if result.met else NOT_MET


def _check_options(ctx: click.Context, options: dict[str, Any]) -> None:
    """Checks the options of `tune` and turns them into arguments of `autocompress.tune`.

    Raises:
        click.UsageError: If an option is not usable; the message names it.
    """
    from autocompress.disk.database import check_database
    from autocompress.disk.storage import prepare_out
    from autocompress.export import check_formats
    from autocompress.gauges.devices import usable_device
    from autocompress.gauges.runtimes import check_runtime
    from autocompress.goal import as_objective
    from autocompress.scheme import AUTO, parse_schemes
    from autocompress.searching.dimensions import parse_dimensions

    if options["resume"]:
        take_from_study(ctx, options)
    options["out"] = checked("--out", prepare_out, options["out"])
    check_shared(ctx, options)
    if options["storage"]:
        checked("--storage", check_database, options["storage"])
    schemes = checked("--scheme", parse_schemes, options["scheme"])
    options["scheme"] = AUTO if options["scheme"] == AUTO else schemes
    options["objective"] = [checked("--objective", as_objective, spec) for spec in options["objective"]]
    options["formats"] = checked("--export", check_formats, options["formats"])
    checked("--search", parse_dimensions, options["search"], schemes, options["recovery"])
    if options["profile_device"]:
        options["profile_device"] = checked("--profile-device", usable_device, options["profile_device"])
    checked("--runtime", check_runtime, options["runtime"], options["profile_device"] or options["device"])


for command in (sweep, *COMMANDS):
    cli.add_command(command)


def main() -> None:
    """Runs the command line; under torchrun in the process of rank 0, whose training the others join."""
    if not ("TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return _main()
    from autocompress.learning.learner import Learner
    from autocompress.learning.ranks import LostProcessError, joined

    with joined() as team:
        if team.leads:
            return _main()
        try:
            team.serve(Learner)
        except LostProcessError:  # reported by the leading process, unless that itself has ended
            sys.exit(0)
        except Exception as error:
            _fail(f"process {team.rank}: {type(error).__name__}: {error}", 1)


def _main() -> None:
    """Runs the command line. Errors are printed as one line on stderr; ``-v`` shows tracebacks."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    if not verbose:  # hides warnings of other libraries; before there are threads, which share the filters
        warnings.filterwarnings("ignore", module=r"(?!autocompress(\.|$))")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where ± or a path cannot be printed, the rest still can
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cluster schedulers end jobs by SIGTERM
    try:
        status = cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("interrupted", INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), USAGE)
    except ValueError as error:
        if verbose:
            raise
        _fail(str(error), USAGE)
    except Exception as error:
        if verbose:
            raise
        _fail(f"{type(error).__name__}: {error} (run again with -v to see where)", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    if "://" in message:  # a library's message may quote an address with a password
        from autocompress.experiments.mlflow_store import without_secrets

        message = without_secrets(message)
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(status)
