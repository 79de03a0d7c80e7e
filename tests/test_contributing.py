"""The worked examples of CONTRIBUTING.md do what it says: they are taken from the page and run."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from itertools import islice
from pathlib import Path

import pytest
import torch

import autocompress as ac
from autocompress.gauges.latency import Latency
from autocompress.goal import OBJECTIVES
from autocompress.measurement import Measurement
from autocompress.scheme import SCHEMES, Evidence, observe
from autocompress.task import Task

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMAND = str(Path(sysconfig.get_path("scripts")) / "autocompress")


def block(language: str, containing: str) -> str:
    """The one code block of a language that contains a text."""
    (found,) = (code for kind, code in BLOCKS if kind == language and containing in code)
    return found


def command(beginning: str) -> list[str]:
    """The arguments of the one command that the page tells the reader to type."""
    lines = [line.removeprefix("$ ") for kind, code in BLOCKS if kind == "console" for line in code.splitlines()]
    (found,) = (line for line in lines if line.startswith(beginning))
    return [COMMAND, *shlex.split(found)[1:]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, where the reader would be; what they register is forgotten afterwards."""
    for kind, code in BLOCKS:
        if name := re.match(r"# (\w+\.py)\n", code):
            assert kind == "python"
            (tmp_path / name[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (SCHEMES, OBJECTIVES):
        list(registry)  # the plugins first
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        monkeypatch.setattr(registry, "_modules", dict(registry._modules))
    for module in ("random_prune", "snip_prune", "serving_cost"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def run(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


def test_both_schemes_pass_the_conformance_suite_as_the_page_inherits_it(folder: Path) -> None:
    """One that looks at data in the checks that data could upset; with warnings as errors, in one process."""
    suite = (folder / "test_random_prune.py").read_text()
    snip = suite.replace("random_prune", "snip_prune").replace("Random", "Snip")
    (folder / "test_snip_prune.py").write_text(snip)
    wanted = "test_random_prune or residual and (untouched or deterministic or idempotent)"
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-k", wanted]
    done = run([sys.executable, "-m", "pytest", *options, "test_random_prune.py", "test_snip_prune.py"], folder)
    assert done.returncode == 0, done.stdout
    summary = re.search(r"^(\d+) passed, \d+ deselected in", done.stdout, flags=re.MULTILINE)
    assert summary and int(summary[1]) > 250


def test_data_decides_in_the_scheme_that_looks_at_it(folder: Path, tiny_task: Task) -> None:
    SnipPrune = importlib.import_module("snip_prune").SnipPrune  # a class

    scheme, model = SnipPrune(), tiny_task.model
    evidence = Evidence(model, lambda: islice(tiny_task.train.batches(), 1), tiny_task.loss)
    facts = observe(scheme, evidence, scheme.analyze(model, tiny_task.example_input))
    (batch,) = evidence.batches()
    model.zero_grad()
    tiny_task.loss(model(batch[0]), batch[1]).backward()
    weight = model.get_parameter("8.weight")
    sensitivity = (weight.grad * weight).abs().flatten()[1:]  # the first entry is always kept
    assert torch.equal(facts.places["8.weight"].flatten()[1:].argsort(), sensitivity.argsort(descending=True))


def test_the_scheme_is_searched_with_as_the_page_does(folder: Path, tiny_task: Task) -> None:
    names: dict[str, object] = {"task": tiny_task}
    code = block("python", 'scheme = "RandomPrune(seed=3)+Quantize16"')
    exec(code, names)  # the page's own words
    result = names["result"]
    assert result.density < 1 and result.met  # type: ignore[attr-defined]
    kept = sum(int(p.count_nonzero()) for p in result.model.parameters())  # type: ignore[attr-defined]
    assert kept <= result.measurements["compressed"].params  # type: ignore[attr-defined]
    asked = [json.loads(file.read_text())["scheme"] for file in folder.glob("autocompress-runs/*/study.json")]
    assert asked == ["RandomPrune(seed=3)+Quantize16"]


def test_the_scheme_is_taken_from_its_file(folder: Path, tiny_task: Task) -> None:
    """As the settings remember it, checked in a fresh process, and loaded where it was imported."""
    asked = command('autocompress tune --scheme "random')[3]
    result = ac.tune(tiny_task, asked, max_drop=0.9, trials=1, epochs=1)
    assert json.loads((result.folder / "study.json").read_text())["scheme"] == asked
    (bundle,) = (one for one in result.exported.artifacts if one.format == "safetensors")
    assert bundle.not_fresh == "" and not result.exported.refused
    best = result.folder / "best"
    assert "is in a file of yours" in (best / "README.md").read_text()
    code = "import sys, torch, autocompress as ac; model = torch.load('dense.pt', weights_only=False)\n"
    code += f"try: ac.load({str(best)!r}, model)\nexcept ValueError as error: print(error)\n"
    code += f"import random_prune; print(type(ac.load({str(best)!r}, model)).__name__)"
    torch.save(tiny_task.model, folder / "dense.pt")
    done = run([sys.executable, "-c", code], folder)
    said, loaded = done.stdout.splitlines()
    assert "random_prune.py:RandomPrune is in a file, which is not run for this; import it first" in said
    assert loaded == type(ac.load(best, tiny_task.model)).__name__


def test_the_scheme_comes_through_the_entry_point(folder: Path) -> None:
    entries = tomllib.loads(block("toml", "entry-points"))["project"]["entry-points"]
    info = folder / "random_prune-1.0.dist-info"  # as pip leaves it
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: random-prune\nVersion: 1.0\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, ours in entries.items() for name, value in ours.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    done = run(command("autocompress schemes"), folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^RandomPrune +Sets weights to zero that are drawn at random", done.stdout, re.MULTILINE)
    assert "seed=0" in done.stdout
    assert re.search(r"^StructPrune ", done.stdout, re.MULTILINE)


def test_the_objective_computes_what_it_says(folder: Path) -> None:
    names: dict[str, object] = {}
    exec(block("python", "@ac.objective(direction="), names)
    measured = Measurement(1.0, 1, 4, 1, "cpu", latency=(Latency(1, 1.0, 1.0, 20), Latency(32, 3.2, 4.0, 20)))
    assert names["serving_cost"](measured) == pytest.approx(100 / 3600 * 0.35)  # type: ignore[operator]  # 10,000 a second


def test_the_objective_is_optimized_as_the_page_does(
    folder: Path, tiny_task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(block("python", "objective=serving_cost"), {"task": tiny_task})
    dense, compressed = map(float, capsys.readouterr().out.split())
    assert dense > 0 and compressed > 0
    (study,) = folder.glob("autocompress-runs/*/study.json")
    assert json.loads(study.read_text())["objective"] == "serving_cost"


@pytest.mark.slow
def test_the_objective_is_taken_from_its_file_on_the_command_line(folder: Path) -> None:
    argv = command("autocompress tune --objective")
    done = run([*argv, "--trials", "1", "--epochs", "1", "--max-drop", "90%", "--json", "--quiet"], folder)
    assert done.returncode == 0, done.stderr
    (trial,) = json.loads(done.stdout)["trials"]
    assert 0 < trial["value"] < 1
