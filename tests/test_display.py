import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import autocompress as ac
from autocompress import progress
from autocompress.gauges.latency import Latency
from autocompress.goal import Objective
from autocompress.measurement import Measurement
from autocompress.sampler import ThresholdSampler
from autocompress.studies.settings import Settings
from autocompress.studies.watcher import Beginning
from autocompress.terminal.display import Display, Footer
from autocompress.trial import Bound, TrialResult
from autocompress.verdict.constraint import Checked

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
        values=(density,),
        seconds=2.0,
        measurement=replace(COMPRESSED, density=density),
        plan={},
        curves={"residual": (0.5, 0.25)},
    )


def beginning(*, relative: bool = False, notes: tuple[str, ...] = (), timeout_s: float | None = None) -> Beginning:
    data = (torch.zeros(40, 2), torch.zeros(40, dtype=torch.long))
    task = ac.Task(nn.Linear(2, 2), data, data, data, name="[red]digits")
    settings = Settings(
        schemes=(ac.parse_scheme("StructPrune"),),
        bound=Bound(0.015, relative),
        objectives=(Objective("density", lambda m: m.density),),
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
        display.began(replace(asked, settings=replace(asked.settings, objectives=(objective,))))
    assert "highest throughput that loses" in printed(console)


def test_the_time_left_is_never_more_than_the_timeout():
    console = plain()
    with Display(console) as display:
        display.began(beginning(timeout_s=3.0))
        display.trial(trial(1), None, None)
    (line,) = [line for line in printed(console).splitlines() if line.startswith("trial  1  density")]
    assert "best none yet" in line
    assert float(re.search(r"at most (\d+) s left", line)[1]) <= 3


def test_the_time_left_is_shared_by_all_that_run_at_a_time_and_what_is_named_twice_is_shown_once():
    console, asked = plain(), beginning()
    size = Objective("size", lambda m: m.size_bytes, unit="bytes")
    settings = replace(asked.settings, objectives=(*asked.settings.objectives, size))
    checked = Checked("size<=2kB", 1000.0, 0.0, -0.7, unit="bytes", is_cost=True)
    with Display(console) as display:
        display.began(replace(asked, settings=settings, workers=4))
        display.trial(replace(trial(1), values=(0.25, 1000.0), constraints=(checked,)), None, None)
    assert "at most 2 s left  density 0.2500, size 1.0 kB\n" in printed(console)


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


def test_the_footer_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    searching, exporting = Footer("trial 2", 8.0), Footer("exporting the answer")
    assert searching.__rich__().plain == "trial 2 · at most 8 s left"
    assert exporting.__rich__().plain == "exporting the answer"
    now = 103.0
    assert searching.__rich__().plain == "trial 2 · 3 s · at most 5 s left"
    assert exporting.__rich__().plain == "exporting the answer · 3 s"
    now = 120.0  # it is slower than the trials before it, and how much is not known
    assert searching.__rich__().plain == "trial 2 · 20 s"
    for at, done in ((121.0, 0.5), (125.0, 0.6)):
        now = at
        searching.advance(done)
    expected = "trial 2 · 25 s · 60%, about 16 s left · at most 16 s of the search left"
    assert searching.__rich__().plain == expected


def test_the_footer_says_how_long_it_still_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    first, exporting = Footer("trial 1", repeats=4), Footer("exporting the answer")
    for at, done in ((102.0, 0.05), (110.0, 0.25)):  # two seconds of preparation, then 40 s for all
        now = at
        for footer in (first, exporting):
            footer.advance(done)
            footer.advance(0.01)  # something inside it that was counted anew
    assert first.__rich__().plain == "trial 1 · 10 s · 25%, about 30 s left · at most 150 s of the search left"
    assert exporting.__rich__().plain == "exporting the answer · 10 s · 25%, about 30 s left"
    now = 130.0  # nothing has been heard since: it counts down
    assert exporting.__rich__().plain == "exporting the answer · 30 s · 25%, about 10 s left"
    now = 150.0  # and does not say what it does not know
    assert exporting.__rich__().plain == "exporting the answer · 50 s"


def test_what_is_reported_reaches_the_line_of_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = plain()
    with Display(console) as display:
        display.doing("training: epoch 1")
        now = 120.0
        with progress.span(0, 0.5):
            progress.report(0.5)
        display.doing("training: epoch 2")  # the same goes on
        now = 160.0
        progress.report(0.75)
        progress.report(0.76)
        now = 200.0
    progress.report(0.9)  # nobody listens any more
    lines = printed(console).splitlines()
    assert lines == ["training: epoch 1", "training: epoch 2", "training: epoch 2 · 60 s · 75%, about 20 s left"]
