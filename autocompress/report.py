"""Writes the report of a study: one self-contained HTML file, the same in Markdown, and the figures."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.disk.files import read_json
from autocompress.disk.record import Record, read_record
from autocompress.showing.comparison import (
    as_bytes,
    as_count,
    comparison,
    constrained,
    decisions,
    in_unit,
    in_words,
    spaced,
    timed_together,
)
from autocompress.showing.figures import Figure, draw
from autocompress.showing.words import at_least, at_most, headline, sentence, trials_in_time, words
from autocompress.verdict.change import loss_or_gain

if TYPE_CHECKING:
    from jinja2 import Environment

FIGURES = "figures"
NOT_MEASURED = ("n/a", "n/a")


def write_report(folder: Path, *, ours: bool = False, into: Path | None = None) -> tuple[Path, ...]:
    """Writes ``report.html``, ``report.md`` and ``figures/`` from the files in a study's folder.

    Args:
        folder: The study's folder, in any state: without a result the report shows the trials so far.
        ours: Whether this process holds the study's lock.
        into: An existing folder to write to instead of the study's.

    Returns:
        The paths of the two files and of the folder of figures.
    """
    record, into = read_record(folder, ours=ours), into or folder
    figures = {figure.name: figure for figure in draw(record, into / FIGURES)}
    content = _content(record, figures)
    written = []
    for name, autoescape in (("report.html", True), ("report.md", False)):
        text = _templates(autoescape).get_template(f"{name}.j2").render(content)
        temporary = into / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        written.append(temporary.replace(into / name))
    return (*written, into / FIGURES)


@cache
def _templates(autoescape: bool) -> "Environment":
    """The environment of the page's templates, which compiles them once per process."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # slow to import, and needed for reports only

    environment = Environment(
        loader=PackageLoader("autocompress"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _markdown, "one_line": lambda text: " ".join(text.split())}
    environment.filters["together"] = _together
    return environment


def _together(value: str) -> str:
    """Keeps a number and its unit on one line; a line may break before ± and before brackets."""
    return re.sub(r" (?![±(])", "\N{NO-BREAK SPACE}", value)


def _markdown(text: object) -> str:
    """Escapes text so that Markdown shows it unchanged, also in a table."""
    plain = " ".join(str(text).split())
    for special in "\\`*_[]<>|#":
        plain = plain.replace(special, f"\\{special}")
    return plain


def _content(record: Record, figures: Mapping[str, Figure]) -> dict[str, Any]:
    """The variables of the templates."""
    found = record.found or {}
    rows = comparison(found) if found else []
    outcome, tone = headline(record)
    measured = found.get("measurements", {}).get("compressed")
    machine = record.asked.get("provenance", {}).get("machine", {})
    return {
        "name": record.name,
        "title": f"{record.asked.get('task', record.name)}: {record.asked.get('scheme', 'unknown scheme')}",
        "question": _question(record),
        "headline": outcome,
        "tone": tone,
        "sentence": sentence(record),
        "words": words(record),
        "tiles": _tiles(record),
        "rows": [row for row in rows if row[1:3] != NOT_MEASURED],
        "not_measured": ", ".join(row[0] for row in rows if row[1:3] == NOT_MEASURED),
        "device": measured["device"] if measured else "",
        "sources": "; ".join(machine.values()) and f"The machine: {'; '.join(machine.values())}.",
        "figures": figures,
        "classes": [_class_row(of_class) for of_class in found.get("classes") or ()],
        "decisions": decisions(found),
        "confidence": f"{100 * found['certificate']['confidence']:g}%" if found.get("certificate") else "",
        "layers": [_layer_row(layer) for layer in found.get("layers") or ()],
        "trials": sorted([*_trials(record), *_failures(record)], key=lambda row: row["number"]),
        "trials_caption": _caption(record),
        "command": record.asked.get("provenance", {}).get("command"),
        "facts": list(_facts(record)),
        "notes": found.get("notes") or (),
        "problems": record.problems,
    }


def _question(record: Record) -> str:
    """The study's name, date and question, in a sentence each."""
    asked = record.asked
    if not asked:
        return f"Study {record.name}"
    kind = "relative to the dense model's" if asked.get("drop") == "relative" else "in absolute points"
    bound = f"{100 * float(asked.get('max_drop', 0)):g}{record.unit}"
    date = f", begun {record.begun} UTC" if record.begun else ""
    objective = _named(asked.get("objective", "density"))
    metric = spaced(str(asked.get("metric", "the metric")))
    asked_for = f"the best {objective} that loses at most {bound} of {metric} ({kind})"
    besides = "".join(f", with {constraint}" for constraint in asked.get("constraints") or ())
    return f"Study {record.name}{date}. Asked: {asked_for}{besides}."


def _named(asked: Any) -> str:
    return " and ".join(asked) if isinstance(asked, list) else str(asked)


def _tiles(record: Record) -> list[tuple[str, str]]:
    """The most important numbers, each with its label."""
    found = record.found
    if found is None or "compressed" not in found["measurements"]:
        return []
    dense, compressed = found["measurements"]["dense"], found["measurements"]["compressed"]
    tiles = [(f"{dense['params'] / max(1, compressed['params']):.3g}×", "fewer parameters")]
    tiles.append((f"{dense['size_bytes'] / compressed['size_bytes']:.3g}×", "smaller on disk"))
    if pairs := timed_together(found["measurements"]):
        before, after = pairs[-1]
        tiles.append((f"{before['p50_ms'] / after['p50_ms']:.2f}×", f"as fast, batch of {after['batch']}"))
    drops = found["drop_pp"]
    if drops["test"] is not None:
        how, size = loss_or_gain(drops["test"], "lost", "gained")
        tiles.append((f"{size:.2f}{record.unit}", f"{how} on test"))
    if drops["upper"] is not None and (certificate := found.get("certificate")):
        confidence = 100 * certificate["confidence"]
        loss, gain = ("≤", at_most, "lost"), ("≥", at_least, "gained")
        (sign, rounded, how), size = loss_or_gain(drops["upper"], loss, gain)
        tiles.append((f"{sign} {rounded(size, record.unit)}", f"{how}, with {confidence:g}% confidence"))
    return tiles


def _class_row(of_class: Mapping[str, Any]) -> dict[str, Any]:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}%"

    known = of_class["recall"] is not None and of_class["dense_recall"] is not None
    change = 100 * (of_class["recall"] - of_class["dense_recall"]) if known else 0.0
    shares = ("dense_recall", "recall", "dense_precision", "precision")
    return {
        "name": of_class["name"],
        "support": of_class["support"],
        **{key: percent(of_class[key]) for key in shares},
        "change": f"{change:+.1f} pp" if known else "n/a",
        "lost": change < 0,
    }


def _layer_row(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": layer["name"],
        "kind": layer["kind"],
        "dense_width": f"{layer['dense_width']:,}",
        "width": "gone" if layer["width"] is None else f"{layer['width']:,}",
        "dense_params": f"{layer['dense_params']:,}",
        "params": f"{layer['params']:,}",
        "kept": f"{100 * layer['params'] / max(1, layer['dense_params']):.1f}%",
    }


def _trials(record: Record) -> Iterator[dict[str, Any]]:
    """The rows of finished trials in the table of trials."""
    answer = record.answer["number"] if record.answer else None
    for trial in record.trials:
        cost, latency = trial["measurement"], trial["measurement"].get("latency") or ()
        error = trial.get("drop_se")
        yield {
            "number": trial["number"],
            "reason": "",
            "answer": trial["number"] == answer,
            "chosen": in_words(trial.get("params", {})),
            "density": f"{trial['density']:.4f}",
            "score": f"{trial['score']:.4f}",
            "drop": f"{100 * trial['drop']:+.2f}" + (f" ± {100 * error:.2f}" if error else "") + record.unit,
            "feasible": trial["feasible"],
            "note": ", given up early" * (trial.get("given_up_at") is not None) + _besides(trial),
            "params": f"{cost['params']:,}",
            "size": as_bytes(cost["size_bytes"]),
            "macs": as_count(cost["macs"]),
            "latency": f"{latency[0]['p50_ms']:.3f} ms" if latency else "not taken",
            "seconds": f"{trial['seconds']:.1f} s",
        }


def _besides(trial: Mapping[str, Any]) -> str:
    """The trial's value of each constraint, and which of them it violates, as text after yes or no."""
    note = ""
    for checked in trial.get("constraints") or ():
        note += f", {constrained(checked['text'])} {in_unit(checked['value'], checked.get('unit', ''))}"
        note += " (violated)" * (checked["excess"] > 0)
    return note


def _failures(record: Record) -> Iterator[dict[str, Any]]:
    """The rows of failed trials in the table of trials."""
    for number, reason in record.failed:
        yield {"number": number, "reason": reason or "for a reason that is not known"}


def _caption(record: Record) -> str:
    within = sum(bool(trial["feasible"]) for trial in record.trials)
    caption = f"{len(record.trials)} finished, {within} of them within the bound"
    given_up = sum(trial.get("given_up_at") is not None for trial in record.trials)
    caption += f"; {given_up} given up early, whose drop is that of the moment" if given_up else ""
    caption += f"; {len(record.failed)} failed. " if record.failed else ". "
    return caption + "The drop is on validation data, ± one standard error of the samples."


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    """Names and values of all that is needed to reproduce the study or to check a copy of it."""
    asked, provenance = record.asked, record.asked.get("provenance", {})
    recovery = asked.get("recovery", {})
    for what in ("scheme", "search", "objective", "sampler", "seed"):
        if what in asked:
            yield what, _named(asked[what])
    if recovery:
        yield "recovery", ", ".join(f"{name} {value}" for name, value in recovery.items() if value is not None)
    if came_to := (record.answer or {}).get("recovery"):
        yield "recovery of the answer", came_to
    for what in ("trials", "timeout", "device"):
        if asked.get(what) is not None:
            yield what, str(asked[what])
    if record.found:
        yield "search", f"{trials_in_time(record.found)}; {record.found['stopped']}"
    for name, data in provenance.get("data", {}).items():
        digest = f"SHA-256 {data['sha256']}" if data.get("sha256") else "not hashed: not held in memory"
        yield f"{name} data", f"{data['n']:,} samples, {digest}"
    if "fingerprint" in asked:
        yield "dense model and data", f"fingerprint {asked['fingerprint']}"
    yield from _files(record)
    if provenance.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    for what, value in provenance.get("machine", {}).items():
        yield what, value


def _files(record: Record) -> Iterator[tuple[str, str]]:
    """The files of the answer with their sizes, and the hash of its weights from ``plan.json``."""
    best = record.folder / "best"
    for name, file in (record.found or {}).get("artifacts", {}).items():
        path = best / Path(file).name
        yield (
            f"file, {name}",
            f"best/{path.name}, {as_bytes(path.stat().st_size) if path.is_file() else 'missing'}",
        )
    for name, reason in (record.found or {}).get("not_exported", {}).items():
        yield f"file, {name}", f"not offered: {reason}"
    if (best / "plan.json").is_file():
        try:
            digest = read_json(best / "plan.json").get("sha256")
        except ValueError as error:
            yield "compressed weights", str(error)
        else:
            if digest:
                yield "compressed weights", f"SHA-256 {digest}"
