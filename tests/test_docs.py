"""What the documents tell the reader to type works, in the order in which they are read."""

import doctest
import importlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autocompress.cli import cli

ROOT = Path(__file__).parents[1]
PACKAGES = ("autocompress", "schemes", "objectives")
WITH_EXAMPLES = [
    ".".join(["autocompress", *file.relative_to(ROOT).with_suffix("").parts[package == "autocompress" :]])
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
]
# One reader, one folder: the later pages go on with the study of the first.
GUIDES = ("getting-started.md", "your-own-objective.md", "reading-the-verdict.md", "deploying.md")
ELSEWHERE = (
    "architectures.md",
    "medical.md",
    "recovery.md",
    "scaling-out.md",
    "searching.md",
    "studies.md",
    "your-own-model.md",
)  # documents with tests of their own


def fences(document: Path, language: str) -> list[str]:
    """The contents of a document's code blocks in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(document: Path) -> Iterator[str]:
    """The lines after a prompt, with what a backslash goes on with."""
    for block in fences(document, "console"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if line.startswith("$ "):
                yield line.removeprefix("$ ")


TYPED = [line for guide in GUIDES for line in commands(ROOT / "docs" / guide)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A reader's folder with the files that the guides say to write."""
    folder = tmp_path_factory.mktemp("reader") / "here"
    folder.mkdir()
    for guide in GUIDES:
        for block in fences(ROOT / "docs" / guide, "python"):
            if named := re.match(r"# (\w+\.py)\n", block):
                (folder / named[1]).write_text(block)
    return folder


@pytest.fixture(scope="module")
def typed(warm, reader: Path) -> dict[str, tuple[int, str]]:
    """How each command ended and what it said, all of them typed in order."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = [(line, warm.run(shlex.split(line), reader, env)) for line in TYPED]
    return {line: (done.status, done.stdout + done.stderr) for line, done in ended}


@pytest.mark.slow
@pytest.mark.parametrize("line", dict.fromkeys(TYPED))
def test_a_command_works(typed, line):
    status, said = typed[line]
    assert status == 0, said
    assert "Traceback" not in said and "Warning" not in said


@pytest.mark.slow
def test_the_first_study_leaves_what_the_later_pages_need(typed, reader):
    first = reader / "autocompress-runs" / "first"
    assert (first / "best" / "model.onnx").is_file()
    assert (first / "report.html").is_file()
    assert {path.name for path in reader.iterdir()} == {"autocompress-runs", "tune.toml", "footprint.py"}


@pytest.mark.slow
def test_the_python_of_a_guide_runs_where_its_study_lies(typed, reader, monkeypatch):
    monkeypatch.chdir(reader)
    blocks = fences(ROOT / "docs" / "deploying.md", "python")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "deploying.md", "exec"), {})


# What makes a study of the reader's own data short enough for a test; the option that comes last wins.
BRIEFLY = "--image-size 32 --train-epochs 1 --epochs 1 --trials 1"
OWN = [line for page in ("your-own-model.md", "medical.md") for line in commands(ROOT / "docs" / page)]


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> Path:
    """A folder with data under the names that the pages use: noise that is brighter in one class."""
    folder = tmp_path_factory.mktemp("own")
    random, (n, parts) = np.random.default_rng(0), (24, ("train", "val", "test"))
    y = np.arange(n) % 2
    shade = 60 + 120 * y[:, None, None]
    pixels = {part: (shade + random.integers(0, 60, (n, 28, 28))).astype(np.uint8) for part in parts}
    arrays = {f"{part}_images": images for part, images in pixels.items()}
    np.savez(folder / "pneumoniamnist.npz", **arrays, **{f"{part}_labels": y[:, None] for part in parts})
    for part, images in pixels.items():
        for k, image in enumerate(images):
            place = folder / "scans" / ("ill" if y[k] else "well")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").save(place / f"{part}{k}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", OWN)
def test_a_command_on_data_of_ones_own_works(warm, patient, line):
    done = warm.run([*shlex.split(line), *BRIEFLY.split()], patient)
    assert done.status in (0, 3), done.stderr  # whether so short a study meets its bound is another matter
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.slow
def test_the_python_of_ones_own_model_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for block in fences(ROOT / "docs" / "your-own-model.md", "python"):
        exec(compile(block, "your-own-model.md", "exec"), known)


def test_every_document_is_read_here_or_elsewhere():
    assert {file.name for file in (ROOT / "docs").glob("*.md")} <= {*GUIDES, *ELSEWHERE}


def test_the_readme_has_nothing_else_to_type():
    """Its two lines are run as they stand, by the tests of the command line and by .ci/run."""
    for line in commands(ROOT / "README.md"):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install "), line


@pytest.mark.parametrize("document", [*(f"docs/{page}" for page in (*GUIDES, *ELSEWHERE)), "README.md"])
def test_links_and_options_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
    flags = {
        name: {"--help", "-h"}
        | {flag for option in command.params for flag in option.opts + option.secondary_opts}
        for name, command in cli.commands.items()
    }
    everywhere = set().union(*flags.values())
    for flag in re.findall(r"(?<=`)--[a-z][\w-]+", text):
        assert flag in everywhere, flag
    for command, words in re.findall(r"(?:`|^\$ )autocompress (\w+)([^`\n]*)", text, re.MULTILINE):
        for flag in re.findall(r"(?<= )--[\w-]+", words):
            assert flag in flags[command], f"autocompress {command} {flag}"


@pytest.mark.parametrize("module", [name.removesuffix(".__init__") for name in WITH_EXAMPLES])
def test_the_examples_in_docstrings_give_what_they_say(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    import ipykernel
    import nbformat
    from nbclient import NotebookClient

    assert ipykernel.version_info  # what runs the cells
    shutil.copy(ROOT / "examples" / "tour.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "tour.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [output for output in printed if output.output_type == "error"]
    assert any("image/svg+xml" in output.get("data", {}) for output in printed)
    assert {path.name for path in tmp_path.iterdir()} == {"tour.ipynb", "autocompress-runs"}
