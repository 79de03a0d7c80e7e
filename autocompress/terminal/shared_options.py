"""The options that several commands have, each declared once, and the check of those of `tune` and `sweep`."""

import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import click

from autocompress.disk.files import DEFAULT_OUT
from autocompress.task_options import add_options
from autocompress.terminal.options import EMPTY, Home, Positive, Run, checked

F = TypeVar("F", bound=Callable[..., Any])

# The beginning of the help of --scheme.
HOW_TO_COMPRESS = "How to compress: NAME, NAME(key=value), FILE.py:NAME, A+B"
OF_RECOVERY = ("epochs", "lr", "optimizer", "distill", "rounds")  # settings of a trial's recovery
# Headings of the options that both commands have, by the first option under each, see `options.Sectioned`.
SECTIONS = {"epochs": "Recovery of each trial", "model": "Model, data and metric"}

OUT = click.option(
    "--out",
    type=Home(),
    default=DEFAULT_OUT,
    show_default=True,
    help="Folder for all studies; nothing is written outside it.",
)
RUN = click.argument("run", type=Run(), default="last")
TRACKING_URI = click.option(
    "--tracking-uri",
    metavar="URI",
    help="Log to this MLflow server, such as http://host:5000.  [default: the study's, or the database in --out]",
)
SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the search and the trials."
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Device of the trials: auto, cpu, cuda or cuda:N."
)
AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, progress on stderr."
)
QUIET = click.option("--quiet", is_flag=True, help="Show no progress.")
_RECOVERY = (
    click.option(
        "--epochs",
        type=Positive(),
        default=45.0,
        show_default=True,
        help="Recovery budget of one trial, in passes over the training data.",
    ),
    click.option(
        "--recovery",
        type=click.Choice(["auto", "lc", "gradual", "iterative", "layerwise", "rewind", "finetune", "none"]),
        default="auto",
        show_default=True,
        help="Method: learning-compression (lc) or a simpler one; auto is gradual where channels are removed or "
        "steps are very few, lc elsewhere.",
    ),
    click.option(
        "--lr",
        type=Positive(),
        help="Peak learning rate.  [default: 0.1, with adamw 0.001; finetune: a tenth]",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["sgd", "adamw"]),
        default="sgd",
        show_default=True,
        help="Optimizer of the gradient steps.",
    ),
    click.option(
        "--distill",
        type=click.FloatRange(0, 1),
        default=0.5,
        show_default=True,
        help="Weight of distillation from the dense model in the loss; the labels have the rest.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        help="Rounds of --recovery iterative.  [default: 4]",
    ),
)


def recovery_options(command: F) -> F:
    """Adds the options of a trial's recovery to a command."""
    return add_options(command, _RECOVERY)


def study_options(kind: Literal["study", "sweep"], named_after: str) -> Callable[[F], F]:
    """Adds the options that say where a study or a sweep lies and is logged, and which one is resumed.

    Args:
        kind: What the command runs, see `resuming`.
        named_after: What its name is made from if none is given.
    """
    options = (
        OUT,
        click.option("--name", help=f"The {kind}'s name.  [default: from {named_after}]"),
        click.option(
            "--resume",
            type=Run(),
            metavar="NAME",
            help=f"Go on with a {kind} (name, a beginning of it, path, or last); options not given are as they "
            "were.",
        ),
        TRACKING_URI,
    )
    return lambda command: add_options(command, options)


def check_shared(ctx: click.Context, options: dict[str, Any], **settings: Any) -> None:
    """Checks the options that `tune` and `sweep` have in common, and turns them into arguments of their functions.

    Args:
        ctx: The command's context.
        options: The command's options by name; changed in place. Those of the recovery are replaced by the
            recovery.
        settings: Further settings of the recovery.

    Raises:
        click.BadParameter: If an option is not usable.
    """
    from autocompress.disk.storage import check_name
    from autocompress.experiments.mlflow_store import check_uri, without_secrets
    from autocompress.gauges.devices import usable_device
    from autocompress.recovery import make_recovery

    _refuse_empty(ctx)
    if options["name"] is not None:
        checked("--name", check_name, options["name"])
    if options["tracking_uri"]:
        checked("--tracking-uri", check_uri, options["tracking_uri"])
    if options["recovery"] == "none":  # it takes no settings, so defaults are dropped; given ones will be refused
        for name in OF_RECOVERY:
            if ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
                options[name] = ctx.params[name] = None
    settings |= {name: options.pop(name) for name in OF_RECOVERY}
    given = {name: value for name, value in settings.items() if value is not None}
    options["recovery"] = checked("--recovery", partial(make_recovery, **given), options["recovery"])
    options["device"] = checked("--device", usable_device, options["device"])
    options["command"] = without_secrets(shlex.join(["autocompress", *sys.argv[1:]]))


def _refuse_empty(ctx: click.Context) -> None:
    """Refuses options with an empty value, as an unset shell variable gives, unless that is their default."""
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        given = value if isinstance(value, tuple) else (value,)
        if "" in given and param.default != "":
            raise click.BadParameter(EMPTY, param_hint=f"'{param.opts[0]}'")
