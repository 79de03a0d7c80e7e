"""``autocompress profile``: measures models on this machine."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autocompress.terminal.options import Positive, Run, Shape, checked
from autocompress.terminal.shared_options import OUT

if TYPE_CHECKING:
    from torch import nn

    from autocompress.gauges.profile import Profiled


@click.command()
@click.argument("run", type=Run(), required=False)
@OUT
@click.option(
    "--model", metavar="MODEL", help="Measure this model, by name or file.py:factory, instead of a study's answer."
)
@click.option(
    "--model-args", multiple=True, metavar="KEY=VALUE", help="Argument of the model's factory; repeatable."
)
@click.option(
    "--input", "shape", type=Shape(), default="3x224x224", show_default=True, help="Shape of --model's input."
)
@click.option("--classes", type=click.IntRange(min=2), default=1000, show_default=True, help="Classes of --model.")
@click.option("--scheme", help="Compress --model by this scheme, without training, to see what it would cost.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.25,
    show_default=True,
    help="Density for --scheme.",
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["eager", "compile", "onnxruntime"]),
    multiple=True,
    help="Runtime to measure in; repeatable.  [default: all that are installed]",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 16),
    show_default=True,
    help="Batch size to measure; repeatable.",
)
@click.option("--device", default="cpu", show_default=True, help="Device to measure on: cpu, cuda or cuda:N.")
@click.option(
    "--budget",
    type=Positive(),
    default=5.0,
    show_default=True,
    help="Seconds for each model, runtime and batch size.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def profile(run: str | None, out: Path, as_json: bool, **options: Any) -> None:
    """Measure a study's answer beside its dense model, or any model.

    RUN is a study's name, a beginning that only it has, its path, or "last"; without --model the last study is
    taken.

    Where a latency is not known to within 3% when the budget is spent, its interval says so.
    """
    from autocompress.gauges.devices import usable_device
    from autocompress.gauges.profile import profile as measure_all
    from autocompress.gauges.runtimes import check_runtime, installed
    from autocompress.showing.comparison import conditions, costs
    from autocompress.terminal.display import Display
    from autocompress.terminal.show import make_console, show_table

    device = checked("--device", usable_device, options["device"])
    runtimes = options["runtimes"] or installed(device)
    for name in runtimes:
        checked("--runtime", check_runtime, name, device)
    profiled = _profiled(run, out, options)
    with Display(make_console(stderr=True)) as display:
        display.doing(f"measuring in {', '.join(runtimes)}")
        measured = measure_all(
            profiled, device, runtimes=runtimes, batch_sizes=options["batches"], budget_s=options["budget"]
        )
    found = {name: asdict(measurement) for name, measurement in measured.items()}
    if as_json:
        click.echo(json.dumps(found))
        return
    console = make_console(stderr=False)
    show_table(console, ("", *found, *(["ratio"] if len(found) == 2 else [])), costs(found, throughput=True))
    for line in conditions(found):
        console.print(line, style="dim", soft_wrap=True, markup=False)


def _profiled(run: str | None, out: Path, options: dict[str, Any]) -> "Profiled":
    """The models to measure: those of a study, or --model, maybe compressed."""
    from autocompress.gauges.profile import check_input, of_model
    from autocompress.scheme import parse_scheme

    if options["model"] is None or run is not None:
        if options["scheme"]:
            raise click.UsageError("--scheme compresses --model; leave RUN out and give --model")
        return _of_study(run or "last", out, options)
    import torch

    model = _model(options, options["classes"], options["shape"][0])
    scheme = checked("--scheme", parse_scheme, options["scheme"]) if options["scheme"] else None
    sample = checked("--input", check_input, model, torch.zeros(1, *options["shape"]))
    return of_model(model, sample, scheme, options["density"])


def _of_study(run: str, out: Path, options: dict[str, Any]) -> "Profiled":
    """A study's answer and its dense model, which is --model if autocompress cannot build it itself."""
    from autocompress.disk.files import read_json
    from autocompress.disk.record import answer_folder, find_study
    from autocompress.formats.bundle import read_plan
    from autocompress.gauges.profile import of_study

    study = checked("RUN", find_study, out, run)
    best = checked("RUN", answer_folder, study)
    plan = checked("RUN", read_plan, best)
    if options["model"] is not None:
        channels = plan["input"].get("shape", [0, options["shape"][0]])[1]
        return of_study(best, _model(options, len(plan.get("classes", ())) or options["classes"], channels))
    if plan["architecture"] is None:
        # The study may name the model's file, but running it is up to the user.
        task_options = read_json(study / "study.json").get("task_options") or {}
        words = ["--model", task_options.get("model") or "file.py:factory"]
        words += [word for argument in task_options.get("model_args", ()) for word in ("--model-args", argument)]
        raise click.UsageError(
            f"{study.name!r} is of a model of your own; give its dense form: {shlex.join(words)}"
        )
    return of_study(best)


def _model(options: dict[str, Any], classes: int, channels: int) -> "nn.Module":
    """The untrained network that --model names."""
    from autocompress.networks.own_model import make_model, parse_arguments

    arguments = checked("--model-args", parse_arguments, options["model_args"])
    made = checked(
        "--model",
        lambda: make_model(
            options["model"], arguments=arguments, weights="none", classes=classes, data_channels=channels
        ),
    )
    return made.model
