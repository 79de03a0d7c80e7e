"""Types of the command line's options, headings of their help, and files of options (``--config``)."""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from autocompress.disk.files import DEFAULT_OUT, NAME

T = TypeVar("T")

_NOT_KEPT = ("config", "save_config", "help")  # options that a file cannot hold, by their names in Python
_OF_ONE_STUDY = ("name", "resume")  # not written by --save-config: the next study has another name
EMPTY = "it is empty; give a value, or leave it out"


class MaxDrop(click.ParamType[float]):
    """A drop as ``1%``, ``1pp`` or ``0.01``."""

    name = "drop"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The drop as a fraction: 0.01 for ``1%``."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(%|pp)?\s*", value)
        drop = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 <= drop < 1:
            self.fail(f"{value!r} is not a drop from 0% up to but not including 100%; write 1%, 1pp or 0.01")
        return drop


class Share(click.ParamType[float]):
    """A share as ``15%`` or ``0.15``, above ``low`` and below ``high``."""

    name = "share"

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a fraction: 0.15 for ``15%``."""
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", str(value))
        share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not self.low < share < self.high:
            self.fail(f"{value!r} is not between {self.low:.0%} and {self.high:.0%}; write 90% or 0.9")
        return share


class Positive(click.FloatRange):
    """A finite number above 0; click's own range lets ``nan`` through."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number above 0")
        return number


class Duration(click.ParamType[float]):
    """A time as ``90``, ``90s``, ``15m`` or ``2h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The time in seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([smh]?)\s*", value)
        seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
        if seconds <= 0:
            self.fail(f"{value!r} is not a duration above 0; write 90s, 15m or 2h")
        return seconds


class Densities(click.ParamType[tuple[float, ...]]):
    """Densities as ``0.5,0.1`` or ``50%,10%``."""

    name = "densities"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The densities as fractions."""
        if isinstance(value, tuple):
            return value
        matches = [re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*(%?)\s*", item) for item in value.split(",")]
        densities = tuple(float(match[1]) / (100 if match[2] else 1) for match in matches if match)
        if len(densities) < len(matches) or not all(0 < density <= 1 for density in densities):
            self.fail(f"{value!r} is not a list of densities above 0 and at most 1; write 0.5,0.1 or 50%,10%")
        if len(set(densities)) < len(densities):
            self.fail(f"{value!r} has a density twice")
        return densities


class Shape(click.ParamType[tuple[int, ...]]):
    """The shape of a sample as ``3x224x224``."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes, channels first."""
        if isinstance(value, tuple):
            return value
        sizes = value.split("x")
        if not all(re.fullmatch(r"[1-9]\d{0,5}", size) for size in sizes):
            self.fail(f"{value!r} is not a shape; write channels x height x width, such as 3x224x224")
        return tuple(map(int, sizes))


class Home(click.Path):
    """The folder of all studies. An empty text, as an unset shell variable gives, is refused.

    It is checked here because `check_shared` cannot recognize it once it has become the path of the current
    folder.
    """

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class Run(click.ParamType[str]):
    """A study by its name, a beginning that only it has, its path, or ``last``; a shell completes the name."""

    name = "run"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names of studies in ``--out`` that begin with ``incomplete``."""
        out = Path(ctx.params.get("out") or DEFAULT_OUT)
        names = sorted(file.parent.name for file in out.glob("*/study.json"))
        known = [name for name in ["last", *names] if re.fullmatch(NAME, name)]
        return [CompletionItem(name) for name in known if name.startswith(incomplete)]


class Sectioned(click.Command):
    """A command whose help lists the options under headings.

    Args:
        sections: The headings, by the Python name of the first option under each.
    """

    def __init__(self, *args: Any, sections: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options; called by click."""
        rows: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for param in self.get_params(ctx):
            heading = self.sections.get(param.name or "", heading)
            if record := param.get_help_record(ctx):
                rows.setdefault(heading, []).append(record)
        for heading, records in rows.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def checked(option: str, check: Callable[..., T], *values: Any) -> T:
    """Calls ``check`` with an option's value and returns the result.

    Raises:
        click.BadParameter: If ``check`` raises a ValueError: its message, with the option's name.
    """
    try:
        return check(*values)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"'{option}'") from error


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Makes the values in a TOML file the defaults of a command's options; options on the command line win.

    Raises:
        click.BadParameter: If the file cannot be read, or has a key that is not an option; the message suggests a
            close match.
    """
    if path is None:
        return
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise click.BadParameter(f"{str(path)!r} is not TOML: {error}") from None
    known = options_of(ctx.command)
    defaults = {}
    for key, value in content.items():
        option = known.get(key.replace("_", "-"))
        if option is None or option.name is None:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise click.BadParameter(f"{str(path)!r} has {key!r}, which is no option; {hint}")
        defaults[option.name] = _as_typed(value, option, f"{str(path)!r}, {key}")
    ctx.default_map = defaults


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a file can hold, by name without dashes."""
    return {
        flag.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in _NOT_KEPT
        for flag in option.opts
        if flag.startswith("--")
    }


def _as_typed(value: Any, option: click.Option, where: str) -> Any:
    """A value of a TOML file as click receives it from the command line: text, or a list of texts."""
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise click.BadParameter(f"{where}: {value!r} is not true or false")
    if option.multiple:
        return [_plain(item, where) for item in (value if isinstance(value, list) else [value])]
    return _plain(value, where)


def _plain(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise click.BadParameter(f"{where}: {value!r} is not a text or a number")
    return str(value)


def write_config(ctx: click.Context, path: Path) -> None:
    """Writes the options of a call, including those from a file, as TOML for `read_config`.

    Defaults are written, too, so that the file means the same when they change; passwords in addresses are not.

    Raises:
        click.BadParameter: If the file cannot be written.
    """
    from autocompress.experiments.mlflow_store import without_secrets

    lines = ["# autocompress tune --config THIS_FILE"]
    for name, option in options_of(ctx.command).items():
        value = ctx.params.get(option.name or "")
        if value is None or value is False or value == () or option.name in _OF_ONE_STUDY:
            continue
        if isinstance(value, str | Path):
            value = without_secrets(str(value))
        lines.append(f"{name} = {_toml(value)}")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"cannot write {str(path)!r}: {error.strerror}"
        raise click.BadParameter(message, param_hint="'--save-config'") from None


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
