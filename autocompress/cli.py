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

from autocompress.task_options import CONSTRAINT, found_again, take_options, task_options
from autocompress.terminal.commands import COMMANDS
from autocompress.terminal.options import (
    OF_A_TRIAL,
    OF_RECOVERY,
    OUT,
    TRACKING_URI,
    Duration,
    MaxDrop,
    Positive,
    Sectioned,
    Share,
    check_shared,
    checked,
    read_config,
    resume_option,
    take_resumed,
    write_config,
)
from autocompress.terminal.sweep_command import sweep

if TYPE_CHECKING:
    from autocompress.studies.result import Result
    from autocompress.studies.watcher import Watcher

NOT_MET, USAGE, INTERRUPTED = 3, 2, 130
# Options that may change when a study is resumed.
BUDGET = ("trials", "timeout", "epochs_total", "tolerance", "device", "profile_device", "workers", "formats")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autocompress")
def cli() -> None:
    """Finds the smallest version of a trained network that stays within an accuracy bound.

    Start with:  autocompress tune --scheme StructPrune --max-drop 1%
    """


@cli.command(
    cls=Sectioned,
    sections={
        "scheme": "Goal",
        "trials": "Search",
        "epochs": "Recovery of each trial",
        "device": "Where it runs",
        "model": "Model, data and metric",
        "out": "Study and output",
    },
)
@click.option(
    "--scheme",
    default="StructPrune",
    show_default=True,
    help="How to compress: NAME, NAME(key=value), FILE.py:NAME, A+B; A,B or auto to choose the best of several.",
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
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the search and the trials."
)
@click.option(
    "--epochs",
    type=Positive(),
    default=45.0,
    show_default=True,
    help="Recovery budget of one trial, in passes over the training data.",
)
@click.option(
    "--recovery",
    type=click.Choice(["auto", "lc", "gradual", "iterative", "layerwise", "rewind", "finetune", "none"]),
    default="auto",
    show_default=True,
    help="Method: learning-compression (lc) or a simpler one; auto is gradual where channels are removed or "
    "steps are very few, lc elsewhere.",
)
@click.option(
    "--lr",
    type=Positive(),
    help="Peak learning rate.  [default: 0.1, with adamw 0.001; finetune: a tenth]",
)
@click.option(
    "--optimizer",
    type=click.Choice(["sgd", "adamw"]),
    default="sgd",
    show_default=True,
    help="Optimizer of the gradient steps.",
)
@click.option(
    "--distill",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Weight of distillation from the dense model in the loss; the labels have the rest.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Rounds of --recovery iterative.  [default: 4]",
)
@click.option(
    "--cheap-trials",
    is_flag=True,
    help="Start each trial from the nearest denser model, with fewer steps, and give up trials that cannot meet "
    "the bound.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Device of the trials: auto, cpu, cuda or cuda:N."
)
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
@OUT
@click.option("--name", help="The study's name.  [default: from task, scheme and time]")
@resume_option("study")
@TRACKING_URI
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
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, progress on stderr.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
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
        _take_from_study(ctx, options)
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


def _take_from_study(ctx: click.Context, options: dict[str, Any]) -> None:
    """Fills in the options of the study that is resumed, except those given again.

    Raises:
        click.BadParameter: If an option was given that differs from the study's and is not one of `BUDGET`.
    """
    from autocompress.notation import with_files

    stored, given = take_resumed(ctx, options, "study")
    recovery = stored["recovery"]
    stored |= {name: recovery.get(name) for name in OF_RECOVERY} | {"recovery": recovery["method"]}
    objective = stored["objective"]
    stored["objective"] = (objective,) if isinstance(objective, str) else tuple(objective)
    with_paths = {  # specs whose files are found from the current folder
        "scheme": with_files(stored["scheme"], stored["files"]),
        "objective": tuple(found_again(spec, stored["files"]) for spec in stored["objective"]),
    }
    stored = {"search": "", "epochs_total": None} | stored  # studies of earlier versions have neither
    same = (
        "scheme",
        "max_drop",
        "drop",
        "objective",
        "recovery",
        *OF_RECOVERY,
        "runtime",
        "search",
        "sampler",
        "seed",
        "cheap_trials",
        "confidence",
    )
    for name in (*same, *BUDGET):
        if name not in stored:  # the study is of a version without this option
            continue
        if name not in given:
            options[name] = with_paths.get(name, stored[name])
        elif name not in BUDGET and (value := _as_stored(name, options[name])) != stored[name]:
            before, now = (", ".join(v) if isinstance(v, tuple) else v for v in (stored[name], value))
            problem = f"the study {options['resume']!r} was made with {before!r}, not {now!r}"
            hint = f"'--{name.replace('_', '-')}'"
            raise click.BadParameter(f"{problem}; resume it as it was or begin a new one", param_hint=hint)


def _as_stored(name: str, given: Any) -> Any:
    """The value of an option in the form of ``study.json``, as some can be written in several ways."""
    from autocompress.goal import as_objective
    from autocompress.plugins import name_of
    from autocompress.recovery import make_recovery
    from autocompress.scheme import AUTO, describe, parse_schemes

    if name == "scheme" and given != AUTO:
        return ", ".join(map(describe, checked("--scheme", parse_schemes, given)))
    if name == "objective":
        return tuple(name_of(checked("--objective", as_objective, spec)) for spec in given)
    return make_recovery(given).method if name == "recovery" else given


sweep.params[3:3] = [option for option in tune.params if option.name in OF_A_TRIAL]
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
