"""``--resume``: the options of the study or sweep that is resumed, filled in where they are not given again."""

from typing import Any, Literal

import click

from autocompress.task_options import found_again, restore
from autocompress.terminal.options import checked
from autocompress.terminal.shared_options import OF_RECOVERY

# Options that may change when a study is resumed.
BUDGET = ("trials", "timeout", "epochs_total", "tolerance", "device", "profile_device", "workers", "formats")
# Options that the ``study.json`` of a sweep stores under their own names.
OF_A_SWEEP = ("densities", "repeats", "timing", "seed")


def take_from_study(ctx: click.Context, options: dict[str, Any]) -> None:
    """Fills in the options of the study that is resumed, except those given again.

    Raises:
        click.BadParameter: If an option was given that differs from the study's and is not one of `BUDGET`.
    """
    from autocompress.notation import with_files

    stored, given = _take_resumed(ctx, options, "study")
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


def take_from_sweep(ctx: click.Context, options: dict[str, Any]) -> None:
    """Fills in the options of the sweep that is resumed, except those given again.

    Whether these are the same is checked by `autocompress.sweep`.
    """
    from autocompress.notation import with_files

    settings, given = _take_resumed(ctx, options, "sweep")
    files, recovery = settings["files"], settings["recovery"]
    del options["constraints"]
    stored = {name: settings[name] for name in OF_A_SWEEP}
    stored["schemes"] = tuple(with_files(scheme, files) for scheme in settings["schemes"])
    stored["also"] = tuple(found_again(metric, files) for metric in settings["also"])
    stored["densities"] = tuple(settings["densities"])
    stored |= {name: recovery.get(name) for name in OF_RECOVERY}
    stored |= {"recovery": recovery["method"], "score_steps": bool(recovery.get("score_steps"))}
    options |= {name: value for name, value in stored.items() if name not in given}


def _take_resumed(
    ctx: click.Context, options: dict[str, Any], kind: Literal["study", "sweep"]
) -> tuple[dict[str, Any], list[str]]:
    """Finds the study or sweep that ``--resume`` names, and fills in its task's options except those given again.

    Args:
        ctx: The command's context.
        options: The command's options by name; changed in place. ``out`` and ``resume`` become the folder of the
            studies and the full name.
        kind: Whether the command resumes studies or sweeps.

    Returns:
        The settings in its ``study.json``, with those of its ``files`` that still exist; and the names of the
        options that were given.

    Raises:
        click.UsageError: If there is no such study, it is of the other kind, or ``--name`` is given as well.
    """
    from autocompress.disk.record import find_study
    from autocompress.disk.storage import study_settings
    from autocompress.plugins import write_files_as

    if options["name"]:
        raise click.UsageError(f"--name and --resume cannot be given together; --resume names the {kind}")
    folder = checked("--resume", find_study, options["out"], options["resume"])
    options["out"], options["resume"] = folder.parent.resolve(), folder.name
    settings = checked("--resume", study_settings, folder.parent, folder.name, kind)
    settings["files"] = write_files_as(settings.get("files", {}))
    given = [name for name in options if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT]
    restore(options, given, settings)
    return settings, given
