import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import autocompress as ac
from autocompress.certify import Verdict
from autocompress.constraint import parse_constraint
from autocompress.display import Display, _short, as_bytes, as_count, make_console, show_result
from autocompress.export import Artifact, Export
from autocompress.goal import Objective
from autocompress.measurement import Latency, Measurement
from autocompress.per_class import per_class
from autocompress.result import Beginning, Result, Settings
from autocompress.sampler import ThresholdSampler
from autocompress.search import BUDGET_SPENT, INTERRUPTED
from autocompress.task import Evaluation
from autocompress.trial import Bound, TrialResult

LATENCY = (Latency(1, 0.25, 0.4, 100), Latency(32, 0.8, 5.0, 40))
HALF = (Latency(1, 0.125, 0.2, 100), Latency(32, 0.4, 2.5, 40))
DENSE = Measurement(1.0, 77_754, 318_536, 763_520, "cpu", LATENCY, peak_memory_bytes=847_280)
COMPRESSED = Measurement(0.0406, 3_160, 17_880, 26_354, "cpu", HALF, peak_memory_bytes=226_376)
FOLDER = Path("/runs/[bold]demo")  # brackets are rich's markup: a path may have them
ESCAPE = "\x1b["


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), width=110, highlight=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=110, highlight=False, force_terminal=True, color_system="standard")


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def trial(number: int, *, density: float = 0.25, drop: float = 0.005, feasible: bool = True) -> TrialResult:
    return TrialResult(
        number=number,
        density_asked=density,
        density=density,
        score=0.98,
        drop=drop,
        drop_se=0.002,
        feasible=feasible,
        value=density,
        seconds=2.0,
        measurement=replace(COMPRESSED, density=density),
        plan={},
        curves={"residual": (0.5, 0.25)},
    )


def beginning(*, relative: bool = False, notes: tuple[str, ...] = (), timeout_s: float | None = None) -> Beginning:
    data = (torch.zeros(40, 2), torch.zeros(40, dtype=torch.long))
    task = ac.Task(nn.Linear(2, 2), data, data, data, name="[red]digits")
    settings = Settings(
        scheme=ac.parse_scheme("StructPrune"),
        bound=Bound(0.015, relative),
        objective=Objective("density", lambda m: m.density),
        trials=5,
        timeout_s=timeout_s,
    )
    return Beginning("demo", task, settings, FOLDER, DENSE, 0.9889, 0.01, notes)


def play(display: Display, **kwargs: object) -> None:
    """A study of three trials, the second of which fails."""
    with display:
        display.doing("measuring the dense model")
        display.began(beginning(**kwargs))
        display.trial(trial(1), trial(1), None)
        display.failed(2, "the realized model [x] is off")
        display.trial(trial(3, density=0.05, drop=0.03, feasible=False), trial(1), None)
        display.doing("exporting the answer")


def test_where_there_is_no_terminal_each_event_is_a_plain_line():
    console = plain()
    play(Display(console), notes=("one layer is left alone",))
    text = printed(console)
    assert ESCAPE not in text
    lines = text.splitlines()
    assert lines[0] == "measuring the dense model"
    assert lines[1] == (
        "[red]digits: StructPrune, lowest density that loses at most 1.5 pp of accuracy (absolute points)"
    )
    assert lines[2] == ("dense: accuracy 0.9889 on 40 val samples, 77,754 parameters, 318.5 kB, 763.5k MACs")
    assert lines[3] == "note: one layer is left alone"
    trials = [line for line in lines if re.match(r"trial +\d+  ", line)]
    assert len(trials) == 3
    first, failed, third = trials
    assert first.startswith("trial  1  density 0.2500  val 0.9800  drop +0.50 pp  feasible yes")
    assert first.endswith("best 0.2500  at most 8 s left")
    assert failed == "trial  2  failed: the realized model [x] is off"
    assert "feasible no" in third and "drop +3.00 pp" in third
    assert third.endswith("best 0.2500  at most 4 s left")
    assert lines[-1] == "exporting the answer"


def test_the_unit_of_a_relative_bound_is_said():
    console = plain()
    with Display(console) as display:
        display.began(beginning(relative=True))
        display.trial(trial(1), None, None)
    assert "loses at most 1.5% of accuracy relative to the dense model's" in printed(console)
    assert "drop +0.50%  feasible" in printed(console)


def test_an_objective_that_is_maximized_is_sought_at_its_highest():
    asked = beginning()
    objective = Objective("throughput", lambda m: m.throughput_per_s, "maximize")
    console = plain()
    with Display(console) as display:
        display.began(replace(asked, settings=replace(asked.settings, objective=objective)))
    assert "highest throughput that loses" in printed(console)


def test_the_time_left_is_never_more_than_the_timeout():
    console = plain()
    with Display(console) as display:
        display.began(beginning(timeout_s=3.0))
        display.trial(trial(1), None, None)
    (line,) = [line for line in printed(console).splitlines() if line.startswith("trial  1  density")]
    assert "best none yet" in line
    assert float(re.search(r"at most (\d+) s left", line)[1]) <= 3


def test_no_line_is_wrapped_however_narrow_the_console_is():
    console = Console(file=io.StringIO(), width=20, highlight=False)
    play(Display(console))
    (line,) = (line for line in printed(console).splitlines() if line.startswith("trial  1  density"))
    assert line.endswith("at most 8 s left")


def test_verbose_adds_the_curves_and_what_the_search_believes():
    sampler = ThresholdSampler(0.01, 0.01)
    belief = sampler.posterior([])
    for verbose in (False, True):
        console = plain()
        with Display(console, verbose=verbose) as display:
            display.began(beginning())
            display.trial(trial(1), trial(1), belief)
        assert ("residual: 0.5 0.25" in printed(console)) is verbose
        assert ("lowest feasible density: " in printed(console)) is verbose


def test_in_a_terminal_a_table_grows_in_place():
    console = terminal()
    play(Display(console), notes=("one layer is left alone",))
    text = printed(console)
    assert ESCAPE in text
    shown = without_escapes(text)
    for words in ("trial", "drop", "feasible", "0.2500", "+0.50", "failed", "0.0500", "+3.00"):
        assert words in shown
    assert "[red]digits: StructPrune" in shown
    assert "note: one layer is left alone" in shown
    last = shown[shown.rindex("feasible") :]
    assert last.count("0.2500") == 3  # the first trial's density, and twice the best so far
    assert "exporting" not in last  # the spinner is gone at the end
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_a_terminal_is_given_back_when_a_study_fails():
    console = terminal()
    with pytest.raises(RuntimeError), Display(console) as display:
        display.began(beginning())
        display.trial(trial(1), trial(1), None)
        raise RuntimeError
    assert printed(console).count("\x1b[?25h") == 1


def result(**changes: object) -> Result:
    certificate = Verdict(
        outcome="certified",
        drop=0.002,
        upper=0.0085,
        lower=-0.004,
        n=450,
        confidence=0.95,
        max_drop=0.01,
        relative=False,
        metric="accuracy",
    )
    artifacts = (
        Artifact("onnx", FOLDER / "best" / "model.onnx", 12_800, 1e-6),
        Artifact("safetensors", FOLDER / "best" / "model.safetensors", 17_880, 0.0),
    )
    met = Result(
        name="demo",
        verdict="certified",
        sentence=certificate.sentence,
        certificate=certificate,
        model=nn.Linear(2, 2),
        density=0.0406,
        drop_val=0.009,
        measurements={"dense": DENSE, "compressed": COMPRESSED},
        scores={"dense": {"val": 0.9889, "test": 0.99}, "compressed": {"val": 0.98, "test": 0.988}},
        records=(trial(1), trial(2)),
        threshold=(0.03, 0.05),
        stopped=BUDGET_SPENT,
        seconds=42.0,
        exported=Export(artifacts, {"pt2": "torch cannot [trace] it"}),
        folder=FOLDER,
    )
    return replace(met, **changes)


def test_a_class_that_is_sacrificed_is_shown_and_a_violated_constraint_too() -> None:
    targets = np.repeat([0, 1], [40, 10])
    before, after = (
        np.eye(2, dtype=np.float32)[found] for found in (targets, np.where(targets == 1, [0], targets))
    )
    dense, compressed = (Evaluation(1.0, outputs, targets) for outputs in (before, after))
    constraint = parse_constraint("sensitivity>=0.5")
    text = shown(
        result(
            per_class=per_class(dense, compressed, ("common", "[rare]")),
            constraints=((constraint.check(dense), constraint.judge(compressed)),),
        )
    )
    assert "classes that lost more than the bound" in text
    assert row(text, "[rare]")[1:] == ["10", "1.0000", "0.0000", "-100.00 pp"]
    assert "common" not in text
    assert row(text, "sensitivity on val")[1:] == ["1.0000"]
    assert row(text, "sensitivity on test")[1:] == ["0.0000", "violated"]
    assert "classes that lost" not in shown(result(per_class=per_class(dense, dense)))


def not_met(**changes: object) -> Result:
    return result(
        verdict="not met",
        sentence="Not met: of 2 trials none loses at most 1 pp on val.",
        certificate=None,
        density=1.0,
        drop_val=0.0,
        measurements={"dense": DENSE},
        scores={"dense": {"val": 0.9889}},
        exported=Export((), {}),
        **changes,
    )


def shown(found: Result, console: Console | None = None) -> str:
    console = console or plain()
    show_result(console, found)
    return printed(console)


def row(text: str, name: str) -> list[str]:
    """The cells of one row of the table."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return re.split(r" {2,}", line.strip())


def test_a_result_shows_dense_beside_compressed_and_the_ratio():
    text = shown(result())
    assert ESCAPE not in text
    assert row(text, "score on val") == ["score on val", "0.9889", "0.9800", "-0.89 pp"]
    assert row(text, "score on test") == ["score on test", "0.9900", "0.9880", "-0.20 pp"]
    assert row(text, "density") == ["density", "1.0000", "0.0406"]
    assert row(text, "parameters") == ["parameters", "77,754", "3,160", "24.61x"]
    assert row(text, "weights on disk") == ["weights on disk", "318.5 kB", "17.9 kB", "17.82x"]
    assert row(text, "MACs") == ["MACs", "763.5k", "26.35k", "28.97x"]
    assert row(text, "latency, batch 1 ")[-1] == "2.00x"
    assert "0.800 ms (p95 5.000)" in text
    assert row(text, "GPU power") == ["GPU power", "n/a", "n/a"]


def test_what_a_gpu_used_is_shown_where_it_was_measured():
    gpu = {"gpu_memory_bytes": 1_500_000_000, "gpu_utilization_pct": 71.0, "gpu_power_w": 250.0}
    dense, compressed = replace(DENSE, **gpu, energy_j=0.004), replace(COMPRESSED, **gpu, energy_j=0.002)
    text = shown(result(measurements={"dense": dense, "compressed": compressed}))
    assert row(text, "GPU memory in use")[1:3] == ["1.50 GB", "1.50 GB"]
    assert row(text, "GPU utilization")[1:3] == ["71%", "71%"]
    assert row(text, "energy an inference") == ["energy an inference", "4.000 mJ", "2.000 mJ", "2.00x"]
    assert "n/a" not in text


def test_a_result_that_is_met_says_where_things_are_and_what_is_next():
    text = shown(result())
    assert result().sentence in text
    assert "2 trials in 42 s; the budget of trials is spent." in text
    assert f"12.8 kB  {FOLDER}/best/model.onnx" in text
    assert "not offered: torch cannot [trace] it" in text
    assert f"Everything is in {FOLDER}" in text
    assert f"Next: {FOLDER}/best/README.md   (how to load it)\nNext: autocompress ui --out /runs   " in text


def test_a_result_that_is_not_met_shows_no_table_and_no_artifacts():
    text = shown(not_met())
    assert "Not met: of 2 trials none loses at most 1 pp on val." in text
    assert "compressed" not in text
    assert "best/" not in text
    assert "Next: autocompress ui --out /runs" in text


@pytest.mark.parametrize("found", [result(stopped=INTERRUPTED), not_met(stopped=INTERRUPTED)])
def test_an_interrupted_result_says_how_to_go_on(found):
    text = shown(found)
    assert "interrupted." in text
    assert "Next: autocompress tune --resume demo --out /runs" in text
    assert (f"{FOLDER}/best/model.onnx" in text) is found.met


def test_the_verdict_has_its_colour_in_a_terminal():
    green, yellow, red = "\x1b[1;32m", "\x1b[1;33m", "\x1b[1;31m"
    assert green in shown(result(), terminal())
    assert yellow in shown(result(verdict="not certifiable"), terminal())
    assert red in shown(not_met(), terminal())


def test_the_console_is_plain_where_there_is_no_terminal(capsys):
    console = make_console(stderr=True)
    assert not console.is_terminal
    console.print("[bold]a path/with_1_number[/bold]")
    assert capsys.readouterr() == ("", "a path/with_1_number\n")
    make_console(stderr=False).print("x" * 100)
    assert capsys.readouterr() == (f"{'x' * 100}\n", "")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (318_536, "318.5 kB"),
        (999_949, "999.9 kB"),
        (999_960, "1.0 MB"),
        (1_234_567, "1.2 MB"),
        (2_500_000_000, "2.50 GB"),
        (1.5e12, "1500.00 GB"),
    ],
)
def test_bytes_are_in_the_unit_that_suits_them(n, text):
    assert as_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (763_520, "763.5k"),
        (999_999, "1M"),
        (12_345_678, "12.35M"),
        (4_100_000_000, "4.1G"),
        (999_960_000_000, "1T"),
        (1.2e13, "12T"),
    ],
)
def test_counts_are_in_thousands_millions_and_billions(n, text):
    assert as_count(n) == text


def test_paths_below_the_current_folder_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert _short(tmp_path / "autocompress-runs" / "a") == Path("autocompress-runs/a")
    assert _short(Path("/elsewhere/a")) == Path("/elsewhere/a")
