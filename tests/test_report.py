"""The report of a study, parsed as a browser would."""

import itertools
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from autocompress.report import _together, write_report

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and its text; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag in tags]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(folder) -> tuple[Page, str]:
    write_report(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def full(recorded, tmp_path_factory):
    """A study with all there can be, and hostile names in all places that take one."""
    trials = recorded.three_trials()
    result = recorded.found(
        trials,
        failed=[{"number": 4, "reason": f"the model is off {HOSTILE}"}],
        layers=[recorded.layer(f"stem.{HOSTILE}", 16, 2), recorded.layer("head", 10, 10)],
        **recorded.by_class(["normal", f"effusion {HOSTILE}", "$x_1$", "hernia"]),
        **recorded.decided(),
    )
    asked = recorded.asked(task=f"chest {HOSTILE}", scheme=f"StructPrune{HOSTILE}")
    return recorded.write_study(tmp_path_factory.mktemp("runs"), settings=asked, trials=trials, result=result)


@pytest.fixture(scope="module")
def page(full) -> tuple[Page, str]:
    return read(full)


def test_the_page_opens_offline(page):
    parsed, html = page
    assert not parsed.all("script", "link", "iframe", "object", "base")
    for attrs in (attrs for _, attrs in parsed.elements):
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attrs.get(name) or ""
            assert not value or value.startswith(("#", "data:image/")), f"{name}={value}"
    assert not re.search(r"@import|url\((?!#)", html)
    assert not re.search(r"(https?:)?//[\w.]+", re.sub(r'content="default-src[^"]*"', "", html)), "an address"
    (policy,) = [a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_hostile_names_are_shown_and_not_run(page):
    parsed, html = page
    assert HOSTILE not in html
    assert f"chest {HOSTILE}" in parsed.text
    assert f"the model is off {HOSTILE}" in parsed.text
    assert f"stem.{HOSTILE}" in parsed.text


def test_every_figure_has_a_name_and_a_description(page):
    parsed, html = page
    figures = parsed.all("svg")
    assert len(figures) == 6  # drop, latency, classes, confusion, layers, recovery
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for svg in figures:
        assert svg["role"] == "img"
        for name in svg["aria-labelledby"].split():
            assert name in ids
    assert all((attrs.get("alt") or "").strip() for attrs in parsed.all("img"))
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', html))
    assert references <= set(ids)


def test_headings_go_down_one_level_at_a_time_and_sections_are_named(page):
    parsed, _ = page
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = {attrs["id"] for _, attrs in parsed.elements if "id" in attrs}
    for section in parsed.all("section"):
        assert section["aria-labelledby"] in ids


def test_it_fits_a_phone_the_dark_and_paper(page):
    parsed, html = page
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert "@media (prefers-color-scheme: dark)" in html
    assert "@media print" in html
    assert "currentColor" in html  # of the figures
    assert len(re.findall(r'<div class="wide"[^>]*>\s*<table', html)) == len(parsed.all("table"))


def test_every_trial_is_there_the_failed_ones_with_their_reason(page):
    _, html = page
    (table,) = re.findall(r'<table class="trials">.*?</table>', html, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr")[2:]]
    assert [row[0] for row in rows] == ["1", "2 (the answer)", "3", "4"]
    assert rows[0][1:5] == ["0.0200", "0.9644", "+1.56 ± 0.40 pp", "no"]
    assert rows[1][4] == "yes"
    assert "failed:" in rows[3][1] and "the model is off" in rows[3][1]


def test_the_words_say_what_was_lost_where_how_sure_and_what_it_buys(page):
    text = page[0].text
    assert "Met on validation data, not proven on test data" in text
    assert "accuracy went from 0.9870 to 0.9800 (444 right answers before, 441 after)" in text
    assert "With 95% confidence the true loss is at most 1.63 pp, while 1 pp was allowed: 450 test samples" in text
    assert (
        "The class that lost most is 'hernia': of its 10 test samples 10 were found before and 8 are now" in text
    )
    assert "within the bound with a probability of 92%" in text
    assert "It keeps 400 of 10,000 parameters (25 times fewer)" in text
    assert "0.5 ms instead of 0.8 ms at batch 32 (1.60 times as fast)" in text
    assert "On a processor, 2 cores, a forward pass in PyTorch on 1 thread takes" in text


def test_decision_thresholds_stand_beside_each_other(page, full):
    parsed, _ = page
    assert "ill dense specificity@ sensitivity=0.95 0.281 0.9512 0.9300 0.9700 (>=" in parsed.text
    assert "ill compressed specificity@ sensitivity=0.95 0.312" in parsed.text
    assert "The bounds on test hold with 95% confidence each." in parsed.text
    row = "| ill | compressed | specificity@sensitivity=0.95 | 0.312 | 0.9512 | 0.9300 | 0.9700 (\\>= 0.9412) |"
    assert row in (full / "report.md").read_text(encoding="utf-8")


def test_the_confidence_is_the_one_that_was_asked_for(recorded, tmp_path):
    trials = recorded.three_trials()
    result = recorded.found(trials)
    result["certificate"]["confidence"] = 0.9
    text = read(recorded.write_study(tmp_path, trials=trials, result=result))[0].text
    assert "With 90% confidence the true loss is at most" in text
    assert "lost, with 90% confidence" in text and "95% confidence" not in text.replace("their 95%", "")


def test_a_loss_that_is_a_gain_for_sure_is_called_one(recorded, tmp_path):
    trials = recorded.three_trials()
    result = recorded.found(trials)
    result["certificate"] |= {"outcome": "certified", "upper": -0.0224}
    result["drop_pp"]["upper"] = -2.24
    text = read(recorded.write_study(tmp_path, trials=trials, result=result))[0].text
    assert "With 95% confidence the true gain is at least 2.24 pp; a loss of 1 pp was allowed." in text
    assert "≥ 2.24 pp gained, with 95% confidence" in text


def test_what_is_needed_to_get_it_again_is_there(page):
    text = page[0].text
    assert "autocompress tune --scheme StructPrune --max-drop 1%" in text
    assert "torch 2.15.0" in text
    assert f"SHA-256 {'cd' * 32}" in text
    assert "fingerprint 0123456789abcdef" in text
    assert "seed 0" in text


def test_each_figure_is_a_file_as_svg_and_png(full, page):
    names = {"drop", "latency", "classes", "confusion", "layers", "recovery"}
    files = sorted((full / "figures").iterdir())
    assert {file.name for file in files} == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for file in files:
        if file.suffix == ".svg":
            root = ET.parse(file).getroot()
            assert root.tag.endswith("svg")
        else:
            assert file.read_bytes().startswith(b"\x89PNG")


def test_the_markdown_says_the_same_and_names_its_figures(full, page):
    text = (full / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# chest \\<script\\>")
    assert "| 2 (the answer) | 0.0400 |" in text
    assert "failed: the model is off" in text
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (full / name).is_file()
    assert text.count("](figures/") == 6
    assert not re.search(r"(?<!\\)<script", text)


def test_a_report_made_again_is_the_same(full, page):
    before = {file: file.read_bytes() for file in full.rglob("*") if file.is_file()}
    write_report(full)
    assert {file: file.read_bytes() for file in full.rglob("*") if file.is_file()} == before


# Studies that did not go well


def test_nothing_met_the_bound(recorded, tmp_path):
    trials = recorded.three_trials()
    parsed, _ = read(recorded.write_study(tmp_path, trials=trials, result=recorded.found(trials, answer=None)))
    assert "Not met: the bound does not hold" in parsed.text
    assert "Not met: of 2 trials none loses 1 pp." in parsed.text
    assert "Dense against compressed" not in parsed.text
    assert len(parsed.all("svg")) == 1  # the trials have a curve all the same


def test_the_test_data_contradicted_it(recorded, tmp_path):
    trials = recorded.three_trials()
    result = recorded.found(trials, verdict="not met")
    result["certificate"] |= {"outcome": "not met", "lower": 0.0213}
    parsed, _ = read(recorded.write_study(tmp_path, trials=trials, result=result))
    assert "the true loss is at least 2.13 pp; only 1 pp was allowed" in parsed.text


def test_an_interrupted_study(recorded, tmp_path):
    trials = recorded.three_trials()
    result = recorded.found(trials, stopped="interrupted")
    parsed, _ = read(recorded.write_study(tmp_path, trials=trials, result=result))
    assert "not proven on test data (the search was interrupted)" in parsed.text


def test_a_killed_study_has_a_report_of_its_trials(recorded, tmp_path):
    parsed, _ = read(recorded.write_study(tmp_path))
    assert "The study did not come to its end" in parsed.text
    assert "3 trials are finished" in parsed.text
    assert "autocompress tune --resume demo goes on" in parsed.text
    assert len(parsed.all("svg")) == 1


def test_a_study_without_a_trial(recorded, tmp_path):
    result = recorded.found([], answer=None, posterior=None, threshold=None)
    parsed, _ = read(recorded.write_study(tmp_path, trials=[], result=result))
    assert "None has finished." in parsed.text
    assert parsed.all("svg") == []


def test_a_study_of_an_earlier_version_has_what_can_be_shown(recorded, tmp_path):
    trials = recorded.three_trials()
    result, settings = recorded.found(trials), recorded.asked()
    for key in ("posterior", "certificate", "answer", "layers", "failed", "classes", "confusion"):
        del result[key]
    del settings["provenance"]
    parsed, _ = read(recorded.write_study(tmp_path, settings=settings, trials=trials, result=result))
    assert "Dense against compressed" in parsed.text
    assert "started from Python" in parsed.text


def test_damaged_files_are_named_and_left_out(recorded, tmp_path):
    folder = recorded.write_study(tmp_path)
    (folder / "trials" / "0002" / "trial.json").write_text('{"number": 2')
    (folder / "trials" / "0003" / "trial.json").write_text('["a list"]')
    parsed, _ = read(folder)
    assert "2 trials" not in parsed.text
    assert "1 trial is finished" in parsed.text
    assert parsed.text.count("is damaged") == 2


@pytest.mark.parametrize("n", [1, 2, 60])
def test_any_number_of_classes_and_layers(recorded, tmp_path, n):
    trials = recorded.three_trials()
    layers = [recorded.layer(f"layers.{i}", 64, 64 if i % 2 else 8) for i in range(n)]
    result = recorded.found(trials, layers=layers, **recorded.by_class([f"class {i}" for i in range(n)]))
    parsed, _ = read(recorded.write_study(tmp_path, trials=trials, result=result))
    assert f"layers.{n - 1}" in parsed.text and f"class {n - 1}" in parsed.text


@pytest.mark.parametrize("n", [1, 2, 15])
def test_several_labels_per_sample_have_a_figure_of_what_is_found_and_missed(recorded, tmp_path, n):
    trials = recorded.three_trials()
    shown = recorded.by_class([f"label {i}" for i in range(n)])
    shown["confusion"] = {"dense": [[[50, 5], [4, 41]]] * n, "compressed": [[[48, 7], [5, 40]]] * n}
    folder = recorded.write_study(tmp_path, trials=trials, result=recorded.found(trials, **shown))
    parsed, _ = read(folder)
    assert f"the dense model makes {9 * n} mistakes, the compressed one {12 * n}" in parsed.text
    text = (folder / "figures" / "confusion.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("found", "missed", "label 0"))


def test_a_relative_bound_is_counted_in_percent(recorded, tmp_path):
    trials = recorded.three_trials()
    settings = recorded.asked(drop="relative")
    parsed, _ = read(
        recorded.write_study(tmp_path, settings=settings, trials=trials, result=recorded.found(trials))
    )
    assert "loses at most 1% of accuracy (relative to the dense model's)" in parsed.text
    assert "+1.56 ± 0.40%" in parsed.text


def test_a_number_keeps_its_unit_on_its_line():
    assert _together("0.57 ms ± 6% (p95 10 ms)").split(" ") == ["0.57\xa0ms", "±\xa06%", "(p95\xa010\xa0ms)"]


def test_five_hundred_trials_are_reported_in_seconds(recorded, tmp_path):
    trials = recorded.many_trials(500)
    folder = recorded.write_study(tmp_path, trials=trials, result=recorded.found(trials, answer=400))
    began = time.process_time()
    _, html = read(folder)
    assert time.process_time() - began <= 5
    assert len(re.findall(r"<tr", html)) > 500
