import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from autocompress.disk.record import read_record
from autocompress.formats.onnx_export import quietly
from autocompress.showing.words import words
from autocompress.terminal.show import make_console, short, show_list, show_result

FOLDER = Path("/runs/[bold]demo")  # brackets are rich's markup: a path may have them
ESCAPE = "\x1b["


def shown(found: dict, folder: Path = FOLDER, **kind: object) -> str:
    file = io.StringIO()
    show_result(Console(file=file, width=110, highlight=False, **kind), found, folder)
    return file.getvalue()


def test_a_result_is_a_table_the_verdict_and_what_is_next(recorded, tmp_path):
    found = recorded.found(recorded.three_trials(), not_exported={"pt2": "torch cannot [trace] it"})
    folder = tmp_path / "[bold]demo"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "model.onnx").write_bytes(bytes(12_800))
    (folder / "report.html").touch()
    text = shown(found, folder)
    assert ESCAPE not in text
    (line,) = [line for line in text.splitlines() if line.startswith("parameters")]
    assert re.split(r" {2,}", line.strip()) == ["parameters", "10,000", "400", "25.00x"]
    assert found["sentence"] in text
    assert "3 trials in 23 s; the budget of trials is spent." in text
    assert f"12.8 kB  {folder}/best/model.onnx" in text  # where it lies now, not where it was written
    assert "not offered: torch cannot [trace] it" in text
    assert f"Everything is in {folder}" in text
    assert f"Next: {folder}/report.html   (look at it in a browser)" in text
    assert f"Next: {folder}/best/README.md   (how to load it)\nNext: autocompress ui --out {tmp_path}  " in text


@pytest.mark.parametrize(
    ("uri", "next_step"),
    [
        (None, "autocompress ui --out {home}"),
        ("sqlite:///{home}/mlflow.db", "autocompress ui --out {home}"),
        ("sqlite:////elsewhere/all runs.db", "mlflow ui --backend-store-uri 'sqlite:////elsewhere/all runs.db'"),
        ("postgresql://host/runs", "mlflow ui --backend-store-uri postgresql://host/runs"),
        ("http://mlflow.example:5000", "http://mlflow.example:5000"),
        ("databricks", "databricks"),
    ],
)
def test_what_is_next_shows_the_trials_where_they_were_logged(recorded, tmp_path, uri, next_step):
    settings = recorded.asked(tracking_uri=uri and uri.format(home=tmp_path))
    found = recorded.found(recorded.three_trials())
    folder = recorded.write_study(tmp_path, settings=settings, result=found)
    last = shown(found, folder).splitlines()[-1]
    assert last == f"Next: {next_step.format(home=tmp_path)}   (compare the trials in MLflow)"


@pytest.mark.parametrize(("before", "new"), [(2, "1"), (3, "none")])
def test_of_a_resumed_study_the_time_is_said_to_be_since_then(recorded, before, new):
    text = shown(recorded.found(recorded.three_trials(), resumed_with=before))
    assert f"3 trials, {new} of them in the 23 s since the study was resumed; the budget of" in text


def test_a_file_that_is_gone_is_said_to_be_missing(recorded):
    assert f"missing  {FOLDER}/best/model.onnx" in shown(recorded.found(recorded.three_trials()))


def test_a_result_that_is_not_met_shows_no_table_and_no_artifacts(recorded):
    text = shown(recorded.found(recorded.three_trials(), answer=None))
    assert "Not met: of 2 trials none loses 1 pp." in text
    assert "compressed" not in text
    assert "best/" not in text
    assert "Next: autocompress ui --out /runs" in text


def test_a_narrow_terminal_folds_names_and_cuts_none(recorded, tmp_path):
    file = io.StringIO()
    console = Console(file=file, width=40, highlight=False, force_terminal=True, color_system=None)
    show_result(console, recorded.found(recorded.three_trials()), FOLDER)
    recorded.write_study(tmp_path, "chest-xrays")
    show_list(console, [read_record(tmp_path / "chest-xrays", journal=False)])
    assert "…" not in file.getvalue()


@pytest.mark.parametrize("answer", [2, None])
def test_an_interrupted_result_says_how_to_go_on(recorded, answer):
    text = shown(recorded.found(recorded.three_trials(), answer, stopped="interrupted"))
    assert "interrupted." in text
    assert "Next: autocompress tune --resume [bold]demo --out /runs" in text
    assert (f"{FOLDER}/best/model.onnx" in text) is (answer is not None)


def test_the_verdict_has_its_colour_in_a_terminal_only(recorded, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = {"force_terminal": True, "color_system": "standard"}
    colours = {"certified": "\x1b[1;32m", "not certifiable": "\x1b[1;33m", "not met": "\x1b[1;31m"}
    for verdict, colour in colours.items():
        found = recorded.found(recorded.three_trials(), verdict=verdict)
        assert colour in shown(found, **terminal)
        assert ESCAPE not in shown(found)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[1-3]m", shown(found, **terminal))


def test_studies_are_listed_oldest_first_in_whatever_state(recorded, tmp_path):
    trials = recorded.three_trials()
    late, early = (recorded.asked() for _ in range(2))
    late["provenance"]["begun"] = "2026-11-21T09:00:00+00:00"
    recorded.write_study(tmp_path, "late[x]", settings=late, result=recorded.found(trials, answer=None))
    recorded.write_study(tmp_path, "early", settings=early, result=recorded.found(trials))
    recorded.write_study(tmp_path, "broken")
    (tmp_path / "broken" / "study.json").write_text("{")
    file = io.StringIO()
    records = [read_record(folder, journal=False) for folder in tmp_path.iterdir()]
    show_list(Console(file=file, width=110), records)
    header, *lines = file.getvalue().splitlines()
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    assert header.split()[:2] == ["name", "begun"]
    assert cells[0] == ["broken", "damaged", "3"]
    finished = ["early", "2026-11-20 15:38", "StructPrune", "finished", "3", "0.0400", "+0.67 pp"]
    assert cells[1] == [*finished, "not certifiable"]
    assert cells[2] == ["late[x]", "2026-11-21 09:00", "StructPrune", "finished", "3", "not met"]


def test_the_console_is_plain_where_there_is_no_terminal(capsys):
    console = make_console(stderr=True)
    assert not console.is_terminal
    console.print("[bold]a path/with_1_number[/bold]")
    assert capsys.readouterr() == ("", "a path/with_1_number\n")
    make_console(stderr=False).print("x" * 100)
    assert capsys.readouterr() == (f"{'x' * 100}\n", "")


@pytest.mark.parametrize("stderr", [False, True])
def test_what_a_thread_says_while_an_export_keeps_exporters_quiet_is_printed(capsys, stderr: bool) -> None:
    console = make_console(stderr=stderr)
    with quietly():
        console.print("note: the server does not answer")
    said = capsys.readouterr()
    assert (said.err if stderr else said.out) == "note: the server does not answer\n"


def test_paths_below_the_current_folder_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "autocompress-runs" / "a") == Path("autocompress-runs/a")
    assert short(Path("/elsewhere/a")) == Path("/elsewhere/a")


def test_a_front_is_a_table_and_a_limit_on_a_cost_a_row(recorded):
    objectives = [{"name": "latency", "unit": "ms"}, {"name": "size", "unit": "bytes"}]
    front = [
        {"number": n, "density": 0.1, "drop_pp": 0.5, "values": {"latency": 1.5, "size": 4000.0}} for n in (2, 3)
    ]
    judged = {"value": 5.5, "met": False, "is_cost": True, "unit": "ms"}
    limits = [{"constraint": "latency<=5ms", "val": {"value": 4.9, "excess": -0.02}, "test": judged}]
    found = recorded.found(recorded.three_trials(), objectives=objectives, front=front, constraints=limits)
    rows = [re.split(r" {2,}", line.strip()) for line in shown(found).splitlines()]
    assert ["density", "drop on val", "latency", "size"] in rows
    assert ["trial 2 (the answer)", "0.1000", "+0.50", "1.5 ms", "4.0 kB"] in rows
    assert ["trial 3", "0.1000", "+0.50", "1.5 ms", "4.0 kB"] in rows
    assert ["latency<=5ms", "5.5 ms", "violated"] in rows


def test_decision_thresholds_are_a_row_for_each_model(recorded):
    text = shown(recorded.found(recorded.three_trials(), **recorded.decided()))
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert [
        "decision thresholds, chosen on val",
        "probability",
        "sensitivity on test",
        "specificity on test",
    ] in rows
    assert ["ill, dense", "0.281", "0.9700 (>= 0.9412)", "0.9200 (>= 0.8800)"] in rows
    assert ["ill, compressed", "0.312", "0.9700 (>= 0.9412)", "0.9000 (>= 0.8600)"] in rows
    assert ">=: at least, with 95% confidence each" in text
    both = recorded.decided()["decision_thresholds"]
    others = {model: [{**one, "metric": "sensitivity@specificity=0.9"} for one in both[model]] for model in both}
    both = {model: both[model] + others[model] for model in both}
    text = shown(recorded.found(recorded.three_trials(), decision_thresholds=both))
    assert "ill, compressed, sensitivity@specificity=0.9 " in text


def test_the_shortlist_is_said_in_words(recorded, tmp_path):
    tested = {"number": 2, "density": 0.04, "outcome": "certified", "upper": 0.0093}
    skipped = {"number": 1, "density": 0.02, "outcome": None, "upper": None}
    gained = {**tested, "number": 3, "upper": -0.0027}
    record = read_record(
        recorded.write_study(
            tmp_path, "gained", result=recorded.found(recorded.three_trials(), shortlist=[gained, skipped])
        )
    )
    assert "trial 3 (density 0.04) gains at least 0.27 pp, certified" in " ".join(words(record))
    for shortlist in ([tested], [tested, skipped]):
        result = recorded.found(recorded.three_trials(), shortlist=shortlist)
        record = read_record(recorded.write_study(tmp_path, f"of-{len(shortlist)}", result=result))
        said = " ".join(words(record))
        assert ("trial 2 (density 0.04) loses at most 0.93 pp, certified" in said) is (len(shortlist) > 1)
        assert ("trial 1 (density 0.02) was not tested" in said) is (len(shortlist) > 1)
